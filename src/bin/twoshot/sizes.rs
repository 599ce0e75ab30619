//! Byte sizes as people write them: `64K`, `1M`, lists and ranges of them.
#![forbid(unsafe_code)]

/// Reads one size: a number with an optional suffix K, M or G (powers of 1024; `KiB` and `kb` mean the same).
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err(format!("`{text}` is no size: use a number with K, M or G")),
    };
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is no size: it begins with no number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` does not fit 64 bits"))
}

/// The largest unit that divides it: `64K`, `1M`, `1000`.
pub fn format(bytes: u64) -> String {
    for (shift, unit) in [(30, "G"), (20, "M"), (10, "K")] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Powers of two from `min` to `max`, both included where they are on the way.
pub fn doubling(min: u64, max: u64) -> Vec<u64> {
    std::iter::successors(Some(min.max(1)), |size| size.checked_mul(2)).take_while(|size| *size <= max).collect()
}

/// Whole elements only: a size that is no multiple of the element is rounded up to one.
pub fn elements(bytes: u64, element: u64) -> u64 {
    bytes.div_ceil(element)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024_in_any_case() {
        let cases = [("8", 8), ("64K", 64 << 10), ("1m", 1 << 20), ("2GiB", 2 << 30), (" 3 kb ", 3 << 10), ("7b", 7)];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "K", "-1", "1.5K", "1T", "99999999999G", "12 34"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_formatted_size_reads_back_as_itself() {
        for bytes in [0, 1, 8, 1000, 1024, 1536, 1 << 20, 3 << 20, 1 << 30, 5 << 30] {
            assert_eq!(parse(&format(bytes)), Ok(bytes));
        }
        assert_eq!(format(64 << 10), "64K");
    }

    #[test]
    fn doubling_ends_at_its_maximum() {
        assert_eq!(doubling(8, 64), [8, 16, 32, 64]);
        assert_eq!(doubling(8, 63), [8, 16, 32]);
        assert_eq!(doubling(0, 2), [1, 2]);
        assert!(doubling(16, 8).is_empty());
    }
}
