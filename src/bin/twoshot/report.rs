//! What a benchmark found: rows merged over ranks, the table for people, the record for programs.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::element::{Dtype, Op};
use crate::protocol::{Agreed, RankFacts, RankRow, Samples};
use crate::sizes;

/// Version of the record's format; `benchmarks/README.md` describes it.
pub const FORMAT: u32 = 1;

/// A figure in microseconds: of each repetition the slowest rank, of those the median and the extremes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Figure {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Figure {
    fn absent(&self) -> bool {
        *self == Self::default()
    }

    /// From one list of repetitions per rank.
    pub fn of(ranks: &[&[f64]]) -> Option<Self> {
        let repetitions = ranks.iter().map(|samples| samples.len()).min()?;
        let slowest = |i: usize| ranks.iter().map(|samples| samples[i]).fold(0.0, f64::max);
        let mut sorted: Vec<f64> = (0..repetitions).map(slowest).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Self { median: rounded((low + high) / 2.0), min: rounded(min), max: rounded(max) })
    }
}

/// Nanoseconds are more than any of the clocks knows.
fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Times of one path; zero where nobody measured it, as for a library that has graphs only.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Times {
    #[serde(skip_serializing_if = "Figure::absent")]
    pub eager: Figure,
    #[serde(skip_serializing_if = "Figure::absent")]
    pub graph: Figure,
    #[serde(skip_serializing_if = "Figure::absent")]
    pub host: Figure,
}

/// What records from before the field measured.
fn sum() -> Op {
    Op::Sum
}

/// One size and type over all ranks.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    pub dtype: Dtype,
    #[serde(default = "sum")]
    pub op: Op,
    pub bytes: u64,
    pub count: u64,
    /// `routed`, `stock`, or `mixed`.
    pub route: String,
    /// Calls through libtwoshot.so that every rank verified.
    pub verified_calls: u64,
    pub compared_elements: u64,
    /// Of stock NCCL, of the calls through libtwoshot.so, and the first of them in words.
    pub wrong_stock: u64,
    pub wrong_routed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong_note: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stock_us: Option<Times>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routed_us: Option<Times>,
    /// Times of other libraries in the same run, by name: whoever measures them adds them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub others_us: BTreeMap<String, Times>,
    /// Stock time by routed time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio_eager: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio_graph: Option<f64>,
}

impl Row {
    /// Merges the rows that all ranks sent for one size; without `timed` whatever they timed is thrown away.
    pub fn merge(ranks: &[RankRow], timed: bool) -> Option<Self> {
        let first = ranks.first()?;
        let total = |value: fn(&RankRow) -> u64| ranks.iter().map(value).sum::<u64>();
        let (routed, stock) = (total(|r| r.routed_calls), total(|r| r.stock_calls));
        let times = |samples: fn(&RankRow) -> &Samples| {
            let figure = |pick: fn(&Samples) -> &Vec<f64>| {
                let lists: Vec<&[f64]> = ranks.iter().map(|r| pick(samples(r)).as_slice()).collect();
                Figure::of(&lists)
            };
            Some(Times { eager: figure(|s| &s.eager)?, graph: figure(|s| &s.graph)?, host: figure(|s| &s.host)? })
        };
        let [stock_us, routed_us] = [times(|r| &r.stock), times(|r| &r.routed)].map(|times| times.filter(|_| timed));
        let ratio = |pick: fn(&Times) -> Figure| {
            let (stock, routed) = (pick(stock_us.as_ref()?).median, pick(routed_us.as_ref()?).median);
            (routed > 0.0).then(|| rounded(stock / routed))
        };
        Some(Self {
            dtype: first.dtype,
            op: first.op,
            bytes: first.bytes,
            count: first.count,
            route: match (routed, stock) {
                (_, 0) if routed > 0 => "routed",
                (0, _) => "stock",
                _ => "mixed",
            }
            .to_owned(),
            verified_calls: first.routed_calls + first.stock_calls,
            compared_elements: total(|r| r.compared),
            wrong_stock: total(|r| r.wrong_stock),
            wrong_routed: total(|r| r.wrong_routed),
            wrong_note: ranks.iter().enumerate().find_map(|(i, r)| Some(format!("rank {i}: {}", r.note.as_ref()?))),
            ratio_eager: ratio(|t| t.eager),
            ratio_graph: ratio(|t| t.graph),
            stock_us,
            routed_us,
            others_us: BTreeMap::new(),
        })
    }

    /// Wrong elements of both paths.
    pub fn wrong(&self) -> u64 {
        self.wrong_stock + self.wrong_routed
    }
}

/// A whole run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Record {
    pub format: u32,
    pub date: String,
    /// `measured`, or what else the figures are.
    pub mode: String,
    pub gpu: String,
    pub arch: u32,
    pub ranks: u32,
    pub hosts: u32,
    pub driver: String,
    pub cuda: i32,
    pub nccl: i32,
    /// Shown, not stored: a record must not depend on where things lie.
    #[serde(skip)]
    pub nccl_path: String,
    pub twoshot: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// What of the environment decides something.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// What the ranks of the routed communicator agreed on, where it was on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreed: Option<Agreed>,
    pub repetitions: u32,
    /// Whether the timed buffers began beside multiples of 16 bytes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unaligned: bool,
    pub rows: Vec<Row>,
}

impl Record {
    /// Reads a record that `twoshot bench --json` wrote.
    pub fn read(path: &Path) -> Result<Self, String> {
        let wrong = |why: String| format!("{}: {why}", path.display());
        let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let record: Self = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if record.format == FORMAT { Ok(record) } else { Err(wrong(format!("format {} is not known", record.format))) }
    }

    /// Takes over what the ranks know of their places.
    pub fn describe(&mut self, facts: &[RankFacts]) {
        let Some(first) = facts.first() else { return };
        let mut hosts: Vec<_> = facts.iter().map(|f| &f.host).collect();
        hosts.sort_unstable();
        hosts.dedup();
        self.hosts = hosts.len() as u32;
        self.gpu.clone_from(&first.gpu);
        self.driver.clone_from(&first.driver);
        self.twoshot.clone_from(&first.twoshot);
        (self.arch, self.cuda, self.nccl) = (first.arch, first.cuda, first.nccl);
        self.agreed = first.agreed;
    }

    /// The lines above the table.
    pub fn heading(&self) -> String {
        let driver = if self.driver.is_empty() { String::new() } else { format!(", driver {}", self.driver) };
        let (cuda, nccl) = (cuda_version(self.cuda), nccl_version(self.nccl));
        format!(
            "{} x {} (sm_{}), {} host(s){driver}, CUDA {cuda}, NCCL {nccl}, twoshot {}\nNCCL from {}",
            self.ranks, self.gpu, self.arch, self.hosts, self.twoshot, self.nccl_path
        )
    }
}

/// 13000 is 13.0.
pub fn cuda_version(code: i32) -> String {
    format!("{}.{}", code / 1000, code % 1000 / 10)
}

/// 22809 is 2.28.9; before 2.9 the code had one digit less.
pub fn nccl_version(code: i32) -> String {
    if code < 10_000 {
        return format!("{}.{}.{}", code / 1000, code % 1000 / 100, code % 100);
    }
    format!("{}.{}.{}", code / 10_000, code % 10_000 / 100, code % 100)
}

/// A GPU's UUID in the form that nvidia-smi prints.
pub fn uuid(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Now, as ISO 8601 in UTC.
pub fn now() -> String {
    iso(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

fn iso(seconds: u64) -> String {
    // Days are counted from 1 March of year 0, so that the leap day is the last of its year.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let time = seconds % 86_400;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time % 3600 / 60, time % 60)
}

/// The table's head, for timed and for verified-only runs.
pub fn head(timed: bool) -> String {
    let (titles, widths): (&[&str], _) = columns(timed);
    line(titles.iter().map(ToString::to_string), widths)
}

fn columns(timed: bool) -> (&'static [&'static str], &'static [usize]) {
    const TIMED: &[&str] = &[
        "bytes",
        "type",
        "op",
        "stock eager",
        "routed eager",
        "ratio",
        "stock graph",
        "routed graph",
        "ratio",
        "host us",
        "route",
        "wrong",
    ];
    const TIMED_WIDTHS: &[usize] = &[8, 5, 4, 12, 12, 6, 12, 12, 6, 11, 7, 6];
    const VERIFIED: &[&str] = &["bytes", "type", "op", "calls", "elements", "route", "wrong"];
    const VERIFIED_WIDTHS: &[usize] = &[8, 5, 4, 7, 12, 7, 6];
    if timed { (TIMED, TIMED_WIDTHS) } else { (VERIFIED, VERIFIED_WIDTHS) }
}

/// One line of the table.
pub fn format_row(row: &Row, timed: bool) -> String {
    let mut cells = vec![sizes::format(row.bytes), row.dtype.name().to_owned(), row.op.name().to_owned()];
    let ratio = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
    match (&row.stock_us, &row.routed_us) {
        (Some(stock), Some(routed)) if timed => cells.extend([
            micros(stock.eager.median),
            micros(routed.eager.median),
            ratio(row.ratio_eager),
            micros(stock.graph.median),
            micros(routed.graph.median),
            ratio(row.ratio_graph),
            format!("{:.1}/{:.1}", stock.host.median, routed.host.median),
        ]),
        _ if timed => cells.extend((0..7).map(|_| "-".to_owned())),
        _ => cells.extend([row.verified_calls.to_string(), row.compared_elements.to_string()]),
    }
    cells.extend([row.route.clone(), row.wrong().to_string()]);
    line(cells.into_iter(), columns(timed).1)
}

/// Three digits that mean something.
fn micros(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

fn line(cells: impl Iterator<Item = String>, widths: &[usize]) -> String {
    cells.zip(widths).map(|(cell, width)| format!("{cell:>width$}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank_row(eager: &[f64], routed: u64, stock: u64) -> RankRow {
        let samples = |scale: f64| {
            let list: Vec<f64> = eager.iter().map(|value| value * scale).collect();
            Samples { eager: list.clone(), graph: list.clone(), host: list }
        };
        RankRow {
            dtype: Dtype::Bf16,
            op: Op::Sum,
            bytes: 65536,
            count: 32768,
            routed_calls: routed,
            stock_calls: stock,
            compared: 32768,
            wrong_routed: 0,
            wrong_stock: 0,
            note: None,
            stock: samples(3.0),
            routed: samples(1.0),
        }
    }

    #[test]
    fn a_figure_is_the_median_of_the_slowest_rank_of_each_repetition() {
        let figure = Figure::of(&[&[1.0, 9.0, 2.0], &[3.0, 1.0, 1.0]]).unwrap();
        assert_eq!(figure, Figure { median: 3.0, min: 2.0, max: 9.0 });
        assert_eq!(Figure::of(&[&[1.0, 2.0, 3.0, 4.0]]).unwrap().median, 2.5);
        assert_eq!(Figure::of(&[&[]]), None);
        assert_eq!(Figure::of(&[]), None);
    }

    #[test]
    fn ranks_merge_into_one_row_with_its_ratio_and_route() {
        let row = Row::merge(&[rank_row(&[2.0, 4.0], 5, 0), rank_row(&[3.0, 3.0], 5, 0)], true).unwrap();
        assert_eq!((row.route.as_str(), row.verified_calls, row.compared_elements), ("routed", 5, 65536));
        assert_eq!(row.ratio_eager, Some(3.0));
        assert_eq!(Row::merge(&[rank_row(&[1.0], 0, 5)], true).unwrap().route, "stock");
        assert_eq!(Row::merge(&[rank_row(&[1.0], 1, 5)], true).unwrap().route, "mixed");
    }

    #[test]
    fn table_lines_stand_under_their_titles() {
        for timed in [true, false] {
            let row = Row::merge(&[rank_row(&[2.0], 5, 0)], true).unwrap();
            let (head, line) = (head(timed), format_row(&row, timed));
            assert_eq!(head.len(), line.len(), "\n{head}\n{line}");
            assert!(line.starts_with("     64K  bf16"), "{line}");
            assert!(line.ends_with("routed      0"), "{line}");
        }
    }

    #[test]
    fn a_row_that_was_not_timed_prints_no_time_and_stores_none() {
        let none = Row::merge(&[rank_row(&[], 5, 0)], true).unwrap();
        let discarded = Row::merge(&[rank_row(&[2.0], 5, 0)], false).unwrap();
        for row in [none, discarded] {
            let stored = serde_json::to_string(&row).unwrap();
            assert!(!stored.contains("_us") && !stored.contains("ratio"), "{stored}");
        }
    }

    #[test]
    fn the_records_of_this_repository_can_be_read_and_come_back_as_they_were() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benchmarks");
        let mut read = 0;
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let record = Record::read(&path).unwrap();
            let mut stored: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            for row in stored["rows"].as_array_mut().unwrap() {
                row.as_object_mut().unwrap().entry("op").or_insert_with(|| "sum".into());
            }
            assert_eq!(serde_json::to_value(&record).unwrap(), stored, "{}", path.display());
            read += 1;
        }
        assert!(read > 0);
    }

    #[test]
    fn versions_and_dates_read_as_people_write_them() {
        assert_eq!((cuda_version(13000), cuda_version(12040)), ("13.0".to_owned(), "12.4".to_owned()));
        assert_eq!((nccl_version(22809), nccl_version(2708)), ("2.28.9".to_owned(), "2.7.8".to_owned()));
        assert_eq!(iso(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(iso(1_795_461_599), "2026-11-23T19:19:59Z");
    }

    #[test]
    fn a_uuid_has_the_form_of_nvidia_smi() {
        let bytes = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(uuid(&bytes), "GPU-12345678-9abc-def0-0102-030405060708");
    }
}
