//! The plugin door: which of the program's call slots lead to us, and what this rank says of it to the others.
//!
//! A call site has to lead here on all ranks of a communicator or on none. NCCL starts a network that has no device once
//! in a process, whatever its table's version, so the objects that are bound are those that were loaded when the process
//! made its first communicator. What is loaded later stays with stock NCCL: ranks make different numbers of communicators,
//! so there is no later moment that they share, and a library bound on one rank would start a set-up that its peers know
//! nothing of. Where the ranks differ nevertheless, or a slot could not be written, they find out in their first vote.

use std::ffi::{CStr, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{collectives, group, lifecycle, one_sided, operations, stock};
use crate::intercept::{self, BindReport, Known};
use crate::setup::Binding;
use crate::{info, warning};

/// What the first binding found; nothing while the plugin door is shut.
static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
static OPENED: AtomicBool = AtomicBool::new(false);

/// NCCL has loaded us: reroutes the calls of every loaded object, once in a process.
pub(super) fn open() {
    if OPENED.swap(true, Ordering::AcqRel) {
        again();
    } else if let Some((_, known)) = bind(None) {
        *KNOWN.lock() = Some(known);
    }
}

/// At each set-up: slots that the dynamic linker has filled since are rerouted once more. Says what leads here now.
pub(super) fn again() -> Binding {
    // Not locked meanwhile: the dynamic linker is called, and a thread inside it may call us.
    let Some(known) = KNOWN.lock().clone() else { return Binding::default() };
    bind(Some(&known)).map_or_else(Binding::default, |(report, _)| Binding {
        digest: report.digest,
        incomplete: report.failed > 0,
        unseen: !report.later.is_empty(),
    })
}

fn bind(known: Option<&Known>) -> Option<(BindReport, Known)> {
    let stock = stock().ok()?;
    let (report, found) = match intercept::bind_relocations(&targets(), known) {
        Ok(bound) => bound,
        Err(error) => {
            warning!(-1, "the direct door stays shut: {error}");
            return None;
        }
    };
    if report.slots > 0 {
        intercept::pin_library();
    }
    if report.changed > 0 || report.failed > 0 {
        info!(
            -1,
            "direct door: {} call slots in {} objects lead here, {} lead to another NCCL, {} could not be written; stock \
             NCCL {} at {}",
            report.slots,
            report.objects,
            report.refused,
            report.failed,
            stock.version,
            stock.path.display()
        );
    }
    say_later(&report.later);
    Some((report, found))
}

/// Once for each object.
fn say_later(later: &[PathBuf]) {
    static SAID: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    for path in later {
        let new = {
            let mut said = SAID.lock();
            let new = !said.contains(path);
            if new {
                said.push(path.clone());
            }
            new
        };
        if new {
            info!(-1, "{} was loaded after the first communicator: its calls are stock NCCL's", path.display());
        }
    }
}

/// The functions whose call slots lead to us: all that are written by hand.
fn targets() -> Vec<(&'static CStr, *const c_void)> {
    let mut targets = collectives::targets();
    targets.extend(collectives::configured_targets());
    targets.extend(group::targets());
    targets.extend(one_sided::targets());
    targets.extend(lifecycle::targets());
    targets.extend(operations::targets());
    targets
}
