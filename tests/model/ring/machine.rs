//! The transition system: launches, memory, and what must not happen. Warps: `block` and `workers`.

use super::config::{Algorithm, Call, Config, Horizon, Mutant, Phase, Reduction, Role};
use super::layout::{Lane, Layout};
use super::state::{Channel, MAX_CHUNKS, MAX_LAUNCHES, MAX_SLOTS, MAX_WORDS, Quit, Rank, State, Word, tagged};
use crate::model::search::Machine;

/// Whose step it is: the block of a rank that does a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: u8,
    pub channel: u8,
}

/// A step, small enough to be made for every transition; `trace` turns it into words.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Launch { rank: u8, call: u8, grid: u8 },
    Land { word: u8, value: u8 },
    LandFlag { slot: u8, value: u8 },
    Tile { place: Place, role: Role, worker: u8, tile: u8 },
    OtherLanes { place: Place, role: Role, worker: u8, tile: u8 },
    LoadAhead { place: Place, role: Role, worker: u8, value: u8 },
    Raise { place: Place, phase: Phase, chunk: u8 },
    RaiseRest { place: Place },
    See { place: Place, phase: Phase, peer: u8, chunk: u8 },
    GiveUp { place: Place, phase: Phase, peer: u8, chunk: u8 },
    SayQuit { place: Place },
}

/// What must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A worker takes something else than this launch's chunk for it.
    WrongWord { place: Place, role: Role, launch: u8, chunk: u8, from: u8, word: u8, found: u8 },
    /// A launch ends well and its result is wrong.
    WrongResult { rank: u8 },
    /// No step is possible although some rank has not finished.
    Deadlock,
    /// A slot is stored into while the chunk in it has not been used, or has not even landed.
    Overwritten { slot: u8 },
    /// A flag is stored that its reader still waits to see, or whose value the place has had before.
    FlagUnseen { slot: u8 },
    /// A launch ends on a rank that another rank has not begun.
    EndedAlone { rank: u8 },
}

pub type Outcome = Result<(), Violation>;

pub struct Model {
    pub config: Config,
    pub layout: Layout,
}

impl Model {
    pub fn new(config: Config) -> Self {
        let layout = Layout::new(&config);
        assert!(layout.slots() <= MAX_SLOTS && layout.slots() * layout.words as usize <= MAX_WORDS);
        assert!(config.ranks <= 3 && config.channels <= 2 && config.workers <= 2 && config.pollers <= 2);
        assert!(config.algorithm == Algorithm::TwoShot || config.ranks == 2);
        assert!(config.may_give_up == 0 || config.reduction != Reduction::Ordered);
        let most = config.calls.iter().map(|call| config.chunks_in(0, call.parts[0])).max();
        assert!(most <= Some(MAX_CHUNKS));
        for call in &config.calls {
            assert!(call.parts[..config.ranks as usize].is_sorted_by(|a, b| a >= b));
        }
        Self { config, layout }
    }

    pub fn ranks(&self) -> usize {
        self.config.ranks as usize
    }

    /// Flags are merged with the steps before and behind them.
    pub fn merged(&self) -> bool {
        self.config.reduction == Reduction::Ordered
    }

    pub fn call(&self, state: &State, rank: u8) -> Call {
        let launch = state.ranks[rank as usize].launch as usize;
        self.config.calls[state.calls[launch] as usize - 1]
    }

    /// Chunks of a rank's part that are this channel's, in the launch that runs at the place.
    pub fn chunks_of(&self, state: &State, place: Place, part: u8) -> u8 {
        self.config.chunks_in(place.channel, self.call(state, place.rank).parts[part as usize])
    }

    /// Of the channel: those of rank 0's part, for nobody has more.
    pub fn chunks(&self, state: &State, place: Place) -> u8 {
        self.chunks_of(state, place, 0)
    }

    pub fn channel<'a>(&self, state: &'a State, place: Place) -> &'a Channel {
        &state.ranks[place.rank as usize].channels[place.channel as usize]
    }

    pub fn channel_mut<'a>(&self, state: &'a mut State, place: Place) -> &'a mut Channel {
        &mut state.ranks[place.rank as usize].channels[place.channel as usize]
    }

    /// ring.cuh: Ring. Where chunk k of the launch that runs at the place is, by the copy that its block has read.
    pub fn position(&self, state: &State, place: Place, chunk: u8) -> u8 {
        let rank = &state.ranks[place.rank as usize];
        rank.base[(place.channel % rank.grid) as usize] + chunk
    }

    pub fn peers(&self, rank: u8) -> impl Iterator<Item = u8> + use<> {
        let ranks = self.config.ranks;
        (1..ranks).map(move |distance| (rank + distance) % ranks)
    }

    // ---- memory

    /// Whether two more stores are under way than the model holds; only a faulty step can come to that, and it waits.
    pub fn no_room_in_flight(&self, word: Word) -> bool {
        word.full()
    }

    /// A store by its only writer.
    pub fn store(&self, word: &mut Word, value: u8) {
        *word = if self.config.reduction == Reduction::None { word.sent(value) } else { Word::stored(value) };
    }

    pub fn store_flag(&self, flag: &mut Word, value: u8) {
        *flag = if self.merged() { Word::stored(value) } else { flag.sent(value) };
    }

    /// Whether the reader of a lane has done with this word of the chunk that the tag names.
    pub fn used(&self, state: &State, lane: Lane, value: u8, word: u8) -> bool {
        let Some((launch, chunk)) = tagged(value) else { return true };
        let rank = &state.ranks[lane.at as usize];
        if rank.launch != launch || rank.grid == 0 {
            return rank.launch > launch;
        }
        let role = if lane.phase == Phase::Scatter { Role::Reduce } else { Role::Collect };
        let tile = chunk * self.config.tiles + word / self.config.lanes;
        rank.channels[lane.channel as usize].next[role as usize][(tile % self.config.workers) as usize] > tile
    }

    fn landings(&self, state: &State, emit: &mut impl FnMut(Step, Result<State, Violation>)) {
        for (index, word) in state.words.iter().enumerate().filter(|(_, word)| word.in_flight()) {
            let mut next = *state;
            next.words[index] = word.landed();
            emit(Step::Land { word: index as u8, value: word.landed().content() }, Ok(next));
        }
        for (slot, flag) in state.flags.iter().enumerate().filter(|(_, flag)| flag.in_flight()) {
            let mut next = *state;
            next.flags[slot] = flag.landed();
            emit(Step::LandFlag { slot: slot as u8, value: flag.landed().content() }, Ok(next));
        }
    }

    // ---- launches

    fn launches(&self, state: &State, rank: u8, emit: &mut impl FnMut(Step, Result<State, Violation>)) {
        let before = &state.ranks[rank as usize];
        let over = matches!(self.config.horizon, Horizon::Launches(n) if before.launch >= n);
        let ended = before.failed && !self.config.has(Mutant::GoesOn);
        if before.grid != 0 || over || ended || before.launch as usize >= MAX_LAUNCHES {
            return;
        }
        let chosen = state.calls[before.launch as usize];
        for call in (1..=self.config.calls.len() as u8).filter(|&call| chosen == 0 || chosen == call) {
            for &grid in &self.config.grids {
                let mut next = *state;
                next.calls[before.launch as usize] = call;
                let begun = &mut next.ranks[rank as usize];
                begun.grid = grid;
                for channel in &mut begun.channels[..self.config.channels as usize] {
                    let first = std::array::from_fn(|worker| worker as u8);
                    channel.next = [first; 3];
                    if matches!(self.config.mutant, Some(Mutant::NoWarpBarrier(_))) {
                        channel.others = first;
                    }
                }
                emit(Step::Launch { rank, call: call - 1, grid }, self.finish(next, rank, Ok(())));
            }
        }
    }

    /// Whether the block has come to this channel: it takes its channels in ascending order.
    fn active(&self, state: &State, place: Place) -> bool {
        let grid = state.ranks[place.rank as usize].grid;
        let first = |channel: u8| {
            let descends = self.config.has(Mutant::ChannelsDescend) && place.rank == 1;
            if descends { channel > place.channel } else { channel < place.channel }
        };
        let same_block = |&channel: &u8| channel % grid == place.channel % grid && first(channel);
        let before = (0..self.config.channels).filter(same_block).map(|channel| Place { channel, ..place });
        // A block that gave up leaves its other channels alone.
        before.into_iter().all(|place| self.done(state, place) && self.channel(state, place).quit == Quit::No)
    }

    /// Whether every warp of the block has come to the end of the channel.
    fn done(&self, state: &State, place: Place) -> bool {
        let channel = self.channel(state, place);
        let tiles = self.chunks(state, place) * self.config.tiles;
        let workers = self.config.workers as usize;
        let roles = self.roles();
        let ended = |next: &[u8]| next[..workers].iter().all(|&next| next >= tiles);
        let apart = matches!(self.config.mutant, Some(Mutant::NoWarpBarrier(_)));
        roles.iter().all(|&role| ended(&channel.next[role as usize]))
            && (!apart || ended(&channel.others))
            && channel.quit != Quit::Unsaid
            && (self.merged() || self.announced_and_seen(state, place))
    }

    pub fn roles(&self) -> &'static [Role] {
        if self.config.algorithm == Algorithm::OneShot { &Role::ALL[..2] } else { &Role::ALL }
    }

    /// Ends the launch if all its blocks have ended.
    fn end(&self, state: &mut State, rank: u8) -> Outcome {
        let channels = self.config.channels;
        let at = rank as usize;
        let grid = state.ranks[at].grid;
        let left = |channel: u8| {
            let quit = |c: u8| c % grid == channel % grid && state.ranks[at].channels[c as usize].quit != Quit::No;
            self.done(state, Place { rank, channel }) || (0..channel).any(quit)
        };
        if grid == 0 || !(0..channels).all(left) {
            return Ok(());
        }
        let quit = state.ranks[at].channels.iter().any(|channel| channel.quit != Quit::No);
        if state.ranks[at].bad && !quit && !state.ranks[at].failed {
            return Err(Violation::WrongResult { rank });
        }
        let launch = state.ranks[at].launch;
        let begun = |other: &Rank| other.launch > launch || other.launch == launch && other.grid != 0;
        if self.config.invariants && !quit && !state.ranks[..self.ranks()].iter().all(begun) {
            return Err(Violation::EndedAlone { rank });
        }
        let parts = self.call(state, rank).parts;
        let ended = &mut state.ranks[at];
        let read = ended.base;
        for (copy, base) in ended.base.iter_mut().enumerate() {
            let block = copy as u8 % grid;
            let counted = if self.config.has(Mutant::BaseByOwnChannel) { block } else { 0 };
            if !self.config.has(Mutant::BaseStays) {
                *base = read[block as usize] + self.config.chunks_in(counted, parts[0]);
            }
        }
        *ended = Rank { launch: launch + 1, base: ended.base, failed: ended.failed || quit, ..Rank::default() };
        Ok(())
    }

    /// What follows a step of a rank's at once, unseen by others.
    fn finish(&self, mut next: State, rank: u8, outcome: Outcome) -> Result<State, Violation> {
        outcome?;
        self.end(&mut next, rank)?;
        if self.config.horizon == Horizon::Unbounded {
            while next.ranks[..self.ranks()].iter().all(|rank| rank.launch > 0) {
                next.age(self.ranks(), self.config.ring);
            }
        }
        Ok(next)
    }
}

impl Machine for Model {
    type State = State;
    type Step = Step;
    type Violation = Violation;

    fn initial(&self) -> State {
        let mut state = State::EMPTY;
        for (launch, &call) in self.config.sequence.iter().enumerate() {
            state.calls[launch] = call + 1;
        }
        state
    }

    fn fingerprint(&self, state: &State) -> u128 {
        state.fingerprint(self.ranks(), self.config.channels as usize)
    }

    fn successors(&self, state: &State, mut emit: impl FnMut(Step, Result<State, Violation>)) {
        self.landings(state, &mut emit);
        for rank in 0..self.config.ranks {
            self.launches(state, rank, &mut emit);
            if state.ranks[rank as usize].grid == 0 {
                continue;
            }
            for channel in 0..self.config.channels {
                let place = Place { rank, channel };
                if !self.active(state, place) {
                    continue;
                }
                let mut step = |step: Step, next: State, outcome: Outcome| {
                    emit(step, self.finish(next, rank, outcome));
                };
                self.worker_steps(state, place, &mut step);
                if !self.merged() {
                    self.signaller_steps(state, place, &mut step);
                    self.poller_steps(state, place, &mut step);
                }
            }
        }
    }

    fn at_rest(&self, state: &State) -> bool {
        let mut ranks = state.ranks[..self.ranks()].iter();
        match self.config.horizon {
            Horizon::Launches(n) => ranks.all(|rank| rank.grid == 0 && rank.launch == n),
            Horizon::Unbounded => ranks.all(|rank| rank.grid == 0 && rank.launch == 0),
        }
    }

    fn check_rest(&self, _: &State) -> Outcome {
        Ok(())
    }

    /// Whoever waits for a rank that gave up may wait for ever, or until it gives up itself.
    fn check_stuck(&self, state: &State) -> Outcome {
        let bounded = self.config.horizon != Horizon::Unbounded;
        let failed = state.ranks[..self.ranks()].iter().any(|rank| rank.failed);
        if self.at_rest(state) && bounded || failed { Ok(()) } else { Err(Violation::Deadlock) }
    }

    fn base(&self, state: &State) -> u32 {
        state.renamed
    }
}
