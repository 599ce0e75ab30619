//! Log lines in NCCL's shape, governed by NCCL's variables: one line per communicator at `INFO`, what went wrong
//! at `WARN`. Nothing is formatted unless it will be written.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

use parking_lot::Mutex;

/// NCCL's levels, as far as they matter here.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Level {
    /// Nothing.
    None,
    /// What went wrong.
    Warn,
    /// What was decided.
    Info,
    /// Every step of a set-up.
    Trace,
}

struct Sink {
    level: Level,
    host: String,
    file: Option<Mutex<File>>,
}

fn sink() -> &'static Sink {
    static SINK: OnceLock<Sink> = OnceLock::new();
    SINK.get_or_init(|| {
        let var = |name| crate::config::log_variable(name);
        let host = host();
        let file = var("NCCL_DEBUG_FILE")
            .and_then(|path| OpenOptions::new().create(true).append(true).open(named(&path)).ok());
        let level = level(var("NCCL_DEBUG").as_deref(), var("NCCL_DEBUG_SUBSYS").as_deref());
        Sink { level, host, file: file.map(Mutex::new) }
    })
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A path in which `%h` and `%p` stand for this host and this process, as in `NCCL_DEBUG_FILE`.
pub fn named(path: &str) -> String {
    path.replace("%h", &host()).replace("%p", &std::process::id().to_string())
}

/// The level that NCCL's two variables ask for.
fn level(debug: Option<&str>, subsystems: Option<&str>) -> Level {
    let level = match debug.map(str::to_ascii_uppercase).as_deref() {
        Some("WARN") => Level::Warn,
        Some("INFO" | "ABORT") => Level::Info,
        Some("TRACE") => Level::Trace,
        _ => return Level::None,
    };
    let Some(list) = subsystems.filter(|list| !list.is_empty()) else { return level };
    let list = list.to_ascii_uppercase();
    let (negate, list) = match list.strip_prefix('^') {
        Some(rest) => (true, rest.to_owned()),
        None => (false, list),
    };
    let named = list.split(',').any(|name| ["INIT", "COLL", "ALL"].contains(&name.trim()));
    if named == negate { level.min(Level::Warn) } else { level }
}

/// Whether lines of this level are written.
pub fn enabled(wanted: Level) -> bool {
    wanted <= sink().level
}

/// Writes one line; `device` is the CUDA ordinal, or -1.
pub fn write(wanted: Level, device: i32, message: fmt::Arguments<'_>) {
    if !enabled(wanted) {
        return;
    }
    let sink = sink();
    let word = if wanted == Level::Warn { "WARN" } else { "INFO" };
    let thread = rustix::thread::gettid().as_raw_nonzero();
    let line = format!("{}:{}:{thread} [{device}] NCCL {word} TWOSHOT {message}\n", sink.host, std::process::id());
    // A full disk or a closed pipe is no reason to disturb the program.
    let _ = match &sink.file {
        Some(file) => file.lock().write_all(line.as_bytes()),
        None => std::io::stdout().lock().write_all(line.as_bytes()),
    };
}

/// One `WARN` line.
#[macro_export]
macro_rules! warning {
    ($device:expr, $($message:tt)*) => {
        $crate::log::write($crate::log::Level::Warn, $device, format_args!($($message)*))
    };
}

/// One `INFO` line.
#[macro_export]
macro_rules! info {
    ($device:expr, $($message:tt)*) => {
        $crate::log::write($crate::log::Level::Info, $device, format_args!($($message)*))
    };
}

/// One line that only `NCCL_DEBUG=TRACE` shows.
#[macro_export]
macro_rules! trace {
    ($device:expr, $($message:tt)*) => {
        $crate::log::write($crate::log::Level::Trace, $device, format_args!($($message)*))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_follows_nccl_debug_and_its_subsystems() {
        assert_eq!(level(None, None), Level::None);
        assert_eq!(level(Some("version"), None), Level::None);
        assert_eq!(level(Some("warn"), None), Level::Warn);
        assert_eq!(level(Some("INFO"), None), Level::Info);
        assert_eq!(level(Some("INFO"), Some("INIT,NET")), Level::Info);
        assert_eq!(level(Some("INFO"), Some("NET")), Level::Warn);
        assert_eq!(level(Some("INFO"), Some("^INIT")), Level::Warn);
        assert_eq!(level(Some("INFO"), Some("^NET")), Level::Info);
    }
}
