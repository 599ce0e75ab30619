//! The kernels' code is loaded before the program makes a communicator. The driver loads code only while the device is
//! idle, so a set-up that did it would wait for whatever the program has queued: say a receive whose send its peer
//! issues behind the very collective that sets up. Stock NCCL loads its kernels when a communicator is made, too.
//!
//! The plugin door does not see the first communicator being made, but is opened while it is, on its thread. What is
//! missing even so (other devices of that moment) is loaded at the set-up.

use std::ffi::c_int;

use crate::config::Config;
use crate::driver::{Device, current_ordinal, with_relaxed_capture};
use crate::setup;

/// Before a communicator is made: NCCL makes it on the thread's device.
pub(super) fn here() {
    if let Some(device) = current_ordinal() {
        on(device);
    }
}

/// Before one is made on this device; false if there is none. What fails is not said here: set-up meets it again and
/// says it.
pub(super) fn on(device: c_int) -> bool {
    if Device::new(device).is_err() {
        return false;
    }
    // The capture of some other thread is none of it.
    with_relaxed_capture(|| setup::preload(device, Config::get()));
    true
}
