//! Compiles the simulated libraries (`libcuda.so.1`, `libnvidia-ml.so.1`,
//! `libnccl.so.2`), the worker program and the driver's own test program into
//! `OUT_DIR`. Objects are kept, and compiled again only when their source or any
//! header is newer.

use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

const JOBS: usize = 2;

struct Target {
    /// File below `OUT_DIR`.
    output: &'static str,
    /// Name other programs link by, a symbolic link beside the output.
    link_name: Option<&'static str>,
    sources: Vec<PathBuf>,
    includes: Vec<PathBuf>,
    /// Macros to define.
    define: &'static [&'static str],
    link: Vec<OsString>,
}

fn main() {
    println!("cargo::rerun-if-env-changed=TWOSHOT_SIM_SKIP");
    // Lints are of the Rust code alone, and have a build directory of their own.
    if std::env::var_os("TWOSHOT_SIM_SKIP").is_some() {
        return;
    }
    let here = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR"));
    let root = here.join("../..");
    let include = root.join("include");
    let kernels = root.join("kernels");
    let dir = |name: &str| here.join(name);
    let map =
        |name: &str| -> OsString { format!("-Wl,--version-script={}", dir(name).join("exports.map").display()).into() };

    // Its own uses of its entries do not go through the symbol table.
    let symbolic = || OsString::from("-Wl,-Bsymbolic-functions");

    println!("cargo::rerun-if-env-changed=TWOSHOT_SIM_SANITIZE");
    for watched in [
        &include,
        &kernels,
        &dir("cuda"),
        &dir("nvml"),
        &dir("exec"),
        &dir("nccl"),
        &dir("worker"),
        &dir("late"),
        &dir("selftest"),
    ] {
        println!("cargo::rerun-if-changed={}", watched.display());
    }
    println!("cargo::rerun-if-changed={}", dir("plugin").display());
    println!("cargo::rerun-if-changed={}", dir("extension").display());
    fs::create_dir_all(out.join("lib/old")).expect("OUT_DIR/lib/old");
    fs::create_dir_all(out.join("bin")).expect("OUT_DIR/bin");

    let mut cuda = sources(&dir("cuda"));
    cuda.extend(sources(&dir("exec")));
    let nvml = ["session.cc", "topology.cc", "faults.cc", "stats.cc"].map(|f| dir("cuda").join(f));
    let mut targets = vec![
        Target {
            output: "lib/libcuda.so.1",
            link_name: Some("lib/libcuda.so"),
            sources: cuda,
            includes: vec![include.clone(), dir("cuda"), dir("exec"), kernels.clone()],
            define: &[],
            link: vec!["-shared".into(), "-Wl,-soname,libcuda.so.1".into(), symbolic(), map("cuda")],
        },
        Target {
            output: "lib/libnvidia-ml.so.1",
            link_name: Some("lib/libnvidia-ml.so"),
            sources: [sources(&dir("nvml")), nvml.to_vec()].concat(),
            includes: vec![include.clone(), dir("cuda")],
            define: &[],
            // It stays when it is closed: its counters and fault rules go on at the next opening.
            link: vec![
                "-shared".into(),
                "-Wl,-soname,libnvidia-ml.so.1".into(),
                "-Wl,-z,nodelete".into(),
                symbolic(),
                map("nvml"),
            ],
        },
    ];
    let nccl = sources(&dir("nccl"));
    if !nccl.is_empty() {
        let mut link: Vec<OsString> = vec!["-shared".into(), "-Wl,-soname,libnccl.so.2".into(), "-Wl,-z,lazy".into()];
        if dir("nccl").join("exports.map").exists() {
            link.push(map("nccl"));
        }
        link.push("-lcuda".into());
        link.push("-ldl".into());
        // The same without the functions that came after 2.20.
        targets.push(Target {
            output: "lib/old/libnccl.so.2",
            link_name: None,
            sources: nccl.clone(),
            includes: vec![include.clone(), dir("nccl")],
            define: &["SIM_NCCL_OLD"],
            link: link.clone(),
        });
        targets.push(Target {
            output: "lib/libnccl.so.2",
            link_name: Some("lib/libnccl.so"),
            sources: nccl,
            includes: vec![include.clone(), dir("nccl")],
            define: &[],
            link,
        });
        // What a program loads late.
        targets.push(Target {
            output: "lib/libsim_extension.so",
            link_name: None,
            sources: sources(&dir("extension")),
            includes: vec![include.clone()],
            define: &[],
            link: ["-shared", "-Wl,-z,now", "-Wl,-z,relro", "-lnccl"].map(Into::into).to_vec(),
        });
        // Another vendor's network plugin, which twoshot must get along with.
        targets.push(Target {
            output: "lib/libsim_collnet.so",
            link_name: None,
            sources: ["testplugin.cc", "testtuner.cc", "numeric.cc"].map(|file| dir("nccl").join(file)).to_vec(),
            includes: vec![include.clone(), dir("nccl")],
            define: &[],
            link: vec!["-shared".into()],
        });
        // A part of a program that is loaded late.
        targets.push(Target {
            output: "lib/libsim_late.so",
            link_name: None,
            sources: sources(&dir("late")),
            includes: vec![include.clone()],
            define: &[],
            link: ["-shared", "-Wl,-z,lazy", "-lnccl"].map(Into::into).to_vec(),
        });
    }
    let worker = sources(&dir("worker"));
    if !worker.is_empty() {
        targets.push(Target {
            output: "bin/sim_worker",
            link_name: None,
            sources: worker,
            includes: vec![include.clone(), dir("worker"), kernels.clone()],
            define: &[],
            link: ["-Wl,-z,lazy", "-lnccl", "-lcuda", "-ldl"].map(Into::into).to_vec(),
        });
    }
    targets.push(Target {
        output: "bin/sim_plugin",
        link_name: None,
        sources: sources(&dir("plugin")),
        includes: vec![include.clone(), dir("plugin")],
        define: &[],
        link: ["-Wl,-z,lazy", "-lcuda", "-ldl"].map(Into::into).to_vec(),
    });
    let mut executor = sources(&dir("exec"));
    executor.extend(["selftest.cc", "selftest_giving_up.cc", "selftest_payload.cc"].map(|name| dir("exec").join(name)));
    targets.push(Target {
        output: "bin/exec_selftest",
        link_name: None,
        sources: executor,
        includes: vec![dir("exec"), kernels.clone()],
        define: &[],
        link: Vec::new(),
    });
    targets.push(Target {
        output: "bin/sim_selftest",
        link_name: None,
        sources: sources(&dir("selftest")),
        includes: vec![include, kernels, dir("selftest")],
        define: &[],
        link: ["-Wl,-z,lazy", "-lcuda", "-lnvidia-ml"].map(Into::into).to_vec(),
    });
    build(&out, &targets);
}

fn var(name: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}

/// The C++ sources of a directory: those its `SOURCES` file lists, else all.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = match fs::read_to_string(dir.join("SOURCES")) {
        Ok(list) => list.split_whitespace().map(|name| dir.join(name)).collect(),
        Err(_) => files(dir).into_iter().filter(|p| p.extension().is_some_and(|e| e == "cc")).collect(),
    };
    found.sort();
    found
}

fn files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default()
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// When the newest file that is no translation unit was changed.
fn newest_header(includes: &[PathBuf]) -> SystemTime {
    let headers = includes.iter().flat_map(|dir| files(dir)).filter(|p| p.extension().is_none_or(|e| e != "cc"));
    headers.map(|p| modified(&p)).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

fn build(out: &Path, targets: &[Target]) {
    let mut tool = cc::Build::new();
    tool.cpp(true).opt_level(2).debug(true).pic(true).cargo_metadata(false).warnings(true).extra_warnings(true);
    tool.std("c++17").flag("-Werror").flag("-fvisibility=hidden").flag("-pthread").flag("-fno-strict-aliasing");
    // Every result is compared bit for bit: where the processor has fused multiply-add (64-bit Arm), none may be made.
    tool.flag("-ffp-contract=off");
    if let Ok(kind) = std::env::var("TWOSHOT_SIM_SANITIZE") {
        tool.flag(format!("-fsanitize={kind}")).flag("-fno-omit-frame-pointer");
    }
    let compiler = tool.get_compiler();

    let mut jobs: Vec<(PathBuf, Command)> = Vec::new();
    let mut objects: Vec<Vec<PathBuf>> = Vec::new();
    for target in targets {
        let headers = newest_header(&target.includes);
        let mut mine = Vec::new();
        for source in &target.sources {
            let mut command = compiler.to_command();
            for include in &target.includes {
                command.arg("-I").arg(include);
            }
            command.args(target.define.iter().map(|name| format!("-D{name}")));
            let mut hash = DefaultHasher::new();
            (format!("{command:?}"), source).hash(&mut hash);
            let stem = source.file_stem().expect("a file").to_string_lossy();
            let object = out.join(format!("{stem}.{:016x}.o", hash.finish()));
            let queued = jobs.iter().any(|(queued, _)| *queued == object);
            if !queued && modified(&object) <= modified(source).max(headers) {
                // Written under another name first: a build that is cut short leaves no half object.
                let partial = object.with_extension("partial");
                command.arg("-c").arg(source).arg("-o").arg(&partial);
                jobs.push((object.clone(), command));
            }
            mine.push(object);
        }
        objects.push(mine);
    }

    let queue = Mutex::new(jobs);
    std::thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                loop {
                    let Some((object, mut command)) = queue.lock().expect("no job panics with it").pop() else {
                        return;
                    };
                    let started = SystemTime::now();
                    let partial = object.with_extension("partial");
                    run(&mut command);
                    // As old as what was read: a header that changes meanwhile is newer.
                    fs::File::options()
                        .append(true)
                        .open(&partial)
                        .and_then(|file| file.set_modified(started))
                        .expect("a time");
                    fs::rename(&partial, &object).expect("the object was written");
                }
            });
        }
    });

    for (target, objects) in targets.iter().zip(&objects) {
        let output = out.join(target.output);
        let mut command = compiler.to_command();
        command.args(objects).arg("-o").arg(&output).arg("-L").arg(out.join("lib"));
        run(command.arg("-Wl,--no-as-needed").args(&target.link).arg("-Wl,-z,defs"));
        if let Some(name) = target.link_name {
            let link = out.join(name);
            let _ = fs::remove_file(&link);
            let file = output.file_name().expect("a file");
            std::os::unix::fs::symlink(file, &link).expect("a symbolic link in OUT_DIR");
        }
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?} failed");
}
