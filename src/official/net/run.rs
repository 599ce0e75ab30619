//! Messages of a batch whose copies can be one: they lie side by side at both ends, or are of one size and equally far
//! apart, as the steps of a channel do in NCCL's shared buffers.
#![forbid(unsafe_code)]

use crate::driver::{Context, Place, Rows, Stream, copy, copy_rows};
use crate::error::Result;
use crate::info;

/// What the driver takes for a distance.
const FAR: u64 = 1 << 30;

/// Copies straight into memory that can be one.
pub struct Run {
    to: u64,
    from: Place,
    width: u64,
    rows: u64,
    /// From each to the next, at the other end and here.
    apart: (u64, u64),
}

impl Run {
    /// The first one.
    pub fn new(to: u64, from: Place, bytes: u64) -> Self {
        Self { to, from, width: bytes, rows: 1, apart: (0, 0) }
    }

    /// Takes one more copy in, if all can still be one; `rows`: also with something in between.
    pub fn takes(&mut self, to: u64, from: Place, bytes: u64, rows: bool) -> bool {
        let (Some(there), Some(here)) = (to.checked_sub(self.to), distance(self.from, from)) else { return false };
        if self.rows == 1 && (there, here) == (self.width, self.width) {
            self.width += bytes;
            return true;
        }
        let device = matches!(from, Place::Device(_));
        if !rows || !device || bytes != self.width {
            return false;
        }
        let fits = |apart: u64| apart >= bytes && apart <= FAR;
        let next = match self.rows {
            1 => fits(there) && fits(here),
            rows => (there, here) == (self.apart.0 * rows, self.apart.1 * rows),
        };
        if next {
            self.apart = if self.rows == 1 { (there, here) } else { self.apart };
            self.rows += 1;
        }
        next
    }

    /// Queues it. Rows that the driver does not take as one go one by one, then and from then on (`rows`).
    pub fn queue(run: Option<Self>, context: &Context, stream: &Stream, rows: &mut bool) -> Result<()> {
        let Some(run) = run else { return Ok(()) };
        if let (Some(together), true) = (run.together(), *rows) {
            let Err(error) = copy_rows(context, &together, stream) else { return Ok(()) };
            info!(context.device().ordinal(), "network: messages of a connection go one by one ({error})");
            *rows = false;
        }
        run.each(|to, from, bytes| copy(context, Place::Device(to), from, bytes, stream))
    }

    fn together(&self) -> Option<Rows> {
        let Place::Device(from) = self.from else { return None };
        let &Self { to, width, rows, apart: (to_pitch, from_pitch), .. } = self;
        (rows > 1).then_some(Rows { to, from, width, rows, to_pitch, from_pitch })
    }

    fn each(&self, mut visit: impl FnMut(u64, Place, u64) -> Result<()>) -> Result<()> {
        (0..self.rows)
            .try_for_each(|row| visit(self.to + row * self.apart.0, moved(self.from, row * self.apart.1), self.width))
    }
}

fn moved(place: Place, by: u64) -> Place {
    match place {
        Place::Host(at) => Place::Host(at + by),
        Place::Device(at) => Place::Device(at + by),
    }
}

/// How far the second place lies behind the first.
fn distance(first: Place, second: Place) -> Option<u64> {
    match (first, second) {
        (Place::Host(first), Place::Host(second)) | (Place::Device(first), Place::Device(second)) => {
            second.checked_sub(first)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes as pairs of where they go and where they are, of a run as one copy and of its rows one by one.
    fn bytes(run: &Run) -> Vec<(u64, Place)> {
        let mut all = Vec::new();
        run.each(|to, from, bytes| {
            all.extend((0..bytes).map(|i| (to + i, moved(from, i))));
            Ok(())
        })
        .expect("no copy fails");
        if let Some(Rows { to, from, width, rows, to_pitch, from_pitch }) = run.together() {
            let rows = (0..rows).flat_map(|row| (0..width).map(move |i| (row, i)));
            let again: Vec<_> =
                rows.map(|(row, i)| (to + row * to_pitch + i, Place::Device(from + row * from_pitch + i))).collect();
            assert_eq!(all, again);
            assert!(to_pitch >= width && from_pitch >= width);
        }
        all
    }

    proptest! {
        #[test]
        fn whatever_is_taken_in_every_byte_of_it_is_copied_once_to_where_it_belongs(
            messages in prop::collection::vec((0u64..40, 0u64..40, 1u64..6, any::<bool>()), 1..12), rows: bool,
            pitch in prop::option::of((4u64..9, 4u64..9)), start in 1u64..1000,
        ) {
            // Anywhere, or as NCCL lays steps out.
            let place = |i: usize, (to, from, bytes, host): (u64, u64, u64, bool)| match pitch {
                Some((there, here)) => (start + i as u64 * there, Place::Device(start + i as u64 * here), 4),
                None if host => (start + to, Place::Host(start + from), bytes),
                None => (start + to, Place::Device(start + from), bytes),
            };
            let messages: Vec<_> = messages.into_iter().enumerate().map(|(i, message)| place(i, message)).collect();
            let mut runs: Vec<Run> = Vec::new();
            for (to, from, bytes) in &messages {
                if !runs.last_mut().is_some_and(|run| run.takes(*to, *from, *bytes, rows)) {
                    runs.push(Run::new(*to, *from, *bytes));
                }
            }
            let want: Vec<_> = messages
                .iter()
                .flat_map(|(to, from, bytes)| (0..*bytes).map(move |i| (to + i, moved(*from, i))))
                .collect();
            prop_assert_eq!(runs.iter().flat_map(bytes).collect::<Vec<_>>(), want);
            prop_assert!(rows || runs.iter().all(|run| run.together().is_none()));
            if rows && pitch.is_some() {
                prop_assert_eq!(runs.len(), 1, "steps of one channel are one copy");
            }
        }
    }
}
