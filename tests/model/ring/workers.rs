//! The warps that move payload: bulk.cuh's `scatter`, `reduce` and `collect`, a tile in a step.

use std::ops::Range;

use super::config::{Algorithm, Mutant, Phase, Role};
use super::layout::Lane;
use super::machine::{Model, Outcome, Place, Step, Violation};
use super::state::{BAD, Quit, State, tag};

/// What a step is about.
#[derive(Clone, Copy)]
struct Work {
    place: Place,
    role: Role,
    worker: u8,
    tile: u8,
}

impl Model {
    pub fn worker_steps(&self, state: &State, place: Place, step: &mut impl FnMut(Step, State, Outcome)) {
        let tiles = self.chunks(state, place) * self.config.tiles;
        for &role in self.roles() {
            for worker in 0..self.config.workers {
                let work = |tile| Work { place, role, worker, tile };
                let channel = self.channel(state, place);
                let tile = channel.next[role as usize][worker as usize];
                if tile < tiles {
                    self.load_ahead(state, work(tile), step);
                    self.tile(state, work(tile), step);
                }
                let others = channel.others[worker as usize];
                if self.config.has(Mutant::NoWarpBarrier(role)) && others < tiles {
                    self.other_lanes(state, work(others), step);
                }
            }
        }
    }

    fn tile(&self, state: &State, work: Work, step: &mut impl FnMut(Step, State, Outcome)) {
        let Work { place, role, worker, tile } = work;
        if !self.may(state, place, role, tile / self.config.tiles) {
            return;
        }
        let mut next = *state;
        let lanes = if self.config.has(Mutant::NoWarpBarrier(role)) { 0..1 } else { 0..self.config.lanes };
        let Some(outcome) = self.move_words(&mut next, work, lanes) else { return };
        let channel = self.channel_mut(&mut next, place);
        channel.next[role as usize][worker as usize] += self.config.workers;
        if self.config.has(Mutant::LoadsAhead(role)) {
            channel.ahead[worker as usize] = 0;
        }
        let outcome = outcome.and_then(|()| if self.merged() { self.raise_complete(&mut next, place) } else { Ok(()) });
        step(Step::Tile { place, role, worker, tile }, next, outcome);
    }

    /// The lanes of a warp wait for themselves and run apart: what lane 0 told says nothing of the others.
    fn other_lanes(&self, state: &State, work: Work, step: &mut impl FnMut(Step, State, Outcome)) {
        let Work { place, role, worker, tile } = work;
        if !self.may(state, place, role, tile / self.config.tiles) {
            return;
        }
        let mut next = *state;
        if let Some(outcome) = self.move_words(&mut next, work, 1..self.config.lanes) {
            self.channel_mut(&mut next, place).others[worker as usize] += self.config.workers;
            step(Step::OtherLanes { place, role, worker, tile }, next, outcome);
        }
    }

    /// Merged with the tile that completes them.
    fn raise_complete(&self, state: &mut State, place: Place) -> Outcome {
        for &phase in self.phases() {
            while self.channel(state, place).raised[phase as usize] < self.announceable(state, place, phase) {
                self.raise(state, place, phase).unwrap_or(Ok(()))?;
            }
        }
        Ok(())
    }

    /// The first word that a worker's next tile loads, before anything was waited for.
    fn load_ahead(&self, state: &State, work: Work, step: &mut impl FnMut(Step, State, Outcome)) {
        let Work { place, role, worker, tile } = work;
        if !self.config.has(Mutant::LoadsAhead(role)) || self.channel(state, place).ahead[worker as usize] != 0 {
            return;
        }
        let chunk = tile / self.config.tiles;
        let source = (0..self.config.ranks).find(|&source| self.loads_from(state, place, role, source, chunk));
        let Some(source) = source else { return };
        let value = state.words[self.index(state, place, role, source, chunk, self.first_word(tile))].content();
        let mut next = *state;
        self.channel_mut(&mut next, place).ahead[worker as usize] = value + 1;
        step(Step::LoadAhead { place, role, worker, value }, next, Ok(()));
    }

    // ---- conditions

    /// What a role waits for before it touches a chunk.
    fn may(&self, state: &State, place: Place, role: Role, chunk: u8) -> bool {
        match role {
            Role::Scatter => self.has_room(state, place, chunk),
            Role::Reduce => {
                let in_place = self.one_shot() && self.call(state, place.rank).in_place;
                let scattered = !in_place
                    || self.config.has(Mutant::NoWaitInPlace)
                    || self.complete(state, place, Role::Scatter) > chunk;
                scattered && self.arrived(state, place, Phase::Scatter, chunk)
            }
            Role::Collect => self.arrived(state, place, Phase::Broadcast, chunk),
        }
    }

    /// ring.cuh's `await_room`.
    fn has_room(&self, state: &State, place: Place, chunk: u8) -> bool {
        let (behind, role) = if self.one_shot() {
            (self.config.one_shot_window(), Role::Reduce)
        } else if self.config.has(Mutant::RoomByReduced) {
            (self.config.ring, Role::Reduce)
        } else {
            (self.config.ring, Role::Collect)
        };
        chunk < behind || self.config.has(Mutant::NoRoom) || self.complete(state, place, role) > chunk - behind
    }

    fn one_shot(&self) -> bool {
        self.config.algorithm == Algorithm::OneShot
    }

    // ---- payload

    fn first_word(&self, tile: u8) -> u8 {
        tile % self.config.tiles * self.config.lanes
    }

    /// Whether a role loads a chunk of this rank's from the own window.
    fn loads_from(&self, state: &State, place: Place, role: Role, source: u8, chunk: u8) -> bool {
        let part = if role == Role::Reduce { place.rank } else { source };
        source != place.rank && chunk < self.chunks_of(state, place, part)
    }

    fn index(&self, state: &State, place: Place, role: Role, source: u8, chunk: u8, word: u8) -> usize {
        let phase = if role == Role::Reduce { Phase::Scatter } else { Phase::Broadcast };
        let lane = Lane { at: place.rank, phase, source, channel: place.channel };
        self.layout.word(self.layout.slot(lane, self.position(state, place, chunk)), word)
    }

    /// Does what these lanes of the tile do. `None` if a store of it has to wait, in a faulty run.
    fn move_words(&self, state: &mut State, work: Work, lanes: Range<u8>) -> Option<Outcome> {
        let Work { place, role, tile, .. } = work;
        let chunk = tile / self.config.tiles;
        let payload = tag(state.ranks[place.rank as usize].launch, chunk);
        for lane in lanes {
            let word = self.first_word(tile) + lane;
            let outcome = match role {
                Role::Scatter => self.scatter_word(state, work, chunk, word, payload)?,
                Role::Reduce => self.reduce_word(state, work, chunk, word, payload)?,
                Role::Collect => {
                    let loaded = self.load(state, work, chunk, word, payload);
                    loaded.map(|good| state.ranks[place.rank as usize].bad |= !good)
                }
            };
            if outcome.is_err() {
                return Some(outcome);
            }
        }
        Some(Ok(()))
    }

    fn scatter_word(&self, state: &mut State, work: Work, chunk: u8, word: u8, payload: u8) -> Option<Outcome> {
        let Work { place, tile, .. } = work;
        for peer in self.peers(place.rank) {
            if chunk >= self.chunks_of(state, place, peer) {
                continue;
            }
            let lost = self.call(state, place.rank).in_place && self.input_overwritten(state, place, tile, word);
            if lost && self.config.may_give_up == 0 {
                return Some(Err(self.wrong(state, work, place.rank, word, BAD)));
            }
            let lane = Lane { at: peer, phase: Phase::Scatter, source: place.rank, channel: place.channel };
            if let error @ Err(_) =
                self.store_word(state, place, lane, chunk, word, if lost { BAD } else { payload })?
            {
                return Some(error);
            }
        }
        Some(Ok(()))
    }

    /// In place, whether the word of the input is already one of the output: the reducer's or a collector's.
    fn input_overwritten(&self, state: &State, place: Place, tile: u8, word: u8) -> bool {
        let role = if self.one_shot() { Role::Reduce } else { Role::Collect };
        let channel = self.channel(state, place);
        let worker = (tile % self.config.workers) as usize;
        let apart = self.config.has(Mutant::NoWarpBarrier(role)) && !word.is_multiple_of(self.config.lanes);
        let next = if apart { channel.others[worker] } else { channel.next[role as usize][worker] };
        next > tile
    }

    fn reduce_word(&self, state: &mut State, work: Work, chunk: u8, word: u8, payload: u8) -> Option<Outcome> {
        let place = work.place;
        if chunk >= self.chunks_of(state, place, place.rank) {
            return Some(Ok(()));
        }
        let good = match self.load(state, work, chunk, word, payload) {
            Ok(good) => good,
            Err(violation) => return Some(Err(violation)),
        };
        state.ranks[place.rank as usize].bad |= !good;
        if self.one_shot() {
            return Some(Ok(()));
        }
        for peer in self.peers(place.rank) {
            let lane = Lane { at: peer, phase: Phase::Broadcast, source: place.rank, channel: place.channel };
            if let error @ Err(_) =
                self.store_word(state, place, lane, chunk, word, if good { payload } else { BAD })?
            {
                return Some(error);
            }
        }
        Some(Ok(()))
    }

    /// Loads this word of the chunk from every rank that has one: whether all of them are right.
    fn load(&self, state: &State, work: Work, chunk: u8, word: u8, payload: u8) -> Result<bool, Violation> {
        let Work { place, role, worker, tile } = work;
        let mut ahead = self.channel(state, place).ahead[worker as usize];
        if !self.config.has(Mutant::LoadsAhead(role)) || word != self.first_word(tile) {
            ahead = 0;
        }
        let mut good = true;
        for source in 0..self.config.ranks {
            if !self.loads_from(state, place, role, source, chunk) {
                continue;
            }
            let memory = state.words[self.index(state, place, role, source, chunk, word)].content();
            let found = std::mem::take(&mut ahead).checked_sub(1).unwrap_or(memory);
            // Where nobody gives up a launch that went wrong here can only end wrong, or never.
            if found != payload && self.config.may_give_up == 0 {
                return Err(self.wrong(state, work, source, word, found));
            }
            good &= found == payload;
        }
        Ok(good)
    }

    fn wrong(&self, state: &State, work: Work, from: u8, word: u8, found: u8) -> Violation {
        let Work { place, role, tile, .. } = work;
        let launch = state.ranks[place.rank as usize].launch;
        Violation::WrongWord { place, role, launch, chunk: tile / self.config.tiles, from, word, found }
    }

    fn store_word(
        &self,
        state: &mut State,
        place: Place,
        lane: Lane,
        chunk: u8,
        word: u8,
        value: u8,
    ) -> Option<Outcome> {
        // Whoever went on because the poller gave up knows that it did.
        let quit = matches!(self.channel(state, place).quit, Quit::Said | Quit::Obeyed);
        if quit && !self.config.has(Mutant::StoresOn) {
            return Some(Ok(()));
        }
        let slot = self.layout.slot(lane, self.position(state, place, chunk));
        let before = state.words[self.layout.word(slot, word)];
        if self.config.invariants {
            if before.in_flight() || !self.used(state, lane, before.content(), word) {
                return Some(Err(Violation::Overwritten { slot: slot as u8 }));
            }
        } else if self.no_room_in_flight(before) {
            return None;
        }
        self.store(&mut state.words[self.layout.word(slot, word)], value);
        Some(Ok(()))
    }
}
