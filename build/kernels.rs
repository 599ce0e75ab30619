//! kernels/kernels.cu -> PTX -> SASS per architecture -> one fat binary. What is linted is what is shipped: the
//! PTX that is archived is the PTX that is assembled and embedded.

use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use crate::toolchain;

/// A PTX target and the architectures that get SASS from it. sm_103 has nothing over sm_100 that the kernels use.
const TARGETS: [(&str, &[&str]); 2] = [("90", &["90"]), ("100", &["100", "103"])];
/// The PTX that goes in as well, for what comes after.
const EMBEDDED_PTX: &str = "100";

pub fn compile(root: &Path, out: &Path) -> Result<(), String> {
    let nvcc = toolchain::nvcc(root)?;
    // The compilers take minutes, and cargo gives every profile a folder of its own: the outputs are kept by their
    // inputs' digest beside the profiles.
    let sources = sources(root)?;
    println!("cargo::rustc-env=TWOSHOT_KERNEL_SOURCES={sources:016x}");
    let kept = beside_profiles(out).join("kernels").join(digest(sources, &nvcc)?);
    if !kept.join(IMAGE).is_file() {
        let fresh = out.join("kernels");
        let _ = fs::remove_dir_all(&fresh);
        fs::create_dir_all(&fresh).map_err(|error| format!("{}: {error}", fresh.display()))?;
        build(root, &nvcc, &fresh)?;
        publish(&fresh, &kept)?;
    }
    println!("cargo::rustc-env=TWOSHOT_PTX_DIR={}", kept.display());
    let image = out.join(IMAGE);
    fs::copy(kept.join(IMAGE), &image).map_err(|error| format!("{}: {error}", image.display()))?;
    let architectures: Vec<_> = TARGETS.iter().flat_map(|(_, architectures)| *architectures).copied().collect();
    let listed = out.join("architectures.rs");
    fs::write(&listed, format!("[{}]", architectures.join(", ")))
        .map_err(|error| format!("{}: {error}", listed.display()))?;
    Ok(())
}

const IMAGE: &str = "kernels.fatbin";

/// The target folder: OUT_DIR is `<target>/[<triple>/]<profile>/build/<package>/out`.
fn beside_profiles(out: &Path) -> &Path {
    out.ancestors().nth(4).unwrap_or(out)
}

/// Whole or not at all: another profile's build may be at the same.
fn publish(fresh: &Path, kept: &Path) -> Result<(), String> {
    let parent = kept.parent().unwrap_or(kept);
    fs::create_dir_all(parent).map_err(|error| format!("{}: {error}", parent.display()))?;
    match fs::rename(fresh, kept) {
        Err(_) if kept.join(IMAGE).is_file() => Ok(()),
        Err(error) => Err(format!("{}: {error}", kept.display())),
        Ok(()) => Ok(()),
    }
}

fn build(root: &Path, nvcc: &Path, archive: &Path) -> Result<(), String> {
    thread::scope(|scope| {
        let jobs: Vec<_> = TARGETS
            .iter()
            .map(|(target, architectures)| scope.spawn(move || one_target(nvcc, root, archive, target, architectures)))
            .collect();
        jobs.into_iter().try_for_each(|job| job.join().unwrap_or_else(|_| Err("a compile thread panicked".into())))
    })?;

    let mut fatbinary = Command::new(beside(nvcc, "fatbinary"));
    fatbinary.args(["-64", "--compress-all"]);
    fatbinary.arg(format!("--create={}", archive.join(IMAGE).display()));
    for arch in TARGETS.iter().flat_map(|(_, architectures)| *architectures) {
        let file = file(archive, "cubin", arch);
        fatbinary.arg(format!("--image3=kind=elf,sm={arch},file={}", file.display()));
    }
    let file = file(archive, "ptx", EMBEDDED_PTX);
    fatbinary.arg(format!("--image3=kind=ptx,sm={EMBEDDED_PTX},file={}", file.display()));
    run(&mut fatbinary).map(|_| ())
}

/// What the outputs depend on: the kernel sources, this file's commands, the compiler.
fn digest(sources: u64, nvcc: &Path) -> Result<String, String> {
    let mut hasher = std::hash::DefaultHasher::new();
    include_str!("kernels.rs").hash(&mut hasher);
    run(Command::new(nvcc).arg("--version"))?.hash(&mut hasher);
    sources.hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

/// FNV-1a, 64 bits, of the kernel sources: the same wherever the library is built, since ranks compare it.
fn sources(root: &Path) -> Result<u64, String> {
    let folder = root.join("kernels");
    let listed = fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut files: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for file in files {
        let name = file.file_name().unwrap_or_default().as_encoded_bytes();
        let text = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        for byte in [name, &[0], text.as_slice(), &[0]].concat() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    Ok(hash)
}

fn one_target(nvcc: &Path, root: &Path, archive: &Path, target: &str, architectures: &[&str]) -> Result<(), String> {
    let ptx = file(archive, "ptx", target);
    run(Command::new(nvcc)
        .args(["--ptx", "-std=c++17", "-O3", "--Werror", "all-warnings"])
        .args(["-Xcompiler", "-Wall,-Wextra,-Werror"])
        .arg(format!("-arch=compute_{target}"))
        .arg("-o")
        .arg(&ptx)
        .arg(root.join("kernels/kernels.cu")))?;
    for arch in architectures {
        let log = run(Command::new(beside(nvcc, "ptxas"))
            .args(["-v", "-O3", "--warning-as-error"])
            .arg(format!("-arch=sm_{arch}"))
            .arg("-o")
            .arg(file(archive, "cubin", arch))
            .arg(&ptx))?;
        let path = archive.join(format!("ptxas-sm_{arch}.log"));
        fs::write(&path, log).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

fn file(archive: &Path, kind: &str, arch: &str) -> PathBuf {
    archive.join(format!("kernels.sm_{arch}.{kind}"))
}

/// A tool of the same toolkit. nvcc itself may be a link into it.
fn beside(nvcc: &Path, tool: &str) -> PathBuf {
    let here = nvcc.with_file_name(tool);
    match fs::canonicalize(nvcc) {
        Ok(real) if !here.is_file() => real.with_file_name(tool),
        _ => here,
    }
}

/// Runs to the end; what it printed is the error's text, or the answer.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(text) } else { Err(format!("{name}: {}: {text}", output.status)) }
}
