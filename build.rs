//! Build script: the kernels become one fat binary, the C headers become Rust types.
//! It reads `kernels/` and `include/`, and writes under `OUT_DIR` and `<target>/kernels`.

#[path = "build/abi.rs"]
mod abi;
#[path = "build/kernels.rs"]
mod kernels;
#[path = "build/toolchain.rs"]
mod toolchain;

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    for path in ["build.rs", "build", "kernels", "include"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // Our own references to our exports must not be rebound to stock NCCL's functions of the same names; and slots that
    // lead here would dangle if the library were unloaded.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-Bsymbolic,-z,nodelete");
    // No data in pages that can run. Packages are linked with Zig's linker, which does not know the option: there a page
    // at the edge of the code may hold both.
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    if !std::env::var("RUSTC_LINKER").is_ok_and(|linker| linker.contains("zigcc")) {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,separate-code");
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // One line cargo shows without `-vv`.
            println!("cargo::error={}", message.replace('\n', " | "));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let root = directory("CARGO_MANIFEST_DIR")?;
    let out = directory("OUT_DIR")?;
    abi::generate(&root, &out)?;
    kernels::compile(&root, &out)
}

fn directory(variable: &str) -> Result<PathBuf, String> {
    std::env::var_os(variable).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {variable}"))
}
