//! How data went in this process: straight into registered memory, or through windows.
#![forbid(unsafe_code)]

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::info;

/// Messages and bytes of senders.
#[derive(Default)]
struct Way {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Way {
    const fn new() -> Self {
        Self { messages: AtomicU64::new(0), bytes: AtomicU64::new(0) }
    }

    fn add(&self, bytes: u64) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn get(&self) -> (u64, u64) {
        (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

static DIRECT: Way = Way::new();
static WINDOW: Way = Way::new();
/// Registrations and announcements that came to nothing.
static REFUSED: AtomicU64 = AtomicU64::new(0);
/// Senders that are open.
static OPEN: AtomicU64 = AtomicU64::new(0);

/// A message that went straight to where it belongs.
pub fn direct(bytes: u64) {
    DIRECT.add(bytes);
}

/// A message that went through a window.
pub fn through_the_window(bytes: u64) {
    WINDOW.add(bytes);
}

/// Memory for which there is no straight way. The first one of the process is named.
pub fn kept_to_the_window(device: i32, why: &Error) {
    static SAID: Once = Once::new();
    REFUSED.fetch_add(1, Ordering::Relaxed);
    SAID.call_once(|| {
        info!(device, "network: registered memory is reached through the window ({why}); more of it is only counted");
    });
}

/// Messages sent straight, their bytes, messages sent through windows, their bytes, and memories kept to the window.
pub fn totals() -> [u64; 5] {
    let ((straight, straight_bytes), (window, window_bytes)) = (DIRECT.get(), WINDOW.get());
    [straight, straight_bytes, window, window_bytes, REFUSED.load(Ordering::Relaxed)]
}

/// An open sender. With the last one the log says what was sent.
pub struct Open(i32);

impl Open {
    /// One more.
    pub fn new(device: i32) -> Self {
        OPEN.fetch_add(1, Ordering::Relaxed);
        Self(device)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if OPEN.fetch_sub(1, Ordering::Relaxed) == 1 {
            let [straight, straight_bytes, window, window_bytes, refused] = totals();
            info!(
                self.0,
                "network: {straight} messages ({straight_bytes} B) were sent straight into registered memory, {window} \
                 ({window_bytes} B) through windows; {refused} memories had no straight way"
            );
        }
    }
}
