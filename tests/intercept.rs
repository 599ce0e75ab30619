//! The doors, opened in real processes: small C programs, a fake NCCL, and libtwoshot.so as it ships. No GPU.
//!
//! The C sources are in tests/intercept/. Each test starts a program with a list of steps and reads what it prints; see
//! probe.c and slots.h.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// libtwoshot.so: named by the environment, or the one that was built together with this test.
fn twoshot() -> PathBuf {
    if let Some(path) = std::env::var_os("TWOSHOT_LIBRARY") {
        return PathBuf::from(path);
    }
    let test = std::env::current_exe().expect("this test's path");
    test.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("libtwoshot.so"))
        .find(|path| path.exists())
        .expect("libtwoshot.so beside or above this test")
}

fn compile(output: &Path, sources: &[&str], options: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiler = std::env::var_os("CC").unwrap_or_else(|| OsString::from("cc"));
    let done = Command::new(compiler)
        .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC"])
        .arg("-I")
        .arg(root.join("include"))
        .args(sources.iter().map(|name| root.join("tests/intercept").join(name)))
        .args(options)
        .arg("-o")
        .arg(output)
        .args(["-ldl"])
        .output()
        .expect("a C compiler");
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{}: {text}", output.display());
}

/// Everything the tests start, built once.
struct Built {
    folder: PathBuf,
}

impl Built {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain path").to_owned()
    }
}

fn built() -> &'static Built {
    static BUILT: OnceLock<Built> = OnceLock::new();
    BUILT.get_or_init(|| {
        // One folder per process: test runners start every test in a process of its own.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("intercept-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        for name in ["a", "b", "link"] {
            std::fs::create_dir_all(folder.join(name)).expect("a folder");
        }
        let built = Built { folder };
        let (a, b) = (built.text("a"), built.text("b"));
        let linked = |folder: &str, library: &str| {
            [format!("-L{folder}"), format!("-l:{library}"), format!("-Wl,-rpath,{folder}")]
        };
        let (to_a, to_b) = (linked(&a, "libnccl.so.2"), linked(&b, "libother.so"));
        let with = |first: &[&'static str], rest: &'static [String; 3]| -> Vec<&'static str> {
            first.iter().copied().chain(rest.iter().map(String::as_str)).collect()
        };
        let (to_a, to_b): (&'static _, &'static _) = (Box::leak(Box::new(to_a)), Box::leak(Box::new(to_b)));

        let soname = "-Wl,-soname,libnccl.so.2";
        compile(&built.path("a/libnccl.so.2"), &["fake_nccl.c"], &["-shared", soname]);
        let other = ["-shared", "-Wl,-soname,libother.so", "-DFAKE_VERSION=22005"];
        compile(&built.path("b/libother.so"), &["fake_nccl.c"], &other);
        let registers = ["-shared", soname, "-DSTOCK"];
        compile(&built.path("registers.so"), &["fake_nccl.c", "registers.c"], &registers);
        compile(&built.path("registers"), &["registers.c"], &[]);

        let lazy = ["-DLINKED", "-fplt", "-Wl,-z,lazy"];
        compile(&built.path("lazy"), &["probe.c"], &with(&lazy, to_a));
        let now = ["-DLINKED", "-fplt", "-Wl,-z,now,-z,relro"];
        compile(&built.path("now"), &["probe.c"], &with(&now, to_a));
        let pointer = ["-DLINKED", "-DPOINTER", "-fno-plt", "-Wl,-z,now,-z,relro"];
        compile(&built.path("pointer"), &["probe.c"], &with(&pointer, to_a));
        compile(&built.path("static"), &["probe.c", "fake_nccl.c"], &["-DLINKED"]);
        compile(&built.path("plain"), &["probe.c"], &[]);
        let user = ["-shared", "-fplt", "-Wl,-z,lazy"];
        compile(&built.path("user_a.so"), &["user.c"], &with(&user, to_a));
        compile(&built.path("user_b.so"), &["user.c"], &with(&user, to_b));
        std::os::unix::fs::symlink(twoshot(), built.path("link/libnccl.so.2")).expect("a link");
        built
    })
}

/// What a program printed on standard output and, apart, on standard error.
struct Run {
    out: String,
    error: String,
}

impl Run {
    /// Owners of one object's slot for a function, in the order printed.
    fn slot(&self, object: &str, function: &str) -> Vec<&str> {
        self.slot_lines(object, function).map(|(owner, _)| owner).collect()
    }

    fn slot_lines<'a>(&'a self, object: &str, function: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.out.lines().filter_map(move |line| {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["slot", o, _, f, owner, rights] if o == object && f == function => Some((owner, rights)),
                _ => None,
            }
        })
    }

    #[track_caller]
    fn has(&self, line: &str) {
        let found = self.out.lines().any(|printed| printed == line);
        assert!(found, "no line `{line}` in\n{}\n{}", self.out, self.error);
    }
}

#[track_caller]
fn run(program: &str, environment: &[(&str, &str)], steps: &[&str]) -> Run {
    let mut command = Command::new(built().path(program));
    for name in ["NCCL_NET_PLUGIN", "LD_PRELOAD", "LD_LIBRARY_PATH", "TWOSHOT_NCCL_LIBRARY"] {
        command.env_remove(name);
    }
    let done = command.envs(environment.iter().copied()).args(steps).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (status, run) = (done.status, Run { out: text(done.stdout), error: text(done.stderr) });
    assert!(status.success(), "{program} {steps:?}: {status}\n{}\n{}", run.out, run.error);
    run
}

const US: &str = "libtwoshot.so";
const STOCK: &str = "libnccl.so.2";

fn plugin() -> String {
    twoshot().to_str().expect("a plain path").to_owned()
}

#[test]
fn a_loaded_plugin_offers_no_network_and_reroutes_a_call_that_was_never_made() {
    let plugin = plugin();
    let steps = ["slots", "init", "slots", "call", "report"];
    let run = run("lazy", &[("NCCL_NET_PLUGIN", &plugin)], &steps);
    run.has("plugin twoshot result 0 devices 0");
    run.has("init 0");
    run.has("call 0");
    run.has("fake 22809 reductions 1 nested 1");
    assert_eq!(run.slot("program", "ncclAllReduce"), ["lazy", US]);
    assert_eq!(run.slot("program", "ncclCommInitRank"), ["lazy", US]);
}

#[test]
fn a_call_that_the_linker_bound_already_is_rerouted() {
    let plugin = plugin();
    let steps = ["call", "slots", "init", "slots", "call", "report"];
    let run = run("lazy", &[("NCCL_NET_PLUGIN", &plugin)], &steps);
    run.has("fake 22809 reductions 2 nested 1");
    assert_eq!(run.slot("program", "ncclAllReduce"), [STOCK, US]);
}

#[test]
fn slots_on_pages_made_read_only_are_rerouted_and_stay_read_only() {
    let plugin = plugin();
    for program in ["now", "pointer"] {
        let run = run(program, &[("NCCL_NET_PLUGIN", &plugin)], &["slots", "init", "slots", "call"]);
        let lines: Vec<_> = run.slot_lines("program", "ncclAllReduce").collect();
        assert_eq!(lines, [(STOCK, "ro"), (US, "ro")], "{program}");
        run.has("call 0");
    }
}

#[test]
fn a_function_pointer_taken_after_loading_leads_to_twoshot() {
    let plugin = plugin();
    let run = run("pointer", &[("NCCL_NET_PLUGIN", &plugin)], &["init", "pointer", "slots", "report"]);
    run.has("pointer 0");
    run.has("fake 22809 reductions 1 nested 1");
    assert_eq!(run.slot("program", "ncclAllReduce"), [US]);
}

#[test]
fn loading_the_plugin_twice_changes_nothing_more() {
    let plugin = plugin();
    let run = run("lazy", &[("NCCL_NET_PLUGIN", &plugin)], &["init", "slots", "init", "slots", "call"]);
    assert_eq!(run.slot("program", "ncclAllReduce"), [US, US]);
    run.has("call 0");
}

#[test]
fn a_library_opened_before_the_plugin_is_rerouted_and_one_opened_after_it_is_not() {
    let plugin = plugin();
    let user = built().text("user_a.so");
    let steps = ["open", &user, "slots", "user", "user_init", "slots", "user", "user_all_reduce"];
    let before = run("plain", &[("NCCL_NET_PLUGIN", &plugin)], &steps);
    before.has("user_all_reduce 0");
    assert_eq!(before.slot("user_a.so", "ncclAllReduce"), ["lazy", US]);

    // Opened later, it is left to stock NCCL: there is no later moment at which all ranks would reroute it.
    let steps =
        ["init", "open", &user, "slots", "user", "user_init", "slots", "call", "user", "user_all_reduce", "report"];
    let after = run("lazy", &[("NCCL_NET_PLUGIN", &plugin)], &steps);
    after.has("call 0");
    after.has("user_all_reduce 0");
    after.has("fake 22809 reductions 2 nested 2");
    assert_eq!(after.slot("user_a.so", "ncclAllReduce"), ["lazy", "lazy"]);
    assert_eq!(after.slot("program", "ncclAllReduce"), [US, US]);
}

#[test]
fn a_second_nccl_of_the_process_is_left_alone() {
    let plugin = plugin();
    let (a, b) = (built().text("user_a.so"), built().text("user_b.so"));
    let steps = [
        "open",
        &b,
        "user",
        "user_all_reduce",
        "open",
        &b,
        "open",
        &a,
        "user",
        "user_init",
        "slots",
        "user",
        "user_all_reduce",
    ];
    let run = run("plain", &[("NCCL_NET_PLUGIN", &plugin)], &steps);
    assert_eq!(run.slot("user_a.so", "ncclAllReduce"), [US]);
    assert_eq!(run.slot("user_b.so", "ncclAllReduce"), ["libother.so"]);
    // Never called, so the linker's decision has to be foreseen.
    assert_eq!(run.slot("user_b.so", "ncclCommInitRank"), ["lazy"]);
}

#[test]
fn preloaded_it_stands_before_the_stock_library_which_does_not_call_it_back() {
    let plugin = plugin();
    let run = run("lazy", &[("LD_PRELOAD", &plugin)], &["call", "slots", "init", "missing", "report"]);
    run.has("call 0");
    run.has("init 0");
    run.has("fake 22809 reductions 1 nested 1");
    assert_eq!(run.slot("program", "ncclAllReduce"), [US]);
    assert_eq!(run.slot(STOCK, "ncclGroupStart"), [STOCK]);
}

#[test]
fn preloaded_and_loaded_as_a_plugin_it_is_still_entered_once() {
    let plugin = plugin();
    let environment = [("LD_PRELOAD", plugin.as_str()), ("NCCL_NET_PLUGIN", plugin.as_str())];
    // Preloaded, our tables are withdrawn, so NCCL finds no plugin: the linker's own decision leads the call to us.
    let run = run("lazy", &environment, &["init", "call", "slots", "report"]);
    run.has("call 0");
    run.has("fake 22809 reductions 1 nested 1");
    assert_eq!(run.slot("program", "ncclAllReduce"), [US]);
}

#[test]
fn a_function_that_the_stock_library_lacks_is_invalid_usage_and_is_named() {
    let plugin = plugin();
    let run = run("lazy", &[("LD_PRELOAD", &plugin), ("NCCL_DEBUG", "WARN")], &["missing", "missing"]);
    let answers: Vec<_> = run.out.lines().filter(|line| line.starts_with("missing")).collect();
    assert_eq!(answers, ["missing 5", "missing 5"]);
    let lines = |text: &str| text.lines().filter(|line| line.contains("ncclGroupSimulateEnd")).count();
    assert_eq!(lines(&run.out) + lines(&run.error), 1, "{}", run.error);
}

#[test]
fn opened_by_path_it_passes_on_to_the_library_that_the_user_named() {
    let (plugin, stock) = (plugin(), built().text("a/libnccl.so.2"));
    let environment = [("TWOSHOT_NCCL_LIBRARY", stock.as_str())];
    run("plain", &environment, &["open", &plugin, "version"]).has("version 0 22809");
    let environment = [("TWOSHOT_NCCL_LIBRARY", "/nowhere/libnccl.so.2")];
    let wrong = run("plain", &environment, &["open", &plugin, "version"]);
    wrong.has("version 5 0");
    assert!(wrong.error.contains("/nowhere/libnccl.so.2"), "{}", wrong.error);
}

#[test]
fn opened_by_path_it_finds_the_library_that_is_loaded_already() {
    let (plugin, user) = (plugin(), built().text("user_b.so"));
    run("plain", &[], &["open", &user, "open", &plugin, "version"]).has("version 0 22005");
}

#[test]
fn a_link_with_nccls_name_finds_the_next_library_of_that_name() {
    let path = format!("{}:{}", built().text("link"), built().text("a"));
    let run = run("plain", &[("LD_LIBRARY_PATH", &path)], &["open", STOCK, "version"]);
    run.has("version 0 22809");
}

#[test]
fn a_link_with_nccls_name_and_nothing_behind_it_says_what_to_set() {
    let path = built().text("link");
    let run = run("plain", &[("LD_LIBRARY_PATH", &path)], &["open", STOCK, "version"]);
    run.has("version 5 0");
    assert!(run.error.contains("TWOSHOT_NCCL_LIBRARY"), "{}", run.error);
}

#[test]
fn a_path_to_twoshot_itself_is_refused() {
    let plugin = plugin();
    let run = run("plain", &[("TWOSHOT_NCCL_LIBRARY", &plugin)], &["open", &plugin, "version"]);
    run.has("version 5 0");
    assert!(run.error.contains("is twoshot itself"), "{}", run.error);
}

#[test]
fn an_nccl_linked_into_the_program_is_not_touched() {
    let plugin = plugin();
    let run = run("static", &[("NCCL_NET_PLUGIN", &plugin)], &["init", "slots", "call", "report"]);
    run.has("plugin twoshot result 0 devices 0");
    run.has("init 0");
    run.has("call 0");
    run.has("fake 22809 reductions 1 nested 1");
    assert_eq!(run.slot("program", "ncclAllReduce"), [""; 0]);
}

#[test]
fn a_jump_keeps_all_registers_and_the_stack() {
    let (plugin, stock) = (plugin(), built().text("registers.so"));
    let run = run("registers", &[("TWOSHOT_NCCL_LIBRARY", stock.as_str())], &[&plugin]);
    let line = "registers 400 385 115 variadic 11.0 team 1 2 1\n";
    assert_eq!(run.out, line.repeat(2));
}
