//! A process that runs already: which NCCLs it has loaded, and whether twoshot is among them.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::{Findings, Mark};

/// The libraries of a process whose file names begin so, each once, in the order of their addresses.
fn loaded(maps: &str, name: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in maps.lines() {
        let Some(path) = line.find('/').map(|at| PathBuf::from(&line[at..])) else { continue };
        let is = path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
        if is && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

/// Looks at the process with this number.
pub fn examine(findings: &mut Findings, root: &Path, pid: u32) {
    let maps = match std::fs::read_to_string(root.join(format!("proc/{pid}/maps"))) {
        Ok(maps) => maps,
        Err(error) => return findings.add(Mark::Warn, "process", format!("{pid}: {error}")),
    };
    match &loaded(&maps, "libtwoshot.so")[..] {
        [] => findings.add(Mark::Warn, "process", format!("{pid} has not loaded twoshot (yet)")),
        [path, ..] => findings.add(Mark::Ok, "process", format!("{pid} has loaded {}", path.display())),
    }
    // Its plugins bear the same beginning.
    let mut nccls = loaded(&maps, "libnccl.so");
    nccls.sort();
    match &nccls[..] {
        [] => {
            findings.add(Mark::Warn, "process", format!("{pid} has loaded no libnccl.so: not yet, or it is linked in"))
        }
        [path] => findings.add(Mark::Ok, "process", format!("one NCCL: {}", path.display())),
        many => {
            let names: Vec<_> = many.iter().map(|path| path.display().to_string()).collect();
            let text = format!(
                "{} NCCLs in one process: {}. Only calls to one of them are routed; make the program use one",
                many.len(),
                names.join(", ")
            );
            findings.add(Mark::Warn, "process", text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_is_found_once_and_plugins_are_none() {
        let maps = "7f00-7f01 r-xp 0 00:00 1   /a/libnccl.so.2\n7f01-7f02 r--p 0 00:00 1   /a/libnccl.so.2\n\
                    7f03-7f04 r-xp 0 00:00 2   /b c/libnccl.so.2.28.9\n7f05-7f06 r-xp 0 00:00 3   /a/libnccl-net.so\n\
                    7f07-7f08 rw-p 0 00:00 0   [heap]\n7f09-7f0a rw-p 0 00:00 0\n";
        assert_eq!(loaded(maps, "libnccl.so"), [Path::new("/a/libnccl.so.2"), Path::new("/b c/libnccl.so.2.28.9")]);
    }
}
