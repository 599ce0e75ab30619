//! The counters as a file (`TWOSHOT_STATS`), for programs that nobody watches.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;

use crate::stats::Snapshot;
use crate::{counters, log, warning};

/// What the file says.
#[derive(Serialize)]
struct Record {
    version: &'static str,
    #[serde(flatten)]
    snapshot: Snapshot,
}

/// Writes the counters of this process. The file is whole at any time: it is written beside and renamed.
pub fn write(path: &Path) {
    if let Err(error) = counters::snapshot().map_err(io::Error::other).and_then(|snapshot| replace(path, snapshot)) {
        warning!(-1, "TWOSHOT_STATS={}: {error}", path.display());
    }
}

fn replace(path: &Path, snapshot: Snapshot) -> io::Result<()> {
    let path = log::named(&path.to_string_lossy());
    // A device or a pipe would be replaced, or written to while nobody reads.
    if fs::metadata(&path).is_ok_and(|there| !there.is_file()) {
        return Err(io::Error::other("there is something that is no file"));
    }
    let beside = format!("{path}.{}", std::process::id());
    let mut text = serde_json::to_vec(&Record { version: env!("CARGO_PKG_VERSION"), snapshot })?;
    text.push(b'\n');
    create(&beside)?.write_all(&text)?;
    fs::rename(&beside, path).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// A new file of this name. What is there, a link somebody laid or the rest of an older process, is taken away, never
/// followed.
fn create(path: &str) -> io::Result<File> {
    let new = || OpenOptions::new().write(true).create_new(true).open(path);
    new().or_else(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => fs::remove_file(path).and_then(|()| new()),
        _ => Err(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_named_after_the_process_and_nothing_else_stays() {
        let dir = std::env::temp_dir().join(format!("twoshot-record-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a directory");
        for _ in 0..2 {
            write(&dir.join("stats-%p.json"));
        }
        let names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [format!("stats-{}.json", std::process::id()).as_str()]);
        let text = std::fs::read(dir.join(&names[0])).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        assert_eq!(value["pid"], std::process::id());
        write(&dir.join("missing/stats.json"));
        std::fs::remove_dir_all(dir).expect("it was there");
    }

    #[test]
    fn a_link_in_the_way_is_not_followed_and_what_is_no_file_is_not_replaced() {
        let dir = std::env::temp_dir().join(format!("twoshot-hostile-{}", std::process::id()));
        fs::create_dir(&dir).expect("a directory");
        let (target, victim) = (dir.join("stats.json"), dir.join("victim"));
        fs::write(&victim, "precious").expect("written");
        let beside = dir.join(format!("stats.json.{}", std::process::id()));
        std::os::unix::fs::symlink(&victim, beside).expect("a link");
        let snapshot = || counters::snapshot().expect("its own layout");
        replace(&target, snapshot()).expect("written");
        assert_eq!(fs::read_to_string(&victim).expect("still there"), "precious");
        assert!(fs::symlink_metadata(&target).expect("written").is_file());
        // A folder, and a device as a socket stands for it.
        let socket = dir.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        for other in [&dir, &socket] {
            let error = replace(other, snapshot()).expect_err("refused").to_string();
            assert!(error.contains("no file"), "{error}");
        }
        assert!(!fs::symlink_metadata(&socket).expect("still there").is_file());
        assert_eq!(fs::read_dir(&dir).expect("a directory").count(), 3, "nothing else stays");
        fs::remove_dir_all(dir).expect("it was there");
    }
}
