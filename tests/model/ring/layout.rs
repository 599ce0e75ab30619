//! Where flags and slots are, see ring.cuh: Ring and Writers.

use super::config::{Algorithm, Config, Phase};

/// The flags and slots that one rank has for one peer, phase and channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// In whose window.
    pub at: u8,
    pub phase: Phase,
    /// Who writes it.
    pub source: u8,
    pub channel: u8,
}

/// Sizes, and the order of everything in the state's arrays.
#[derive(Clone, Copy)]
pub struct Layout {
    phases: u8,
    ranks: u8,
    channels: u8,
    ring: u8,
    /// Words of a chunk.
    pub words: u8,
}

impl Layout {
    pub fn new(config: &Config) -> Self {
        Self {
            phases: if config.algorithm == Algorithm::OneShot { 1 } else { 2 },
            ranks: config.ranks,
            channels: config.channels,
            ring: config.ring,
            words: config.tiles * config.lanes,
        }
    }

    pub fn slots(self) -> usize {
        let lanes = self.ranks * self.phases * (self.ranks - 1) * self.channels;
        lanes as usize * self.ring as usize
    }

    /// The slot of a position, which is also the index of its flag.
    pub fn slot(self, lane: Lane, position: u8) -> usize {
        let nth = lane.source - u8::from(lane.source > lane.at);
        let window = lane.at * self.phases + lane.phase as u8;
        let of_source = (window * (self.ranks - 1) + nth) * self.channels + lane.channel;
        of_source as usize * self.ring as usize + (position % self.ring) as usize
    }

    pub fn word(self, slot: usize, word: u8) -> usize {
        slot * self.words as usize + word as usize
    }

    /// What a slot is.
    pub fn place(self, slot: usize) -> (Lane, u8) {
        let ring = self.ring as usize;
        let (of_source, number) = ((slot / ring) as u8, (slot % ring) as u8);
        let (row, channel) = (of_source / self.channels, of_source % self.channels);
        let (window, nth) = (row / (self.ranks - 1), row % (self.ranks - 1));
        let at = window / self.phases;
        let phase = if window % self.phases == 0 { Phase::Scatter } else { Phase::Broadcast };
        (Lane { at, phase, source: nth + u8::from(nth >= at), channel }, number)
    }
}
