//! The bounded share of fuzzing: every seed and every input that once failed, and mutations of them for a few seconds.
//! `scripts/fuzz` does the rest.
#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use targets::{ALL, Target};

/// For the mutations of all targets together.
const SHARE: Duration = Duration::from_secs(6);

fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let mut inputs = (target.seeds)();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions").join(target.name);
    if let Ok(entries) = fs::read_dir(folder) {
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        inputs.extend(paths.iter().map(|path| fs::read(path).expect("a regression can be read")));
    }
    inputs
}

/// Numbers that differ from run to run; the seed is printed, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit.max(1)
    }
}

/// A few changes as a fuzzer makes them: bytes, numbers at their limits, cuts, repeats and pieces of other inputs.
fn mutated(all: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = all[random.below(all.len())].clone();
    for _ in 0..=random.below(5) {
        let at = random.below(input.len() + 1);
        match random.below(6) {
            0 => input.insert(at, [0, 1, 0x7f, 0x80, 0xff, b'0', b'\n'][random.below(7)]),
            1 if at < input.len() => input[at] ^= 1 << random.below(8),
            2 => input.truncate(at),
            3 if at + 8 <= input.len() => {
                let word = [0, 1, u64::MAX, i64::MAX as u64, 1 << 32, u64::MAX - 7][random.below(6)];
                input[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            4 => {
                let other = &all[random.below(all.len())];
                let from = random.below(other.len() + 1);
                input.truncate(at);
                input.extend(&other[from..]);
            }
            _ if at < input.len() => input[at] = random.below(256) as u8,
            _ => {}
        }
    }
    input
}

#[test]
fn nothing_that_is_read_makes_a_reader_fail_badly() {
    // One test for all: some targets count the process's descriptors.
    let seed = std::env::var("TWOSHOT_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    println!("TWOSHOT_FUZZ_SEED={seed}");
    let mut random = Random(seed);
    for target in ALL {
        let all = inputs(target);
        assert!(!all.is_empty(), "{} has no seeds", target.name);
        for input in &all {
            (target.run)(input);
        }
        let (start, mut runs) = (Instant::now(), 0);
        while start.elapsed() < SHARE / ALL.len() as u32 {
            let input = mutated(&all, &mut random);
            let outcome = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(outcome.is_ok(), "{} fails on {:?}", target.name, input.escape_ascii().to_string());
            runs += 1;
        }
        println!("{}: {} inputs, {runs} mutations", target.name, all.len());
        assert!(runs > 50, "{} made only {runs} runs", target.name);
    }
}
