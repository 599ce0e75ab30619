//! `twoshot bench`: verifies, then measures stock and routed AllReduce in the same run, one process per GPU.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::element::{Dtype, Op};
use crate::measure::{Machine, Seen, random_seed};
use crate::progress::Progress;
use crate::protocol::Plan;
use crate::report::{Record, Row, format_row, head};
use crate::{plot, sizes};

/// Verify, then measure stock and routed AllReduce, one process per GPU
#[derive(Args, Debug)]
pub struct Bench {
    #[command(flatten)]
    machine: Machine,
    /// Element types: bf16 f16 f32 f64 e4m3 e5m2 i8 u8 i32 u32 i64 u64, or all
    #[arg(long, value_parser = named::<Dtype>, value_delimiter = ',', default_value = "bf16")]
    dtype: Vec<Named<Dtype>>,
    /// Reductions: sum prod max min avg, or all
    #[arg(long, value_parser = named::<Op>, value_delimiter = ',', default_value = "sum")]
    op: Vec<Named<Op>>,
    /// Smallest size
    #[arg(long, value_parser = sizes::parse, default_value = "8")]
    min: u64,
    /// Largest size; sizes double from --min
    #[arg(long, value_parser = sizes::parse, default_value = "64M")]
    max: u64,
    /// These sizes instead, such as 1K,64K,1M
    #[arg(long, value_parser = sizes::parse, value_delimiter = ',', value_name = "LIST")]
    sizes: Vec<u64>,
    /// Timed repetitions; 0 only verifies [default: 9; 0 on simulated GPUs, where the times are thrown away]
    #[arg(long)]
    repetitions: Option<u32>,
    /// Calls of one repetition [default: 100 for small sizes down to 5 for large ones]
    #[arg(long)]
    calls: Option<u32>,
    /// Verified eager calls at each size and path; half as many are captured and replayed three times
    #[arg(long, default_value_t = 4)]
    checks: u32,
    /// Time buffers that begin one, two, ... elements (another number on each rank) behind a multiple of 16 bytes
    #[arg(long)]
    unaligned: bool,
    /// Seed of the payloads [default: a new one]
    #[arg(long)]
    seed: Option<u64>,
    /// Write the record here, see benchmarks/README.md
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw latency and bus bandwidth here, .svg or .png (see also `twoshot plot`)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Exit with 1 when no call was routed
    #[arg(long)]
    require_routed: bool,
}

/// What one word of a list stands for.
#[derive(Clone, Debug)]
struct Named<T>(Vec<T>);

fn named<T: ValueEnum>(word: &str) -> Result<Named<T>, String> {
    if word.eq_ignore_ascii_case("all") {
        return Ok(Named(T::value_variants().to_vec()));
    }
    T::from_str(word, true).map(|one| Named(vec![one])).map_err(|_| format!("`{word}` is none of them"))
}

fn flat<T: Clone>(words: &[Named<T>]) -> Vec<T> {
    words.iter().flat_map(|word| word.0.clone()).collect()
}

/// Runs it; the exit code is 0, 1 for wrong answers, 2 when it could not run.
pub fn main(bench: &Bench) -> i32 {
    match run(bench) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("twoshot bench: {message}");
            2
        }
    }
}

impl Bench {
    fn plan(&self) -> Result<Plan, String> {
        let sizes = if self.sizes.is_empty() { sizes::doubling(self.min, self.max) } else { self.sizes.clone() };
        if sizes.is_empty() || sizes.contains(&0) {
            return Err("no size to run: --min is above --max, or a size is 0".to_owned());
        }
        let repetitions = self.repetitions.unwrap_or(if self.machine.simulated { 0 } else { 9 });
        // Ranks that share a GPU take turns of milliseconds: few calls say all there is to say.
        let calls = self.calls.or(self.machine.shared_gpu.map(|_| 3));
        let seed = match self.seed {
            Some(seed) => seed,
            None => random_seed()?,
        };
        let (dtypes, ops) = (flat(&self.dtype), flat(&self.op));
        Ok(Plan { sizes, dtypes, ops, repetitions, calls, checks: self.checks.max(1), seed, unaligned: self.unaligned })
    }
}

fn run(bench: &Bench) -> Result<i32, String> {
    let plan = bench.plan()?;
    if let Some(path) = &bench.plot {
        plot::check(path)?;
    }
    let prepared = bench.machine.prepare()?;
    let timed = plan.repetitions > 0 && !prepared.simulated;
    let progress = Progress::new(plan.sizes.len() * plan.dtypes.len() * plan.ops.len(), "starting the ranks");
    let mut seen = |seen: Seen<'_>| match seen {
        Seen::Ready(record) => progress.aside(|| {
            say(&heading(record));
            say(&head(timed));
        }),
        Seen::Row(row) => {
            progress.aside(|| {
                say(&format_row(row, timed));
                if let Some(note) = &row.wrong_note {
                    say(&format!("         WRONG: {note}"));
                }
            });
            progress.step(&format!("{} of {} done", sizes::format(row.bytes), row.dtype.name()));
        }
    };
    let (record, outcome) = prepared.run(&plan, timed, &Vec::new(), &mut seen);
    progress.end();
    // What was found before a failure is worth keeping.
    if let Some(path) = &bench.json
        && (outcome.is_ok() || !record.rows.is_empty())
    {
        write(path, &record)?;
    }
    outcome?;
    if let Some(path) = &bench.plot {
        match plot::draw(std::slice::from_ref(&record), plot::Way::Graph, path) {
            Ok(()) => say(&format!("drawn to {}", path.display())),
            // The measurement is not lost with its picture.
            Err(message) => say(&format!("no picture: {message}")),
        }
    }
    Ok(verdict(bench, &record))
}

fn heading(record: &Record) -> String {
    let remark = match record.mode.as_str() {
        "simulated" => "\nSIMULATED: the GPUs are software. Answers are verified, no speed is measured.",
        "shared-gpu" => "\nNOT A MEASUREMENT: the ranks share one GPU and take turns. Only the answers count.",
        "emulated-hosts" => "\nEmulated hosts: stock NCCL goes over loopback sockets. Compare with nothing but itself.",
        _ => "\nMicroseconds per call: median over repetitions, slowest rank. host us: stock/routed.",
    };
    let buffers = if record.unaligned { "\nTimed on unaligned buffers." } else { "" };
    format!("{}{remark}{buffers}", record.heading())
}

/// Standard output, line by line; a reader that went away ends nothing.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn verdict(bench: &Bench, record: &Record) -> i32 {
    let wrong: u64 = record.rows.iter().map(Row::wrong).sum();
    let compared: u64 = record.rows.iter().map(|row| row.compared_elements).sum();
    let routed = record.rows.iter().filter(|row| row.route == "routed").count();
    let mixed = record.rows.iter().any(|row| row.route == "mixed");
    say(&format!("{wrong} wrong of {compared} elements compared; {routed} of {} sizes routed", record.rows.len()));
    if mixed {
        say("note: within one size some calls were routed and some were not");
    }
    if routed == 0 {
        say("note: nothing was routed; `twoshot doctor` and NCCL_DEBUG=INFO say why");
    }
    i32::from(wrong > 0 || bench.require_routed && routed == 0)
}

/// Writes a record as `benchmarks/README.md` describes it.
pub fn write(path: &Path, record: &Record) -> Result<(), String> {
    let mut text = serde_json::to_string_pretty(record).map_err(|error| error.to_string())?;
    text.push('\n');
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bench: Bench,
    }

    fn parsed(arguments: &str) -> Bench {
        Line::try_parse_from(std::iter::once("bench").chain(arguments.split_whitespace())).unwrap().bench
    }

    #[test]
    fn a_list_of_sizes_replaces_the_doubling() {
        assert_eq!(parsed("--sizes 1K,64K,1M").plan().unwrap().sizes, [1 << 10, 64 << 10, 1 << 20]);
        assert_eq!(parsed("--max 32").plan().unwrap().sizes, [8, 16, 32]);
        assert!(parsed("--min 64 --max 32").plan().is_err());
        assert!(parsed("--sizes 0").plan().is_err());
    }

    #[test]
    fn only_who_asks_for_unaligned_buffers_times_them() {
        assert!(!parsed("").plan().unwrap().unaligned && parsed("--unaligned").plan().unwrap().unaligned);
    }

    #[test]
    fn all_means_every_type_and_every_operation() {
        let plan = parsed("--dtype all --op all").plan().unwrap();
        assert_eq!(plan.reductions().len(), 60);
        let plan = parsed("--dtype f32,e4m3 --op max").plan().unwrap();
        assert_eq!((plan.dtypes, plan.ops), (vec![Dtype::F32, Dtype::E4m3], vec![Op::Max]));
        assert_eq!(parsed("").plan().unwrap().reductions().len(), 1);
        assert!(named::<Dtype>("f31").is_err());
    }

    #[test]
    fn a_simulated_run_times_nothing_unless_asked_to_go_through_the_motions() {
        assert_eq!(parsed("--simulated").plan().unwrap().repetitions, 0);
        assert_eq!(parsed("").plan().unwrap().repetitions, 9);
    }
}
