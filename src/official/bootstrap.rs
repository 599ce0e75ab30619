//! Blobs between the ranks of a collective network, over TCP. Rank 0 listens and the others call it; NCCL carried its
//! handle to them. Every wait has a deadline, and a connection that breaks ends the exchange for all.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::address::{Handle, choose};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::handoff::random;
use crate::wire::{BLOB, Blob};

/// Token, rank and number of ranks.
const HELLO: usize = 16 + 4 + 4;
const PAUSE: Duration = Duration::from_millis(1);

pub(super) fn system(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// A socket that peers are told of by its handle.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: TcpListener,
    /// What NCCL carries to the peers.
    pub handle: Handle,
}

impl Listener {
    /// Listens at an address that peers can reach.
    pub fn open(interfaces: Option<&str>) -> Result<Self> {
        let all = if_addrs::get_if_addrs().map_err(system("listing network interfaces"))?;
        let all: Vec<_> = all.into_iter().map(|one| (one.name.clone(), one.ip())).collect();
        let socket = TcpListener::bind((choose(interfaces, &all), 0)).map_err(system("listening for the ranks"))?;
        socket.set_nonblocking(true).map_err(system("listening for the ranks"))?;
        let address = socket.local_addr().map_err(system("listening for the ranks"))?;
        Ok(Self { socket, handle: Handle { address, token: random()? } })
    }
}

/// The ranks of one collective communicator.
pub struct TcpExchange {
    rank: u32,
    ranks: u32,
    /// At rank 0 the others in order, else rank 0 alone.
    links: Vec<TcpStream>,
    patience: Duration,
}

impl TcpExchange {
    /// Connects all ranks: `root` is rank 0's handle, `listener` this rank's own. `deadline` is that of a step of
    /// set-up; what the ranks do between two blobs takes a few of them at most.
    pub fn connect(root: Handle, ranks: u32, rank: u32, listener: &Listener, deadline: Duration) -> Result<Self> {
        let until = Instant::now() + deadline;
        let links = if rank == 0 { meet(listener, ranks, until)? } else { vec![call(root, ranks, rank, until)?] };
        Ok(Self { rank, ranks, links, patience: patience(deadline) })
    }

    /// Says that this rank has ended, and waits at most `patience` for all others to say so: whether they did. A rank
    /// that is gone counts as ended.
    pub fn part(mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let leave = |link: &TcpStream| drop(link.shutdown(std::net::Shutdown::Write));
        // The others hear of the last one by rank 0, which leaves last.
        if self.rank != 0 {
            self.links.iter().for_each(leave);
        }
        let ended = self.links.iter_mut().all(|link| ended(link, until));
        self.links.iter().for_each(leave);
        ended
    }

    fn gather(&mut self, mine: &Blob, step: &'static str, until: Instant) -> Result<Vec<u8>> {
        let mut all = vec![0; BLOB * self.ranks as usize];
        if self.rank == 0 {
            let lost = |rank| move |_| Error::Peer { rank, step };
            all[..BLOB].copy_from_slice(mine);
            for (rank, link) in (1..).zip(&mut self.links) {
                let at = BLOB * rank as usize;
                read_exact(link, &mut all[at..at + BLOB], until).map_err(lost(rank))?;
            }
            for (rank, link) in (1..).zip(&mut self.links) {
                write_all(link, &all, until).map_err(lost(rank))?;
            }
        } else {
            let root = self.links.first_mut().ok_or(Error::Bug("no link to rank 0"))?;
            let lost = |_| Error::Peer { rank: 0, step };
            write_all(root, mine, until).map_err(lost)?;
            read_exact(root, &mut all, until).map_err(lost)?;
        }
        Ok(all)
    }
}

fn patience(deadline: Duration) -> Duration {
    deadline * 3 + Duration::from_secs(10)
}

impl Exchange for TcpExchange {
    fn ranks(&self) -> u32 {
        self.ranks
    }

    fn rank(&self) -> u32 {
        self.rank
    }

    fn allgather(&mut self, mine: &Blob, step: &'static str) -> Result<Vec<Blob>> {
        let all = self.gather(mine, step, Instant::now() + self.patience).inspect_err(|_| {
            // What comes after a lost blob cannot be told from it any more, and nobody shall wait for this rank.
            self.links.iter().for_each(|link| drop(link.shutdown(std::net::Shutdown::Both)));
        })?;
        Ok(all.chunks_exact(BLOB).filter_map(|chunk| chunk.try_into().ok()).collect())
    }

    fn grant(&mut self, deadline: Duration) {
        self.patience = patience(deadline);
    }
}

/// Waits for every other rank. Who does not say the token is sent away: a stranger must not disturb the ranks.
fn meet(listener: &Listener, ranks: u32, until: Instant) -> Result<Vec<TcpStream>> {
    let mut links: Vec<Option<TcpStream>> = (1..ranks).map(|_| None).collect();
    let mut callers: Vec<(TcpStream, Vec<u8>)> = Vec::new();
    while let Some(missing) = links.iter().position(Option::is_none) {
        if Instant::now() >= until {
            return Err(Error::Peer { rank: missing as u32 + 1, step: "connecting to rank 0" });
        }
        match listener.socket.accept() {
            Ok((caller, _)) => {
                caller.set_nonblocking(true).map_err(system("a connection between ranks"))?;
                caller.set_nodelay(true).map_err(system("a connection between ranks"))?;
                callers.push((caller, Vec::with_capacity(HELLO)));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(PAUSE),
            Err(error) if [ErrorKind::Interrupted, ErrorKind::ConnectionAborted].contains(&error.kind()) => {}
            Err(error) => return Err(system("accepting a rank")(error)),
        }
        let mut still = Vec::new();
        for (caller, mut said) in callers {
            match listen_to(&caller, &mut said) {
                Some(true) => {
                    let rank = known(&said, listener, ranks);
                    if let Some(slot) = rank.and_then(|rank| links.get_mut(rank as usize - 1)).filter(|s| s.is_none()) {
                        caller.set_nonblocking(false).map_err(system("a connection between ranks"))?;
                        *slot = Some(caller);
                    }
                }
                Some(false) => still.push((caller, said)),
                None => {}
            }
        }
        callers = still;
    }
    links.into_iter().collect::<Option<Vec<_>>>().ok_or(Error::Bug("a link got lost"))
}

/// Reads on: whether all is said, or `None` where the caller has left.
fn listen_to(mut caller: &TcpStream, said: &mut Vec<u8>) -> Option<bool> {
    let mut bytes = [0; HELLO];
    match caller.read(&mut bytes[said.len()..]) {
        Ok(0) => None,
        Ok(n) => {
            let at = said.len();
            said.extend_from_slice(&bytes[at..at + n]);
            Some(said.len() == HELLO)
        }
        Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => Some(false),
        Err(_) => None,
    }
}

/// The rank of a caller that belongs here.
fn known(said: &[u8], listener: &Listener, ranks: u32) -> Option<u32> {
    let (token, numbers) = said.split_at_checked(16)?;
    let (rank, of) = numbers.split_at_checked(4)?;
    let rank = u32::from_le_bytes(rank.try_into().ok()?);
    let of = u32::from_le_bytes(of.try_into().ok()?);
    (token == listener.handle.token && of == ranks && (1..ranks).contains(&rank)).then_some(rank)
}

fn call(root: Handle, ranks: u32, rank: u32, until: Instant) -> Result<TcpStream> {
    let mut link = connect(root.address, until)?;
    let mut hello = root.token.to_vec();
    hello.extend_from_slice(&rank.to_le_bytes());
    hello.extend_from_slice(&ranks.to_le_bytes());
    write_all(&mut link, &hello, until).map_err(|_| Error::Peer { rank: 0, step: "connecting to rank 0" })?;
    Ok(link)
}

pub(super) fn connect(to: SocketAddr, until: Instant) -> Result<TcpStream> {
    let left = until.saturating_duration_since(Instant::now()).max(PAUSE);
    let link = TcpStream::connect_timeout(&to, left).map_err(system("connecting to a rank"))?;
    link.set_nodelay(true).map_err(system("connecting to a rank"))?;
    Ok(link)
}

/// Reads all of `bytes`, waiting until `until` at most.
pub(super) fn read_exact(link: &mut TcpStream, mut bytes: &mut [u8], until: Instant) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let left = left(until)?;
        link.set_read_timeout(Some(left))?;
        match link.read(bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => bytes = &mut std::mem::take(&mut bytes)[n..],
            Err(error) if again(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes`, waiting until `until` at most.
pub(super) fn write_all(link: &mut TcpStream, mut bytes: &[u8], until: Instant) -> std::io::Result<()> {
    while !bytes.is_empty() {
        link.set_write_timeout(Some(left(until)?))?;
        match link.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if again(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether the other side says until then that nothing more comes.
fn ended(link: &mut TcpStream, until: Instant) -> bool {
    let end = read_exact(link, &mut [0], until);
    end.is_err_and(|error| error.kind() != ErrorKind::TimedOut)
}

fn left(until: Instant) -> std::io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn again(error: &std::io::Error) -> bool {
    [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted].contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn listener() -> Listener {
        Listener::open(Some("lo")).expect("a socket on the loopback interface")
    }

    #[test]
    fn every_rank_gets_every_blob_and_strangers_do_not_disturb() {
        const RANKS: u32 = 5;
        let root = listener();
        let handle = Handle::decode(&root.handle.encode()).expect("a handle");
        let mut stranger = TcpStream::connect(handle.address).expect("anybody may call");
        stranger.write_all(&[7; HELLO]).expect("and say anything");
        let silent = TcpStream::connect(handle.address).expect("or nothing");
        std::thread::scope(|scope| {
            let root = &root;
            let ranks: Vec<_> = (0..RANKS)
                .map(|rank| {
                    scope.spawn(move || {
                        let own = listener();
                        let listener = if rank == 0 { root } else { &own };
                        let mut exchange =
                            TcpExchange::connect(handle, RANKS, rank, listener, PATIENCE).expect("connected");
                        for round in 0..3u8 {
                            let got = exchange.allgather(&[rank as u8 ^ (round << 4); BLOB], "test").expect("all");
                            let expected: Vec<Blob> = (0..RANKS).map(|r| [r as u8 ^ (round << 4); BLOB]).collect();
                            assert!(got == expected, "rank {rank}, round {round}");
                        }
                    })
                })
                .collect();
            ranks.into_iter().for_each(|rank| rank.join().expect("no rank fails"));
        });
        drop(silent);
    }

    #[test]
    fn a_rank_that_never_comes_is_named_in_time() {
        let root = listener();
        let start = Instant::now();
        let error = TcpExchange::connect(root.handle, 3, 0, &root, Duration::from_millis(100)).err().expect("no peers");
        assert!(matches!(error, Error::Peer { rank: 1, .. }), "{error}");
        assert!(start.elapsed() < PATIENCE);
        let gone = listener().handle;
        let own = listener();
        assert!(TcpExchange::connect(gone, 3, 1, &own, Duration::from_millis(100)).is_err());
    }

    #[test]
    fn ranks_that_part_know_whether_all_have_ended() {
        for late in [false, true] {
            let root = listener();
            let handle = root.handle;
            std::thread::scope(|scope| {
                let root = &root;
                let ranks: Vec<_> = (0..3)
                    .map(|rank| {
                        scope.spawn(move || {
                            let own = listener();
                            let listener = if rank == 0 { root } else { &own };
                            let exchange =
                                TcpExchange::connect(handle, 3, rank, listener, PATIENCE).expect("connected");
                            if late && rank == 2 {
                                std::thread::sleep(Duration::from_millis(600));
                            }
                            exchange.part(if late { Duration::from_millis(100) } else { PATIENCE })
                        })
                    })
                    .collect();
                let parted: Vec<bool> = ranks.into_iter().map(|rank| rank.join().expect("no rank fails")).collect();
                // Rank 0 does not wait for ever, and rank 1 hears of it.
                assert!(parted[0] != late && (late || parted == [true; 3]), "{parted:?}");
            });
        }
    }

    #[test]
    fn a_rank_that_leaves_ends_the_exchange_for_all() {
        let root = listener();
        let handle = root.handle;
        std::thread::scope(|scope| {
            let left = scope.spawn(move || {
                drop(TcpExchange::connect(handle, 3, 2, &listener(), PATIENCE).expect("connected"));
            });
            let stays = scope.spawn(move || {
                let mut exchange = TcpExchange::connect(handle, 3, 1, &listener(), PATIENCE).expect("connected");
                exchange.allgather(&[1; BLOB], "test").expect_err("rank 2 is gone")
            });
            let mut exchange = TcpExchange::connect(handle, 3, 0, &root, PATIENCE).expect("connected");
            let error = exchange.allgather(&[0; BLOB], "test").expect_err("rank 2 is gone");
            assert!(matches!(error, Error::Peer { rank: 2, step: "test" }), "{error}");
            left.join().expect("it left");
            assert!(matches!(stays.join().expect("an error"), Error::Peer { rank: 0, .. }));
        });
    }
}
