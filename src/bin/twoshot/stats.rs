//! `twoshot stats PID`: what a running program's AllReduce calls did so far.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use twoshot::driver::link_of;
use twoshot::stats::{NAME, Snapshot, WORDS};

/// Show a running program's AllReduce calls by route and size
#[derive(Args, Debug)]
pub struct Stats {
    /// The process
    pid: u32,
    /// For programs
    #[arg(long)]
    json: bool,
}

/// Runs it; the exit code is 0 when there was something to show, else 1.
pub fn main(stats: &Stats) -> i32 {
    match read(stats.pid) {
        Ok(snapshot) => {
            let mut out = std::io::stdout().lock();
            // A reader that went away changes nothing.
            let _ = if stats.json {
                serde_json::to_writer(&mut out, &snapshot).map_err(std::io::Error::other).and_then(|()| writeln!(out))
            } else {
                write!(out, "{snapshot}")
            };
            0
        }
        Err(message) => {
            eprintln!("twoshot stats: process {}: {message}", stats.pid);
            1
        }
    }
}

fn read(pid: u32) -> Result<Snapshot, String> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let known = own_number(&process)?;
    let mut failure = "twoshot is not loaded, or no communicator has been made yet".to_owned();
    for path in pages(&process.join("fd"))? {
        match page(&path) {
            // A forked child holds its parent's.
            Ok(snapshot) if snapshot.pid != known => {
                failure = format!("the counters it holds are those of process {}", snapshot.pid);
            }
            Ok(snapshot) => return Ok(snapshot),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The number of a process in its own namespace of processes: the last one the kernel lists.
fn own_number(process: &Path) -> Result<u64, String> {
    let status = fs::read_to_string(process.join("status")).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such process".to_owned(),
        _ => error.to_string(),
    })?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.and_then(|all| all.split_whitespace().last()?.parse().ok()).ok_or("it has no number".to_owned())
}

/// Its open files with the name of the counters.
fn pages(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => "not permitted: be its user, or root".to_owned(),
        _ => error.to_string(),
    })?;
    let link = link_of(NAME);
    let named = |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.as_os_str() == link.as_str());
    Ok(entries.flatten().map(|entry| entry.path()).filter(named).collect())
}

/// The counters in such a file, which may be anything: no more than expected is read.
fn page(path: &Path) -> Result<Snapshot, String> {
    let mut bytes = Vec::new();
    let most = ((WORDS + 1) * size_of::<u64>()) as u64;
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take(most).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Snapshot::of_bytes(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_twoshot_and_a_process_that_is_none_are_one_clear_line() {
        assert_eq!(
            read(std::process::id()).unwrap_err(),
            "twoshot is not loaded, or no communicator has been made yet"
        );
        assert_eq!(read(u32::MAX).unwrap_err(), "there is no such process");
    }

    #[test]
    fn this_process_has_the_number_it_knows() {
        assert_eq!(own_number(Path::new("/proc/self")), Ok(u64::from(std::process::id())));
    }
}
