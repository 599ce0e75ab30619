//! One broken set-up: a simulated host, what is wrong with it, and what doctor must say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use twoshot_sim::{End, Outcome, Rank, Session, Topology, lib_dir, twoshot_library};

const PATIENCE: Duration = Duration::from_secs(60);

/// A process that has these libraries loaded and sleeps; killed when dropped.
pub struct Lookalike(Child);

pub fn lookalike(libraries: &[PathBuf]) -> Lookalike {
    let list: Vec<_> = libraries.iter().map(|path| path.to_str().expect("text")).collect();
    let mut command = Command::new("sleep");
    command.arg("600").env("LD_PRELOAD", list.join(":")).env("LD_LIBRARY_PATH", lib_dir()).stdin(Stdio::null());
    let process = Lookalike(command.spawn().expect("sleep starts"));
    // Mapped before its program is: wait for both.
    let maps = format!("/proc/{}/maps", process.0.id());
    let start = Instant::now();
    while !list.iter().all(|path| fs::read_to_string(&maps).is_ok_and(|maps| maps.contains(path))) {
        assert!(start.elapsed() < PATIENCE, "not loaded: {}", fs::read_to_string(&maps).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(5));
    }
    process
}

impl Drop for Lookalike {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct Case {
    name: &'static str,
    topology: Topology,
    gpus: Option<&'static str>,
    args: Vec<String>,
    env: Vec<(String, String)>,
    root: Option<&'static str>,
    imex: bool,
    broken: Option<&'static str>,
    without: Option<&'static str>,
    other: Option<u32>,
    process: Option<u32>,
}

/// What it said.
pub struct Said {
    pub text: String,
    session: Session,
    pid: u32,
}

impl Said {
    /// How often it made a call of the driver.
    pub fn calls(&self, name: &str) -> u64 {
        let stats = self.session.stats(self.pid).expect("counters of the driver");
        stats.assert_nothing_live();
        stats.calls(name)
    }
}

impl Case {
    pub fn new(name: &'static str, topology: Topology) -> Self {
        Self {
            name,
            topology,
            gpus: None,
            args: Vec::new(),
            env: Vec::new(),
            root: None,
            imex: true,
            broken: None,
            without: None,
            other: None,
            process: None,
        }
    }

    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn faults(self, rules: &str) -> Self {
        self.env("TWOSHOT_SIM_FAULTS", rules)
    }

    pub fn gpus(mut self, list: &'static str) -> Self {
        self.gpus = Some(list);
        self
    }

    /// Looks at this file system instead of one made for the case.
    pub fn root(mut self, path: &'static str) -> Self {
        self.root = Some(path);
        self
    }

    pub fn no_imex(mut self) -> Self {
        self.imex = false;
        self
    }

    /// One library is a file of no bytes.
    pub fn broken(mut self, library: &'static str) -> Self {
        self.broken = Some(library);
        self
    }

    /// The libraries lack one function.
    pub fn without(mut self, symbol: &'static str) -> Self {
        self.without = Some(symbol);
        self
    }

    /// Doctor's report of another host is given to it.
    pub fn with_report_of(mut self, host: u32) -> Self {
        self.other = Some(host);
        self
    }

    pub fn of(mut self, process: &Lookalike) -> Self {
        self.process = Some(process.0.id());
        self
    }

    fn session(&self) -> Session {
        let session = Session::new(&self.topology).expect("a session directory");
        let symbols: Vec<_> = self.without.into_iter().collect();
        let session = match (&symbols[..], self.broken) {
            ([], None) => session,
            (symbols, broken) => {
                let session = session.without_symbols(symbols).expect("copies of the libraries");
                if let Some(library) = broken {
                    fs::write(session.libraries().join(library), b"").expect("a file of no bytes");
                }
                session
            }
        };
        fs::create_dir_all(session.dir().join("root/dev/shm")).expect("a folder");
        if self.imex {
            fs::create_dir_all(session.dir().join("root/dev/nvidia-caps-imex-channels/channel0")).expect("a folder");
        }
        session
    }

    fn run(&self, session: &Session, host: u32, args: &[&str]) -> Outcome {
        let gpus = (0..self.topology.hosts()[host as usize].gpus).map(|gpu| gpu.to_string()).collect::<Vec<_>>();
        let mut rank = Rank::new(env!("CARGO_BIN_EXE_twoshot"))
            .host(host)
            .gpus(self.gpus.unwrap_or(&gpus.join(",")))
            .arg("doctor")
            .args(args)
            .arg("--root")
            .arg(self.root.map_or_else(|| session.dir().join("root"), PathBuf::from))
            .env("TWOSHOT_LIBRARY", twoshot_library())
            .env_remove("VIRTUAL_ENV")
            .env_remove("CONDA_PREFIX");
        for (name, value) in &self.env {
            rank = rank.env(name, value);
        }
        session.run_all([rank], PATIENCE).expect("doctor starts").pop().expect("one outcome")
    }

    fn screen(mut self, code: i32) -> Said {
        let session = self.session();
        if let Some(host) = self.other.take() {
            let report = session.dir().join("report.json");
            fs::write(&report, self.run(&session, host, &["--json"]).stdout).expect("a report");
            self.args.extend(["--with".to_owned(), report.to_str().expect("text").to_owned()]);
        }
        if let Some(pid) = self.process {
            self.args.extend(["--pid".to_owned(), pid.to_string()]);
        }
        let args: Vec<_> = self.args.iter().map(String::as_str).collect();
        let outcome = self.run(&session, 0, &args);
        assert_eq!(outcome.end, End::Exit(code), "{}: {outcome}", self.name);
        let text = normal(&outcome.stdout, &session, self.process);
        compare(self.name, &text);
        Said { text, pid: outcome.pid, session }
    }

    #[track_caller]
    fn says(self, code: i32, words: [&str; 2]) -> Said {
        let name = self.name;
        let said = self.screen(code);
        for words in words {
            assert!(said.text.contains(words), "{name} does not say `{words}`:\n{}", said.text);
        }
        said
    }

    /// AllReduce is routed, and these words are said.
    #[track_caller]
    pub fn routed(self, words: &str) -> Said {
        self.says(0, ["ROUTED: ", words])
    }

    /// It stays with stock NCCL on this host, for this reason.
    #[track_caller]
    pub fn stock(self, reason: &str, words: &str) {
        self.says(1, [&format!("here: STOCK NCCL, {reason}: "), words]);
    }

    /// It stays with stock NCCL between hosts, for this reason.
    #[track_caller]
    pub fn across(self, reason: &str, words: &str) {
        self.says(1, [&format!("across hosts: STOCK NCCL, {reason}: "), words]);
    }

    /// A report could not be read.
    #[track_caller]
    pub fn unreadable(self, words: &str) {
        self.says(1, ["across hosts: STOCK NCCL: ", words]);
    }

    pub fn json(self) -> serde_json::Value {
        let session = self.session();
        let outcome = self.run(&session, 0, &["--json"]);
        assert_eq!(outcome.end, End::Exit(1), "{outcome}");
        serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome}"))
    }
}

/// Replaces what depends on the machine.
fn normal(text: &str, session: &Session, process: Option<u32>) -> String {
    let shown = |path: &Path| path.display().to_string();
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut text = text.to_owned();
    for (path, name) in [
        (session.libraries(), "$SIM"),
        (session.dir(), "$SESSION"),
        (lib_dir(), "$SIM"),
        (&twoshot_library(), "$TWOSHOT"),
    ] {
        text = text.replace(&shown(&real(path)), name).replace(&shown(path), name);
    }
    text = text.replace(env!("CARGO_PKG_VERSION"), "$VERSION");
    if let Some(pid) = process {
        text = text.replace(&pid.to_string(), "$PID");
    }
    // NCCLs that this machine happens to have.
    let foreign =
        |line: &&str| ["/usr/", "/.venv/"].iter().any(|place| line.contains(place)) && line.contains("libnccl");
    let some = text.lines().any(|line| foreign(&line));
    let kept = text.lines().filter(|line| !(foreign(line) || some && line.contains("the first is what")));
    kept.map(|line| machine(line) + "\n").collect()
}

/// One line without this machine's numbers.
fn machine(line: &str) -> String {
    let mut line = line.to_owned();
    if let (Some(from), Some(to)) = (line.find("kernel module "), line.find(", CUDA")) {
        line.replace_range(from..to + 2, "");
    }
    if line.contains("/dev/shm") && line.contains("MiB free") {
        return "ok   /dev/shm     N MiB free".to_owned();
    }
    if line.contains("net:[") {
        let mut parts = line.split('[');
        let first = parts.next().unwrap_or_default().to_owned();
        return parts.fold(first, |line, part| line + "[N]" + part.split_once(']').map_or("", |(_, rest)| rest));
    }
    line
}

fn compare(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/doctor/{name}.txt"));
    if std::env::var_os("TWOSHOT_UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).expect("the golden file");
    }
    let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(text, golden, "{name} differs from {}", path.display());
}
