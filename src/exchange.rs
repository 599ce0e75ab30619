//! How ranks exchange small blobs during set-up, and what a vote is. The transport comes from the door: stock
//! NCCL's own AllGather for the direct door.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::decline::Decline;
use crate::domain::Declined;
use crate::error::{Error, Result};
use crate::wire::{Blob, Step};

/// All ranks of one communicator.
pub trait Exchange {
    /// Number of ranks.
    fn ranks(&self) -> u32;

    /// This rank.
    fn rank(&self) -> u32;

    /// Every rank gives one blob and gets all of them, by rank. `step` names what is waited for.
    ///
    /// An error means that the ranks can no longer agree on anything: the communicator is lost.
    fn allgather(&mut self, mine: &Blob, step: &'static str) -> Result<Vec<Blob>>;

    /// From now on no rank's step takes longer than this; the ranks agreed on it.
    fn grant(&mut self, _deadline: Duration) {}

    /// Whether this rank's communicator does not block its caller, as far as is known.
    fn non_blocking(&self) -> bool {
        false
    }
}

/// One vote: every rank states its outcome, every rank gets all outcomes or the same refusal.
///
/// The outer error is a lost communicator, the inner one the ranks' common verdict.
pub fn vote(
    exchange: &mut dyn Exchange,
    mine: Step,
    name: &'static str,
) -> Result<std::result::Result<Vec<Step>, Declined>> {
    let blobs = exchange.allgather(&mine.encode(), name)?;
    if blobs.len() != exchange.ranks() as usize {
        return Err(Error::Bug("an exchange returned another number of blobs than ranks"));
    }
    let mut steps = Vec::with_capacity(blobs.len());
    for (rank, blob) in (0u32..).zip(&blobs) {
        let step = Step::decode(blob).filter(|step| step.number == mine.number && step.rank == rank);
        let Some(step) = step else {
            return Ok(Err(Declined { reason: Decline::Foreign, rank, code: 0 }));
        };
        steps.push(step);
    }
    let refusal = (0u32..)
        .zip(&steps)
        .find_map(|(rank, step)| step.declined.map(|(reason, code)| Declined { reason, rank, code }));
    Ok(refusal.map_or(Ok(steps), Err))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Canned(Vec<Blob>);

    impl Exchange for Canned {
        fn ranks(&self) -> u32 {
            self.0.len() as u32
        }
        fn rank(&self) -> u32 {
            0
        }
        fn allgather(&mut self, mine: &Blob, _step: &'static str) -> Result<Vec<Blob>> {
            self.0[0] = *mine;
            Ok(self.0.clone())
        }
    }

    fn cast(peer: Blob) -> std::result::Result<Vec<Step>, Declined> {
        vote(&mut Canned(vec![[0; crate::wire::BLOB], peer]), Step::new(2, 0), "test").unwrap()
    }

    #[test]
    fn a_vote_passes_only_when_every_rank_is_in_the_same_step_and_agrees() {
        assert_eq!(cast(Step::new(2, 1).encode()).unwrap().len(), 2);
        let refused = Step { declined: Some((Decline::Map, 2)), ..Step::new(2, 1) };
        assert_eq!(cast(refused.encode()).unwrap_err(), Declined { reason: Decline::Map, rank: 1, code: 2 });
    }

    #[test]
    fn a_rank_in_another_step_or_with_foreign_data_declines_all() {
        for blob in [Step::new(3, 1).encode(), Step::new(2, 0).encode(), [7; crate::wire::BLOB]] {
            assert_eq!(cast(blob).unwrap_err().reason, Decline::Foreign);
        }
    }
}
