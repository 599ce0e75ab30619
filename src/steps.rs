//! Running a step of set-up under a deadline: driver calls can block (a fabric manager that does not answer), and a
//! caller of `ncclAllReduce` must not hang where stock NCCL would not have.
#![forbid(unsafe_code)]

use std::sync::mpsc;
use std::time::Duration;

use crate::driver::{Scope, with_relaxed_capture};
use crate::error::{Error, Result};

/// The driver compiles kernels on it where it has no code for a device.
const STACK: usize = 8 << 20;

/// Runs `work` on a thread of its own and waits for it at most `deadline`. A step that does not come back is left
/// behind: it owns what it works on and releases it when it returns, if it ever does.
pub fn bounded<T: Send + 'static>(
    name: &'static str,
    deadline: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let scope = Scope::inherited();
    let run = move || {
        scope.run(|| {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| with_relaxed_capture(work)));
            let result = result.unwrap_or(Err(Error::Bug("a step of set-up panicked")));
            // Nobody listens any more after the deadline; the result, and what it owns, is dropped here then.
            let _ = sender.send(result);
        });
    };
    // The size is set: with `ulimit -s unlimited` some platforms would give 2 MiB, with a small limit too little.
    let thread = std::thread::Builder::new().name("twoshot-setup".into()).stack_size(STACK).spawn(run);
    let thread = thread.map_err(|source| Error::System { what: "starting a thread", source })?;
    match receiver.recv_timeout(deadline) {
        Ok(result) => {
            // It has sent its result; joining keeps the count of threads what it was.
            let _ = thread.join();
            result
        }
        Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::Deadline(name)),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::Bug("a step of set-up vanished")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    #[test]
    fn a_step_that_blocks_is_left_behind_and_releases_what_it_owns_when_it_returns() {
        let owned = Arc::new(());
        let (release, blocked) = mpsc::channel::<()>();
        let held = Arc::clone(&owned);
        let start = Instant::now();
        let error = bounded("blocking", Duration::from_millis(50), move || {
            let _ = blocked.recv();
            Ok(held)
        })
        .unwrap_err();
        assert!(matches!(error, Error::Deadline("blocking")));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(Arc::strong_count(&owned), 2);
        drop(release);
        while Arc::strong_count(&owned) > 1 {
            assert!(start.elapsed() < Duration::from_secs(10), "the step kept what it owned");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_step_that_panics_is_an_error() {
        let error = bounded::<()>("panicking", Duration::from_secs(5), || panic!("on purpose")).unwrap_err();
        assert!(matches!(error, Error::Bug(_)));
    }
}
