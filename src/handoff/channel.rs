//! A pair of sockets between two processes of a host: whole messages, each with a descriptor or none, without blocking.
#![forbid(unsafe_code)]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg, socketpair,
};

use super::{next_message, system};
use crate::error::{Error, Result};

/// One end.
pub struct Channel(OwnedFd);

/// What came.
#[derive(Debug)]
pub enum Received {
    /// A message, and what came with it.
    Message(Option<OwnedFd>),
    /// Nothing yet.
    Nothing,
    /// The other end is closed.
    Ended,
}

impl Channel {
    /// This end, and the descriptor of the other one.
    pub fn pair() -> Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(system("socketpair"))?;
        Ok((Self(ours), theirs))
    }

    /// The end that another process made.
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a message; whether it has left. If not, it can be tried again later.
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<bool> {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Error::Bug("no room for one descriptor"));
        }
        match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => Ok(true),
            // The last: too many descriptors of this user are on their way.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::TOOMANYREFS) => Ok(false),
            Err(errno) => Err(system("sending to a process of this host")(errno)),
        }
    }

    /// The next message, which has to be as long as `bytes`.
    pub fn receive(&self, bytes: &mut [u8]) -> Result<Received> {
        let (got, fds) = match next_message(&self.0, bytes) {
            Ok((0, _)) => return Ok(Received::Ended),
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(errno) => return Err(system("receiving from a process of this host")(errno)),
        };
        if got != bytes.len() || fds.len() > 1 {
            return Err(Error::Protocol("a message of another kind than was waited for"));
        }
        Ok(Received::Message(fds.into_iter().next()))
    }

    /// Waits for the next message, at most until `until`.
    pub fn wait(&self, bytes: &mut [u8], until: Instant) -> Result<Option<OwnedFd>> {
        loop {
            match self.receive(bytes)? {
                Received::Message(fd) => return Ok(fd),
                Received::Ended => return Err(Error::Protocol("the other end of a channel was closed")),
                Received::Nothing => {}
            }
            let left = until.saturating_duration_since(Instant::now()).min(Duration::from_secs(1));
            if left.is_zero() {
                return Err(Error::Deadline("a message of another process"));
            }
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let polled = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout));
            polled.map(drop).or_else(|errno| if errno == Errno::INTR { Ok(()) } else { Err(system("poll")(errno)) })?;
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn pair() -> (Channel, Channel) {
        let (ours, theirs) = Channel::pair().expect("sockets");
        (ours, Channel::of(theirs))
    }

    #[test]
    fn messages_come_whole_and_in_order_with_their_descriptors_and_then_the_end() {
        let (near, far) = pair();
        let mut bytes = [0; 3];
        assert!(matches!(far.receive(&mut bytes), Ok(Received::Nothing)));
        let file = std::fs::File::from(rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).expect("a file"));
        file.write_all_at(b"xyz", 0).expect("written");
        assert!(near.send(b"one", None).expect("sent"));
        assert!(near.send(b"two", Some(file.as_fd())).expect("sent"));
        drop((near, file));
        assert!(far.wait(&mut bytes, soon()).expect("a message").is_none());
        assert_eq!(&bytes, b"one");
        let got = std::fs::File::from(far.wait(&mut bytes, soon()).expect("a message").expect("a descriptor"));
        got.read_exact_at(&mut bytes, 0).expect("read");
        assert_eq!(&bytes, b"xyz");
        assert!(matches!(far.receive(&mut bytes), Ok(Received::Ended)));
        assert!(far.wait(&mut bytes, soon()).is_err());
    }

    #[test]
    fn the_last_message_of_an_end_that_closes_meanwhile_is_not_taken_for_its_end() {
        // In a tenth of a second of these rounds some fell between the kernel's two looks.
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            let (near, far) = pair();
            let sender = std::thread::spawn(move || near.send(b"one", None).expect("sent"));
            let came = loop {
                match far.receive(&mut [0; 3]).expect("no error") {
                    Received::Nothing => {}
                    came => break came,
                }
            };
            assert!(matches!(came, Received::Message(None)), "{came:?}");
            assert!(sender.join().expect("a sender"));
        }
    }

    #[test]
    fn what_an_end_said_before_it_closed_is_heard_though_it_left_messages_unread() {
        let (near, far) = pair();
        assert!(far.send(b"two", None).expect("sent"));
        assert!(near.send(b"one", None).expect("sent"));
        drop(near);
        let mut bytes = [0; 3];
        assert!(matches!(far.receive(&mut bytes), Ok(Received::Message(None))));
        assert_eq!(&bytes, b"one");
        assert!(matches!(far.receive(&mut bytes), Ok(Received::Ended)));
    }

    #[test]
    fn a_message_of_another_length_is_refused_and_a_full_channel_says_so() {
        let (near, far) = pair();
        assert!(near.send(b"four", None).expect("sent"));
        assert!(far.receive(&mut [0; 3]).is_err());
        assert!(near.send(b"to", None).expect("sent"));
        assert!(far.receive(&mut [0; 3]).is_err());
        let mut sent = 0;
        while near.send(&[7; 96], None).expect("sent or full") {
            sent += 1;
            assert!(sent < 1_000_000, "a channel without end");
        }
        for _ in 0..sent {
            assert!(matches!(far.receive(&mut [0; 96]), Ok(Received::Message(None))));
        }
        assert!(near.send(&[7; 96], None).expect("room again"));
        drop(far);
        assert!(near.send(&[7; 96], None).is_err());
    }

    #[test]
    fn a_message_that_never_comes_is_given_up_in_time() {
        let (_near, far) = pair();
        let error = far.wait(&mut [0; 3], Instant::now() + Duration::from_millis(50)).expect_err("nobody spoke");
        assert!(matches!(error, Error::Deadline(_)), "{error}");
    }
}
