//! The processes of a benchmark: started together, heard together, ended together.
//!
//! None outlives the parent: each asks the kernel to be killed with it, and the parent kills all of them when one
//! fails, when nothing is heard for too long, and whenever it leaves this module.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::protocol::{Message, Task};

/// One process: its task and what its environment differs in.
pub struct Place {
    pub task: Task,
    /// Variables to set, or with `None` to take away.
    pub environment: Vec<(OsString, Option<OsString>)>,
}

enum Heard {
    Message(Box<Message>),
    /// The pipe ended.
    Ended,
}

/// Running ranks.
pub struct Ranks {
    children: Vec<Child>,
    inputs: Vec<Option<ChildStdin>>,
    from: Receiver<(usize, Heard)>,
    steps: Vec<String>,
    done: Vec<bool>,
    patience: Duration,
    end: Instant,
}

impl Ranks {
    /// Starts all; each is this very program again.
    pub fn start(places: &[Place], patience: Duration, limit: Duration) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let (to, from) = mpsc::channel();
        let count = places.len();
        let mut ranks = Self {
            children: Vec::with_capacity(count),
            inputs: Vec::with_capacity(count),
            from,
            steps: vec!["starting".to_owned(); count],
            done: vec![false; count],
            patience,
            end: Instant::now() + limit,
        };
        for (rank, place) in places.iter().enumerate() {
            let mut command = Command::new(&program);
            command.arg("bench-rank").stdin(Stdio::piped()).stdout(Stdio::piped());
            for (name, value) in &place.environment {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
            let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
            ranks.children.push(child);
            ranks.inputs.push(stdin);
            ranks.tell(rank, &place.task)?;
            let Some(stdout) = stdout else { return Err("a rank has no standard output".to_owned()) };
            let to = to.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    // Nothing but messages travels here; what is none would be a rank that broke.
                    let message = serde_json::from_str(&line).unwrap_or_else(|error| Message::Failed {
                        message: format!("unreadable message: {error}: {line}"),
                    });
                    if to.send((rank, Heard::Message(Box::new(message)))).is_err() {
                        return;
                    }
                }
                let _ = to.send((rank, Heard::Ended));
            });
        }
        Ok(ranks)
    }

    /// Sends one line to a rank. A rank that cannot be written to is about to be heard of.
    pub fn tell(&mut self, rank: usize, line: &impl serde::Serialize) -> Result<(), String> {
        let mut text = serde_json::to_vec(line).map_err(|error| error.to_string())?;
        text.push(b'\n');
        if let Some(stdin) = &mut self.inputs[rank] {
            let _ = stdin.write_all(&text).and_then(|()| stdin.flush());
        }
        Ok(())
    }

    /// Sends one line to every rank.
    pub fn tell_all(&mut self, line: &impl serde::Serialize) -> Result<(), String> {
        (0..self.children.len()).try_for_each(|rank| self.tell(rank, line))
    }

    /// The next message that is not about steps, or `None` when all ranks are done.
    pub fn next(&mut self) -> Result<Option<(usize, Message)>, String> {
        let mut deadline = Instant::now() + self.patience;
        while self.done.iter().any(|done| !done) {
            let left = deadline.min(self.end).saturating_duration_since(Instant::now());
            match self.from.recv_timeout(left) {
                Ok((rank, Heard::Message(message))) => {
                    deadline = Instant::now() + self.patience;
                    match *message {
                        Message::Step { step } => self.steps[rank] = step,
                        Message::Done => self.done[rank] = true,
                        Message::Failed { message } => return Err(self.first_failure(rank, message)),
                        message => return Ok(Some((rank, message))),
                    }
                }
                Ok((rank, Heard::Ended)) => {
                    if !self.done[rank] {
                        let status = self.children[rank].wait().map_or_else(|e| e.to_string(), |s| s.to_string());
                        return Err(format!("rank {rank} ended during: {} ({status})", self.steps[rank]));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let why = if Instant::now() >= self.end {
                        "the time for the whole run is over"
                    } else {
                        "no rank was heard for too long"
                    };
                    return Err(self.silence(why));
                }
                Err(RecvTimeoutError::Disconnected) => return Err("all ranks ended".to_owned()),
            }
        }
        Ok(None)
    }

    /// When one fails, others often fail a moment later, and theirs may be the better explanation.
    fn first_failure(&self, rank: usize, message: String) -> String {
        let mut lines = vec![format!("rank {rank}, {}: {message}", self.steps[rank])];
        let end = Instant::now() + Duration::from_millis(1500);
        while let Ok((other, heard)) = self.from.recv_timeout(end.saturating_duration_since(Instant::now())) {
            if let Heard::Message(message) = heard
                && let Message::Failed { message } = *message
            {
                lines.push(format!("rank {other}, {}: {message}", self.steps[other]));
            }
        }
        lines.join("\n  ")
    }

    fn silence(&self, why: &str) -> String {
        let waiting: Vec<_> = self
            .steps
            .iter()
            .enumerate()
            .filter(|(rank, _)| !self.done[*rank])
            .map(|(rank, step)| format!("  rank {rank}: {step}"))
            .collect();
        format!("{why}; the ranks were at\n{}", waiting.join("\n"))
    }

    /// Waits for the processes, which have said that they are done.
    pub fn finish(mut self) -> Result<(), String> {
        let deadline = Instant::now() + self.patience;
        for rank in 0..self.children.len() {
            self.inputs[rank] = None;
            loop {
                let child = &mut self.children[rank];
                match child.try_wait().map_err(|error| error.to_string())? {
                    Some(status) if status.success() => break,
                    Some(status) => return Err(format!("rank {rank} was done, then ended with {status}")),
                    None if Instant::now() > deadline => return Err(format!("rank {rank} was done, but did not end")),
                    None => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
        Ok(())
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // Only processes that still run are left; those that ended have been waited for or are now.
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        for child in &mut self.children {
            let _ = child.kill();
        }
        // A process can stay inside the kernel driver for a while; that is no reason to stay with it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.children.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
            self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        }
    }
}
