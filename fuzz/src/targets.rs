//! One function per target: takes any bytes, must not panic, and checks what has to hold whatever they are.

use std::ffi::OsString;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, send, sendmsg, socket_with, socketpair,
};
use twoshot::config::{Config, VARIABLES};
use twoshot::domain::merge;
use twoshot::exchange::{Exchange, vote};
use twoshot::handoff::{Desk, receive};
use twoshot::intercept::elf::NATIVE;
use twoshot::intercept::walk::{self, Segment};
use twoshot::layout::Layout;
use twoshot::report;
use twoshot::stats::{self, Snapshot};
use twoshot::tuning::Tuning;
use twoshot::wire::{BLOB, Blob, Facts, Step};

/// One target.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds }
}

/// All of them; the simulator's topology file is C++ and apart.
pub const ALL: &[Target] = &[
    target("blobs", blobs, seeds_of_blobs),
    target("votes", votes, seeds_of_votes),
    target("handoff", handoff, seeds_of_handoff),
    target("environment", environment, seeds_of_environment),
    target("slots", slots, seeds_of_slots),
    target("statistics", statistics, seeds_of_statistics),
    target("report", report, seeds_of_report),
    target("tuning", tuning, seeds_of_tuning),
];

/// Writes a target's seeds into the folder that `TWOSHOT_FUZZ_SEEDS` names.
#[allow(dead_code)] // the corpus test, which compiles this file too, only reads them
pub fn write_seeds(name: &str) {
    let Some(folder) = std::env::var_os("TWOSHOT_FUZZ_SEEDS").map(std::path::PathBuf::from) else { return };
    let target = ALL.iter().find(|target| target.name == name).expect("a target");
    for (number, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number}")), seed).expect("a folder that can be written");
    }
}

/// The first bytes, as numbers, and what is behind them.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u64 {
        self.take(8).iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
    }
}

/// A blob of these bytes. A fuzzer guesses no checksum: it is put right, unless `raw`.
fn blob(bytes: &[u8], like: &Blob, raw: bool) -> Blob {
    let mut blob = *like;
    if raw {
        let length = bytes.len().min(BLOB);
        blob[..length].copy_from_slice(&bytes[..length]);
        return blob;
    }
    // Magic, protocol and kind stay.
    let length = bytes.len().min(BLOB - 8 - 12);
    blob[12..12 + length].copy_from_slice(&bytes[..length]);
    let sum = blob[..BLOB - 8]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    blob[BLOB - 8..].copy_from_slice(&sum.to_le_bytes());
    blob
}

/// Blobs of either kind: what can be read can be written and read again.
pub fn blobs(data: &[u8]) {
    let mut input = Input(data);
    let raw = input.byte() & 1 != 0;
    let facts = blob(input.0, &Facts::default().encode(), raw);
    if let Some(read) = Facts::decode(&facts) {
        assert_eq!(Facts::decode(&read.encode()), Some(read));
    }
    assert!(raw || Step::decode(&facts).is_none(), "facts were read as a step");
    if let Some(read) = Step::decode(&blob(input.0, &Step::new(0, 0).encode(), raw)) {
        assert_eq!(Step::decode(&read.encode()), Some(read));
    }
}

fn seeds_of_blobs() -> Vec<Vec<u8>> {
    let full = Facts { ranks: 8, rank: 3, arch: 90, blocks: 132, vmm: true, ..Facts::default() };
    let of = |how: u8, blob: &Blob| [&[how][..], &blob[usize::from(how == 0) * 12..]].concat();
    vec![of(1, &full.encode()), of(0, &full.encode()), of(0, &Step::new(3, 1).encode()), vec![]]
}

/// An exchange in which all other ranks say these things.
struct Canned(Vec<Blob>);

impl Exchange for Canned {
    fn ranks(&self) -> u32 {
        self.0.len() as u32
    }

    fn rank(&self) -> u32 {
        0
    }

    fn allgather(&mut self, mine: &Blob, _step: &'static str) -> twoshot::error::Result<Vec<Blob>> {
        self.0[0] = *mine;
        Ok(self.0.clone())
    }
}

/// What the ranks say to each other: a merge, a vote, and the sizes that come of them.
pub fn votes(data: &[u8]) {
    let mut input = Input(data);
    let ranks = 1 + input.byte() % 8;
    let how = input.byte();
    let mut said = Vec::new();
    for rank in 0..ranks {
        let bytes = input.take(160);
        let one = blob(bytes, &Facts::default().encode(), how & 1 != 0 && rank == 0);
        said.push(match Facts::decode(&one) {
            // Most inputs speak of their own place, or nothing but that would ever be found out.
            Some(facts) if how & 2 == 0 => {
                Facts { rank: u32::from(rank), ranks: u32::from(ranks), declined: None, ..facts }.encode()
            }
            _ => one,
        });
    }
    match merge(&said) {
        Ok(domain) => {
            assert!(domain.facts.len() == usize::from(ranks) && domain.blocks > 0 && domain.hosts > 0);
            assert!(ranks > 1);
            let sizes = (input.word() & (1 << 30), input.word() & (1 << 30));
            if let Some(layout) = Layout::for_payloads(u32::from(ranks), sizes.0, sizes.1) {
                assert!(layout.window_bytes() > 0);
            }
        }
        Err(declined) => assert!(declined.rank < u32::from(ranks)),
    }
    let mut steps = vec![[0; BLOB]; usize::from(ranks)];
    for (rank, step) in (0u32..).zip(&mut steps) {
        let one = blob(input.take(200), &Step::new(2, rank).encode(), how & 4 != 0);
        *step = match Step::decode(&one) {
            Some(read) if how & 8 == 0 => Step { number: 2, rank, declined: None, ..read }.encode(),
            _ => one,
        };
    }
    match vote(&mut Canned(steps), Step::new(2, 0), "a step") {
        Ok(Ok(steps)) => {
            assert_eq!(steps.len(), usize::from(ranks));
            for step in steps {
                assert!(step.granularity <= 1 << 40, "a peer asks for {} bytes at a time", step.granularity);
            }
        }
        Ok(Err(declined)) => assert!(declined.rank < u32::from(ranks)),
        Err(error) => panic!("{error}"),
    }
}

fn seeds_of_votes() -> Vec<Vec<u8>> {
    let facts =
        |gpu: u8| Facts { gpu: [gpu; 16], arch: 90, blocks: 132, vmm: true, fd_handles: true, ..Facts::default() };
    let said = |how: u8| {
        let mut bytes = vec![1, how];
        for gpu in 1..3 {
            bytes.extend(&facts(gpu).encode()[12..172]);
        }
        bytes.extend([7; 16]);
        for rank in 0..2 {
            bytes.extend(&Step { granularity: 2 << 20, blocks: 3, ..Step::new(2, rank) }.encode()[12..212]);
        }
        bytes
    };
    vec![said(0), said(2), said(10), said(15)]
}

fn socket_to(desk: &Desk) -> OwnedFd {
    let name: String = desk.name.iter().map(|byte| format!("{byte:02x}")).collect();
    let address = SocketAddrUnix::new_abstract_name(format!("twoshot-{name}").as_bytes()).expect("a short name");
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket");
    connect(&socket, &address).expect("the desk is open");
    socket
}

fn send_with(socket: &OwnedFd, bytes: &[u8], fds: usize, fd: &OwnedFd) {
    let fds = vec![fd.as_fd(); fds];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let _ = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
}

/// The number that the next descriptor gets: higher than before where one was left open.
fn next_descriptor(any: &OwnedFd) -> i32 {
    any.try_clone().expect("a copy").as_raw_fd()
}

fn secret() -> OwnedFd {
    rustix::fs::memfd_create("twoshot-fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("an anonymous file")
}

const GENUINE: u32 = 0x7fff_fff1;
const PATIENCE: Duration = Duration::from_secs(20);

/// Both ends of the descriptor socket: strangers and broken peers at a desk, and a broken desk.
pub fn handoff(data: &[u8]) {
    thread_local! {
        static DESK: (Desk, OwnedFd) = (Desk::open(64).expect("a desk"), secret());
    }
    DESK.with(|(desk, secret)| {
        let before = next_descriptor(secret);
        at_a_desk(data, desk, secret);
        from_a_desk(data, secret);
        assert_eq!(next_descriptor(secret), before, "a descriptor was left open");
    });
}

fn at_a_desk(data: &[u8], desk: &Desk, secret: &OwnedFd) {
    let mut input = Input(data);
    let round = input.byte();
    let hello = |rank: u32| [&desk.token[..], &rank.to_le_bytes(), &[round]].concat();
    let mut callers = Vec::new();
    let mut entitled: Vec<u32> = Vec::new();
    for _ in 0..input.byte() % 6 {
        let how = input.byte();
        let mut packet = input.take(usize::from(how >> 3)).to_vec();
        if how & 1 != 0 {
            packet.splice(0..packet.len().min(16), desk.token);
        }
        let valid = packet.len() == 21 && packet[..16] == desk.token && packet[20] == round;
        let rank = packet.get(16..20).map_or(0, |rank| u32::from_le_bytes(rank.try_into().expect("four")));
        if valid && (rank == GENUINE || how & 4 != 0) {
            continue;
        }
        let socket = socket_to(desk);
        send_with(&socket, &packet, usize::from(how & 2 != 0) * 3, secret);
        if how & 4 != 0 {
            // It hangs up; a caller that proved itself would be waited for.
            drop(socket);
            continue;
        }
        let served = valid && !entitled.contains(&rank);
        if served {
            entitled.push(rank);
        }
        callers.push((socket, served));
    }
    let genuine = socket_to(desk);
    send(&genuine, &hello(GENUINE), SendFlags::NOSIGNAL).expect("said");
    let give = Some((secret.as_fd(), entitled.len() + 1));
    desk.trade(0, round, give, &[], PATIENCE).expect("strangers must not disturb the ranks");
    assert!(matches!(receive(&genuine, GENUINE), Ok(Some(_))), "a peer was not served");
    for (socket, served) in callers {
        assert_eq!(matches!(receive(&socket, 0), Ok(Some(_))), served, "the wrong caller was served");
    }
}

fn from_a_desk(data: &[u8], secret: &OwnedFd) {
    let mut input = Input(data);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair");
    let fds = usize::from(input.byte() % 8);
    let bytes = input.take(usize::from(data.last().copied().unwrap_or(0)));
    send_with(&theirs, bytes, fds, secret);
    let taken = receive(&ours, 3);
    assert_eq!(matches!(taken, Ok(Some(_))), fds == 1 && bytes.len() == 1, "{fds} in {} bytes", bytes.len());
    drop((taken, theirs));
    // What comes behind the end is an error, not a wait.
    assert!(!matches!(receive(&ours, 3), Ok(None)));
}

fn seeds_of_handoff() -> Vec<Vec<u8>> {
    let caller = |how: u8, bytes: &[u8]| [&[how | (bytes.len() as u8) << 3][..], bytes].concat();
    let all = |callers: &[Vec<u8>]| [&[5, callers.len() as u8][..], &callers.concat()].concat();
    let good = [&[0; 16][..], &[7, 0, 0, 0], &[5]].concat();
    vec![
        all(&[]),
        all(&[caller(1, &good)]),
        all(&[caller(0, &good), caller(3, &good), caller(1, &good[..20]), caller(4, &[])]),
        vec![1, 1, 1, 1],
        vec![2, 9, 9, 2],
    ]
}

/// Any environment: refused in one line that names the variable, or understood within bounds.
pub fn environment(data: &[u8]) {
    let mut set: Vec<(&str, OsString)> = Vec::new();
    for entry in data.split(|byte| *byte == 0) {
        if let Some((index, value)) = entry.split_first() {
            let name = VARIABLES[usize::from(*index) % VARIABLES.len()].name;
            set.push((name, OsString::from_vec(value.to_vec())));
        }
    }
    match Config::parse(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone())) {
        Ok(config) => {
            let sizes = [Some(config.min_bytes), config.max_bytes, config.oneshot_max_bytes];
            assert!(sizes.iter().flatten().all(|bytes| *bytes <= 1 << 30));
            assert!(config.max_blocks.is_none_or(|blocks| (1..=256).contains(&blocks)));
            assert!(config.setup_timeout_ms >= 100 && config.timeout_ms <= 86_400_000);
            config.digest();
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.lines().count() == 1 && text.len() < 1200, "{text}");
            assert!(!text.chars().any(char::is_control), "{text:?}");
            assert!(VARIABLES.iter().any(|variable| text.starts_with(variable.name)), "{text}");
        }
    }
}

fn seeds_of_environment() -> Vec<Vec<u8>> {
    let index = |name: &str| VARIABLES.iter().position(|variable| variable.name == name).expect("known") as u8;
    let entries = |pairs: &[(&str, &[u8])]| {
        let all = pairs.iter().map(|(name, value)| [&[index(name)][..], value].concat());
        all.collect::<Vec<_>>().join(&0)
    };
    vec![
        entries(&[("TWOSHOT_MAX_BYTES", b"64kib"), ("TWOSHOT_ALGO", b"oneshot"), ("TWOSHOT_MODE", b"off")]),
        entries(&[("TWOSHOT_MIN_BYTES", b"1G"), ("TWOSHOT_TIMEOUT_MS", b"86400000"), ("TWOSHOT_ENABLE", b"true")]),
        entries(&[("NCCL_ALGO", b"broadcast:ring;allreduce:tree,nvls"), ("NCCL_PROTO", b"LL128,Simple")]),
        entries(&[("NCCL_MNNVL_UUID", b"0xffffffffffffffff"), ("NCCL_MNNVL_CLIQUE_ID", b"-1")]),
        entries(&[("TWOSHOT_MAX_BLOCKS", b"257"), ("TWOSHOT_HOST_ID", b"\xff\xfe")]),
        entries(&[("TWOSHOT_MULTICAST", b"a\nb\x1b[2J")]),
    ]
}

const IMAGE_HEAD: usize = 8 + 1;
const IMAGE_SEGMENT: usize = 1 + 1 + 8 + 8;

/// The walk from an object's segments to its call slots, over memory of which nothing is true.
pub fn slots(data: &[u8]) {
    let mut input = Input(data);
    let base = input.word();
    let mut segments = Vec::new();
    for _ in 0..input.byte() % 8 {
        // PT_LOAD, PT_DYNAMIC and one that means nothing here.
        let kind = [1, 2, 0x6474_e552][usize::from(input.byte() % 3)];
        let flags = u32::from(input.byte() & 7);
        segments.push(Segment { kind, flags, start: input.word(), size: input.word() });
    }
    let image = input.0;
    let read = |range: std::ops::Range<u64>| {
        let inside = range.is_empty()
            || segments.iter().any(|segment| {
                let own = segment.range();
                segment.is_loaded(4) && own.start <= range.start && range.end <= own.end
            });
        let range = usize::try_from(range.start).ok()?..usize::try_from(range.end).ok()?;
        if range.is_empty() { Some(&[][..]) } else { image.get(range).filter(|_| inside) }
    };
    let wanted = |name: &[u8]| name.starts_with(b"nccl").then_some(name.len());
    for slot in walk::slots(base, &segments, &read, &wanted).unwrap_or_default() {
        assert!(walk::is_word(base, segments.iter().copied(), slot.offset), "{slot:?} is no word of the object");
        assert!(slot.offset.checked_add(8).is_some() && slot.name >= 4);
    }
}

fn seeds_of_slots() -> Vec<Vec<u8>> {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let object = |added: u64| {
        let mut bytes = words(&[added]);
        bytes.push(3);
        for (kind, flags, start, size) in [(0, 4, 0, 0x400), (0, 6, 0x400, 0x200), (1, 4, 0x300, 0xa0_u64)] {
            bytes.extend([kind, flags]);
            bytes.extend(words(&[start, size]));
        }
        assert_eq!(bytes.len(), IMAGE_HEAD + 3 * IMAGE_SEGMENT);
        let mut image = vec![0; 0x600];
        image[0x10..0x1e].copy_from_slice(b"\0ncclAllReduce");
        let symbol = 1_u32.to_le_bytes();
        image[0x118..0x11c].copy_from_slice(&symbol);
        let jump = 1_u64 << 32 | u64::from(NATIVE.jump_slot());
        image[0x200..0x218].copy_from_slice(&words(&[0x408, jump, 0]));
        let table = [(5, added + 0x10), (10, 0x20), (6, added + 0x100), (23, added + 0x200), (2, 24), (20, 7), (0, 0)];
        let table: Vec<_> = table.iter().flat_map(|(tag, value)| words(&[*tag, *value])).collect();
        image[0x300..0x300 + table.len()].copy_from_slice(&table);
        bytes.extend(image);
        bytes
    };
    vec![object(0), object(0x10000)]
}

/// The memory of a process's counters, and how it is shown.
pub fn statistics(data: &[u8]) {
    let mut input = Input(data);
    let shown = match input.byte() {
        0 => Snapshot::of_bytes(input.0),
        _ => {
            let mut words = vec![0; stats::WORDS];
            words[..4].copy_from_slice(&[stats::MAGIC, stats::VERSION, 7, stats::WORDS as u64]);
            while !input.0.is_empty() {
                let place = stats::HEAD + input.word() as usize % (stats::WORDS - stats::HEAD);
                words[place] = input.word();
            }
            Snapshot::of(&words)
        }
    };
    match shown {
        Ok(snapshot) => {
            assert!(!snapshot.to_string().is_empty());
            assert!(serde_json::to_string(&snapshot).is_ok());
        }
        Err(error) => assert_eq!(error.lines().count(), 1, "{error}"),
    }
}

fn seeds_of_statistics() -> Vec<Vec<u8>> {
    let sparse = |cells: &[(u64, u64)]| {
        let cells = cells.iter().flat_map(|(place, word)| [place.to_le_bytes(), word.to_le_bytes()]);
        [&[1][..], &cells.collect::<Vec<_>>().concat()].concat()
    };
    let one = stats::SLOT as u64;
    let head = [stats::MAGIC, stats::VERSION, 7].map(u64::to_ne_bytes).concat();
    vec![
        sparse(&[(one, 2), (one + 2, 1), (one + 3, 4), (one + 8, 9), (one + 9, u64::MAX), (one + 11, u64::MAX)]),
        sparse(&[(one, 3), (one + 4, 28), (2 * one, 77)]),
        sparse(&[(5, u64::MAX), (8, 3), (9, 700)]),
        [&[0][..], &head].concat(),
        vec![0, 1, 2, 3],
    ]
}

/// `twoshot doctor --json` of another host.
pub fn report(data: &[u8]) {
    match report::read(data) {
        Ok(all) => all.iter().for_each(|facts| assert_eq!(report::facts(&report::line(facts)), Some(*facts))),
        Err(error) => assert_eq!(error.lines().count(), 1, "{error}"),
    }
    if let Ok(text) = std::str::from_utf8(data) {
        report::facts(text);
    }
}

fn seeds_of_report() -> Vec<Vec<u8>> {
    let line = report::line(&Facts { ranks: 2, rank: 1, arch: 90, ..Facts::default() });
    let mut text = Vec::new();
    write!(text, "{{\"version\": \"0.1.0\", \"gpus\": [\"{line}\", \"{line}\"]}}").expect("memory");
    vec![text, line.into_bytes(), b"{\"gpus\":[\"\"]}".to_vec(), b"[[[[{}]]]]".to_vec()]
}

/// A tuning file: refused in one line, or read so that it can be written and read again.
pub fn tuning(data: &[u8]) {
    match Tuning::parse(data) {
        Ok(read) => {
            let written = serde_json::to_vec(&read).expect("what was read");
            let again = Tuning::parse(&written).expect("what was written");
            assert_eq!((again.digest(), again), (read.digest(), read));
        }
        Err(error) => {
            assert!(error.lines().count() == 1 && !error.chars().any(char::is_control), "{error:?}");
        }
    }
}

fn seeds_of_tuning() -> Vec<Vec<u8>> {
    let row = "{\"arch\":90,\"ranks\":4,\"hosts\":1,\"multicast\":false,\"nccl\":\"2.28\",\"oneshot_bytes\":65536,\
               \"twoshot_bytes\":4194304,\"blocks\":16}";
    let other = row.replace("90", "100");
    let texts = [
        format!("{{\"format\":1,\"rows\":[{row},{other}]}}"),
        format!("{{\"format\":1,\"rows\":[{row},{row}]}}"),
        "{\"format\":1,\"rows\":[],\"collnet\":[{\"ranks\":4,\"hosts\":2,\"from_bytes\":8,\"to_bytes\":99}]}"
            .to_owned(),
        "{\"format\":2,\"rows\":[]}".to_owned(),
        "{\"format\":1,\"ro\\nws\":[]}".to_owned(),
    ];
    texts.map(String::into_bytes).into()
}
