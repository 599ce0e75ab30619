//! Handing file descriptors to the other ranks of this host: SCM_RIGHTS over abstract Unix sockets.
//!
//! Every rank opens a [`Desk`] under a random name; name and token travel through the exchange. A caller gives the
//! token and its rank and is handed one descriptor, once per round. Nothing is derived from seeds, paths or process
//! ids, and no capability is needed. One loop serves and collects at the same time, so no order between ranks can
//! deadlock, and the whole loop has one deadline.
#![forbid(unsafe_code)]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, recv, recvmsg, send,
    sendmsg, socket_with,
};

use crate::error::{Error, Result};

mod channel;

pub use channel::{Channel, Received};

const HELLO: usize = 16 + 4 + 1;

fn system(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::System { what, source: errno.into() }
}

/// Sixteen random bytes from the operating system.
pub fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(system("getrandom"))?;
    }
    Ok(bytes)
}

/// Where peers ask for descriptors.
pub struct Desk {
    listener: OwnedFd,
    /// Random name of the socket.
    pub name: [u8; 16],
    /// What callers must say.
    pub token: [u8; 16],
}

/// How to reach a peer's desk.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its rank.
    pub rank: u32,
    /// Name of its socket.
    pub name: [u8; 16],
    /// Its token.
    pub token: [u8; 16],
}

fn address(name: &[u8; 16]) -> Result<SocketAddrUnix> {
    let mut text = String::from("twoshot-");
    for byte in name {
        text.push_str(&format!("{byte:02x}"));
    }
    SocketAddrUnix::new_abstract_name(text.as_bytes()).map_err(system("abstract socket name"))
}

fn open_socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(system("socket"))
}

struct Caller {
    socket: OwnedFd,
    closed: bool,
}

impl Desk {
    /// Opens a desk that `ranks` callers can queue at.
    pub fn open(ranks: u32) -> Result<Self> {
        let (name, token) = (random()?, random()?);
        let listener = open_socket()?;
        bind(&listener, &address(&name)?).map_err(system("bind"))?;
        listen(&listener, i32::try_from(ranks).unwrap_or(i32::MAX).max(16)).map_err(system("listen"))?;
        Ok(Self { listener, name, token })
    }

    /// Gives `give` to `callers` different peers and takes one descriptor from each of `take`, in that order.
    /// `round` keeps two handoffs through the same desk apart; between two of them the ranks vote, so that no caller of
    /// the next one comes while this one is served.
    pub fn trade(
        &self,
        rank: u32,
        round: u8,
        give: Option<(BorrowedFd<'_>, usize)>,
        take: &[Peer],
        patience: Duration,
    ) -> Result<Vec<OwnedFd>> {
        let deadline = Instant::now() + patience;
        let mut waiting = Vec::with_capacity(take.len());
        for peer in take {
            waiting.push((peer.rank, call(peer, rank, round)?));
        }
        let mut taken: Vec<Option<OwnedFd>> = take.iter().map(|_| None).collect();
        let mut callers: Vec<Caller> = Vec::new();
        let mut served: Vec<u32> = Vec::new();
        let wanted = give.as_ref().map_or(0, |(_, callers)| *callers);
        loop {
            let open = served.len() < wanted;
            let missing: Vec<usize> = (0..take.len()).filter(|i| taken[*i].is_none()).collect();
            if !open && missing.is_empty() {
                return taken.into_iter().collect::<Option<Vec<_>>>().ok_or(Error::Bug("a descriptor got lost"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let rank = missing.first().map_or(u32::MAX, |i| take[*i].rank);
                return Err(Error::Peer { rank, step: "passing file descriptors" });
            }
            wait(&self.listener, open, &callers, missing.iter().map(|i| &waiting[*i].1), left)?;
            if let Some((fd, _)) = &give {
                self.accept(&mut callers)?;
                for caller in &mut callers {
                    self.serve(caller, *fd, round, &mut served)?;
                }
                callers.retain(|caller| !caller.closed);
            }
            for i in missing {
                taken[i] = receive(&waiting[i].1, take[i].rank)?;
            }
        }
    }

    fn accept(&self, callers: &mut Vec<Caller>) -> Result<()> {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                // Names of abstract sockets are listed for everybody: a stranger must not even keep a place.
                Ok(socket) if !same_user(&socket) => drop(socket),
                Ok(socket) => callers.push(Caller { socket, closed: false }),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(system("accept")(errno)),
            }
        }
    }

    /// Hands the descriptor to a caller that proves itself. A caller that does not is closed and forgotten: a
    /// stranger on the socket must not disturb the ranks.
    fn serve(&self, caller: &mut Caller, give: BorrowedFd<'_>, round: u8, served: &mut Vec<u32>) -> Result<()> {
        // One byte more than a hello: what is longer is none.
        let mut hello = [0; HELLO + 1];
        let len = match recv(&caller.socket, &mut hello[..], RecvFlags::empty()) {
            Ok((len, _)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => 0,
        };
        caller.closed = true;
        let rank = u32::from_le_bytes([hello[16], hello[17], hello[18], hello[19]]);
        if len != HELLO || hello[..16] != self.token || hello[20] != round || served.contains(&rank) {
            return Ok(());
        }
        let fds = [give];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Error::Bug("no room for one descriptor"));
        }
        let answer = [IoSlice::new(&[1])];
        if sendmsg(&caller.socket, &answer, &mut control, SendFlags::NOSIGNAL).is_ok() {
            served.push(rank);
        }
        Ok(())
    }
}

/// Whether this process's own user, or root, is at the other end.
fn same_user(socket: &OwnedFd) -> bool {
    // rustix has this too, but no process id 0, which is that of a rank in another container (PID namespace).
    let peer = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials);
    peer.is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw() || peer.uid() == 0)
}

fn call(peer: &Peer, rank: u32, round: u8) -> Result<OwnedFd> {
    let socket = open_socket()?;
    connect(&socket, &address(&peer.name)?).map_err(system("connect to a peer's socket"))?;
    let mut hello = [0; HELLO];
    hello[..16].copy_from_slice(&peer.token);
    hello[16..20].copy_from_slice(&rank.to_le_bytes());
    hello[20] = round;
    send(&socket, &hello, SendFlags::NOSIGNAL).map_err(system("send to a peer's socket"))?;
    Ok(socket)
}

/// The descriptor that `rank` has sent through this socket, if one has come: exactly one, or it is an error.
pub fn receive(socket: &OwnedFd, rank: u32) -> Result<Option<OwnedFd>> {
    // As above: exactly one byte is an answer.
    let mut byte = [0; 2];
    let fds = match next_message(socket, &mut byte) {
        Ok((1, fds)) => fds,
        Ok(_) => return Err(Error::Peer { rank, step: "passing file descriptors (it closed the socket)" }),
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(errno) => return Err(system("receive from a peer's socket")(errno)),
    };
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Ok(Some(fd)),
        Err(_) => Err(Error::Protocol("a peer sent another number of descriptors than one")),
    }
}

/// The length of the next message, cut to `bytes`, and what came with it, without blocking; length 0: the other end is
/// closed.
///
/// What looks like the end is asked for once more. Linux first looks for a message and only then whether the other end is
/// closed, so the last message of an end that sends and closes in between would be lost; and an end that closes with
/// messages unread resets the other, whose own next message is then hidden by the error, once.
fn next_message(socket: &OwnedFd, bytes: &mut [u8]) -> rustix::io::Result<(usize, Vec<OwnedFd>)> {
    match try_message(socket, bytes) {
        Ok((0, _)) => try_message(socket, bytes),
        Err(Errno::CONNRESET) => match try_message(socket, bytes) {
            Err(Errno::AGAIN) => Ok((0, Vec::new())),
            second => second,
        },
        first => first,
    }
}

fn try_message(socket: &OwnedFd, bytes: &mut [u8]) -> rustix::io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((message.bytes, fds.flatten().collect()))
}

fn wait<'a>(
    listener: &OwnedFd,
    open: bool,
    callers: &[Caller],
    waiting: impl Iterator<Item = &'a OwnedFd>,
    left: Duration,
) -> Result<()> {
    let mut fds: Vec<PollFd<'_>> = Vec::new();
    if open {
        fds.push(PollFd::new(listener, PollFlags::IN));
    }
    fds.extend(callers.iter().map(|caller| PollFd::from_borrowed_fd(caller.socket.as_fd(), PollFlags::IN)));
    fds.extend(waiting.map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)));
    let left = left.min(Duration::from_secs(1));
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(system("poll")(errno)),
    }
}

#[cfg(test)]
mod tests;
