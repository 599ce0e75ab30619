//! Threads on which stock NCCL runs.
#![forbid(unsafe_code)]

use std::io;
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crate::config::Config;

/// Stock NCCL connects peers at a communicator's first collective, on the caller's thread: it expects as much stack as
/// the main thread of a program commonly has.
pub(super) const STACK: usize = 8 << 20;

/// Starts a thread for `work()`. One that cannot be had is asked for again, as long as a step of set-up may take.
pub(super) fn start<'scope, T: Send + 'scope, W: FnOnce() -> T + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl Fn() -> W,
) -> io::Result<ScopedJoinHandle<'scope, T>> {
    let patience = Duration::from_millis(Config::get().setup_timeout_ms);
    patiently(patience, || Builder::new().name(name.to_owned()).stack_size(STACK).spawn_scoped(scope, work()))
}

fn patiently<T>(patience: Duration, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match attempt() {
            Err(_) if begun.elapsed() < patience => std::thread::sleep(pause),
            outcome => return outcome,
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_cannot_be_had_at_first_is_asked_for_again_and_not_for_ever() {
        let refused = || io::Error::from(io::ErrorKind::WouldBlock);
        let mut left = 5;
        let got = patiently(Duration::from_secs(60), || {
            left -= 1;
            if left > 0 { Err(refused()) } else { Ok(left) }
        });
        assert_eq!(got.expect("the fifth attempt"), 0);
        let begun = Instant::now();
        patiently(Duration::from_millis(30), || Err::<(), _>(refused())).expect_err("never");
        assert!(begun.elapsed() >= Duration::from_millis(30));
    }
}
