//! The state of one communicator: new, declined, ready or lost; its launches; and the registry by `ncclComm_t`.
#![forbid(unsafe_code)]

mod deferral;
mod operations;
mod ready;
mod sample;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::config::Config;
use crate::counters::Counters;
use crate::domain::{Declined, Tuned};
use crate::driver::{Context, Fault, RawStream, Remains, nvtx};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::route::NEVER;
use crate::setup::{Binding, Established, Request, establish};
use crate::stats::Standing;
use crate::table::Source;
use crate::{info, tuning, warning};
use deferral::Deferral;
use operations::Operations;
pub use ready::{Buffers, Ready, collect, only_aborted_are_left};
use sample::Sampler;

/// What a call of a communicator finds.
pub enum State<'a> {
    /// Nobody has set it up yet.
    New,
    /// Its ranks agreed to leave everything to stock NCCL.
    Declined,
    /// Its calls can be routed.
    Ready(&'a Arc<Ready>),
    /// Its ranks lost each other during set-up: calls fail.
    Lost,
}

const NEW: u8 = 0;
const DECLINED: u8 = 1;
const READY: u8 = 2;
const LOST: u8 = 3;

/// Why calls are stock NCCL's to refuse.
const FINALIZED: u8 = 1;
const SUSPENDED: u8 = 2;

/// What we learned when the communicator was made, if we saw it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// `maxCTAs` of its configuration.
    pub max_blocks: Option<u32>,
    /// `blocking = 0`.
    pub non_blocking: bool,
}

/// One communicator.
#[derive(Default)]
pub struct Communicator {
    state: AtomicU8,
    busy: AtomicBool,
    ready: OnceLock<Arc<Ready>>,
    hints: Hints,
    /// Stock NCCL said `ncclInProgress` for it.
    in_progress: AtomicBool,
    told: AtomicBool,
    cancelled: AtomicBool,
    refusing: AtomicU8,
    /// Its `ncclComm_t`, for the log.
    address: usize,
    /// Stock NCCL made it under our eyes; else it is only a handle that somebody passed.
    seen: bool,
    sampler: OnceLock<Sampler>,
    /// Its calls.
    pub counters: Counters,
    /// What its set-up has let go.
    pub remains: Remains,
    /// Operations that were made for it.
    pub operations: Operations,
    /// Its first call, if it does not block its caller.
    pub deferral: Deferral,
}

impl Communicator {
    /// Where it stands. One load.
    pub fn state(&self) -> State<'_> {
        match self.state.load(Ordering::SeqCst) {
            READY => self.ready.get().map_or(State::Lost, State::Ready),
            DECLINED => State::Declined,
            LOST => State::Lost,
            _ => State::New,
        }
    }

    /// What is known from its creation, and of one whose creation was not seen, from what its set-up met.
    pub fn hints(&self) -> Hints {
        let non_blocking = self.hints.non_blocking || self.in_progress.load(Ordering::Relaxed);
        Hints { non_blocking, ..self.hints }
    }

    /// Stock NCCL has answered `ncclInProgress`: it does not block its caller.
    pub fn found_in_progress(&self) {
        self.in_progress.store(true, Ordering::Relaxed);
    }

    /// The fault that one of its kernels reported, logged when it is seen for the first time.
    pub fn fault(&self, ready: &Ready) -> Option<Fault> {
        let fault = ready.fault()?;
        if !self.told.swap(true, Ordering::Relaxed) {
            let (rank, ranks) = (ready.rank(), ready.agreement().ranks);
            warning!(
                ready.device(),
                "rank {rank}/{ranks}, communicator {:#x}: a kernel reported {fault}",
                self.address
            );
        }
        Some(fault)
    }

    /// Queues a call, timed on the device if its turn has come.
    pub fn timed<T>(&self, (row, bytes): (usize, u64), stream: RawStream, queue: impl FnOnce() -> T) -> T {
        let Some(sampler) = self.sampler.get() else { return queue() };
        let sample = sampler.begin(&self.counters, (row, bytes), stream);
        let result = queue();
        if let Some(sample) = sample {
            sampler.end(sample, stream);
        }
        result
    }

    /// Counts what was timed and is done.
    pub fn read_samples(&self) {
        if let Some(sampler) = self.sampler.get() {
            sampler.read(&self.counters);
        }
    }

    /// Logs the fault of a communicator that ends, if nobody has asked for it; an abort of the program's own is none.
    pub fn last_word(&self, ready: &Ready) {
        if ready.fault().is_some_and(|fault| !fault.is_abort()) {
            self.fault(ready);
        }
    }

    /// Leaves it to stock NCCL without asking anybody: for what every rank finds alike before the first vote.
    pub fn decline(&self) {
        self.counters.stands(Standing::Off, None);
        self.state.store(DECLINED, Ordering::Release);
    }

    /// Claims the right to set it up; NCCL forbids two threads in one communicator, a program may still do it.
    pub fn claim(&self) -> bool {
        !self.busy.swap(true, Ordering::AcqRel)
    }

    /// Whether some thread is setting it up right now.
    pub fn setting_up(&self) -> bool {
        self.busy.load(Ordering::Acquire) && self.state.load(Ordering::Acquire) == NEW
    }

    /// Ends what must not outlive the communicator: a set-up in progress, and its kernels.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let State::Ready(ready) = self.state() {
            ready.abort();
        }
    }

    /// Whether the communicator is being aborted: stock NCCL must not be asked about it any more.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// The caller has finalized it: what follows is stock NCCL's to refuse.
    pub fn finalize(&self) {
        self.refusing.fetch_or(FINALIZED, Ordering::AcqRel);
    }

    /// The caller has suspended it, or resumed it.
    pub fn suspend(&self, suspended: bool) {
        if suspended {
            self.refusing.fetch_or(SUSPENDED, Ordering::AcqRel);
        } else {
            self.refusing.fetch_and(!SUSPENDED, Ordering::AcqRel);
        }
    }

    /// Whether it takes calls: neither aborted nor revoked nor finalized nor suspended.
    pub fn takes_calls(&self, ready: &Ready) -> bool {
        self.refusing.load(Ordering::Relaxed) == 0 && !ready.aborted()
    }

    /// A set-up that ended without a verdict leaves peers waiting: no later call may go on as if it had not begun.
    pub fn settle(&self) {
        if self.state.compare_exchange(NEW, LOST, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.counters.stands(Standing::Lost, None);
        }
    }

    /// Gives the right to set it up back, where nothing had begun.
    pub fn unclaim(&self) {
        self.busy.store(false, Ordering::Release);
    }

    /// Sets it up with its peers and latches the outcome: no later call tries again.
    ///
    /// `context` is the device's, or why there is none; `nccl` the version code of stock NCCL; `bound` what of the
    /// program's calls leads here.
    pub fn set_up(
        &self,
        exchange: &mut dyn Exchange,
        device: i32,
        context: Result<Arc<Context>>,
        (nccl, bound): (i32, Binding),
    ) -> Result<()> {
        let config = Config::get();
        let max_blocks = self.hints.max_blocks;
        let request = Request { device, max_blocks, nccl: tuning::band(nccl), bound };
        let (rank, ranks) = (exchange.rank(), exchange.ranks());
        self.counters.identify(device, rank, ranks);
        nvtx::prepare(config.nvtx.as_deref());
        let _range = nvtx::range(c"twoshot: set-up of a communicator");
        let ours = context.as_ref().ok().map(Arc::clone);
        let (mut reason, mut own) = (None, None);
        let established = || establish(exchange, context, request, config, &mut own);
        let verdict = self.remains.keep(established);
        let outcome = verdict.map(|verdict| match (verdict, ours) {
            (Ok(established), Some(context)) => {
                log_on(device, rank, &established);
                Some(Arc::new(Ready::new(context, established, self.remains.clone(), rank, config)))
            }
            (Ok(_), None) => None,
            (Err(declined), _) => {
                log_off((device, rank, ranks), &declined, own.as_ref(), config);
                reason = Some(declined.reason);
                None
            }
        });
        let (state, standing) = match &outcome {
            Ok(Some(ready)) => {
                if let Some(sampler) = Sampler::new(ready.context(), config.sample) {
                    let _ = self.sampler.set(sampler);
                }
                let _ = self.ready.set(Arc::clone(ready));
                (READY, Standing::On)
            }
            Ok(None) => {
                // Windows are not kept for as long as the communicator: they go when another one is made or ends.
                self.remains.lay_aside();
                (DECLINED, Standing::Off)
            }
            Err(error) => {
                warning!(device, "rank {rank}/{ranks}: set-up broke off, the communicator is lost: {error}");
                (LOST, Standing::Lost)
            }
        };
        self.counters.stands(standing, reason);
        // Before `cancelled` is asked, as an abort sets that before it asks for the state: one of the two sees the other.
        self.state.store(state, Ordering::SeqCst);
        if let (State::Ready(ready), true) = (self.state(), self.cancelled()) {
            ready.abort();
        }
        outcome.map(|_| ())
    }
}

fn log_on(device: i32, rank: u32, established: &Established) {
    let agreement = &established.agreement;
    let multicast = if established.workspace.has_multicast() { "multicast" } else { "unicast" };
    let table = established.row.source.name();
    let remark = match established.tuned {
        Tuned::Agreed if established.row.source != Source::File => {
            " (the tuning file has no row for this world)".into()
        }
        Tuned::Ignored { rank } => format!(" (tuning files ignored: rank {rank}'s is unusable or not rank 0's)"),
        _ => String::new(),
    };
    let switch = match agreement.switch_bytes {
        NEVER => String::new(),
        bytes => {
            let from = bytes.max(agreement.oneshot_bytes.saturating_add(1));
            format!(", sums in the switch from {from} to {} B", agreement.switch_max_bytes)
        }
    };
    let bulk = match agreement.bulk_bytes {
        0 => String::new(),
        bytes => format!(", bulk to {bytes} B"),
    };
    info!(
        device,
        "rank {rank}/{}: ON, {} host(s), {multicast}, handles {:?}, one-shot to {} B, two-shot to {} B{switch}{bulk}, blocks {}, \
         memory {} B, table: {table}{remark}",
        agreement.ranks,
        established.hosts,
        established.handle,
        agreement.oneshot_bytes,
        agreement.twoshot_bytes,
        agreement.blocks,
        established.window_bytes,
    );
}

fn log_off((device, rank, ranks): (i32, u32, u32), declined: &Declined, own: Option<&Error>, config: &Config) {
    // The rank it holds for knows more.
    let word = config.forbidden.filter(|_| declined.rank == rank).map(str::to_owned);
    let failed = own.filter(|error| !matches!(error, Error::Protocol(_)));
    let own = word.or_else(|| failed.map(Error::to_string)).map(|text| format!(" [{text}]")).unwrap_or_default();
    info!(device, "rank {rank}/{ranks}: OFF, stock NCCL: {declined}{own}");
}

type Table = HashMap<usize, Arc<Communicator>>;

static TABLE: LazyLock<ArcSwap<Table>> = LazyLock::new(|| ArcSwap::from_pointee(Table::new()));
static CHANGES: Mutex<()> = Mutex::new(());

/// The communicator behind an `ncclComm_t`, made known at its first call if its creation was not seen. The common
/// case is a wait-free look-up.
pub fn find(comm: usize) -> Arc<Communicator> {
    if let Some(found) = TABLE.load().get(&comm) {
        return Arc::clone(found);
    }
    let hints = *UNSEEN.lock();
    insert(comm, hints, false)
}

/// The limit of blocks asked of communicators whose address is not known yet: NCCL fills in the result of a split or a shrink when
/// it is complete, which may be long after the call. It holds for every communicator that is first seen at a call; the
/// ranks vote, so what one rank assumes is common.
static UNSEEN: Mutex<Hints> = Mutex::new(Hints { max_blocks: None, non_blocking: false });

/// Remembers what was asked of a communicator that will be seen later.
pub fn expected(hints: Hints) {
    let mut unseen = UNSEEN.lock();
    // Whether it blocks is no matter for a vote: a program that expects it to block must not be told to come back.
    let limits = [unseen.max_blocks, hints.max_blocks];
    unseen.max_blocks = limits.into_iter().flatten().min();
}

/// A communicator was created at this address; whatever was known of an older one there is forgotten.
pub fn created(comm: usize, hints: Hints) {
    insert(comm, hints, true);
}

fn insert(comm: usize, hints: Hints, replace: bool) -> Arc<Communicator> {
    let (communicator, old) = exchange_entry(comm, hints, replace);
    if let Some(old) = old {
        // Its end was not seen. What it held goes as at an abort, and not under the lock.
        if let State::Ready(ready) = old.state() {
            let ready = Arc::clone(ready);
            drop(old);
            ready.release(Duration::ZERO, true);
        } else {
            old.remains.lay_aside();
        }
    }
    communicator
}

fn exchange_entry(comm: usize, hints: Hints, replace: bool) -> (Arc<Communicator>, Option<Arc<Communicator>>) {
    let _changes = CHANGES.lock();
    if !replace && let Some(found) = TABLE.load().get(&comm) {
        return (Arc::clone(found), None);
    }
    let communicator = Arc::new(Communicator { hints, address: comm, seen: replace, ..Communicator::default() });
    let mut table = Table::clone(&TABLE.load());
    let old = table.insert(comm, Arc::clone(&communicator));
    TABLE.store(Arc::new(table));
    (communicator, old)
}

/// The communicator if it is known, without making it known.
pub fn known(comm: usize) -> Option<Arc<Communicator>> {
    TABLE.load().get(&comm).map(Arc::clone)
}

/// Forgets a handle that stock NCCL does not know, or not yet: whatever addresses a program passes, none is kept.
pub fn dismiss(comm: usize) {
    if known(comm).is_some_and(|communicator| !communicator.seen) {
        remove(comm);
    }
}

/// Forgets a communicator that is about to be destroyed and hands its state over.
pub fn remove(comm: usize) -> Option<Arc<Communicator>> {
    let _changes = CHANGES.lock();
    let mut table = Table::clone(&TABLE.load());
    let removed = table.remove(&comm);
    if removed.is_some() {
        TABLE.store(Arc::new(table));
    }
    removed
}

/// The error of a communicator whose set-up broke off.
pub fn lost() -> Error {
    Error::Peer { rank: u32::MAX, step: "set-up broke off" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_of_a_communicator_not_seen_yet_holds_at_its_first_call() {
        assert!(!find(16).hints().non_blocking);
        expected(Hints { max_blocks: Some(8), ..Hints::default() });
        expected(Hints { non_blocking: true, ..Hints::default() });
        expected(Hints { max_blocks: Some(4), ..Hints::default() });
        let hints = find(32).hints();
        assert!(!hints.non_blocking && hints.max_blocks == Some(4));
        assert!(!find(16).hints().non_blocking, "what is known stays");
        created(48, Hints::default());
        assert!(!find(48).hints().non_blocking, "what was seen is taken as it is");
    }

    #[test]
    fn a_handle_that_stock_does_not_know_is_forgotten_and_one_that_was_made_is_kept() {
        find(0x1010);
        created(0x1020, Hints::default());
        dismiss(0x1010);
        dismiss(0x1020);
        assert!(known(0x1010).is_none() && known(0x1020).is_some());
    }
}
