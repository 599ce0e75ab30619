//! The warps that wait for peers and announce to them, and what a block's warps tell each other.

use super::config::{Algorithm, Mutant, Phase, Role};
use super::layout::Lane;
use super::machine::{Model, Outcome, Place, Step, Violation};
use super::state::{BAD, Quit, State, tag};

impl Model {
    // ---- Release: what the workers have told

    /// ring.cuh's `mark` and `begin_channel`: chunks that are complete as far as this worker goes.
    fn told(&self, state: &State, place: Place, role: Role, worker: u8) -> u8 {
        let (chunks, tiles) = (self.chunks(state, place), self.config.tiles);
        let next = self.channel(state, place).next[role as usize][worker as usize];
        if next >= chunks * tiles {
            chunks
        } else if self.config.has(Mutant::CompleteTooEarly) {
            next.div_ceil(tiles)
        } else {
            next / tiles
        }
    }

    /// ring.cuh's `complete`: chunks that all workers of a role have completed.
    pub fn complete(&self, state: &State, place: Place, role: Role) -> u8 {
        (0..self.config.workers).map(|worker| self.told(state, place, role, worker)).min().unwrap_or(0)
    }

    /// The same, as the signaller takes it.
    pub fn announceable(&self, state: &State, place: Place, phase: Phase) -> u8 {
        let role = match phase {
            Phase::Broadcast if !self.config.has(Mutant::BroadcastAsScattered) => Role::Reduce,
            _ => Role::Scatter,
        };
        let heard = self.config.workers - u8::from(self.config.has(Mutant::IgnoresOneWarp));
        (0..heard).map(|worker| self.told(state, place, role, worker)).min().unwrap_or(0)
    }

    // ---- the signaller

    pub fn phases(&self) -> &'static [Phase] {
        if self.config.algorithm == Algorithm::OneShot {
            &[Phase::Scatter]
        } else {
            &[Phase::Scatter, Phase::Broadcast]
        }
    }

    pub fn signaller_steps(&self, state: &State, place: Place, step: &mut impl FnMut(Step, State, Outcome)) {
        let channel = self.channel(state, place);
        match channel.quit {
            Quit::No | Quit::Unsaid => {}
            Quit::Said if self.config.has(Mutant::QuitIgnored) => {}
            Quit::Said if self.config.has(Mutant::QuitReadFirst) => {
                let mut next = *state;
                self.channel_mut(&mut next, place).quit = Quit::Obeyed;
                if let Some(outcome) = self.raise_rest(&mut next, place) {
                    step(Step::RaiseRest { place }, next, outcome);
                }
                return;
            }
            Quit::Said | Quit::Obeyed => return,
        }
        for &phase in self.phases() {
            let chunk = channel.raised[phase as usize];
            if chunk < self.announceable(state, place, phase) {
                let mut next = *state;
                if let Some(outcome) = self.raise(&mut next, place, phase) {
                    step(Step::Raise { place, phase, chunk }, next, outcome);
                }
            }
        }
    }

    /// Everything that is complete, in one batch.
    fn raise_rest(&self, state: &mut State, place: Place) -> Option<Outcome> {
        for &phase in self.phases() {
            while self.channel(state, place).raised[phase as usize] < self.announceable(state, place, phase) {
                if let error @ Err(_) = self.raise(state, place, phase)? {
                    return Some(error);
                }
            }
        }
        Some(Ok(()))
    }

    /// ring.cuh's `raise`, for the next chunk of a phase. `None` while its fence waits.
    pub fn raise(&self, state: &mut State, place: Place, phase: Phase) -> Option<Outcome> {
        let chunk = self.channel(state, place).raised[phase as usize];
        self.channel_mut(state, place).raised[phase as usize] += 1;
        let position = self.position(state, place, chunk);
        let lane = |peer| Lane { at: peer, phase, source: place.rank, channel: place.channel };
        let counted = |peer| if phase == Phase::Scatter { peer } else { place.rank };
        let has = |state: &State, peer| chunk < self.chunks_of(state, place, counted(peer));
        let receivers: [Option<u8>; 2] = {
            let mut peers = self.peers(place.rank).filter(|&peer| has(state, peer));
            [peers.next(), peers.next()]
        };
        let payload = tag(state.ranks[place.rank as usize].launch, chunk);
        for slot in receivers.iter().flatten().map(|&peer| self.layout.slot(lane(peer), position)) {
            let words = self.layout.word(slot, 0)..self.layout.word(slot + 1, 0);
            let under_way = state.words[words].iter().any(|word| word.awaits(payload) || word.awaits(BAD));
            if under_way && !self.config.has(Mutant::NoFence) || self.no_room_in_flight(state.flags[slot]) {
                return None;
            }
        }
        for &peer in receivers.iter().flatten() {
            let slot = self.layout.slot(lane(peer), position);
            if self.config.invariants && !self.seen(state, lane(peer), slot, position) {
                return Some(Err(Violation::FlagUnseen { slot: slot as u8 }));
            }
            self.store_flag(&mut state.flags[slot], position + 1);
        }
        Some(Ok(()))
    }

    /// Whether the flag may be set to this position: what was there is less and has been seen by its reader.
    fn seen(&self, state: &State, lane: Lane, slot: usize, position: u8) -> bool {
        let flag = state.flags[slot];
        if flag.in_flight() || flag.content() > position {
            return false;
        }
        let rank = &state.ranks[lane.at as usize];
        let Some(before) = flag.content().checked_sub(1) else { return true };
        // A chunk of the launch that runs, or that will be the next; else an earlier one's, which has ended.
        let base = rank.base[(lane.channel % rank.grid.max(1)) as usize];
        let Some(chunk) = before.checked_sub(base) else { return true };
        if rank.grid == 0 {
            return false;
        }
        let place = Place { rank: lane.at, channel: lane.channel };
        if self.merged() {
            let role = if lane.phase == Phase::Scatter { Role::Reduce } else { Role::Collect };
            return self.complete(state, place, role) > chunk;
        }
        let peer = self.peers(lane.at).position(|peer| peer == lane.source).unwrap_or(0);
        let (turn, nth) = (chunk / self.config.pollers, chunk % self.config.pollers);
        self.channel(state, place).seen[lane.phase as usize][peer][nth as usize] > turn
    }

    // ---- the poller

    /// ring.cuh's `awaited`: chunks that a phase brings from a peer.
    fn awaited(&self, state: &State, place: Place, phase: Phase, peer: u8) -> u8 {
        self.chunks_of(state, place, if phase == Phase::Scatter { place.rank } else { peer })
    }

    fn gone(&self, phase: Phase, peer: usize, nth: u8) -> u8 {
        1 << ((phase as u8 * 2 + peer as u8) * 2 + nth)
    }

    /// The next chunk of a lane of the poller, if it waits for one.
    fn polled(&self, state: &State, place: Place, phase: Phase, peer: usize, nth: u8) -> Option<u8> {
        let channel = self.channel(state, place);
        let source = self.peers(place.rank).nth(peer)?;
        let chunk = nth + self.config.pollers * channel.seen[phase as usize][peer][nth as usize];
        let waits =
            chunk < self.awaited(state, place, phase, source) && channel.gone & self.gone(phase, peer, nth) == 0;
        waits.then_some(chunk)
    }

    fn here(&self, state: &State, place: Place, phase: Phase, source: u8, chunk: u8) -> bool {
        let lane = Lane { at: place.rank, phase, source, channel: place.channel };
        let position = self.position(state, place, chunk);
        let found = state.flags[self.layout.slot(lane, position)].content();
        found == position + 1 || self.config.has(Mutant::AtLeast) && found > position
    }

    /// Each lane of the poller, with the chunk that it waits for.
    fn polls(&self, state: &State, place: Place) -> impl Iterator<Item = (Phase, usize, u8, u8)> {
        let peers = 0..self.ranks() - 1;
        let of_peer = move |peer| (0..self.config.pollers).map(move |nth| (peer, nth));
        let lanes = self
            .phases()
            .iter()
            .flat_map(move |&phase| peers.clone().flat_map(of_peer).map(move |(peer, nth)| (phase, peer, nth)));
        lanes.filter_map(move |(phase, peer, nth)| {
            self.polled(state, place, phase, peer, nth).map(|chunk| (phase, peer, nth, chunk))
        })
    }

    pub fn poller_steps(&self, state: &State, place: Place, step: &mut impl FnMut(Step, State, Outcome)) {
        let may_give_up = self.config.may_give_up >> place.rank & 1 == 1;
        for (phase, peer, nth, chunk) in self.polls(state, place) {
            let source = self.peers(place.rank).nth(peer).unwrap_or(0);
            if self.here(state, place, phase, source, chunk) {
                let mut next = *state;
                self.channel_mut(&mut next, place).seen[phase as usize][peer][nth as usize] += 1;
                step(Step::See { place, phase, peer: source, chunk }, next, Ok(()));
            }
            // Also if the flag has come since it last looked.
            if may_give_up {
                let mut next = *state;
                let channel = self.channel_mut(&mut next, place);
                channel.gone |= self.gone(phase, peer, nth);
                if channel.quit == Quit::No {
                    channel.quit = if self.config.has(Mutant::QuitSaidLast) { Quit::Unsaid } else { Quit::Said };
                }
                step(Step::GiveUp { place, phase, peer: source, chunk }, next, Ok(()));
            }
        }
        if self.channel(state, place).quit == Quit::Unsaid {
            let mut next = *state;
            self.channel_mut(&mut next, place).quit = Quit::Said;
            step(Step::SayQuit { place }, next, Ok(()));
        }
    }

    /// ring.cuh's `await`: whether chunk k of a phase is here from every peer, as far as the block knows.
    pub fn arrived(&self, state: &State, place: Place, phase: Phase, chunk: u8) -> bool {
        let asked = if self.config.has(Mutant::OnePeer) { 1 } else { self.ranks() - 1 };
        self.peers(place.rank).take(asked).enumerate().all(|(peer, source)| {
            if self.merged() {
                return chunk >= self.awaited(state, place, phase, source)
                    || self.here(state, place, phase, source, chunk);
            }
            // What is awaited is past this chunk, or nothing is awaited any more.
            let nth = chunk % self.config.pollers;
            self.polled(state, place, phase, peer, nth).is_none_or(|waits_for| waits_for > chunk)
        })
    }

    /// Whether signaller and poller have come to their ends.
    pub fn announced_and_seen(&self, state: &State, place: Place) -> bool {
        let channel = self.channel(state, place);
        let chunks = self.chunks(state, place);
        let returned = match channel.quit {
            Quit::Said => !self.config.has(Mutant::QuitIgnored),
            Quit::Obeyed => true,
            Quit::No | Quit::Unsaid => false,
        };
        let announced = self.phases().iter().all(|&phase| channel.raised[phase as usize] >= chunks);
        (announced || returned) && self.polls(state, place).next().is_none()
    }
}
