//! The tuning file: measured by `twoshot tune`, voted on by all ranks, and ignored by all where one cannot use it.
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Job, Report};
use serde_json::json;
use twoshot::table::{self, Row, World};
use twoshot::tuning::{FORMAT, Tuned, Tuning};
use twoshot_sim::{Session, Topology, nccl, twoshot_library};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("twoshot-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a folder");
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("text").to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The world of [`job`]: NCCL 2.28 on two GPUs of one host.
fn row() -> Tuned {
    Tuned {
        arch: 90,
        ranks: 2,
        hosts: 1,
        multicast: false,
        nccl: "2.28".to_owned(),
        oneshot_bytes: 8 << 10,
        twoshot_bytes: 32 << 10,
        bulk_bytes: 0,
        blocks: 3,
        note: None,
    }
}

fn write(folder: &Folder, name: &str, row: Tuned) -> String {
    let path = folder.file(name);
    let tuning = Tuning { format: FORMAT, rows: vec![row], collnet: Vec::new() };
    fs::write(&path, serde_json::to_vec(&tuning).expect("JSON")).expect("a file");
    path
}

/// One call of each route under the limits of [`row`]: 4 KB, 20 KB, 60 KB; all three are small enough for the table.
fn job() -> Job {
    let program = "allreduce count=1000; allreduce count=5000; allreduce count=15000; destroy";
    Job::new(Topology::one_host(2), program)
        .env("SIM_NCCL_VERSION", 22809)
        .env("TWOSHOT_MULTICAST", 0)
        .env("NCCL_DEBUG", "INFO")
}

#[track_caller]
fn line<'a>(report: &'a Report, rank: usize, word: &str) -> &'a str {
    let lines = report.lines(rank);
    let found: Vec<_> = lines.iter().filter(|line| line.contains(word)).collect();
    assert_eq!(found.len(), 1, "{word}: {}", report.outcomes[rank]);
    found[0]
}

/// What the built-in table says of the world of [`job`].
fn built_in() -> Row {
    table::row(World { ranks: 2, arch: 90, multicast: false, hosts: 1, nccl: 228 })
}

/// The built-in table is in force on all ranks, and the one that is the reason has said why.
#[track_caller]
fn expect_ignored(report: &Report, culprit: usize, why: &str) {
    report.expect_success().expect_on();
    let Row { oneshot_bytes, source, .. } = built_in();
    for rank in 0..report.outcomes.len() {
        let on = line(report, rank, ": ON,");
        assert!(on.contains(&format!("one-shot to {oneshot_bytes} B,")), "{on}");
        assert!(on.contains(&format!("table: {} (", source.name())), "{on}");
        assert!(on.ends_with(&format!("(tuning files ignored: rank {culprit}'s is unusable or not rank 0's)")), "{on}");
        let warned: Vec<_> = report.lines(rank).into_iter().filter(|line| line.contains("TUNING_FILE")).collect();
        assert_eq!(warned.len(), usize::from(rank == culprit), "{}", report.outcomes[rank]);
        assert!(warned.iter().all(|line| line.contains(why) && line.contains(" NCCL WARN ")), "{warned:?}");
    }
    assert_eq!(report.counters(0), (3, 0));
}

#[test]
fn the_limits_of_a_file_that_all_ranks_have_hold_on_all_ranks() {
    let folder = Folder::new("tuning-agreed");
    let report = job().env("TWOSHOT_TUNING_FILE", write(&folder, "t.json", row())).run();
    report.expect_success().expect_on();
    for rank in 0..2 {
        let on = line(&report, rank, ": ON,");
        for word in ["one-shot to 8192 B, two-shot to 32768 B, blocks 3,", "table: tuning file"] {
            assert!(on.contains(word), "{on}");
        }
        assert!(line(&report, rank, " ends: ").contains("oneshot 1, twoshot 1, stock 1 size=1"));
    }
}

#[test]
fn what_the_user_sets_by_variable_replaces_the_file() {
    let folder = Folder::new("tuning-variable");
    let job = job().env("TWOSHOT_TUNING_FILE", write(&folder, "t.json", row())).env("TWOSHOT_MAX_BYTES", "64K");
    let report = job.run();
    assert!(line(&report, 0, ": ON,").contains("one-shot to 8192 B, two-shot to 65536 B, blocks 3,"));
}

#[test]
fn a_file_that_leaves_everything_to_stock_is_obeyed() {
    let folder = Folder::new("tuning-nothing");
    let nothing = Tuned { oneshot_bytes: 0, twoshot_bytes: 0, ..row() };
    let report = job().env("TWOSHOT_TUNING_FILE", write(&folder, "t.json", nothing)).run();
    report.expect_success().expect_on();
    assert_eq!(report.counters(1), (0, 3));
}

#[test]
fn a_file_without_a_row_for_this_world_leaves_the_table_in_force_and_says_so() {
    let folder = Folder::new("tuning-world");
    let other = Tuned { nccl: "2.30".to_owned(), ..row() };
    let report = job().env("TWOSHOT_TUNING_FILE", write(&folder, "t.json", other)).run();
    let on = line(&report, 1, ": ON,");
    let said = format!("table: {} (the tuning file has no row for this world)", built_in().source.name());
    assert!(on.ends_with(&said), "{on}");
}

#[test]
fn files_that_differ_are_ignored_by_all_ranks() {
    let folder = Folder::new("tuning-differ");
    let (one, other) = (write(&folder, "1.json", row()), write(&folder, "2.json", Tuned { blocks: 4, ..row() }));
    let both = job().rank_env(0, "TWOSHOT_TUNING_FILE", &one).rank_env(1, "TWOSHOT_TUNING_FILE", &other).run();
    expect_ignored(&both, 1, "differs from rank 0's");
    let alone = job().rank_env(0, "TWOSHOT_TUNING_FILE", &one).run();
    expect_ignored(&alone, 1, "is not set on rank 1");
}

#[test]
fn a_bad_file_on_one_rank_is_named_in_one_line_and_ignored_by_all() {
    let folder = Folder::new("tuning-bad");
    let good = write(&folder, "good.json", row());
    let bad = folder.file("bad.json");
    for (text, why) in [
        (Some("{\"format\": 1,\n \"rows\": [{\"arch\": \"ninety\"}]}"), "invalid type"),
        (Some("\u{1b}[31m\0"), "expected value"),
        (None, "No such file"),
    ] {
        match text {
            Some(text) => fs::write(&bad, text).expect("a file"),
            None => fs::remove_file(&bad).expect("it was there"),
        }
        for rank in [0, 1] {
            let job =
                job().rank_env(rank, "TWOSHOT_TUNING_FILE", &bad).rank_env(1 - rank, "TWOSHOT_TUNING_FILE", &good);
            let report = job.run();
            expect_ignored(&report, rank, &format!("TWOSHOT_TUNING_FILE={bad}: {why}"));
        }
    }
}

/// Two simulated GPUs for `twoshot tune`.
fn places(session: &Session, folder: &Folder) -> String {
    let place = |rank: u32| {
        json!({"device": 0, "environment": {
            "LD_LIBRARY_PATH": session.libraries(), "TWOSHOT_SIM_DIR": session.dir(), "TWOSHOT_SIM_HOST": "0",
            "TWOSHOT_SIM_RANK": rank.to_string(), "TWOSHOT_HOST_ID": "sim-host-0", "NCCL_HOSTID": "sim-host-0",
            "CUDA_VISIBLE_DEVICES": rank.to_string(), "SIM_NCCL_VERSION": "22809", "TWOSHOT_MULTICAST": "0",
        }})
    };
    let path = folder.file("places.json");
    fs::write(&path, serde_json::to_vec(&json!([place(0), place(1)])).expect("JSON")).expect("a file");
    path
}

fn tune(folder: &Folder, args: &[&str]) -> Output {
    let session = Session::new(&Topology::one_host(2)).expect("a session");
    let places = places(&session, folder);
    let mut command = Command::new(env!("CARGO_BIN_EXE_twoshot"));
    for (name, _) in std::env::vars_os() {
        if ["TWOSHOT_", "NCCL_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    // What the caller has set must not bend the measurement.
    command.env("TWOSHOT_ALGO", "twoshot").env("TWOSHOT_MAX_BYTES", "1K").env("TWOSHOT_TUNING_FILE", "/nowhere");
    command.args(["tune", "--places", &places, "--library"]).arg(twoshot_library()).arg("--nccl").arg(nccl());
    command.args(["--blocks", "1,2", "--min", "1K", "--max", "4K", "--repetitions", "1", "--calls", "2"]);
    command.args(args).stdin(Stdio::null()).output().expect("tune starts")
}

#[test]
fn tune_measures_every_forced_algorithm_and_budget_and_writes_nothing_that_a_simulator_timed() {
    let folder = Folder::new("tune-refuses");
    let (out, records) = (folder.file("t.json"), folder.file("records"));
    let output = tune(&folder, &["--out", &out, "--keep", &records]);
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{said}{complained}");
    assert!(said.contains("These times mean nothing: the mode was \"simulated\"."), "{said}");
    assert!(complained.contains("not written from times that mean nothing"), "{complained}");
    assert!(!Path::new(&out).exists());
    let mut names: Vec<_> = fs::read_dir(&records).expect("records").map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["oneshot-1-4096.json", "oneshot-2-4096.json", "twoshot-1-4096.json", "twoshot-2-4096.json"]);
    for name in names {
        let name = name.to_str().expect("text");
        let text = fs::read(Path::new(&records).join(name)).expect("a record");
        let record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        let (algorithm, blocks) = name.trim_end_matches("-4096.json").split_once('-').expect("two words");
        assert_eq!(record["environment"]["TWOSHOT_ALGO"], algorithm);
        let agreed = &record["agreed"];
        assert_eq!(agreed["blocks"].to_string(), blocks);
        let (ranks, hosts, multicast) = (&agreed["ranks"], &agreed["hosts"], &agreed["multicast"]);
        assert_eq!((ranks, hosts, multicast, &agreed["nccl"]), (&json!(2), &json!(1), &json!(false), &json!(228)));
        assert_eq!(agreed["oneshot_bytes"], if algorithm == "oneshot" { 4096 } else { 0 });
        let rows = record["rows"].as_array().expect("rows");
        assert!(rows.len() == 3 && rows.iter().all(|row| row["route"] == "routed" && row["wrong_routed"] == 0));
    }
}

#[test]
fn what_tune_writes_is_what_the_ranks_then_use() {
    let folder = Folder::new("tune-writes");
    let out = write(&folder, "t.json", Tuned { ranks: 5, ..row() });
    let records = folder.file("records");
    let output = tune(&folder, &["--out", &out, "--keep", &records, "--simulated"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("sm_90, 2 ranks, 1 host(s), unicast, NCCL 2.28"), "{said}");
    let tuning = Tuning::parse(&fs::read(&out).expect("the file")).expect("a tuning file");
    assert_eq!(tuning.rows.iter().map(|row| row.ranks).collect::<Vec<_>>(), [5, 2], "rows of other worlds stay");
    let found = &tuning.rows[1];
    assert!(found.note.as_ref().is_some_and(|note| note.starts_with("simulated: these times mean nothing; ")));
    // The records alone lead to the same row.
    let (again, mut args) = (folder.file("again.json"), vec!["--simulated", "--out"]);
    args.push(&again);
    args.push("--from");
    let kept: Vec<_> = fs::read_dir(&records).expect("records").map(|e| e.unwrap().path()).collect();
    args.extend(kept.iter().map(|path| path.to_str().expect("text")));
    let output = tune(&folder, &args);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let same = Tuning::parse(&fs::read(&again).expect("the file")).expect("a tuning file");
    let limits = |row: &Tuned| (row.oneshot_bytes, row.twoshot_bytes, row.blocks);
    assert_eq!(limits(&same.rows[0]), limits(found));
    let report = job().env("TWOSHOT_TUNING_FILE", &out).run();
    let expected = format!(
        "one-shot to {} B, two-shot to {} B, blocks {},",
        found.oneshot_bytes, found.twoshot_bytes, found.blocks
    );
    let on = line(&report, 0, ": ON,");
    assert!(on.contains(&expected) && on.ends_with("table: tuning file"), "{on}");
}
