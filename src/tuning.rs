//! The tuning file (`TWOSHOT_TUNING_FILE`): cross-over rows that `twoshot tune` measured on the user's own machine.
//!
//! A file is taken whole or not at all, and by all ranks or by none: every rank states [`Tuning::digest`] in the first
//! vote, and what the ranks do not have in common is not used.
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::layout::MAX_BLOCKS;
use crate::table::{Row, Source, World};

/// Version of the file's format.
pub const FORMAT: u32 = 1;
/// A larger file is something else.
pub const MOST_BYTES: u64 = 1 << 20;
/// The largest payload limit, that of the variables too.
const MOST_PAYLOAD: u64 = 1 << 30;

/// A tuning file.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// [`FORMAT`].
    pub format: u32,
    /// One row per world; no world twice.
    pub rows: Vec<Tuned>,
    /// Where the official door's tuner prefers CollNet; no ranks and hosts twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub collnet: Vec<Preferred>,
}

/// Sizes of AllReduce for which CollNet was measured to win. NCCL tells a tuner of ranks and nodes, and of nothing else.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Preferred {
    /// Ranks of the communicator.
    pub ranks: u32,
    /// What NCCL holds for hosts among them.
    pub hosts: u32,
    /// Smallest payload, in bytes.
    pub from_bytes: u64,
    /// Largest payload.
    pub to_bytes: u64,
    /// Where it comes from, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Preferred {
    fn check(&self) -> Result<(), &'static str> {
        if self.ranks < 2 || self.hosts < 1 || self.hosts > self.ranks {
            return Err("`ranks` and `hosts` do not go together");
        }
        if self.from_bytes > self.to_bytes {
            return Err("`from_bytes` is above `to_bytes`");
        }
        Ok(())
    }
}

/// The limits of one world.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// Compute capability, `major * 10 + minor`.
    pub arch: u32,
    /// Ranks of the communicator.
    pub ranks: u32,
    /// Hosts among them.
    pub hosts: u32,
    /// Whether the ranks have multicast.
    pub multicast: bool,
    /// NCCL's minor release, such as `2.28`: stock NCCL's speed is half of every cross-over.
    pub nccl: String,
    /// Largest payload of one-shot, in bytes.
    pub oneshot_bytes: u64,
    /// Largest payload of two-shot.
    pub twoshot_bytes: u64,
    /// Largest payload of what goes through the ring, above two-shot's; 0 for none. Above both the call is stock NCCL's.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bulk_bytes: u64,
    /// Most blocks of a launch.
    pub blocks: u32,
    /// Where the row comes from, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The band of an NCCL version code: 22809 is 2.28.9 and in band 228. Before 2.9 codes had a digit less.
pub fn band(code: i32) -> u32 {
    let code = u32::try_from(code).unwrap_or(0);
    if code < 10_000 { code / 1000 * 100 + code % 1000 / 100 } else { code / 100 }
}

/// A band as people write it: `2.28`.
pub fn band_name(band: u32) -> String {
    format!("{}.{}", band / 100, band % 100)
}

fn band_of(name: &str) -> Option<u32> {
    let (major, minor) = name.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(major) || !digits(minor) {
        return None;
    }
    let (major, minor) = (major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?);
    (minor < 100 && major < 1000).then_some(major * 100 + minor)
}

impl Tuned {
    /// The world it is for; nothing where the row makes no sense.
    fn world(&self) -> Option<World> {
        let Self { arch, ranks, hosts, multicast, .. } = *self;
        Some(World { ranks, arch, multicast, hosts, nccl: band_of(&self.nccl)? })
    }

    fn check(&self) -> Result<(), &'static str> {
        let Some(world) = self.world() else { return Err("`nccl` is no minor release such as \"2.28\"") };
        if world.ranks < 2 || world.hosts < 1 || world.hosts > world.ranks {
            return Err("`ranks` and `hosts` do not go together");
        }
        if self.oneshot_bytes > self.twoshot_bytes {
            return Err("`oneshot_bytes` is above `twoshot_bytes`");
        }
        if self.twoshot_bytes.max(self.bulk_bytes) > MOST_PAYLOAD {
            return Err("`twoshot_bytes` or `bulk_bytes` is above 1 GiB");
        }
        if self.bulk_bytes != 0 && self.bulk_bytes <= self.twoshot_bytes {
            return Err("`bulk_bytes` is not above `twoshot_bytes`");
        }
        if self.blocks < 1 || self.blocks > MAX_BLOCKS {
            return Err("`blocks` is not between 1 and 256");
        }
        Ok(())
    }
}

impl Tuning {
    /// Reads the bytes of a file. Pure.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        // The text can hold words of the file, which must not break a log line.
        let tuning: Self =
            serde_json::from_slice(bytes).map_err(|error| error.to_string().escape_debug().to_string())?;
        if tuning.format != FORMAT {
            return Err(format!("format {} is not known, this version reads {FORMAT}", tuning.format));
        }
        for (at, row) in tuning.rows.iter().enumerate() {
            row.check().map_err(|why| format!("row {}: {why}", at + 1))?;
            if tuning.rows[..at].iter().any(|other| other.world() == row.world()) {
                return Err(format!("row {}: the same world as an earlier row", at + 1));
            }
        }
        for (at, one) in tuning.collnet.iter().enumerate() {
            one.check().map_err(|why| format!("collnet {}: {why}", at + 1))?;
            if tuning.collnet[..at].iter().any(|other| (other.ranks, other.hosts) == (one.ranks, one.hosts)) {
                return Err(format!("collnet {}: the same ranks and hosts as an earlier one", at + 1));
            }
        }
        Ok(tuning)
    }

    /// The sizes for which CollNet is preferred among so many ranks on so many hosts, if the file says so.
    pub fn preferred(&self, ranks: u32, hosts: u32) -> Option<&Preferred> {
        self.collnet.iter().find(|one| (one.ranks, one.hosts) == (ranks, hosts))
    }

    /// As [`Self::digest`], of the preferences; 0 without any.
    pub fn preferences(&self) -> u64 {
        let words = |one: &Preferred| [u64::from(one.ranks), u64::from(one.hosts), one.from_bytes, one.to_bytes];
        if self.collnet.is_empty() { 0 } else { hashed(self.collnet.iter().flat_map(words)).max(1) }
    }

    /// A number that two ranks have in common exactly when their rows decide alike; notes do not count.
    pub fn digest(&self) -> u64 {
        let words = self.rows.iter().flat_map(|row| {
            let world = row.world();
            let nccl = world.map_or(0, |world| u64::from(world.nccl));
            let small = [row.arch, row.ranks, row.hosts, u32::from(row.multicast), row.blocks].map(u64::from);
            small.into_iter().chain([nccl, row.oneshot_bytes, row.twoshot_bytes, row.bulk_bytes])
        });
        // The two smallest numbers mean something else in a vote.
        hashed(words).max(2)
    }

    /// The row of a world, if the file has one.
    pub fn row(&self, world: World) -> Option<Row> {
        let tuned = self.rows.iter().find(|row| row.world() == Some(world))?;
        let Tuned { oneshot_bytes, twoshot_bytes, bulk_bytes, blocks, .. } = *tuned;
        Some(Row { oneshot_bytes, twoshot_bytes, bulk_bytes, blocks, bulk_blocks: blocks, source: Source::File })
    }

    /// Puts a row in the place of the one for the same world, or behind the others.
    pub fn put(&mut self, row: Tuned) {
        match self.rows.iter_mut().find(|old| old.world() == row.world()) {
            Some(old) => *old = row,
            None => self.rows.push(row),
        }
    }
}

fn hashed(words: impl Iterator<Item = u64>) -> u64 {
    words
        .flat_map(u64::to_le_bytes)
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Reads a file for [`Tuning::parse`]: only a regular one, so that nothing can block, and not more than is sensible.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > MOST_BYTES {
        return Err(io::Error::other("larger than 1 MiB"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row() -> Tuned {
        Tuned {
            arch: 90,
            ranks: 4,
            hosts: 1,
            multicast: false,
            nccl: "2.28".to_owned(),
            oneshot_bytes: 128 << 10,
            twoshot_bytes: 4 << 20,
            bulk_bytes: 0,
            blocks: 24,
            note: None,
        }
    }

    fn file(rows: &[Tuned]) -> Vec<u8> {
        serde_json::to_vec(&Tuning { format: FORMAT, rows: rows.to_vec(), collnet: vec![] }).unwrap()
    }

    fn world() -> World {
        World { ranks: 4, arch: 90, multicast: false, hosts: 1, nccl: 228 }
    }

    #[test]
    fn a_row_is_found_by_its_whole_world_and_by_nothing_less() {
        let tuning = Tuning::parse(&file(&[row()])).unwrap();
        let found = tuning.row(world()).unwrap();
        assert_eq!((found.oneshot_bytes, found.twoshot_bytes, found.blocks), (128 << 10, 4 << 20, 24));
        assert_eq!(found.source, Source::File);
        for other in [
            World { ranks: 5, ..world() },
            World { arch: 100, ..world() },
            World { multicast: true, ..world() },
            World { hosts: 2, ..world() },
            World { nccl: 229, ..world() },
            World { nccl: 0, ..world() },
        ] {
            assert_eq!(tuning.row(other), None, "{other:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_named() {
        for (bytes, word) in [
            (b"".to_vec(), "EOF"),
            (b"[]".to_vec(), "invalid"),
            (br#"{"format": 1}"#.to_vec(), "rows"),
            (br#"{"format": 2, "rows": []}"#.to_vec(), "format 2"),
            (br#"{"format": 1, "rows": [], "blocks": 3}"#.to_vec(), "unknown field"),
            (file(&[Tuned { blocks: 0, ..row() }]), "row 1: `blocks`"),
            (file(&[Tuned { blocks: 257, ..row() }]), "`blocks`"),
            (file(&[row(), Tuned { oneshot_bytes: 8 << 20, ranks: 8, ..row() }]), "row 2: `oneshot_bytes`"),
            (file(&[Tuned { twoshot_bytes: 1 << 40, ..row() }]), "1 GiB"),
            (file(&[Tuned { bulk_bytes: 1 << 40, ..row() }]), "1 GiB"),
            (file(&[Tuned { bulk_bytes: 4 << 20, ..row() }]), "`bulk_bytes` is not above"),
            (file(&[Tuned { ranks: 1, ..row() }]), "`ranks`"),
            (file(&[Tuned { hosts: 0, ..row() }]), "`hosts`"),
            (file(&[Tuned { nccl: "2.+8".to_owned(), ..row() }]), "`nccl`"),
            (file(&[row(), Tuned { blocks: 8, ..row() }]), "row 2: the same world"),
        ] {
            let error = Tuning::parse(&bytes).expect_err(word);
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
    }

    fn preferred(ranks: u32, from: u64, to: u64) -> Preferred {
        Preferred { ranks, hosts: ranks / 2, from_bytes: from, to_bytes: to, note: None }
    }

    fn preferring(collnet: &[Preferred]) -> Vec<u8> {
        serde_json::to_vec(&Tuning { format: FORMAT, rows: vec![row()], collnet: collnet.to_vec() }).unwrap()
    }

    #[test]
    fn preferences_for_collnet_are_found_by_ranks_and_hosts_and_nonsense_among_them_is_named() {
        let tuning = Tuning::parse(&preferring(&[preferred(4, 100, 200), preferred(8, 0, 0)])).unwrap();
        assert_eq!(tuning.preferred(4, 2).unwrap().to_bytes, 200);
        assert_eq!((tuning.preferred(4, 4), tuning.preferred(2, 1)), (None, None));
        // Files without any are what they were, and the other way round.
        let bare = Tuning::parse(&file(&[row()])).unwrap();
        assert_eq!((bare.preferences(), bare.digest()), (0, tuning.digest()));
        assert!(!String::from_utf8(file(&[row()])).unwrap().contains("collnet"));
        for (bytes, word) in [
            (preferring(&[preferred(4, 201, 200)]), "collnet 1: `from_bytes`"),
            (preferring(&[preferred(8, 0, 1), preferred(1, 0, 1)]), "collnet 2: `ranks`"),
            (preferring(&[preferred(4, 0, 1), preferred(4, 2, 3)]), "collnet 2: the same"),
            (br#"{"format": 1, "rows": [], "collnet": [{"ranks": 2}]}"#.to_vec(), "missing field"),
            (br#"{"format": 1, "rows": [], "collnet": {}}"#.to_vec(), "invalid type"),
        ] {
            let error = Tuning::parse(&bytes).expect_err(word);
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_digest_of_preferences_counts_what_decides_and_no_notes() {
        let digest = |one: Preferred| Tuning { format: FORMAT, rows: vec![], collnet: vec![one] }.preferences();
        let base = digest(preferred(4, 1, 9));
        assert_eq!(digest(Preferred { note: Some("by hand".to_owned()), ..preferred(4, 1, 9) }), base);
        for other in
            [preferred(6, 1, 9), preferred(4, 2, 9), preferred(4, 1, 10), Preferred { hosts: 4, ..preferred(4, 1, 9) }]
        {
            assert_ne!(digest(other.clone()), base, "{other:?}");
        }
        assert_ne!(base, 0);
    }

    #[test]
    fn a_file_that_keeps_everything_with_stock_is_a_file() {
        let none = Tuned { oneshot_bytes: 0, twoshot_bytes: 0, ..row() };
        assert_eq!(Tuning::parse(&file(&[none])).unwrap().row(world()).unwrap().twoshot_bytes, 0);
    }

    #[test]
    fn the_digest_counts_what_decides_and_no_notes() {
        let digest = |row: Tuned| Tuning { format: FORMAT, rows: vec![row], collnet: vec![] }.digest();
        let base = digest(row());
        assert_eq!(digest(Tuned { note: Some("by hand".to_owned()), ..row() }), base);
        for other in [
            Tuned { arch: 100, ..row() },
            Tuned { ranks: 5, ..row() },
            Tuned { hosts: 2, ..row() },
            Tuned { multicast: true, ..row() },
            Tuned { nccl: "2.29".to_owned(), ..row() },
            Tuned { oneshot_bytes: 1, ..row() },
            Tuned { twoshot_bytes: 4 << 21, ..row() },
            Tuned { bulk_bytes: 4 << 21, ..row() },
            Tuned { blocks: 25, ..row() },
        ] {
            assert_ne!(digest(other.clone()), base, "{other:?}");
        }
        assert!(Tuning { format: FORMAT, rows: vec![], collnet: vec![] }.digest() >= 2);
    }

    #[test]
    fn a_measured_row_replaces_the_one_of_its_world_and_keeps_the_others() {
        let mut tuning = Tuning { format: FORMAT, rows: vec![row(), Tuned { ranks: 8, ..row() }], collnet: vec![] };
        tuning.put(Tuned { blocks: 8, ..row() });
        tuning.put(Tuned { ranks: 2, ..row() });
        let seen: Vec<_> = tuning.rows.iter().map(|row| (row.ranks, row.blocks)).collect();
        assert_eq!(seen, [(4, 8), (8, 24), (2, 24)]);
    }

    #[test]
    fn versions_fall_into_bands_of_a_minor_release() {
        assert_eq!([22809, 22803, 23007, 2708, 0, -1].map(band), [228, 228, 230, 207, 0, 0]);
        assert_eq!((band_name(228), band_of("2.28")), ("2.28".to_owned(), Some(228)));
        assert_eq!((band_of("2"), band_of("2.100"), band_of("-2.1"), band_of(".1")), (None, None, None, None));
    }

    #[test]
    fn only_a_regular_file_of_sensible_length_is_read() {
        assert!(read(Path::new("/dev/zero")).unwrap_err().to_string().contains("regular"));
        assert!(read(Path::new("/")).is_err());
        assert!(read(Path::new("/nowhere/x.json")).is_err());
        let large = std::env::temp_dir().join(format!("twoshot-tuning-{}", std::process::id()));
        std::fs::write(&large, vec![b' '; MOST_BYTES as usize + 1]).unwrap();
        let outcome = read(&large);
        std::fs::remove_file(&large).unwrap();
        assert!(outcome.unwrap_err().to_string().contains("1 MiB"));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Tuning::parse(&bytes);
        }

        #[test]
        fn what_is_written_reads_back(ranks in 2u32..1000, one in 0u64..1 << 20, blocks in 1u32..=256, multicast: bool) {
            let bulk_bytes = if multicast { 0 } else { one * 4 + 1 };
            let row = Tuned { ranks, oneshot_bytes: one, twoshot_bytes: one * 2, bulk_bytes, blocks, multicast, ..row() };
            let read = Tuning::parse(&file(std::slice::from_ref(&row))).unwrap();
            prop_assert_eq!(read.rows, vec![row]);
            let one = Preferred { ranks, hosts: 1, from_bytes: one, to_bytes: one.saturating_mul(1 << 40), note: None };
            let read = Tuning::parse(&preferring(std::slice::from_ref(&one))).unwrap();
            prop_assert_eq!(read.collnet, vec![one]);
        }
    }
}
