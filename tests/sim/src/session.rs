//! A session: the directory that simulated processes share.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::rank::{self, Outcome, Rank};
use crate::stats::Stats;
use crate::topology::Topology;
use crate::{elf, lib_dir};

/// One simulated machine room. Its directory goes when it is dropped.
#[derive(Debug)]
pub struct Session {
    dir: PathBuf,
    hosts: Vec<u32>,
    libraries: PathBuf,
}

impl Session {
    /// Makes the directory and writes the topology into it.
    pub fn new(topology: &Topology) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        // One of this name may be there: of a process that was killed and whose number came again.
        let dir = loop {
            let name = format!("twoshot-sim.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let dir = base.join(name);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => break made.map(|()| dir)?,
            }
        };
        let hosts = topology.hosts().iter().map(|h| h.gpus).collect();
        let session = Self { dir, hosts, libraries: lib_dir().to_owned() };
        fs::write(session.dir.join("topology"), topology.to_string())?;
        Ok(session)
    }

    /// Makes every process of this session meet libraries that lack these symbols.
    pub fn without_symbols(mut self, names: &[&str]) -> io::Result<Self> {
        let copies = self.dir.join("lib");
        fs::create_dir_all(&copies)?;
        for entry in fs::read_dir(&self.libraries)?.flatten().filter(|entry| entry.path().is_file()) {
            let library = elf::without_symbols(fs::read(entry.path())?, names)?;
            fs::write(copies.join(entry.file_name()), library)?;
        }
        self.libraries = copies;
        Ok(self)
    }

    /// The shared directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The libraries its processes load.
    pub fn libraries(&self) -> &Path {
        &self.libraries
    }

    /// One process per GPU of the session, in order of hosts, all running `program`.
    pub fn ranks(&self, program: impl Into<OsString>) -> Vec<Rank> {
        let program = program.into();
        let places =
            self.hosts.iter().enumerate().flat_map(|(host, gpus)| (0..*gpus).map(move |gpu| (host as u32, gpu)));
        places.map(|(host, gpu)| Rank::new(&program).host(host).gpu(gpu)).collect()
    }

    /// Runs the processes at the same time and waits for all; what still runs
    /// after `timeout` is killed. Outcomes are in the order of the ranks.
    pub fn run_all(&self, ranks: impl IntoIterator<Item = Rank>, timeout: Duration) -> io::Result<Vec<Outcome>> {
        rank::run_all(self, ranks.into_iter().collect(), timeout)
    }

    /// The counters of one process; all zero when it never opened the driver.
    pub fn stats(&self, pid: u32) -> io::Result<Stats> {
        let mut stats = Stats::default();
        for file in [format!("stats.{pid}"), format!("nvml-stats.{pid}")] {
            match stats.read(&self.dir.join(file)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(stats)
    }

    /// The counters of every process so far.
    pub fn all_stats(&self) -> io::Result<HashMap<u32, Stats>> {
        let mut all = HashMap::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.strip_prefix("nvml-stats.").or_else(|| name.strip_prefix("stats."));
            if let Some(pid) = pid.and_then(|p| p.parse().ok()) {
                all.insert(pid, self.stats(pid)?);
            }
        }
        Ok(all)
    }

    /// The sum of the counters of every process so far.
    pub fn sum_of_stats(&self) -> io::Result<Stats> {
        let mut sum = Stats::default();
        self.all_stats()?.values().for_each(|s| sum.add(s));
        Ok(sum)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if std::env::var_os("TWOSHOT_SIM_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
