//! `twoshot run -- COMMAND`: starts a program with what switches twoshot on, and nothing else.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, ValueEnum};

use crate::{library, measure};

/// Start a command with twoshot switched on
#[derive(Args, Debug)]
pub struct Run {
    /// How twoshot gets in
    #[arg(long, value_enum, default_value_t = Door::Plugin)]
    door: Door,
    /// libtwoshot.so [default: $TWOSHOT_LIBRARY, else the one installed with this program]
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// Stock NCCL for the door `path` [default: $TWOSHOT_NCCL_LIBRARY, $VLLM_NCCL_SO_PATH, else libnccl.so.2]
    #[arg(long, value_name = "PATH")]
    nccl: Option<PathBuf>,
    /// Print the variables and the command, start nothing; without a command: lines for the shell's `eval`
    #[arg(long)]
    print: bool,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required_unless_present = "print", value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// The ways into NCCL.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Door {
    /// NCCL loads it as its network plugin (NCCL_NET_PLUGIN)
    Plugin,
    /// The same by its name and LD_LIBRARY_PATH, for NCCL 2.20 and 2.27.3, which take no path
    Name,
    /// The dynamic linker loads it first (LD_PRELOAD)
    Preload,
    /// The program opens it in place of NCCL (VLLM_NCCL_SO_PATH), as vLLM does
    Path,
    /// NCCL's plugin interface alone, nothing bound (TWOSHOT_MODE=collnet); see docs/official-door.md
    Collnet,
}

/// Becomes the command; returns only when it could not.
pub fn main(run: &Run) -> i32 {
    match start(run) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("twoshot run: {message}");
            2
        }
    }
}

fn start(run: &Run) -> Result<i32, String> {
    let library = library::twoshot(run.library.as_deref())?;
    let stock = match run.door {
        Door::Plugin | Door::Preload | Door::Collnet => None,
        Door::Name if !library.with_file_name(BY_NAME).is_file() => {
            return Err(format!("no {BY_NAME} beside {}; a link of that name to it will do", library.display()));
        }
        Door::Name => None,
        Door::Path => Some(stock(run, &library)?),
    };
    let settings = compose(run.door, &library, stock.as_deref(), |name| std::env::var_os(name));
    if run.print {
        let line = if run.command.is_empty() { exports(&settings) } else { shell(&settings, &run.command) };
        let _ = writeln!(std::io::stdout().lock(), "{line}");
        return Ok(0);
    }
    let (program, arguments) = run.command.split_first().ok_or("no command")?;
    let error = Command::new(program).args(arguments).envs(settings).exec();
    eprintln!("twoshot run: {}: {error}", program.to_string_lossy());
    // What a shell returns.
    Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
}

/// The library that `ncclAllReduce` is to go on to: what the program would have opened without us.
fn stock(run: &Run, library: &Path) -> Result<PathBuf, String> {
    let before = library::variable("VLLM_NCCL_SO_PATH").filter(|path| !same_file(path, library));
    let given = run.nccl.clone().or_else(|| library::variable("TWOSHOT_NCCL_LIBRARY")).or(before);
    measure::stock(given.as_deref()).map(|(path, _)| path)
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((std::fs::canonicalize(a), std::fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

/// What NCCL makes of `NCCL_NET_PLUGIN=twoshot`.
const BY_NAME: &str = "libnccl-net-twoshot.so";

/// What NCCL has to be told beside the plugin's name, unless the user has told it something else. The last one: NCCL cuts
/// sends between nodes into pieces of 128 KiB, and every piece costs its progress thread microseconds (16 MiB: 1345 us, with
/// this 500, 2 H100). The library itself cannot say so: NCCL asks the environment, which a plugin must not change under a
/// running program's threads.
const OFFICIAL: [(&str, &str); 7] = [
    ("TWOSHOT_MODE", "collnet"),
    ("NCCL_COLLNET_ENABLE", "1"),
    ("NCCL_MNNVL_ENABLE", "0"),
    ("NCCL_NET_GDR_LEVEL", "SYS"),
    ("CUDA_MODULE_LOADING", "EAGER"),
    ("NCCL_P2P_NET_CHUNKSIZE", "524288"),
    ("NCCL_MIN_NCHANNELS", "8"),
];

/// The variables that a door needs, given those that are set.
fn compose(
    door: Door,
    library: &Path,
    stock: Option<&Path>,
    var: impl Fn(&str) -> Option<OsString>,
) -> Vec<(&'static str, OsString)> {
    let ahead = |name: &str, first: &OsStr, separator: &str| {
        let mut list = first.to_owned();
        if let Some(before) = var(name).filter(|value| !value.is_empty()) {
            let listed = before.to_string_lossy().split([',', ':', ' ']).any(|entry| OsStr::new(entry) == first);
            if listed {
                return before;
            }
            list.push(separator);
            list.push(before);
        }
        list
    };
    let path = library.as_os_str();
    match door {
        Door::Plugin => vec![("NCCL_NET_PLUGIN", ahead("NCCL_NET_PLUGIN", path, ","))],
        Door::Name => {
            let folder = library.parent().unwrap_or(Path::new("/")).as_os_str();
            vec![
                ("NCCL_NET_PLUGIN", ahead("NCCL_NET_PLUGIN", OsStr::new("twoshot"), ",")),
                ("LD_LIBRARY_PATH", ahead("LD_LIBRARY_PATH", folder, ":")),
            ]
        }
        Door::Preload => vec![("LD_PRELOAD", ahead("LD_PRELOAD", path, ":"))],
        Door::Collnet => {
            let unset = |name: &str| var(name).is_none_or(|value| value.is_empty());
            let told = OFFICIAL.iter().filter(|(name, _)| unset(name)).map(|(name, value)| (*name, value.into()));
            [("NCCL_NET_PLUGIN", ahead("NCCL_NET_PLUGIN", path, ","))].into_iter().chain(told).collect()
        }
        Door::Path => {
            let mut settings = vec![("VLLM_NCCL_SO_PATH", library.into())];
            settings.extend(stock.map(|stock| ("TWOSHOT_NCCL_LIBRARY", stock.into())));
            settings
        }
    }
}

/// A line for a shell.
fn shell(settings: &[(&str, OsString)], command: &[OsString]) -> String {
    let settings = settings.iter().map(|(name, value)| format!("{name}={}", quoted(value)));
    settings.chain(command.iter().map(|word| quoted(word))).collect::<Vec<_>>().join(" ")
}

/// Lines for a shell's `eval`.
fn exports(settings: &[(&str, OsString)]) -> String {
    let lines = settings.iter().map(|(name, value)| format!("export {name}={}", quoted(value)));
    lines.collect::<Vec<_>>().join("\n")
}

fn quoted(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: &str = "/opt/twoshot/lib/libtwoshot.so";

    fn composed(door: Door, stock: Option<&str>, set: &[(&str, &str)]) -> Vec<(&'static str, String)> {
        let var = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        let settings = compose(door, Path::new(LIBRARY), stock.map(Path::new), var);
        settings.into_iter().map(|(name, value)| (name, value.to_string_lossy().into_owned())).collect()
    }

    #[test]
    fn the_plugin_door_goes_ahead_of_the_sites_own_plugins() {
        assert_eq!(composed(Door::Plugin, None, &[]), [("NCCL_NET_PLUGIN", LIBRARY.to_owned())]);
        let with = composed(Door::Plugin, None, &[("NCCL_NET_PLUGIN", "aws-ofi,gcp")]);
        assert_eq!(with, [("NCCL_NET_PLUGIN", format!("{LIBRARY},aws-ofi,gcp"))]);
        assert_eq!(composed(Door::Plugin, None, &[("NCCL_NET_PLUGIN", "")]), [("NCCL_NET_PLUGIN", LIBRARY.to_owned())]);
    }

    #[test]
    fn a_door_that_is_open_already_is_not_opened_twice() {
        let plugins = format!("other,{LIBRARY}");
        assert_eq!(composed(Door::Plugin, None, &[("NCCL_NET_PLUGIN", &plugins)]), [("NCCL_NET_PLUGIN", plugins)]);
        assert_eq!(composed(Door::Preload, None, &[("LD_PRELOAD", LIBRARY)]), [("LD_PRELOAD", LIBRARY.to_owned())]);
    }

    #[test]
    fn by_name_the_folder_goes_ahead_on_the_search_path() {
        let folder = ("LD_LIBRARY_PATH", "/opt/twoshot/lib".to_owned());
        assert_eq!(composed(Door::Name, None, &[]), [("NCCL_NET_PLUGIN", "twoshot".to_owned()), folder]);
        let set = [("NCCL_NET_PLUGIN", "aws-ofi"), ("LD_LIBRARY_PATH", "/opt/x")];
        let [plugin, folder] = &composed(Door::Name, None, &set)[..] else { panic!("two variables") };
        assert_eq!((&*plugin.1, &*folder.1), ("twoshot,aws-ofi", "/opt/twoshot/lib:/opt/x"));
    }

    #[test]
    fn the_official_door_tells_nccl_what_it_needs_and_leaves_what_the_user_has_said() {
        let all = composed(Door::Collnet, None, &[("TWOSHOT_MAX_BLOCKS", "8")]);
        assert_eq!(all[0], ("NCCL_NET_PLUGIN", LIBRARY.to_owned()));
        assert_eq!(all[1..], OFFICIAL.map(|(name, value)| (name, value.to_owned())));
        let set = [("NCCL_P2P_NET_CHUNKSIZE", "262144"), ("NCCL_NET_GDR_LEVEL", "SYS"), ("TWOSHOT_MODE", "")];
        let names: Vec<_> = composed(Door::Collnet, None, &set).into_iter().map(|(name, _)| name).collect();
        assert!(!names.contains(&"NCCL_P2P_NET_CHUNKSIZE") && !names.contains(&"NCCL_NET_GDR_LEVEL"));
        assert!(names.contains(&"TWOSHOT_MODE") && names.len() == 6);
    }

    #[test]
    fn preload_keeps_what_others_preload() {
        let with = composed(Door::Preload, None, &[("LD_PRELOAD", "/usr/lib/libjemalloc.so")]);
        assert_eq!(with, [("LD_PRELOAD", format!("{LIBRARY}:/usr/lib/libjemalloc.so"))]);
    }

    #[test]
    fn the_path_door_names_the_library_and_the_stock_one_behind_it() {
        let with = composed(Door::Path, Some("/x/libnccl.so.2"), &[("VLLM_NCCL_SO_PATH", "/x/libnccl.so.2")]);
        let expected =
            [("VLLM_NCCL_SO_PATH", LIBRARY.to_owned()), ("TWOSHOT_NCCL_LIBRARY", "/x/libnccl.so.2".to_owned())];
        assert_eq!(with, expected);
    }

    #[test]
    fn without_a_command_the_variables_are_lines_to_evaluate() {
        let settings = [("A", OsString::from("/x y")), ("B", OsString::from("z"))];
        assert_eq!(exports(&settings), "export A='/x y'\nexport B=z");
    }

    #[test]
    fn a_printed_line_survives_a_shell() {
        let words = ["python", "a b.py", "it's", ""].map(OsString::from);
        assert_eq!(shell(&[("A", "/x y".into())], &words), r"A='/x y' python 'a b.py' 'it'\''s' ''");
    }
}
