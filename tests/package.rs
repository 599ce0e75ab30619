//! The wheel, as a user meets it: made by scripts/package.py, installed by pip into a fresh environment, and switched on
//! by what it says itself.
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::Report;
use twoshot_sim::{Rank, Session, Topology, twoshot_library, worker};

const PROGRAM: &str = "random calls=8 seed=6 max=3000; destroy";

/// Opens the library under each of its names, and says how many times it is there.
const ONE_INSTANCE: &str = "
import ctypes, pathlib, twoshot
folder = pathlib.Path(twoshot.library()).parent
names = ['libnccl-net-twoshot.so', 'libnccl-tuner-twoshot.so', 'libtwoshot.so']
opened = [ctypes.CDLL(str(folder / name)) for name in names]
print(len({ctypes.cast(library.ncclNetPlugin_v10, ctypes.c_void_p).value for library in opened}))
";

#[track_caller]
fn succeed(command: &mut Command) -> String {
    let output = command.output().expect("the command was started");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// An environment that holds the wheel and nothing else.
fn install(folder: &Path) -> PathBuf {
    let built = folder.join("built");
    std::fs::create_dir(&built).expect("a folder");
    std::fs::copy(env!("CARGO_BIN_EXE_twoshot"), built.join("twoshot")).expect("the program");
    std::fs::copy(twoshot_library(), built.join("libtwoshot.so")).expect("the library");
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/package.py");
    let mut command = Command::new("python3");
    command.arg(package).arg("--from").arg(&built).arg("--out").arg(folder).args(["--strip", "strip --strip-debug"]);
    let made = succeed(&mut command);
    let wheel = made.lines().find(|line| line.ends_with(".whl")).expect("a wheel");
    let environment = folder.join("environment");
    succeed(Command::new("python3").args(["-m", "venv"]).arg(&environment));
    let pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps"];
    succeed(Command::new(environment.join("bin/python")).args(pip).arg(wheel));
    environment
}

/// Two ranks, each a shell that evaluates `words` before it becomes the program.
fn run(environment: &Path, words: &str, release: u32) {
    let session = Session::new(&Topology::one_host(2)).expect("a session directory");
    let bin = environment.join("bin");
    let library = succeed(Command::new(bin.join("python")).args(["-c", "import twoshot; print(twoshot.library())"]));
    let ranks: Vec<Rank> = session
        .ranks("sh")
        .into_iter()
        .enumerate()
        .map(|(r, rank)| {
            // The last variable is for the worker's own counting, and comes when the choice is made.
            rank.args(["-c", &format!("{words} env TWOSHOT_LIBRARY={} \"$0\" \"$@\"", library.trim())])
                .arg(worker())
                .args(["--rank", &r.to_string(), "--ranks", "2", "--device", "0", "--program", PROGRAM])
                .arg("--id")
                .arg(session.dir().join("unique-id"))
                .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
                .env("NCCL_DEBUG", "INFO")
                .env("TWOSHOT_SETUP_TIMEOUT_MS", "20000")
                .env("TWOSHOT_TIMEOUT_MS", "60000")
                .env("SIM_NCCL_VERSION", release.to_string())
        })
        .collect();
    let outcomes = session.run_all(ranks, Duration::from_secs(120)).expect("the ranks were started");
    let report = Report { session, outcomes };
    report.expect_success().expect_on().expect_nothing_live();
    for rank in 0..2 {
        assert_eq!(report.counters(rank), (8, 0), "{words} {release}: {}", report.outcomes[rank]);
    }
}

#[test]
fn the_wheel_in_a_fresh_environment_is_switched_on_by_its_env_module_its_command_and_its_name() {
    let session = Session::new(&Topology::one_host(1)).expect("a directory");
    let environment = install(session.dir());
    for release in [22304, 22809, 23007] {
        run(&environment, r#"eval "$(python -m twoshot.env)";"#, release);
    }
    for release in [22005, 22703, 23007] {
        run(&environment, r#"eval "$(python -m twoshot.env --door name)";"#, release);
    }
    let by_hand = r#"export NCCL_NET_PLUGIN=twoshot
        export LD_LIBRARY_PATH="$(dirname "$(python -c 'import twoshot; print(twoshot.library())')"):$LD_LIBRARY_PATH";"#;
    run(&environment, by_hand, 22809);
    run(&environment, "python -m twoshot.env", 23007);
    run(&environment, "twoshot run --door preload --", 23007);

    let python = environment.join("bin/python");
    assert_eq!(succeed(Command::new(&python).args(["-c", ONE_INSTANCE])).trim(), "1", "instances of the library");
    let printed = |words: &[&str]| succeed(Command::new(environment.join("bin/twoshot")).args(words));
    let env = |words: &[&str]| succeed(Command::new(&python).args(["-m", "twoshot.env"]).args(words));
    assert_eq!(env(&["--door", "preload"]), printed(&["run", "--door", "preload", "--print"]));
    assert_eq!(env(&["--print", "x", "--door"]), printed(&["run", "--print", "--", "x", "--door"]));
}
