//! The counters of a simulated process.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

const SLOT: usize = 64;
const NAME: usize = 56;

/// Counters by name: `live.*` is what a process holds, `total.*` what it ever
/// held or did, `call.*` how often it called an entry, `own.*` how often the library
/// that `TWOSHOT_SIM_CALLER` names did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    values: BTreeMap<String, u64>,
}

impl Stats {
    /// Adds the table in `path`.
    pub(crate) fn read(&mut self, path: &Path) -> io::Result<()> {
        for slot in fs::read(path)?.chunks_exact(SLOT) {
            let (name, value) = slot.split_at(NAME);
            let length = name.iter().position(|&b| b == 0).unwrap_or(NAME);
            if length == 0 {
                break;
            }
            let name = String::from_utf8_lossy(&name[..length]).into_owned();
            let value = u64::from_ne_bytes(value.try_into().expect("eight bytes"));
            let sum = self.values.entry(name).or_default();
            *sum = sum.wrapping_add(value);
        }
        Ok(())
    }

    /// Adds another process's counters.
    pub fn add(&mut self, other: &Stats) {
        for (name, value) in &other.values {
            let sum = self.values.entry(name.clone()).or_default();
            *sum = sum.wrapping_add(*value);
        }
    }

    /// A counter by its full name; 0 when nothing ever touched it.
    pub fn get(&self, name: &str) -> u64 {
        self.values.get(name).copied().unwrap_or(0)
    }

    /// All counters.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.values.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// What is held now: `allocations`, `mappings`, `fds`, `streams`...
    pub fn live(&self, what: &str) -> u64 {
        self.get(&format!("live.{what}"))
    }

    /// What was ever held or done.
    pub fn total(&self, what: &str) -> u64 {
        self.get(&format!("total.{what}"))
    }

    /// How often an entry was called.
    pub fn calls(&self, entry: &str) -> u64 {
        self.get(&format!("call.{entry}"))
    }

    /// How often the entries whose names begin so were called.
    pub fn calls_beginning(&self, prefix: &str) -> u64 {
        let prefix = format!("call.{prefix}");
        self.values.iter().filter(|(name, _)| name.starts_with(&prefix)).map(|(_, value)| value).sum()
    }

    /// Everything that is held, by name.
    pub fn all_live(&self) -> Vec<(&str, u64)> {
        let live = self.values.iter().filter_map(|(name, value)| Some((name.strip_prefix("live.")?, *value)));
        live.filter(|(_, value)| *value != 0).collect()
    }

    /// Everything that is held and should not be: all but one module on each device, and one reference to the context
    /// that each is loaded into. A module may stay for the next communicator.
    pub fn left_behind(&self) -> Vec<(&str, u64)> {
        let modules = self.live("modules");
        let kept = |name| if ["modules", "contexts"].contains(&name) { modules } else { 0 };
        let left = self.all_live().into_iter().map(|(name, held)| (name, held.saturating_sub(kept(name))));
        left.filter(|(_, held)| *held > 0).collect()
    }

    /// # Panics
    /// When anything is left behind ([`Self::left_behind`]).
    #[track_caller]
    pub fn assert_nothing_live(&self) {
        self.assert_nothing_live_but(&[]);
    }

    /// # Panics
    /// When anything but these kinds is still held.
    #[track_caller]
    pub fn assert_nothing_live_but(&self, kinds: &[&str]) {
        let left: Vec<_> = self.left_behind().into_iter().filter(|(name, _)| !kinds.contains(name)).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}
