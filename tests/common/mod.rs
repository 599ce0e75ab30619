//! What the simulator tests of the shipped library share: a job of worker processes behind one door.
#![allow(dead_code, reason = "every test program uses another part")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use twoshot_sim::{Outcome, Rank, Session, Topology, nccl, twoshot_library, worker};

/// How the library gets between the program and NCCL.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Door {
    /// `NCCL_NET_PLUGIN`.
    Plugin,
    /// `LD_PRELOAD`.
    Preload,
    /// The program opens the library by its path in place of NCCL.
    Path,
    /// Not at all.
    Shut,
}

/// One job: a topology, a program for the worker, and an environment.
pub struct Job {
    topology: Topology,
    door: Door,
    program: String,
    env: Vec<(String, String)>,
    rank_env: Vec<(usize, String, String)>,
    rank_doors: Vec<(usize, Door)>,
    rank_programs: Vec<(usize, String)>,
    args: Vec<String>,
    timeout: Duration,
}

impl Job {
    /// A job whose workers run `program`, one per GPU, through the plugin door.
    pub fn new(topology: Topology, program: &str) -> Self {
        Self {
            topology,
            door: Door::Plugin,
            program: program.to_owned(),
            env: Vec::new(),
            rank_env: Vec::new(),
            rank_doors: Vec::new(),
            rank_programs: Vec::new(),
            args: Vec::new(),
            timeout: Duration::from_secs(120),
        }
    }

    pub fn door(mut self, door: Door) -> Self {
        self.door = door;
        self
    }

    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((name.to_owned(), value.to_string()));
        self
    }

    /// A variable of one rank only.
    pub fn rank_env(mut self, rank: usize, name: &str, value: impl ToString) -> Self {
        self.rank_env.push((rank, name.to_owned(), value.to_string()));
        self
    }

    /// Another door for one rank.
    pub fn rank_door(mut self, rank: usize, door: Door) -> Self {
        self.rank_doors.push((rank, door));
        self
    }

    /// Another program for one rank.
    pub fn rank_program(mut self, rank: usize, program: &str) -> Self {
        self.rank_programs.push((rank, program.to_owned()));
        self
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs it and waits for all ranks.
    pub fn run(self) -> Report {
        let session = Session::new(&self.topology).expect("a session directory");
        self.run_in(session)
    }

    /// Runs it in a session made before.
    pub fn run_in(self, session: Session) -> Report {
        let library = twoshot_library();
        let ranks = session.ranks(worker());
        let count = ranks.len();
        let ranks: Vec<Rank> =
            ranks.into_iter().enumerate().map(|(r, rank)| self.rank(rank, r, count, &session, &library)).collect();
        let outcomes = session.run_all(ranks, self.timeout).expect("the ranks were started");
        Report { session, outcomes }
    }

    fn rank(&self, rank: Rank, r: usize, count: usize, session: &Session, library: &Path) -> Rank {
        let id: PathBuf = session.dir().join("unique-id");
        let program = self.rank_programs.iter().find(|(only, _)| *only == r).map_or(&self.program, |(_, own)| own);
        let door = self.rank_doors.iter().find(|(only, _)| *only == r).map_or(self.door, |(_, own)| *own);
        let mut rank = rank
            .args(["--rank", &r.to_string(), "--ranks", &count.to_string(), "--device", "0"])
            .arg("--id")
            .arg(id)
            .args(["--program", program])
            .args(&self.args)
            .env("NCCL_DEBUG", "INFO")
            .env("TWOSHOT_SETUP_TIMEOUT_MS", "20000")
            .env("TWOSHOT_TIMEOUT_MS", "60000");
        rank = match door {
            Door::Plugin => rank.env("NCCL_NET_PLUGIN", library),
            Door::Preload => rank.env("LD_PRELOAD", library),
            Door::Path => rank.arg("--nccl").arg(library).env("TWOSHOT_NCCL_LIBRARY", nccl()),
            Door::Shut => rank,
        };
        for (name, value) in &self.env {
            rank = rank.env(name, value);
        }
        for (_, name, value) in self.rank_env.iter().filter(|(only, _, _)| *only == r) {
            rank = rank.env(name, value);
        }
        rank
    }
}

/// What came of a job.
pub struct Report {
    pub session: Session,
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// Every rank ended well: the worker checks its results itself.
    #[track_caller]
    pub fn expect_success(&self) -> &Self {
        for outcome in &self.outcomes {
            assert!(outcome.succeeded(), "{outcome}");
        }
        self
    }

    /// Twoshot's lines of one rank.
    pub fn lines(&self, rank: usize) -> Vec<&str> {
        self.outcomes[rank].stdout.lines().filter(|line| line.contains(" TWOSHOT ")).collect()
    }

    /// Every rank says that the communicator is on.
    #[track_caller]
    pub fn expect_on(&self) -> &Self {
        for (rank, outcome) in self.outcomes.iter().enumerate() {
            assert!(self.lines(rank).iter().any(|line| line.contains(": ON,")), "not on: {outcome}");
        }
        self
    }

    /// Every rank says that the communicator is off, once, for this reason.
    #[track_caller]
    pub fn expect_off(&self, reason: &str) -> &Self {
        for (rank, outcome) in self.outcomes.iter().enumerate() {
            let off: Vec<_> = self.lines(rank).into_iter().filter(|line| line.contains(": OFF,")).collect();
            assert!(off.len() == 1 && off[0].contains(reason), "expected OFF for {reason}: {outcome}");
        }
        self
    }

    /// AllReduce calls that ran in twoshot's kernels and in stock NCCL, on one rank.
    pub fn counters(&self, rank: usize) -> (u64, u64) {
        let stdout = &self.outcomes[rank].stdout;
        let summary =
            stdout.lines().rev().find(|line| line.contains("\"cmd\":\"summary\"") || line.contains("\"routed\":"));
        let summary = summary.unwrap_or_else(|| panic!("no summary: {}", self.outcomes[rank]));
        (number(summary, "\"routed\":"), number(summary, "\"stock\":"))
    }

    /// Nothing of the driver is held by any rank any more.
    #[track_caller]
    pub fn expect_nothing_live(&self) -> &Self {
        for outcome in &self.outcomes {
            self.session.stats(outcome.pid).expect("stats of a rank").assert_nothing_live();
        }
        self
    }
}

fn number(line: &str, key: &str) -> u64 {
    let at = line.find(key).unwrap_or_else(|| panic!("no {key} in {line}")) + key.len();
    let digits: String = line[at..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no number after {key} in {line}"))
}
