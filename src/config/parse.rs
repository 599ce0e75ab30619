//! Parsing of single values. Every function is pure: the variable comes through a closure.
#![forbid(unsafe_code)]

use std::ffi::OsString;

/// A value that could not be understood.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("{name}={value}: {expected}")]
pub struct Invalid {
    name: &'static str,
    value: String,
    expected: String,
}

type Parsed<T> = Result<Option<T>, Invalid>;

/// The raw value; empty counts as unset, as for NCCL.
pub(super) fn text(var: &impl Fn(&str) -> Option<OsString>, name: &str) -> Option<OsString> {
    var(name).filter(|value| !value.is_empty())
}

fn with<T>(
    var: &impl Fn(&str) -> Option<OsString>,
    name: &'static str,
    expected: impl Fn() -> String,
    read: impl Fn(&str) -> Option<T>,
) -> Parsed<T> {
    let Some(value) = text(var, name) else { return Ok(None) };
    let value = value.to_string_lossy();
    match read(value.trim()) {
        Some(read) => Ok(Some(read)),
        // A hostile environment must neither flood the log nor break its lines.
        None => {
            let value = value.chars().take(80).flat_map(char::escape_debug).collect();
            Err(Invalid { name, value, expected: expected() })
        }
    }
}

/// One of a list of words, in any case.
pub(super) fn choice<T: Copy>(
    var: &impl Fn(&str) -> Option<OsString>,
    name: &'static str,
    words: &[(&str, T)],
) -> Parsed<T> {
    let expected = || format!("expected one of {}", words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", "));
    with(var, name, expected, |value| {
        words.iter().find(|(word, _)| word.eq_ignore_ascii_case(value)).map(|(_, choice)| *choice)
    })
}

/// `0` or `1`, and the usual words for them.
pub(super) fn switch(var: &impl Fn(&str) -> Option<OsString>, name: &'static str) -> Parsed<bool> {
    let words = [("0", false), ("1", true), ("off", false), ("on", true), ("false", false), ("true", true)];
    choice(var, name, &words)
}

/// A decimal number inside a range.
pub(super) fn integer(var: &impl Fn(&str) -> Option<OsString>, name: &'static str, low: u64, high: u64) -> Parsed<u64> {
    let expected = || format!("expected a number from {low} to {high}");
    with(var, name, expected, |value| value.parse().ok().filter(|n| (low..=high).contains(n)))
}

/// Bytes with an optional binary suffix: `4096`, `64K`, `4M`, `1G`.
pub(super) fn bytes(var: &impl Fn(&str) -> Option<OsString>, name: &'static str) -> Parsed<u64> {
    let expected = || "expected bytes, such as 65536, 64K or 4M (at most 1G)".to_owned();
    with(var, name, expected, |value| {
        let upper = value.to_ascii_uppercase();
        let digits = upper.trim_end_matches("IB").trim_end_matches('B');
        let (digits, shift) = match digits.as_bytes().last()? {
            b'K' => (&digits[..digits.len() - 1], 10),
            b'M' => (&digits[..digits.len() - 1], 20),
            b'G' => (&digits[..digits.len() - 1], 30),
            _ => (digits, 0),
        };
        let number: u64 = digits.trim().parse().ok()?;
        number.checked_mul(1 << shift).filter(|n| *n <= 1 << 30)
    })
}
