//! The way beside a connection on which the receiver tells the sender of memory that it may write to: with descriptors on
//! one host, by name between hosts. Apart from the data's frames, because another thread listens to it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::pipe::Pipe;
use super::wire::{FRAME, Frame};
use crate::error::{Error, Result};
use crate::handoff::{Channel, Received};

/// One end.
pub enum Side {
    /// To a process of this host, and what it has not taken yet.
    Local(Channel, VecDeque<(Frame, Option<OwnedFd>)>),
    /// To a process of another host.
    Remote(Box<Pipe>),
}

impl Side {
    /// Tells the other end something, with a descriptor where it is on this host.
    pub fn put(&mut self, frame: Frame, fd: Option<OwnedFd>) -> Result<()> {
        match self {
            Self::Local(_, queue) => queue.push_back((frame, fd)),
            Self::Remote(pipe) => pipe.put(&frame)?,
        }
        self.flush().map(drop)
    }

    /// Hands on what is queued; whether nothing is left.
    pub fn flush(&mut self) -> Result<bool> {
        match self {
            Self::Local(channel, queue) => {
                while let Some((frame, fd)) = queue.front() {
                    if !channel.send(&frame.encode(), fd.as_ref().map(AsFd::as_fd))? {
                        return Ok(false);
                    }
                    queue.pop_front();
                }
                Ok(true)
            }
            Self::Remote(pipe) => pipe.flush(),
        }
    }

    /// Whether something is queued.
    pub fn owing(&self) -> bool {
        matches!(self, Self::Local(_, queue) if !queue.is_empty())
    }

    /// What the other end has said. An error: it says nothing more.
    pub fn get(&mut self) -> Result<Option<(Frame, Option<OwnedFd>)>> {
        match self {
            Self::Local(channel, _) => {
                let mut bytes = [0; FRAME];
                match channel.receive(&mut bytes)? {
                    Received::Nothing => Ok(None),
                    Received::Ended => {
                        Err(Error::Peer { rank: u32::MAX, step: "the other end of a connection is gone" })
                    }
                    Received::Message(fd) => {
                        let frame = Frame::decode(&bytes).ok_or(Error::Protocol("a frame that is none"))?;
                        Ok(Some((frame, fd)))
                    }
                }
            }
            Self::Remote(pipe) => {
                if let Some(frame) = pipe.get()? {
                    return Ok(Some((frame, None)));
                }
                let filled = pipe.fill();
                match pipe.get()? {
                    Some(frame) => Ok(Some((frame, None))),
                    None => filled.map(|()| None),
                }
            }
        }
    }
}

impl AsFd for Side {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Local(channel, _) => channel.as_fd(),
            Self::Remote(pipe) => pipe.as_fd(),
        }
    }
}
