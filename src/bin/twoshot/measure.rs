//! One run of the ranks: where they are, what they are told, what comes back. `bench` shows it, `tune` draws
//! conclusions from several.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use crate::launch::{Place, Ranks};
use crate::nccl::Nccl;
use crate::protocol::{Message, Plan, RankFacts, RankRow, Task};
use crate::report::{FORMAT, Record, Row, now};
use crate::{cuda, library};

/// Where the ranks run, and with which libraries.
#[derive(Args, Debug)]
pub struct Machine {
    /// Number of ranks; every visible GPU if not given
    #[arg(long)]
    ranks: Option<u32>,
    /// Stock NCCL [default: $TWOSHOT_NCCL_LIBRARY, else libnccl.so.2, else a Python environment's]
    #[arg(long, value_name = "PATH")]
    nccl: Option<PathBuf>,
    /// libtwoshot.so [default: $TWOSHOT_LIBRARY, else the one installed with this program]
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// N ranks on one GPU: checks that everything works, measures nothing
    #[arg(long, value_name = "N", conflicts_with = "ranks")]
    pub shared_gpu: Option<u32>,
    /// Make every rank look like a host of its own to NCCL and to twoshot
    #[arg(long)]
    hostid_per_rank: bool,
    /// Keep NVLink multicast (NVLS) away, in stock NCCL and in twoshot
    #[arg(long)]
    no_multicast: bool,
    /// Give up when no rank was heard for so many seconds
    #[arg(long, default_value_t = 180)]
    patience: u64,
    /// Give up after so many seconds in all
    #[arg(long, default_value_t = 3600)]
    deadline: u64,
    /// The GPUs are simulated: verify, never time
    #[arg(long, hide = true)]
    pub simulated: bool,
    /// JSON list of the ranks' places: [{"device": 0, "environment": {"NAME": "value"}}, ...]
    #[arg(long, hide = true, value_name = "FILE")]
    places: Option<PathBuf>,
}

/// One entry of `--places`.
#[derive(Debug, Default, Deserialize)]
struct Given {
    #[serde(default)]
    device: i32,
    #[serde(default)]
    environment: BTreeMap<String, String>,
}

/// A machine whose libraries and GPUs were found.
pub struct Prepared<'a> {
    machine: &'a Machine,
    library: PathBuf,
    nccl: PathBuf,
    givens: Vec<Given>,
    /// Simulated GPUs have no speed, whatever the options say.
    pub simulated: bool,
}

/// What happens during a run, as it happens.
pub enum Seen<'a> {
    /// All ranks are ready.
    Ready(&'a Record),
    /// A line is complete.
    Row(&'a Row),
}

/// Variables that a run sets on all ranks, or with `None` takes away.
pub type Changes = Vec<(&'static str, Option<String>)>;

impl Machine {
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

    /// Finds libraries and GPUs.
    pub fn prepare(&self) -> Result<Prepared<'_>, String> {
        let library = library::twoshot(self.library.as_deref())?;
        let givens = self.givens()?;
        if givens.len() < 2 {
            return Err(format!("AllReduce needs 2 ranks, there is {} (see --shared-gpu)", givens.len()));
        }
        let simulated = self.simulated || in_simulator(&givens);
        // A simulated NCCL can only be opened where its simulated driver is found, which is in the ranks.
        let nccl = match &self.nccl {
            Some(path) => std::fs::canonicalize(path).map_err(|error| format!("{}: {error}", path.display()))?,
            None => stock(None)?.0,
        };
        Ok(Prepared { machine: self, library, nccl, givens, simulated })
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

impl Prepared<'_> {
    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.givens.len()
    }

    /// Runs the plan on all ranks; `timed` keeps what they timed. The record holds what was found before a failure, too.
    pub fn run(
        &self,
        plan: &Plan,
        timed: bool,
        changes: &Changes,
        seen: &mut dyn FnMut(Seen<'_>),
    ) -> (Record, Result<(), String>) {
        let mut record = Record {
            format: FORMAT,
            date: now(),
            mode: self.machine.mode(self.simulated).to_owned(),
            gpu: String::new(),
            arch: 0,
            ranks: self.givens.len() as u32,
            hosts: 0,
            driver: String::new(),
            cuda: 0,
            nccl: 0,
            nccl_path: self.nccl.display().to_string(),
            twoshot: String::new(),
            commit: commit(),
            environment: self.environment(changes),
            agreed: None,
            repetitions: if timed { plan.repetitions } else { 0 },
            unaligned: plan.unaligned,
            rows: Vec::new(),
        };
        let outcome = self.listen(plan, timed, changes, &mut record, seen);
        (record, outcome)
    }

    fn listen(
        &self,
        plan: &Plan,
        timed: bool,
        changes: &Changes,
        record: &mut Record,
        seen: &mut dyn FnMut(Seen<'_>),
    ) -> Result<(), String> {
        let count = self.givens.len();
        let places: Vec<_> = (0..count).map(|rank| self.place(plan, rank, changes)).collect();
        let seconds = Duration::from_secs;
        let mut ranks = Ranks::start(&places, seconds(self.machine.patience), seconds(self.machine.deadline))?;
        let mut facts: Vec<Option<RankFacts>> = vec![None; count];
        let mut rows: Vec<Vec<RankRow>> = vec![Vec::new(); count];
        while let Some((rank, message)) = ranks.next()? {
            match message {
                Message::Ids(ids) => ranks.tell_all(&ids)?,
                Message::Ready(known) => {
                    facts[rank] = Some(known);
                    if let Some(all) = facts.iter().cloned().collect::<Option<Vec<_>>>() {
                        record.describe(&all);
                        seen(Seen::Ready(record));
                    }
                }
                Message::Row(row) => {
                    rows[rank].push(row);
                    let line = record.rows.len();
                    let complete = rows.iter().map(|rows| rows.get(line).cloned()).collect::<Option<Vec<_>>>();
                    if let Some(row) = complete.as_deref().and_then(|ranks| Row::merge(ranks, timed)) {
                        seen(Seen::Row(&row));
                        record.rows.push(row);
                    }
                }
                Message::Step { .. } | Message::Done | Message::Failed { .. } => {}
            }
        }
        ranks.finish()
    }

    fn place(&self, plan: &Plan, rank: usize, changes: &Changes) -> Place {
        let given = &self.givens[rank];
        let task = Task {
            rank: rank as u32,
            ranks: self.givens.len() as u32,
            device: given.device,
            nccl: self.nccl.clone(),
            library: self.library.clone(),
            plan: plan.clone(),
        };
        let set = |name: &str, value: OsString| (OsString::from(name), Some(value));
        let mut environment = vec![set("TWOSHOT_NCCL_LIBRARY", self.nccl.clone().into())];
        if self.machine.no_multicast {
            environment.push(set("NCCL_NVLS_ENABLE", "0".into()));
        }
        // A twoshot in front of the stock library would make both columns the same.
        let in_front = ["LD_PRELOAD", "NCCL_NET_PLUGIN"].iter().filter(|name| names_twoshot(name));
        environment.extend(in_front.map(|name| ((*name).into(), None)));
        environment.extend(given.environment.iter().map(|(name, value)| set(name, value.into())));
        environment.extend(changes.iter().map(|(name, value)| ((*name).into(), value.as_ref().map(Into::into))));
        Place { task, environment }
    }

    /// NCCL's and twoshot's variables as rank 0 meets them, paths of this machine left out.
    fn environment(&self, changes: &Changes) -> BTreeMap<String, String> {
        let inherited = std::env::vars_os()
            .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
        let mut all: BTreeMap<_, _> = inherited.chain(self.machine.rank_environment(0)).collect();
        if self.machine.no_multicast {
            all.insert("NCCL_NVLS_ENABLE".to_owned(), "0".to_owned());
        }
        for (name, value) in changes {
            match value {
                Some(value) => all.insert((*name).to_owned(), value.clone()),
                None => all.remove(*name),
            };
        }
        let recorded = |name: &str| {
            (name.starts_with("NCCL_") || name.starts_with("TWOSHOT_"))
                && !name.ends_with("_LIBRARY")
                && !name.ends_with("_FILE")
                && !name.starts_with("TWOSHOT_SIM_")
        };
        all.retain(|name, _| recorded(name));
        all
    }
}

fn names_twoshot(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value.to_string_lossy().contains("twoshot"))
}

/// A seed that nobody chose.
pub fn random_seed() -> Result<u64, String> {
    let bytes = twoshot::handoff::random().map_err(|error| error.to_string())?;
    Ok(u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        machine: Machine,
    }

    fn parsed(arguments: &str) -> Machine {
        Line::try_parse_from(std::iter::once("measure").chain(arguments.split_whitespace())).unwrap().machine
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

    #[test]
    fn what_a_run_changes_stands_in_its_record_and_what_it_takes_away_does_not() {
        let machine = parsed("--no-multicast");
        let prepared = Prepared {
            machine: &machine,
            library: PathBuf::from("/l"),
            nccl: PathBuf::from("/n"),
            givens: vec![Given::default(), Given::default()],
            simulated: false,
        };
        let set = |name, value: &str| (name, Some(value.to_owned()));
        let changes =
            vec![set("TWOSHOT_ALGO", "oneshot"), ("NCCL_NVLS_ENABLE", None), set("TWOSHOT_TUNING_FILE", "/f")];
        let environment = prepared.environment(&changes);
        assert_eq!(environment["TWOSHOT_ALGO"], "oneshot");
        assert!(!environment.contains_key("NCCL_NVLS_ENABLE") && !environment.contains_key("TWOSHOT_TUNING_FILE"));
        let plan = Plan {
            sizes: vec![8],
            dtypes: vec![],
            ops: vec![],
            repetitions: 0,
            calls: None,
            checks: 1,
            seed: 0,
            unaligned: false,
        };
        let place = prepared.place(&plan, 1, &changes);
        assert_eq!((place.task.rank, place.task.ranks), (1, 2));
        // What comes last holds.
        let last = place.environment.iter().rfind(|(name, _)| name == "NCCL_NVLS_ENABLE").unwrap();
        assert_eq!(last.1, None);
    }
}
