//! The counters as a file (`TWOSHOT_STATS`), for programs that nobody watches.
#![forbid(unsafe_code)]

use std::io;
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
    let beside = format!("{path}.{}", std::process::id());
    let mut text = serde_json::to_vec(&Record { version: env!("CARGO_PKG_VERSION"), snapshot })?;
    text.push(b'\n');
    std::fs::write(&beside, text)?;
    std::fs::rename(&beside, path).inspect_err(|_| {
        let _ = std::fs::remove_file(&beside);
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
}
