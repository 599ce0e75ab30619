//! `twoshot bench`: verifies, then measures stock and routed AllReduce in the same run, one process per GPU.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;

use crate::element::{Dtype, Op};
use crate::launch::{Place, Ranks};
use crate::nccl::Nccl;
use crate::protocol::{Message, Plan, RankFacts, RankRow, Task};
use crate::report::{FORMAT, Record, Row, format_row, head, now};
use crate::{cuda, library, sizes};

/// Verify, then measure stock and routed AllReduce, one process per GPU
#[derive(Args, Debug)]
pub struct Bench {
    /// Number of ranks; every visible GPU if not given
    #[arg(long)]
    ranks: Option<u32>,
    /// Stock NCCL [default: $TWOSHOT_NCCL_LIBRARY, else libnccl.so.2, else a Python environment's]
    #[arg(long, value_name = "PATH")]
    nccl: Option<PathBuf>,
    /// libtwoshot.so [default: $TWOSHOT_LIBRARY, else the one installed with this program]
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
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
    /// Seed of the payloads [default: a new one]
    #[arg(long)]
    seed: Option<u64>,
    /// Write the record here, see benchmarks/README.md
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// N ranks on one GPU: checks that everything works, measures nothing
    #[arg(long, value_name = "N", conflicts_with = "ranks")]
    shared_gpu: Option<u32>,
    /// Make every rank look like a host of its own to NCCL and to twoshot
    #[arg(long)]
    hostid_per_rank: bool,
    /// Keep NVLink multicast (NVLS) away, in stock NCCL and in twoshot
    #[arg(long)]
    no_multicast: bool,
    /// Exit with 1 when no call was routed
    #[arg(long)]
    require_routed: bool,
    /// Give up when no rank was heard for so many seconds
    #[arg(long, default_value_t = 180)]
    patience: u64,
    /// Give up after so many seconds in all
    #[arg(long, default_value_t = 3600)]
    deadline: u64,
    /// The GPUs are simulated: verify, never time
    #[arg(long, hide = true)]
    simulated: bool,
    /// JSON list of the ranks' places: [{"device": 0, "environment": {"NAME": "value"}}, ...]
    #[arg(long, hide = true, value_name = "FILE")]
    places: Option<PathBuf>,
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

/// One entry of `--places`.
#[derive(Debug, Default, Deserialize)]
struct Given {
    #[serde(default)]
    device: i32,
    #[serde(default)]
    environment: BTreeMap<String, String>,
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
    fn mode(&self, simulated: bool) -> &'static str {
        if simulated {
            "simulated"
        } else if self.shared_gpu.is_some() {
            "shared-gpu"
        } else if self.hostid_per_rank {
            "emulated-hosts"
        } else {
            "measured"
        }
    }

    fn plan(&self) -> Result<Plan, String> {
        let sizes = if self.sizes.is_empty() { sizes::doubling(self.min, self.max) } else { self.sizes.clone() };
        if sizes.is_empty() || sizes.contains(&0) {
            return Err("no size to run: --min is above --max, or a size is 0".to_owned());
        }
        let repetitions = self.repetitions.unwrap_or(if self.simulated { 0 } else { 9 });
        // Ranks that share a GPU take turns of milliseconds: few calls say all there is to say.
        let calls = self.calls.or(self.shared_gpu.map(|_| 3));
        let seed = match self.seed {
            Some(seed) => seed,
            None => u64::from_le_bytes(
                twoshot::handoff::random().map_err(|e| e.to_string())?[..8].try_into().unwrap_or_default(),
            ),
        };
        let (dtypes, ops) = (flat(&self.dtype), flat(&self.op));
        Ok(Plan { sizes, dtypes, ops, repetitions, calls, checks: self.checks.max(1), seed })
    }

    /// Where the ranks run.
    fn givens(&self) -> Result<Vec<Given>, String> {
        if let Some(path) = &self.places {
            let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            return serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()));
        }
        let devices = cuda::device_count()?;
        let (ranks, shared) = match self.shared_gpu {
            Some(ranks) => (ranks, true),
            None => (self.ranks.unwrap_or(devices), false),
        };
        if devices == 0 || (!shared && ranks > devices) {
            return Err(format!("{ranks} ranks need as many GPUs, {devices} are visible (see --shared-gpu)"));
        }
        let device = |rank: u32| if shared { 0 } else { i32::try_from(rank).unwrap_or(i32::MAX) };
        let given = |rank| Given { device: device(rank), environment: self.rank_environment(rank) };
        Ok((0..ranks).map(given).collect())
    }

    /// What this program's own options mean for a rank's environment.
    fn rank_environment(&self, rank: u32) -> BTreeMap<String, String> {
        let mut set = BTreeMap::new();
        let mut put = |name: &str, value: String| set.insert(name.to_owned(), value);
        let host = format!("twoshot-bench-{rank}");
        if self.shared_gpu.is_some() {
            put("TWOSHOT_SHARED_GPU", "1".to_owned());
        }
        if self.shared_gpu.is_some() || self.hostid_per_rank {
            // NCCL refuses two ranks of one host on one GPU, and between hosts it needs a network.
            put("NCCL_HOSTID", host.clone());
            put("NCCL_SOCKET_IFNAME", "lo".to_owned());
        }
        if self.hostid_per_rank {
            put("TWOSHOT_HOST_ID", host);
        }
        set
    }
}

/// Simulated GPUs have no speed, whatever the options say.
fn in_simulator(givens: &[Given]) -> bool {
    const SIGN: &str = "TWOSHOT_SIM_DIR";
    std::env::var_os(SIGN).is_some() || givens.iter().any(|given| given.environment.contains_key(SIGN))
}

/// The library that stock calls go to, opened here once to be sure of it.
pub fn stock(given: Option<&Path>) -> Result<(PathBuf, i32), String> {
    let mut first = None;
    for path in library::nccl_candidates(given) {
        match Nccl::open(&path) {
            Ok(nccl) if nccl.twoshot_version().is_some() => {
                first.get_or_insert_with(|| format!("{} is twoshot itself", path.display()));
            }
            Ok(nccl) => return Ok((nccl.path().to_owned(), nccl.version()?)),
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    let why = first.unwrap_or_default();
    Err(format!(
        "no stock NCCL: {why}; give --nccl PATH (PyTorch brings one: .../site-packages/nvidia/nccl/lib/libnccl.so.2)"
    ))
}

fn run(bench: &Bench) -> Result<i32, String> {
    let plan = bench.plan()?;
    let library = library::twoshot(bench.library.as_deref())?;
    let givens = bench.givens()?;
    if givens.len() < 2 {
        return Err(format!("AllReduce needs 2 ranks, there is {} (see --shared-gpu)", givens.len()));
    }
    let simulated = bench.simulated || in_simulator(&givens);
    // A simulated NCCL can only be opened where its simulated driver is found, which is in the ranks.
    let nccl = match &bench.nccl {
        Some(path) => std::fs::canonicalize(path).map_err(|error| format!("{}: {error}", path.display()))?,
        None => stock(None)?.0,
    };
    let places: Vec<_> = givens
        .iter()
        .enumerate()
        .map(|(i, given)| place(bench, &plan, &library, &nccl, (i, givens.len()), given))
        .collect();
    let mut record = Record {
        format: FORMAT,
        date: now(),
        mode: bench.mode(simulated),
        gpu: String::new(),
        arch: 0,
        ranks: places.len() as u32,
        hosts: 0,
        driver: String::new(),
        cuda: 0,
        nccl: 0,
        nccl_path: nccl.display().to_string(),
        twoshot: String::new(),
        commit: commit(),
        environment: environment(bench),
        repetitions: if simulated { 0 } else { plan.repetitions },
        rows: Vec::new(),
    };
    let limits = (Duration::from_secs(bench.patience), Duration::from_secs(bench.deadline));
    let mut ranks = Ranks::start(&places, limits.0, limits.1)?;
    let outcome = listen(&mut ranks, &mut record, plan.repetitions > 0 && !simulated);
    // What was found before a failure is worth keeping.
    if let Some(path) = &bench.json
        && (outcome.is_ok() || !record.rows.is_empty())
    {
        write(path, &record)?;
    }
    outcome?;
    ranks.finish()?;
    Ok(verdict(bench, &record))
}

fn place(
    bench: &Bench,
    plan: &Plan,
    library: &Path,
    nccl: &Path,
    (rank, ranks): (usize, usize),
    given: &Given,
) -> Place {
    let task = Task {
        rank: rank as u32,
        ranks: ranks as u32,
        device: given.device,
        nccl: nccl.to_owned(),
        library: library.to_owned(),
        plan: plan.clone(),
    };
    let set = |name: &str, value: OsString| (OsString::from(name), Some(value));
    let mut environment = vec![set("TWOSHOT_NCCL_LIBRARY", nccl.into())];
    if bench.no_multicast {
        environment.push(set("NCCL_NVLS_ENABLE", "0".into()));
    }
    // A twoshot in front of the stock library would make both columns the same.
    environment.extend(
        ["LD_PRELOAD", "NCCL_NET_PLUGIN"].iter().filter(|name| names_twoshot(name)).map(|name| ((*name).into(), None)),
    );
    environment.extend(given.environment.iter().map(|(name, value)| set(name, value.into())));
    Place { task, environment }
}

fn names_twoshot(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value.to_string_lossy().contains("twoshot"))
}

/// Hears the ranks out and prints the table line by line.
fn listen(ranks: &mut Ranks, record: &mut Record, timed: bool) -> Result<(), String> {
    let count = record.ranks as usize;
    let mut facts: Vec<Option<RankFacts>> = vec![None; count];
    let mut rows: Vec<Vec<RankRow>> = vec![Vec::new(); count];
    while let Some((rank, message)) = ranks.next()? {
        match message {
            Message::Ids(ids) => ranks.tell_all(&ids)?,
            Message::Ready(known) => {
                facts[rank] = Some(known);
                if let Some(all) = facts.iter().cloned().collect::<Option<Vec<_>>>() {
                    record.describe(&all);
                    say(&heading(record));
                    say(&head(timed));
                }
            }
            Message::Row(row) => {
                rows[rank].push(row);
                let line = record.rows.len();
                let complete = rows.iter().map(|rows| rows.get(line).cloned()).collect::<Option<Vec<_>>>();
                if let Some(row) = complete.as_deref().and_then(|ranks| Row::merge(ranks, timed)) {
                    say(&format_row(&row, timed));
                    if let Some(note) = &row.wrong_note {
                        say(&format!("         WRONG: {note}"));
                    }
                    record.rows.push(row);
                }
            }
            Message::Step { .. } | Message::Done | Message::Failed { .. } => {}
        }
    }
    Ok(())
}

fn heading(record: &Record) -> String {
    let remark = match record.mode {
        "simulated" => "\nSIMULATED: the GPUs are software. Answers are verified, no speed is measured.",
        "shared-gpu" => "\nNOT A MEASUREMENT: the ranks share one GPU and take turns. Only the answers count.",
        "emulated-hosts" => "\nEmulated hosts: stock NCCL goes over loopback sockets. Compare with nothing but itself.",
        _ => "\nMicroseconds per call: median over repetitions, slowest rank. host us: stock/routed.",
    };
    format!("{}{remark}", record.heading())
}

/// Standard output, line by line; a reader that went away ends nothing.
fn say(line: &str) {
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

fn write(path: &Path, record: &Record) -> Result<(), String> {
    let mut text = serde_json::to_string_pretty(record).map_err(|error| error.to_string())?;
    text.push('\n');
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// The working tree's commit, with a `+` where it has changes.
fn commit() -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"]).filter(|commit| !commit.is_empty())?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    Some(if changed { format!("{commit}+") } else { commit })
}

/// NCCL's and twoshot's variables as rank 0 meets them, paths of this machine left out.
fn environment(bench: &Bench) -> BTreeMap<String, String> {
    let inherited = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    let mut all: BTreeMap<_, _> = inherited.chain(bench.rank_environment(0)).collect();
    if bench.no_multicast {
        all.insert("NCCL_NVLS_ENABLE".to_owned(), "0".to_owned());
    }
    let recorded = |name: &str| {
        (name.starts_with("NCCL_") || name.starts_with("TWOSHOT_"))
            && !name.ends_with("_LIBRARY")
            && !name.starts_with("TWOSHOT_SIM_")
    };
    all.retain(|name, _| recorded(name));
    all
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

    #[test]
    fn a_place_in_the_simulator_makes_the_run_a_simulated_one() {
        let environment = BTreeMap::from([("TWOSHOT_SIM_DIR".to_owned(), "/x".to_owned())]);
        assert!(in_simulator(&[Given { device: 0, environment }]));
    }

    #[test]
    fn ranks_that_share_a_gpu_look_like_hosts_to_nccl_and_like_one_host_to_twoshot() {
        let set = parsed("--shared-gpu 2").rank_environment(1);
        assert_eq!(set["NCCL_HOSTID"], "twoshot-bench-1");
        assert_eq!(set["TWOSHOT_SHARED_GPU"], "1");
        assert!(!set.contains_key("TWOSHOT_HOST_ID"));
        assert!(parsed("").rank_environment(0).is_empty());
        assert_eq!(parsed("--hostid-per-rank").rank_environment(3)["TWOSHOT_HOST_ID"], "twoshot-bench-3");
    }
}
