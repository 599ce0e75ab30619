//! Where the two libraries are: libtwoshot.so, and the stock NCCL that bench, doctor and run talk of.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

/// The name NCCL is linked and opened by.
pub const NCCL: &str = "libnccl.so.2";
const TWOSHOT: &str = "libtwoshot.so";

/// libtwoshot.so: the path given, `TWOSHOT_LIBRARY`, or the one beside this program or in `../lib`.
pub fn twoshot(given: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(path) = given.map(Path::to_owned).or_else(|| variable("TWOSHOT_LIBRARY")) {
        return existing(&path);
    }
    let executable = std::env::current_exe().map_err(|error| format!("this program's own path: {error}"))?;
    let folder = executable.parent().unwrap_or(Path::new("."));
    let candidates = candidates(folder);
    candidates.iter().find(|path| path.is_file()).map_or_else(
        || {
            let places: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
            Err(format!("no {TWOSHOT} at {}: give --library PATH or set TWOSHOT_LIBRARY", places.join(", ")))
        },
        |path| existing(path),
    )
}

fn candidates(folder: &Path) -> Vec<PathBuf> {
    let above = folder.parent().unwrap_or(folder);
    vec![folder.join(TWOSHOT), above.join("lib").join(TWOSHOT), above.join(TWOSHOT), folder.join("deps").join(TWOSHOT)]
}

fn existing(path: &Path) -> Result<PathBuf, String> {
    std::fs::canonicalize(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// A variable's path, if it is set and not empty.
pub fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Stock NCCLs in the order in which they are preferred: given, `TWOSHOT_NCCL_LIBRARY`, what the dynamic linker finds
/// (by name, so it may not exist), and the wheels of active Python environments.
pub fn nccl_candidates(given: Option<&Path>) -> Vec<PathBuf> {
    let explicit = given.map(Path::to_owned).or_else(|| variable("TWOSHOT_NCCL_LIBRARY"));
    if let Some(path) = explicit {
        return vec![path];
    }
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| variable(name));
    let wheels = environments
        .chain([PathBuf::from(".venv"), PathBuf::from("/usr/local"), PathBuf::from("/usr")])
        .flat_map(|root| in_wheels(&root));
    std::iter::once(PathBuf::from(NCCL)).chain(wheels).collect()
}

/// `<root>/lib/python3.*/{site,dist}-packages/nvidia/nccl/lib/libnccl.so.2`.
fn in_wheels(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else { return Vec::new() };
    let pythons = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
    let mut found: Vec<_> = pythons
        .flat_map(|python| ["site-packages", "dist-packages"].map(|folder| python.path().join(folder)))
        .map(|folder| folder.join("nvidia/nccl/lib").join(NCCL))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_was_given_is_the_only_candidate() {
        assert_eq!(nccl_candidates(Some(Path::new("/x/libnccl.so.2"))), [PathBuf::from("/x/libnccl.so.2")]);
    }

    #[test]
    fn the_library_is_looked_for_beside_the_program_and_in_its_lib_folder() {
        let places = candidates(Path::new("/opt/twoshot/bin"));
        assert!(places.contains(&PathBuf::from("/opt/twoshot/bin/libtwoshot.so")));
        assert!(places.contains(&PathBuf::from("/opt/twoshot/lib/libtwoshot.so")));
    }

    #[test]
    fn a_library_that_does_not_exist_is_an_error_that_names_it() {
        let error = twoshot(Some(Path::new("/nowhere/libtwoshot.so"))).unwrap_err();
        assert!(error.contains("/nowhere/libtwoshot.so"), "{error}");
    }
}
