use super::*;
use std::io::Write;
use std::os::unix::fs::FileExt;

const PATIENCE: Duration = Duration::from_secs(20);

fn file_saying(text: &str) -> std::fs::File {
    let fd = rustix::fs::memfd_create("twoshot-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = std::fs::File::from(fd);
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// All of a small file, from its start: the position is shared by everybody who holds the descriptor.
fn read(fd: OwnedFd) -> String {
    let mut bytes = [0; 64];
    let len = std::fs::File::from(fd).read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

fn peers(desks: &[Desk]) -> Vec<Peer> {
    (0u32..).zip(desks).map(|(rank, desk)| Peer { rank, name: desk.name, token: desk.token }).collect()
}

#[test]
fn every_rank_gets_every_other_ranks_descriptor_in_two_rounds() {
    const RANKS: u32 = 9;
    let desks: Vec<_> = (0..RANKS).map(|_| Desk::open(RANKS).unwrap()).collect();
    let peers = peers(&desks);
    // Between two rounds the ranks vote; here a barrier stands for it.
    let vote = std::sync::Barrier::new(RANKS as usize);
    std::thread::scope(|scope| {
        for (rank, desk) in (0u32..).zip(&desks) {
            let (peers, vote) = (&peers, &vote);
            scope.spawn(move || {
                for round in 0..2 {
                    let mine = file_saying(&format!("{rank}/{round}"));
                    let others: Vec<_> = peers.iter().filter(|peer| peer.rank != rank).copied().collect();
                    let give = Some((mine.as_fd(), others.len()));
                    let got = desk.trade(rank, round, give, &others, PATIENCE).unwrap();
                    let texts: Vec<_> = got.into_iter().map(read).collect();
                    let expected: Vec<_> = others.iter().map(|peer| format!("{}/{round}", peer.rank)).collect();
                    assert_eq!(texts, expected);
                    vote.wait();
                }
            });
        }
    });
}

#[test]
fn a_stranger_without_the_token_is_given_nothing_and_disturbs_nobody() {
    let desks = [Desk::open(2).unwrap(), Desk::open(2).unwrap()];
    let peers = peers(&desks);
    let strangers: Vec<_> =
        [Peer { token: [0; 16], ..peers[0] }, Peer { rank: 7, name: peers[0].name, token: peers[1].token }]
            .iter()
            .map(|peer| call(peer, 1, 0).unwrap())
            .collect();
    let wrong_round = call(&peers[0], 1, 9).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(desks[1].trade(1, 0, None, &peers[..1], PATIENCE).unwrap().len(), 1));
        let mine = file_saying("secret");
        desks[0].trade(0, 0, Some((mine.as_fd(), 1)), &[], PATIENCE).unwrap();
    });
    for socket in strangers.iter().chain([&wrong_round]) {
        assert!(!matches!(receive(socket, 0), Ok(Some(_))));
    }
}

#[test]
fn a_peer_that_never_comes_is_named_when_the_deadline_passes() {
    let desks = [Desk::open(2).unwrap(), Desk::open(2).unwrap()];
    let peers = peers(&desks);
    let mine = file_saying("x");
    let start = Instant::now();
    let patience = Duration::from_millis(200);
    let error = desks[0].trade(0, 0, Some((mine.as_fd(), 1)), &peers[1..], patience).unwrap_err();
    assert!(matches!(error, Error::Peer { rank: 1, .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_peer_that_is_gone_is_an_error_at_once() {
    let gone = Desk::open(2).unwrap();
    let peer = Peer { rank: 1, name: gone.name, token: gone.token };
    drop(gone);
    let desk = Desk::open(2).unwrap();
    assert!(desk.trade(0, 0, None, &[peer], PATIENCE).is_err());
}

/// Name and token of a desk as one word, and back.
fn told(desk: &Desk) -> String {
    desk.name.iter().chain(&desk.token).map(|byte| format!("{byte:02x}")).collect()
}

fn heard(rank: u32, word: &str) -> Peer {
    let byte = |i: usize| u8::from_str_radix(&word[2 * i..2 * i + 2], 16).expect("a told desk");
    Peer { rank, name: std::array::from_fn(byte), token: std::array::from_fn(|i| byte(16 + i)) }
}

const OTHER_END: &str = "TWOSHOT_TEST_OTHER_END";

fn trade_with(rank: u32, peer: Peer, desk: &Desk) -> String {
    let mine = file_saying(&format!("of {rank}"));
    let got = desk.trade(rank, 0, Some((mine.as_fd(), 1)), &[peer], PATIENCE).expect("a descriptor");
    got.into_iter().map(read).collect()
}

#[test]
#[ignore = "the other rank of the next test, which starts it"]
fn the_rank_in_the_other_pid_namespace() {
    let peer = heard(0, &std::env::var(OTHER_END).expect("started by the next test"));
    let desk = Desk::open(2).unwrap();
    println!("DESK {}", told(&desk));
    assert_eq!(trade_with(1, peer, &desk), "of 0");
}

#[test]
fn ranks_in_containers_of_their_own_pass_descriptors_though_neither_has_a_process_id_for_the_other() {
    use std::io::BufRead;
    let desk = Desk::open(2).unwrap();
    let unshare = || {
        let mut command = std::process::Command::new("unshare");
        command.args(["--pid", "--fork"]);
        command
    };
    if !unshare().arg("true").output().is_ok_and(|done| done.status.success()) {
        eprintln!("skipped: PID namespaces are not permitted here");
        return;
    }
    let mut other = unshare()
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "handoff::tests::the_rank_in_the_other_pid_namespace", "--ignored", "--nocapture"])
        .env(OTHER_END, told(&desk))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(other.stdout.take().unwrap()).lines();
    let word =
        lines.find_map(|line| Some(line.ok()?.split_once("DESK ")?.1.to_owned())).expect("the other rank's desk");
    assert_eq!(trade_with(0, heard(1, &word), &desk), "of 1");
    let rest: Vec<_> = lines.map_while(|line| line.ok()).collect();
    assert!(other.wait().unwrap().success(), "{rest:?}");
}
