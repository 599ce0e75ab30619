//! Where the external tools are: nvcc and its neighbours, libclang. Looks, runs nothing but `cc`.

use std::env;
use std::path::{Path, PathBuf};

/// nvcc: `NVCC`, `CUDA_HOME`, `PATH`, then what `scripts/setup` installed.
pub fn nvcc(root: &Path) -> Result<PathBuf, String> {
    for variable in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let named = env::var_os("NVCC").filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = named {
        // A wrong word of the user is an error, not a reason to take another compiler.
        return if path.is_file() { Ok(path) } else { Err(format!("NVCC={} is not a file", path.display())) };
    }
    let home = env::var_os("CUDA_HOME").filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    home.map(|home| home.join("bin"))
        .into_iter()
        .chain(env::split_paths(&path))
        .chain(wheel_directories(root, "nvidia").into_iter().map(|package| package.join("bin")))
        .map(|bin| bin.join("nvcc"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            "nvcc was not found: set NVCC or CUDA_HOME, or run scripts/setup, which installs it into .venv".into()
        })
}

/// The directory of libclang's shared object if `scripts/setup` installed it and nobody named another.
pub fn libclang(root: &Path) -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed=LIBCLANG_PATH");
    if env::var_os("LIBCLANG_PATH").is_some() {
        return None;
    }
    wheel_directories(root, "clang").into_iter().find(|directory| directory.join("libclang.so").is_file())
}

/// The wheel of libclang has no headers of its own (stddef.h): the C compiler's serve as well.
pub fn compiler_headers() -> Option<PathBuf> {
    let output = std::process::Command::new("cc").arg("-print-file-name=include").output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.join("stddef.h").is_file().then_some(path)
}

/// The directories one level below `.venv/lib/python*/site-packages/<package>`.
fn wheel_directories(root: &Path, package: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in children(&root.join(".venv/lib")) {
        let mut directory = python.join("site-packages");
        directory.push(package);
        found.extend(children(&directory));
    }
    found
}

/// Sorted, so that two builds agree.
fn children(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(directory)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    found.sort();
    found
}
