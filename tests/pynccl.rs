//! vLLM's own pynccl on the library: the wrapper is read out of vLLM's wheel on the package index at test time.
//!
//! Where the index cannot be reached the test says so and checks nothing; any other failure to read the wheel fails it.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use twoshot_sim::{Session, Topology, nccl, twoshot_library};

const FOLDER: &str = "vllm/distributed/device_communicators";
/// What `scripts/pypi.py` ends with when there is no index.
const UNREACHABLE: i32 = 75;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The Python that scripts/setup has made: it has a pip.
fn python() -> PathBuf {
    let own = root().join(".venv/bin/python");
    if own.exists() { own } else { PathBuf::from("python3") }
}

/// Reads one file out of a release's wheel; false where there is no index.
fn read_from_wheel(release: &str, member: &str, into: &Path) -> bool {
    let mut command = Command::new(python());
    command.arg(root().join("scripts/pypi.py")).arg(format!("vllm=={release}")).arg(member).arg(into);
    let output = command.output().expect("python runs");
    if output.status.code() == Some(UNREACHABLE) {
        eprintln!("NOT TESTED with vLLM {release}: {}", String::from_utf8_lossy(&output.stderr).trim());
        return false;
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

fn run(release: &str, members: &[&str]) {
    let session = Session::new(&Topology::one_host(2)).expect("a session directory");
    let files = session.dir().join("wheel");
    std::fs::create_dir(&files).expect("a folder");
    for member in members {
        let name = Path::new(member).file_name().expect("a file's name");
        if !read_from_wheel(release, member, &files.join(name)) {
            return;
        }
    }
    let count = 2;
    let ranks = session.ranks(python()).into_iter().enumerate().map(|(rank, process)| {
        process
            .arg(root().join("tests/pynccl/rank.py"))
            .arg(&files)
            .args([rank.to_string(), count.to_string()])
            .arg(session.dir().join("unique-id"))
            .env("VLLM_NCCL_SO_PATH", twoshot_library())
            .env("TWOSHOT_NCCL_LIBRARY", nccl())
            .env("TWOSHOT_SETUP_TIMEOUT_MS", "20000")
            .env("TWOSHOT_TIMEOUT_MS", "60000")
            .env("NCCL_DEBUG", "INFO")
    });
    let outcomes = session.run_all(ranks, Duration::from_secs(120)).expect("the ranks were started");
    let all: Vec<String> = outcomes.iter().map(ToString::to_string).collect();
    assert!(outcomes.iter().all(twoshot_sim::Outcome::succeeded), "{}", all.join("\n"));
    for outcome in &outcomes {
        assert!(outcome.stdout.contains(": ON,"), "not on: {outcome}");
        // Captured calls count once.
        assert!(outcome.stdout.contains("calls 6 routed 6 stock 0"), "not all were routed: {outcome}");
    }
}

#[test]
fn sums_of_the_newest_pynccl_are_routed_and_right_eager_and_captured() {
    run("0.33.0", &["vllm/utils/nccl.py", &format!("{FOLDER}/pynccl_wrapper.py")]);
}

#[test]
fn sums_of_an_old_pynccl_are_routed_and_right_eager_and_captured() {
    run("0.8.5", &[&format!("{FOLDER}/pynccl_wrapper.py")]);
}
