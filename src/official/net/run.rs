//! Messages of a batch whose copies can be one, because they lie side by side at both ends.
#![forbid(unsafe_code)]

use crate::driver::{Context, Place, Stream, copy};
use crate::error::Result;

/// Copies straight into memory that can be one.
pub struct Run {
    to: u64,
    from: Place,
    bytes: u64,
}

impl Run {
    /// The first one.
    pub fn new(to: u64, from: Place, bytes: u64) -> Self {
        Self { to, from, bytes }
    }

    /// Takes one more copy in, if it goes on where all so far end.
    pub fn takes(&mut self, to: u64, from: Place, bytes: u64) -> bool {
        let next = match self.from {
            Place::Host(at) => Place::Host(at + self.bytes),
            Place::Device(at) => Place::Device(at + self.bytes),
        };
        let goes_on = (self.to + self.bytes, next) == (to, from);
        self.bytes += if goes_on { bytes } else { 0 };
        goes_on
    }

    /// Queues it.
    pub fn queue(run: Option<Self>, context: &Context, stream: &Stream) -> Result<()> {
        run.map_or(Ok(()), |run| copy(context, Place::Device(run.to), run.from, run.bytes, stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn moved(place: Place, by: u64) -> Place {
        match place {
            Place::Host(at) => Place::Host(at + by),
            Place::Device(at) => Place::Device(at + by),
        }
    }

    /// Bytes as pairs of where they go and where they are.
    fn bytes(to: u64, from: Place, bytes: u64) -> impl Iterator<Item = (u64, Place)> {
        (0..bytes).map(move |i| (to + i, moved(from, i)))
    }

    proptest! {
        #[test]
        fn every_byte_of_every_message_is_copied_once_to_where_it_belongs_and_side_by_side_as_one(
            messages in prop::collection::vec((0u64..4, 0u64..4, 1u64..6, any::<bool>()), 1..12), start in 1u64..1000,
        ) {
            // Behind the one before, or with a gap at either end, or in memory of the other kind.
            let (mut to, mut from, mut apart, mut was) = (start, start, 0, None);
            let mut runs: Vec<Run> = Vec::new();
            let mut want = Vec::new();
            for (there, here, size, host) in messages {
                to += there / 2;
                from += here / 2;
                let place = if host { Place::Host(from) } else { Place::Device(from) };
                apart += u32::from(there > 1 || here > 1 || was != Some(host));
                want.extend(bytes(to, place, size));
                if !runs.last_mut().is_some_and(|run| run.takes(to, place, size)) {
                    runs.push(Run::new(to, place, size));
                }
                (to, from, was) = (to + size, from + size, Some(host));
            }
            prop_assert_eq!(runs.len() as u32, apart);
            prop_assert_eq!(runs.iter().flat_map(|run| bytes(run.to, run.from, run.bytes)).collect::<Vec<_>>(), want);
        }
    }
}
