//! The multicast objects of this process, so that communicators of one device set share one.
//!
//! A communicator holds the object through its part; here are weak references only, so an object lives as long as any
//! of its parts. Ranks release theirs at different times. That they speak of the same object, and which part of it is
//! free on all of them, is a pure function of what all of them say.
#![forbid(unsafe_code)]

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::domain::Domain;
use crate::driver::{Divided, MOST_OBJECTS};
use crate::wire::{Offer, Step};

/// A device set as one of its ranks sees it: every rank's process and GPU, in the order of ranks, and the size of the
/// windows.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Place {
    members: Vec<([u8; 16], [u8; 16])>,
    rank: u32,
    window_bytes: u64,
}

impl Place {
    /// This rank's place in a domain.
    pub fn of(domain: &Domain, rank: u32, window_bytes: u64) -> Self {
        let members = domain.facts.iter().map(|facts| (facts.process, facts.gpu)).collect();
        Self { members, rank, window_bytes }
    }
}

/// An object, and the identity by which the ranks call it.
#[derive(Clone)]
pub struct Known {
    /// Random.
    pub id: u64,
    /// This rank's handle of it.
    pub object: Arc<Divided>,
}

static OBJECTS: Mutex<Vec<(Place, u64, Weak<Divided>)>> = Mutex::new(Vec::new());

/// The objects that communicators of this place use.
pub fn known(place: &Place) -> Vec<Known> {
    let objects = OBJECTS.lock();
    let own = objects.iter().filter(|(of, _, _)| of == place);
    // Held by the caller until the ranks have agreed. Dropping one may call the driver: not under this lock.
    own.filter_map(|(_, id, object)| Some(Known { id: *id, object: object.upgrade()? })).take(MOST_OBJECTS).collect()
}

/// Lets later communicators of this place find an object.
pub fn keep(place: Place, id: u64, object: &Arc<Divided>) {
    let mut objects = OBJECTS.lock();
    objects.retain(|(_, _, object)| object.strong_count() > 0);
    objects.push((place, id, Arc::downgrade(object)));
}

/// What this rank says of its objects.
pub fn offers(known: &[Known]) -> [Offer; MOST_OBJECTS] {
    let mut offers = [Offer::default(); MOST_OBJECTS];
    for (offer, known) in offers.iter_mut().zip(known) {
        *offer = Offer { id: known.id, free: known.object.free() };
    }
    offers
}

/// The first object of rank 0 that all ranks have with a common free part, and that part.
pub fn agree(steps: &[Step]) -> Option<(u64, u32)> {
    let free = |step: &Step, id| step.offers.iter().filter(|offer| offer.id == id).fold(0, |all, own| all | own.free);
    let candidates = steps.first()?.offers.iter().filter(|offer| offer.id != 0);
    candidates
        .map(|offer| (offer.id, steps.iter().fold(u32::MAX, |common, step| common & free(step, offer.id))))
        .find_map(|(id, common)| (common != 0).then_some((id, common.trailing_zeros())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn step(rank: u32, offers: &[(u64, u32)]) -> Step {
        let mut step = Step::new(1, rank);
        for (offer, (id, free)) in step.offers.iter_mut().zip(offers) {
            *offer = Offer { id: *id, free: *free };
        }
        step
    }

    #[test]
    fn a_part_is_taken_only_of_an_object_that_every_rank_has_and_where_every_rank_holds_it_free() {
        let agreed = |ranks: &[&[(u64, u32)]]| {
            agree(&(0..).zip(ranks).map(|(rank, offers)| step(rank, offers)).collect::<Vec<_>>())
        };
        assert_eq!(agreed(&[&[(7, 0b1110)], &[(7, 0b0110)], &[(7, 0b1100)]]), Some((7, 2)));
        assert_eq!(agreed(&[&[(7, 0b1010)], &[(7, 0b0101)]]), None, "nothing in common");
        assert_eq!(agreed(&[&[(7, 1)], &[]]), None, "one rank has released it");
        assert_eq!(agreed(&[&[], &[(7, 1)]]), None);
        assert_eq!(agreed(&[&[(7, 1)], &[(8, 1)]]), None, "another generation");
        assert_eq!(agreed(&[&[(7, 0), (8, 4)], &[(8, 6), (7, 0)]]), Some((8, 2)), "the first is full");
        assert_eq!(agreed(&[]), None);
    }

    proptest! {
        #[test]
        fn what_is_agreed_is_free_on_every_rank(
            ranks in prop::collection::vec(prop::collection::vec((0u64..4, any::<u32>()), 0..MOST_OBJECTS), 1..6),
        ) {
            let steps: Vec<_> = (0..).zip(&ranks).map(|(rank, offers)| step(rank, offers)).collect();
            if let Some((id, part)) = agree(&steps) {
                prop_assert!(id != 0);
                for offers in &ranks {
                    prop_assert!(offers.iter().any(|(own, free)| *own == id && free & (1 << part) != 0));
                }
            }
        }
    }
}
