//! Frees that are put off while a communicator is being set up.
//!
//! `cuMemFree`, `cuMemFreeHost` and the unloading of code wait for everything that is queued on the device, and unmapping
//! may. What a program has queued can wait for a peer that comes to its own part only behind the first collective of
//! another communicator: so a set-up frees nothing. What its owners let go is kept with the communicator and freed when
//! that ends, where stock NCCL frees too.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::capture::{bury, with_relaxed_capture};

type Free = Box<dyn FnOnce() + Send>;

/// In the order in which they were let go.
#[derive(Default)]
struct Bag(Mutex<Vec<Free>>);

impl Drop for Bag {
    fn drop(&mut self) {
        let frees = std::mem::take(self.0.get_mut());
        if !frees.is_empty() {
            Scope::default().run(|| with_relaxed_capture(|| frees.into_iter().for_each(|free| free())));
        }
    }
}

/// What the set-up of one communicator has let go. Freed when the last copy is dropped.
#[derive(Clone, Default)]
pub struct Remains(Arc<Bag>);

impl Remains {
    /// Runs `work`; what is let go on this thread meanwhile, and on the threads of its steps, is kept here.
    pub fn keep<T>(&self, work: impl FnOnce() -> T) -> T {
        Scope(Arc::downgrade(&self.0)).run(work)
    }

    /// Those of the set-up that this thread is in.
    pub fn current() -> Option<Self> {
        Scope::inherited().0.upgrade().map(Self)
    }

    /// Lays aside what is kept so far, for the next [`super::reap`].
    pub fn lay_aside(&self) {
        let frees = std::mem::take(&mut *self.0.0.lock());
        if !frees.is_empty() {
            bury(Arc::new(Bag(Mutex::new(frees))));
        }
    }
}

thread_local! {
    static CURRENT: RefCell<Weak<Bag>> = const { RefCell::new(Weak::new()) };
}

/// Where what a thread lets go is kept, if anywhere. Does not keep it alive: a step that was left behind, and comes back
/// when its communicator has ended, frees at once.
#[derive(Clone, Default)]
pub struct Scope(Weak<Bag>);

impl Scope {
    /// That of this thread, for a thread that works for it.
    pub fn inherited() -> Self {
        Self(CURRENT.try_with(|current| current.borrow().clone()).unwrap_or_default())
    }

    /// Runs `work` in it.
    pub fn run<T>(self, work: impl FnOnce() -> T) -> T {
        /// Puts back what was there, whatever way `work` ends.
        struct Before(Weak<Bag>);
        impl Drop for Before {
            fn drop(&mut self) {
                let _ = CURRENT.try_with(|current| current.replace(std::mem::take(&mut self.0)));
            }
        }
        let _before = CURRENT.try_with(|current| Before(current.replace(self.0)));
        work()
    }
}

/// Frees something by `free`: now, without disturbing a capture of another thread, or, in a set-up, later.
pub fn let_go(free: impl FnOnce() + Send + 'static) {
    match Remains::current() {
        Some(remains) => remains.0.0.lock().push(Box::new(free)),
        None => with_relaxed_capture(free),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn note(said: &mpsc::Sender<u32>, n: u32) {
        let said = said.clone();
        let_go(move || said.send(n).expect("somebody listens"));
    }

    #[test]
    fn what_is_let_go_in_a_set_up_is_freed_in_its_order_when_the_communicator_ends() {
        let (said, heard) = mpsc::channel();
        let remains = Remains::default();
        remains.keep(|| {
            note(&said, 1);
            let step = Scope::inherited();
            let of_step = said.clone();
            std::thread::spawn(move || step.run(|| note(&of_step, 2))).join().expect("no panic");
            note(&said, 3);
        });
        note(&said, 0);
        let copy = remains.clone();
        drop(remains);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [0]);
        drop(copy);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn a_step_that_comes_back_behind_the_end_frees_at_once() {
        let (said, heard) = mpsc::channel();
        let remains = Remains::default();
        let step = remains.keep(Scope::inherited);
        drop(remains);
        step.run(|| note(&said, 1));
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [1]);
        assert!(Remains::current().is_none());
    }

    #[test]
    fn what_is_laid_aside_goes_with_the_next_collection_and_not_with_the_communicator() {
        let (said, heard) = mpsc::channel();
        let remains = Remains::default();
        remains.keep(|| note(&said, 1));
        remains.lay_aside();
        remains.keep(|| note(&said, 2));
        drop(remains);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [2]);
        super::super::reap();
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [1]);
    }
}
