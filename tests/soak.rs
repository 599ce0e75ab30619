//! The bounded share of the soak: `scripts/soak` itself on simulated GPUs, for less than a minute.

use std::process::Command;

use twoshot_sim::{lib_dir, twoshot_library, worker};

fn soak(mode: &str, options: &[&str]) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/soak.py");
    let output = Command::new("python3")
        .args([script, mode, "--library"])
        .arg(twoshot_library())
        .arg("--worker")
        .arg(worker())
        .arg("--libs")
        .arg(lib_dir())
        .args(options)
        .output()
        .expect("python3");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

#[test]
fn whatever_programs_do_and_whoever_dies_results_are_right_and_nothing_is_left() {
    // `TWOSHOT_SOAK_SECONDS` is for nights; the seed is printed and new in every run.
    let seconds = std::env::var("TWOSHOT_SOAK_SECONDS").unwrap_or_else(|_| "25".to_owned());
    let said = soak("soak", &["--sim", "3", "--limit", &seconds]);
    println!("{said}");
    assert!(said.contains("round(s), all right"), "{said}");
}

#[test]
fn hosts_of_one_fabric_are_soaked_too() {
    let said = soak("soak", &["--sim", "2x2", "--limit", "12"]);
    assert!(said.contains("round(s), all right"), "{said}");
}

#[test]
fn the_checks_that_run_on_gpus_run_here() {
    let said = soak("kill", &["--sim", "2", "--rounds", "1", "--limit", "40"]);
    assert!(said.contains("kill: 1 round(s), all right"), "{said}");
    let said = soak("lifecycle", &["--sim", "2", "--rounds", "10", "--limit", "300"]);
    assert_eq!(said.matches("10 rounds through twoshot").count(), 2, "{said}");
    assert!(!said.contains("GROWS"), "{said}");
}

#[test]
fn the_check_of_nccls_releases_runs_here() {
    let output = Command::new("python3")
        .args([
            concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/gpu/releases_check"),
            "--sim",
            "2",
            "--doors",
            "plugin,path",
        ])
        .args(["--worker".as_ref(), worker().as_os_str(), "--libs".as_ref(), lib_dir().as_os_str()])
        .args([twoshot_library(), lib_dir().join("libnccl.so.2")])
        .env("SIM_NCCL_VERSION", "22809")
        .output()
        .expect("python3");
    let said = String::from_utf8_lossy(&output.stdout);
    let ran = "514 calls, 0 wrong, 438 routed";
    assert!(said.contains("releases_check: all right") && said.matches(ran).count() >= 2, "{said}");
}
