//! `twoshot tune`: measures where one-shot, two-shot and stock NCCL cross on this machine, with all ranks, and writes
//! the tuning file. Algorithms and block budgets are forced by the variables that every user has.
#![forbid(unsafe_code)]

mod choose;

use std::path::{Path, PathBuf};

use clap::Args;
use twoshot::layout::Algorithm;
use twoshot::tuning::{FORMAT, Tuned, Tuning, band_name};

use crate::bench::{say, write};
use crate::element::{Dtype, Op};
use crate::measure::{Changes, Machine, Prepared, Seen, random_seed};
use crate::progress::Progress;
use crate::protocol::{Agreed, Plan};
use crate::report::Record;
use crate::sizes;
use choose::{Choice, Ratio, Sample, choose};

/// Memory of one-shot's stages that a rank is asked for at most: one-shot keeps a payload for every rank.
const MOST_STAGE: u64 = 64 << 20;

/// Measure where one-shot, two-shot and stock NCCL cross on this machine, and write the tuning file
#[derive(Args, Debug)]
pub struct Tune {
    #[command(flatten)]
    machine: Machine,
    /// The tuning file; rows of other worlds in it are kept
    #[arg(long, short, value_name = "FILE", default_value = "twoshot-tuning.json")]
    out: PathBuf,
    /// Show what was found and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Draw conclusions from the records that --keep left instead of measuring
    #[arg(long, value_name = "RECORD", num_args = 1..)]
    from: Vec<PathBuf>,
    /// Keep the records of all runs in this folder
    #[arg(long, value_name = "FOLDER")]
    keep: Option<PathBuf>,
    /// Block budgets to try; more than 32 can make two communicators of one GPU wait for each other for ever
    #[arg(long, value_delimiter = ',', default_value = "16,24,32", value_parser = clap::value_parser!(u32).range(1..=256))]
    blocks: Vec<u32>,
    /// Smallest size
    #[arg(long, value_parser = sizes::parse, default_value = "1K")]
    min: u64,
    /// Largest size, and the largest limit that can come out: the memory of a communicator grows with it
    #[arg(long, value_parser = sizes::parse, default_value = "16M")]
    max: u64,
    /// Element type
    #[arg(long, default_value = "bf16")]
    dtype: Dtype,
    /// Timed repetitions
    #[arg(long, default_value_t = 9)]
    repetitions: u32,
    /// Calls of one repetition [default: 100 for small sizes down to 5 for large ones]
    #[arg(long)]
    calls: Option<u32>,
    /// Leave a size to stock NCCL unless it is won by so many percent
    #[arg(long, default_value_t = 3.0)]
    margin: f64,
}

/// Runs it; the exit code is 0, 1 for wrong answers, 2 when it could not run or write.
pub fn main(tune: &Tune) -> i32 {
    match run(tune) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("twoshot tune: {message}");
            2
        }
    }
}

fn run(tune: &Tune) -> Result<i32, String> {
    // A file that cannot be extended is found before minutes are spent.
    let mut tuning = existing(&tune.out)?;
    let records = if tune.from.is_empty() {
        measure(tune)?
    } else {
        tune.from.iter().map(|path| Record::read(path)).collect::<Result<_, _>>()?
    };
    let wrong: u64 = records.iter().flat_map(|record| &record.rows).map(crate::report::Row::wrong).sum();
    if wrong > 0 {
        say(&format!("{wrong} wrong elements: nothing is written; please report this"));
        return Ok(1);
    }
    let meaningless = records.iter().find(|record| record.mode != "measured").map(|record| record.mode.clone());
    let samples = samples(&records)?;
    let Some(choice) = choose(&samples, tune.margin / 100.0) else {
        return Err("nothing was timed".to_owned());
    };
    let row = row(&records, &choice, meaningless.as_deref())?;
    shown(&samples, &choice, &row).iter().for_each(|line| say(line));
    if let Some(mode) = meaningless {
        say(&format!("These times mean nothing: the mode was \"{mode}\"."));
        if !tune.machine.simulated {
            return Err("a tuning file is not written from times that mean nothing".to_owned());
        }
    }
    if tune.dry_run {
        return Ok(0);
    }
    tuning.put(row);
    replace(&tune.out, &tuning)?;
    let shown = std::path::absolute(&tune.out).unwrap_or_else(|_| tune.out.clone());
    say(&format!("written; set on all ranks: TWOSHOT_TUNING_FILE={}", shown.display()));
    Ok(0)
}

fn existing(path: &Path) -> Result<Tuning, String> {
    match twoshot::tuning::read(path) {
        Ok(bytes) => Tuning::parse(&bytes).map_err(|why| format!("{} is no tuning file: {why}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(Tuning { format: FORMAT, rows: Vec::new(), collnet: Vec::new() })
        }
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// The file is whole at any time: programs may start meanwhile.
fn replace(path: &Path, tuning: &Tuning) -> Result<(), String> {
    let mut text = serde_json::to_string_pretty(tuning).map_err(|error| error.to_string())?;
    text.push('\n');
    Tuning::parse(text.as_bytes()).map_err(|why| format!("what was found makes no tuning file: {why}"))?;
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let written = std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&beside);
        format!("{}: {error}", path.display())
    })
}

/// Below this the ring is never the fastest way: docs/performance.md.
const LEAST_BULK: u64 = 1 << 20;

/// What a run forces: everything that decides between our algorithms and stock, whatever the caller has set.
fn forced(algorithm: Algorithm, blocks: u32, largest: u64) -> Changes {
    let set = |name, value: String| (name, Some(value));
    vec![
        set("TWOSHOT_ALGO", algorithm.name().to_owned()),
        set("TWOSHOT_MAX_BLOCKS", blocks.to_string()),
        set("TWOSHOT_MAX_BYTES", largest.to_string()),
        set("TWOSHOT_ONESHOT_MAX_BYTES", largest.to_string()),
        set("TWOSHOT_MIN_BYTES", "0".to_owned()),
        ("TWOSHOT_MEMORY", None),
        ("TWOSHOT_TUNING_FILE", None),
        ("TWOSHOT_ENABLE", None),
        ("TWOSHOT_MODE", None),
    ]
}

fn measure(tune: &Tune) -> Result<Vec<Record>, String> {
    let prepared = tune.machine.prepare()?;
    let sizes = sizes::doubling(tune.min, tune.max);
    let (Some(_), Some(_)) = (sizes.first(), tune.blocks.first()) else {
        return Err("no size to run: --min is above --max".to_owned());
    };
    if let Some(folder) = &tune.keep {
        std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let alone = |algorithm| match algorithm {
        Algorithm::TwoShot | Algorithm::Switch => sizes.clone(),
        Algorithm::Bulk => sizes.iter().copied().filter(|bytes| *bytes >= LEAST_BULK).collect(),
        Algorithm::OneShot => {
            let most = MOST_STAGE / prepared.ranks() as u64;
            sizes.iter().copied().filter(|bytes| *bytes <= most).collect()
        }
    };
    let runs: Vec<_> =
        tune.blocks.iter().flat_map(|blocks| Algorithm::TABLED.map(|algorithm| (algorithm, *blocks))).collect();
    let steps = runs.iter().map(|(algorithm, _)| alone(*algorithm).len()).sum();
    let progress = Progress::new(steps, "starting the ranks");
    let mut records = Vec::new();
    for (algorithm, blocks) in runs {
        let sizes = alone(algorithm);
        let Some(largest) = sizes.last().copied() else { continue };
        let record = one(tune, &prepared, (algorithm, blocks), sizes, &progress)?;
        if record.rows.iter().all(|row| row.route != "routed") {
            if algorithm == Algorithm::Bulk {
                // With multicast, many ranks or little memory there is no ring.
                continue;
            }
            return Err(format!("{} was routed nowhere: see `twoshot doctor` and NCCL_DEBUG=INFO", algorithm.name()));
        }
        if let Some(folder) = &tune.keep {
            write(&folder.join(format!("{}-{blocks}-{largest}.json", algorithm.name())), &record)?;
        }
        records.push(record);
    }
    progress.end();
    Ok(records)
}

fn one(
    tune: &Tune,
    prepared: &Prepared<'_>,
    (algorithm, blocks): (Algorithm, u32),
    sizes: Vec<u64>,
    progress: &Progress,
) -> Result<Record, String> {
    let largest = sizes.last().copied().unwrap_or(0);
    let calls = tune.calls.or(tune.machine.shared_gpu.map(|_| 3));
    // Every answer is verified, too: a limit must not be drawn from wrong results.
    let (dtypes, seed) = (vec![tune.dtype], random_seed()?);
    let plan = Plan {
        sizes,
        dtypes,
        ops: vec![Op::Sum],
        repetitions: tune.repetitions.max(1),
        calls,
        checks: 1,
        seed,
        unaligned: false,
    };
    let mut seen = |seen: Seen<'_>| {
        if let Seen::Row(row) = seen {
            progress.step(&format!("{}, {blocks} blocks, {}", algorithm.name(), sizes::format(row.bytes)));
        }
    };
    let (record, outcome) = prepared.run(&plan, true, &forced(algorithm, blocks, largest), &mut seen);
    outcome.map(|()| record)
}

/// What the records say of forced algorithms.
fn samples(records: &[Record]) -> Result<Vec<Sample>, String> {
    let mut samples = Vec::new();
    for record in records {
        let algorithm = record
            .environment
            .get("TWOSHOT_ALGO")
            .and_then(|name| Algorithm::TABLED.into_iter().find(|algorithm| algorithm.name() == name));
        let (Some(algorithm), Some(agreed)) = (algorithm, &record.agreed) else {
            return Err("a record is not one of `twoshot tune --keep`: no forced algorithm, or nothing routed".into());
        };
        for row in record.rows.iter().filter(|row| row.route == "routed") {
            let (Some(stock), Some(ours)) = (row.stock_us, row.routed_us) else { continue };
            let ratio =
                Ratio { eager: ours.eager.median / stock.eager.median, graph: ours.graph.median / stock.graph.median };
            if ratio.eager.is_finite() && ratio.graph.is_finite() && ratio.eager > 0.0 && ratio.graph > 0.0 {
                let us = (stock.graph.median, ours.graph.median);
                samples.push(Sample { algorithm, blocks: agreed.blocks, bytes: row.bytes, ratio, us });
            }
        }
    }
    Ok(samples)
}

fn row(records: &[Record], choice: &Choice, mode: Option<&str>) -> Result<Tuned, String> {
    let worlds: Vec<Agreed> = records.iter().filter_map(|record| record.agreed).collect();
    let Some(first) = worlds.first() else { return Err("nothing was routed".to_owned()) };
    let world = |agreed: &Agreed| (agreed.arch, agreed.ranks, agreed.hosts, agreed.multicast, agreed.nccl);
    if worlds.iter().any(|agreed| world(agreed) != world(first)) {
        return Err("the records are of different worlds (ranks, hosts, GPUs, multicast or NCCL)".to_owned());
    }
    let of = &records[0];
    let mode = mode.map(|mode| format!("{mode}: these times mean nothing; ")).unwrap_or_default();
    Ok(Tuned {
        arch: first.arch,
        ranks: first.ranks,
        hosts: first.hosts,
        multicast: first.multicast,
        nccl: band_name(first.nccl),
        oneshot_bytes: choice.oneshot_bytes,
        twoshot_bytes: choice.twoshot_bytes,
        bulk_bytes: choice.bulk_bytes,
        blocks: choice.blocks,
        note: Some(format!("{mode}{}, {} x {}, twoshot {}", of.date, of.ranks, of.gpu, of.twoshot)),
    })
}

/// The table, and the row in words.
fn shown(samples: &[Sample], choice: &Choice, row: &Tuned) -> Vec<String> {
    let way = if row.multicast { "multicast" } else { "unicast" };
    let mut lines = vec![
        format!("sm_{}, {} ranks, {} host(s), {way}, NCCL {}", row.arch, row.ranks, row.hosts, row.nccl),
        format!("Captured calls, us, at most {} blocks:", choice.blocks),
        format!("{:>8} {:>9} {:>9} {:>9} {:>9}  taken", "bytes", "stock", "one-shot", "two-shot", "bulk"),
    ];
    let mut sizes: Vec<u64> = samples.iter().map(|sample| sample.bytes).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for bytes in sizes {
        let of = |algorithm| {
            let same = |s: &&Sample| (s.algorithm, s.blocks, s.bytes) == (algorithm, choice.blocks, bytes);
            samples.iter().find(same)
        };
        let (one, two, bulk) = (of(Algorithm::OneShot), of(Algorithm::TwoShot), of(Algorithm::Bulk));
        let cell = |us: Option<f64>| us.map_or_else(|| "-".to_owned(), |us| format!("{us:.2}"));
        let taken = match bytes {
            _ if bytes <= choice.oneshot_bytes => "one-shot",
            _ if bytes <= choice.twoshot_bytes => "two-shot",
            _ if bytes <= choice.bulk_bytes => "bulk",
            _ => "stock",
        };
        let stock = cell(one.or(two).or(bulk).map(|sample| sample.us.0));
        let [one, two, bulk] = [one, two, bulk].map(|sample| cell(sample.map(|sample| sample.us.1)));
        lines.push(format!("{:>8} {stock:>9} {one:>9} {two:>9} {bulk:>9}  {taken}", sizes::format(bytes)));
    }
    let bulk =
        if choice.bulk_bytes > 0 { format!(", bulk to {}", sizes::format(choice.bulk_bytes)) } else { String::new() };
    lines.push(format!(
        "one-shot to {}, two-shot to {}{bulk}, at most {} blocks",
        sizes::format(choice.oneshot_bytes),
        sizes::format(choice.twoshot_bytes),
        choice.blocks
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_run_decides_everything_that_the_caller_could_have_set() {
        let changes = forced(Algorithm::TwoShot, 8, 1 << 20);
        for variable in twoshot::config::VARIABLES {
            let decides = variable.meaning.contains("Must be the same") && variable.name != "TWOSHOT_SHARED_GPU"
                || ["TWOSHOT_MAX_BLOCKS", "TWOSHOT_MEMORY", "TWOSHOT_TUNING_FILE", "TWOSHOT_ENABLE", "TWOSHOT_MODE"]
                    .contains(&variable.name);
            let changed = changes.iter().any(|(name, _)| *name == variable.name);
            assert_eq!(changed, decides, "{}", variable.name);
        }
    }

    #[test]
    fn a_file_that_is_no_tuning_file_is_not_replaced() {
        let path = std::env::temp_dir().join(format!("twoshot-tune-{}", std::process::id()));
        std::fs::write(&path, "precious").unwrap();
        let error = existing(&path).unwrap_err();
        assert!(error.contains("no tuning file"), "{error}");
        replace(&path, &Tuning { format: FORMAT, rows: Vec::new(), collnet: Vec::new() }).unwrap();
        assert_eq!(existing(&path).unwrap().rows, []);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(existing(&path).unwrap().rows, []);
    }
}
