//! The GPUs of a host in what `twoshot doctor --json` prints: one line of hexadecimal digits each, which hold the very
//! blob that the ranks would exchange. Read back on another host, perhaps from a file that is something else.
#![forbid(unsafe_code)]

use serde_json::Value;

use crate::wire::{BLOB, Blob, Facts};

/// One GPU as a line.
pub fn line(facts: &Facts) -> String {
    facts.encode().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The GPU of a line.
pub fn facts(line: &str) -> Option<Facts> {
    let digits = line.as_bytes();
    if digits.len() != 2 * BLOB {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut blob: Blob = [0; BLOB];
    for (byte, pair) in blob.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
    }
    Facts::decode(&blob)
}

/// The GPUs of a report, or why it is none.
pub fn read(text: &[u8]) -> Result<Vec<Facts>, String> {
    let report: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let lines = report.get("gpus").and_then(Value::as_array).ok_or("no report of `twoshot doctor --json`")?;
    let one = |line: &Value| line.as_str().and_then(facts).ok_or("a GPU cannot be read: another version?");
    Ok(lines.iter().map(one).collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_comes_back_as_it_was_written_and_rubbish_does_not() {
        let known = Facts { ranks: 2, rank: 1, arch: 90, gpu: [3; 16], ..Facts::default() };
        let good = line(&known);
        assert_eq!(facts(&good), Some(known));
        for bad in ["", "zz", &good[2..], &format!("{good}00"), &"é".repeat(BLOB), &good.replacen('5', "+", 1)] {
            assert!(facts(bad).is_none(), "{bad}");
        }
        let text = serde_json::json!({ "gpus": [good, good] }).to_string();
        assert_eq!(read(text.as_bytes()), Ok(vec![known, known]));
    }

    #[test]
    fn whatever_is_no_report_is_one_line_that_says_so() {
        for text in
            [&b""[..], b"[]", b"3", b"{}", b"{\"gpus\":3}", b"{\"gpus\":[3]}", b"{\"gpus\":[\"00\"]}", &[0xff; 9]]
        {
            let error = read(text).expect_err("refused");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
