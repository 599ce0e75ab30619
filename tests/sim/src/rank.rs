//! Simulated processes: how they are started and what became of them.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::netns::Netns;
use crate::session::Session;

const POLL: Duration = Duration::from_millis(5);

/// A process to start.
#[derive(Clone, Debug)]
pub struct Rank {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, Option<OsString>)>,
    host: u32,
    gpus: String,
    namespace: Option<String>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Exit(i32),
    /// It was ended by this signal.
    Signal(i32),
    /// It still ran at the deadline and was killed.
    TimedOut,
}

/// What a process left.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its place in the list given to [`Session::run_all`].
    pub rank: usize,
    /// Its process number, by which [`Session::stats`] finds its counters.
    pub pid: u32,
    /// How it ended.
    pub end: End,
    /// All it wrote to standard output.
    pub stdout: String,
    /// All it wrote to standard error.
    pub stderr: String,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Outcome {
    /// True when it exited with code 0.
    pub fn succeeded(&self) -> bool {
        self.end == End::Exit(0)
    }

    /// # Panics
    /// Unless it exited with code 0.
    #[track_caller]
    pub fn expect_success(&self) {
        assert!(self.succeeded(), "{self}");
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { rank, pid, end, stdout, stderr, elapsed } = self;
        writeln!(f, "rank {rank} (pid {pid}) after {elapsed:?}: {end:?}")?;
        write!(f, "--- stdout\n{stdout}--- stderr\n{stderr}---")
    }
}

impl Rank {
    /// A process on host 0 that sees GPU 0.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            host: 0,
            gpus: "0".to_owned(),
            namespace: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), Some(value.as_ref().to_owned())));
        self
    }

    /// Takes a variable out of its environment.
    #[must_use]
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), None));
        self
    }

    /// Puts it on this host.
    #[must_use]
    pub fn host(mut self, host: u32) -> Self {
        self.host = host;
        self
    }

    /// Lets it see this GPU of its host.
    #[must_use]
    pub fn gpu(self, gpu: u32) -> Self {
        self.gpus(&gpu.to_string())
    }

    /// Lets it see these GPUs of its host (`CUDA_VISIBLE_DEVICES`).
    #[must_use]
    pub fn gpus(mut self, list: &str) -> Self {
        list.clone_into(&mut self.gpus);
        self
    }

    /// Sets its fault rules.
    #[must_use]
    pub fn faults(self, rules: &str) -> Self {
        self.env("TWOSHOT_SIM_FAULTS", rules)
    }

    /// Runs it in the network namespace of its host. Call after [`Rank::host`].
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.namespace = Some(netns.name(self.host));
        self
    }

    fn command(&self, session: &Session, rank: usize) -> Command {
        let mut command = match &self.namespace {
            Some(name) => {
                let mut ip = Command::new("ip");
                ip.args(["netns", "exec", name]).arg(&self.program);
                ip
            }
            None => Command::new(&self.program),
        };
        // Nothing of the caller's own environment may decide a test.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let decides = ["TWOSHOT_", "NCCL_", "CUDA_"].iter().any(|p| text.starts_with(p)) || text == "LD_PRELOAD";
            if decides {
                command.env_remove(&name);
            }
        }
        command
            .args(&self.args)
            .env("TWOSHOT_SIM_DIR", session.dir())
            .env("TWOSHOT_SIM_HOST", self.host.to_string())
            .env("TWOSHOT_SIM_RANK", rank.to_string())
            .env("TWOSHOT_HOST_ID", format!("sim-host-{}", self.host))
            .env("NCCL_HOSTID", format!("sim-host-{}", self.host))
            .env("CUDA_VISIBLE_DEVICES", &self.gpus)
            .env("LD_LIBRARY_PATH", session.libraries())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (name, value) in &self.env {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}

/// A child that does not outlive the test.
struct Running {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    started: Instant,
    end: Option<(End, Duration)>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.end.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn collect(from: Option<impl Read + Send + 'static>) -> Option<JoinHandle<String>> {
    let mut from = from?;
    Some(thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }))
}

fn text(thread: &mut Option<JoinHandle<String>>) -> String {
    thread.take().and_then(|t| t.join().ok()).unwrap_or_default()
}

pub(crate) fn run_all(session: &Session, ranks: Vec<Rank>, timeout: Duration) -> io::Result<Vec<Outcome>> {
    let deadline = Instant::now() + timeout;
    let mut running = Vec::new();
    for (index, rank) in ranks.iter().enumerate() {
        let mut child = rank.command(session, index).spawn()?;
        let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
        running.push(Running { child, stdout, stderr, started: Instant::now(), end: None });
    }
    while running.iter().any(|r| r.end.is_none()) {
        let late = Instant::now() >= deadline;
        for r in running.iter_mut().filter(|r| r.end.is_none()) {
            if let Some(status) = r.child.try_wait()? {
                let end = status.code().map_or_else(|| End::Signal(status.signal().unwrap_or(0)), End::Exit);
                r.end = Some((end, r.started.elapsed()));
            } else if late {
                r.child.kill()?;
                r.child.wait()?;
                r.end = Some((End::TimedOut, r.started.elapsed()));
            }
        }
        thread::sleep(POLL);
    }
    let mut outcomes = Vec::new();
    for (rank, r) in running.iter_mut().enumerate() {
        let (end, elapsed) = r.end.expect("all have ended");
        let (stdout, stderr) = (text(&mut r.stdout), text(&mut r.stderr));
        outcomes.push(Outcome { rank, pid: r.child.id(), end, stdout, stderr, elapsed });
    }
    Ok(outcomes)
}
