//! Exhaustive interleavings of the ring of large payloads: the protocol of `kernels/ring.cuh` holds, its mutants fail.
//!
//! Each test prints the number of states it visited (`--nocapture`), each rejected mutant its counterexample. The tests
//! marked `ignored` explore larger configurations in minutes: `cargo test --test ring_model -- --ignored`.
//! Prose: `docs/ring-model.md`.
#![forbid(unsafe_code)]

mod model {
    pub mod fingerprint;
    pub mod ring;
    pub mod search;
}

use model::ring::config::{Call, Config, Mutant, Role};
use model::ring::machine::{Model, Violation};
use model::ring::trace::render;
use model::search::{Order, explore};

fn one<const N: usize>(chunks: [u8; N]) -> Vec<Call> {
    chunks.map(Call::one_shot).to_vec()
}

fn two<const N: usize>(parts: [[u8; 3]; N]) -> Vec<Call> {
    parts.map(Call::two_shot).to_vec()
}

/// Each of them also with `in == out`.
fn in_place_too(calls: Vec<Call>) -> Vec<Call> {
    let in_place: Vec<Call> = calls.iter().map(|call| call.in_place()).collect();
    [calls, in_place].concat()
}

/// Between two ranks, with the smallest ring that the kernel takes: a window of one chunk.
fn one_shot<const N: usize>(chunks: [u8; N]) -> Config {
    Config::one_shot(4, &one(chunks))
}

#[track_caller]
fn holds(what: &str, config: &Config) {
    assert!(config.invariants);
    let model = Model::new(config.clone());
    let report = explore(&model, Order::Depth);
    println!("{what}: {} states, {} transitions, {:.2?}", report.states, report.transitions, report.time);
    if let Some(found) = &report.counterexample {
        // Again, breadth first, for a run that a person can read.
        let shortest = explore(&model, Order::Breadth).counterexample;
        panic!("{what}:\n{}", render(config, shortest.as_ref().unwrap_or(found)));
    }
    assert!(report.rests > 0, "{what}: no run ever came to rest");
}

#[track_caller]
fn found(what: &str, config: &Config, order: Order) -> Violation {
    let report = explore(&Model::new(config.clone()), order);
    let (states, time) = (report.states, report.time);
    let found = report.counterexample.unwrap_or_else(|| panic!("{what}: not rejected in {states} states"));
    println!("{what}: rejected after {states} states, {time:.2?}\n{}", render(config, &found));
    found.violation
}

/// The search finds harm: a wrong result or a hang, not merely a broken invariant.
#[track_caller]
fn fails(what: &str, config: &Config) {
    let harm = found(what, config, Order::Breadth);
    use Violation::{Deadlock, WrongResult, WrongWord};
    assert!(!config.invariants && matches!(harm, WrongWord { .. } | WrongResult { .. } | Deadlock), "{harm:?}");
}

// ---- what holds ---------------------------------------------------------------------------------------------------

#[test]
fn two_ranks_hold_in_every_interleaving_of_every_word_and_flag_for_any_number_of_launches() {
    let calls = in_place_too(one([1, 2, 3, 4, 5, 6]));
    holds("one-shot, every step", &Config::one_shot(4, &calls).every_step());
    holds("one-shot, 2 warps, every step", &Config::one_shot(4, &calls).every_step().workers(2, 1).pollers(2));
    let calls = in_place_too(one([1, 2, 3]));
    holds("one-shot, 2 warps, 2 tiles, every step", &Config::one_shot(4, &calls).every_step().workers(2, 2).pollers(2));
}

#[test]
fn two_ranks_hold_with_two_channels_of_which_one_may_lack_a_chunk_and_grids_that_change() {
    holds("one-shot, 2 channels, every step", &one_shot([1, 3]).two_channels(&[1, 2]).every_step());
    holds("one-shot, 2 channels, every flag", &one_shot([1, 2, 5]).two_channels(&[1, 2]).every_flag());
    holds("one-shot, 2 channels", &one_shot([1, 2, 3, 4, 5, 6]).two_channels(&[1, 2]));
    holds("one-shot, 2 channels, 2 warps", &one_shot([1, 3, 4, 5]).two_channels(&[1, 2]).workers(2, 2));
}

#[test]
fn two_ranks_hold_with_a_larger_ring_and_window() {
    holds("one-shot, ring 8, every flag", &Config::one_shot(8, &one([1, 3, 6])).every_flag());
    holds("one-shot, ring 8, 2 channels", &Config::one_shot(8, &one([5, 7])).two_channels(&[1, 2]));
}

#[test]
fn two_shot_holds_between_two_ranks_in_every_interleaving_of_every_word_and_flag() {
    let parts = [[1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 2, 0]];
    holds("two-shot, ring 1, every step", &Config::two_shot(2, 1, &in_place_too(two(parts))).every_step());
    let parts = [[1, 1, 0], [2, 1, 0], [3, 3, 0]];
    holds("two-shot, ring 2, every step", &Config::two_shot(2, 2, &two(parts)).every_step());
    let warps = Config::two_shot(2, 1, &two([[1, 1, 0], [2, 1, 0]])).every_step().workers(2, 2).pollers(2);
    holds("two-shot, ring 1, 2 warps, 2 tiles, every step", &warps);
    let channels = Config::two_shot(2, 1, &two([[1, 1, 0], [2, 1, 0]])).two_channels(&[1, 2]);
    holds("two-shot, ring 1, 2 channels, every step", &channels.every_step());
    holds("two-shot, ring 4, every step", &Config::two_shot(2, 4, &two([[2, 2, 0]])).every_step());
}

#[test]
fn two_shot_holds_between_three_ranks() {
    holds("two-shot, 3 ranks, every step", &Config::two_shot(3, 1, &two([[1, 0, 0], [1, 1, 1]])).every_step());
    let parts = [[1, 0, 0], [2, 1, 0], [1, 1, 1]];
    holds("two-shot, 3 ranks, every flag", &Config::two_shot(3, 1, &in_place_too(two(parts))).every_flag());
    let parts = [[1, 0, 0], [1, 1, 1], [2, 1, 0], [3, 3, 3]];
    holds("two-shot, 3 ranks, ring 2", &Config::two_shot(3, 2, &in_place_too(two(parts))));
    holds("two-shot, 3 ranks, ring 2, 2 warps", &Config::two_shot(3, 2, &two(parts)).workers(2, 1));
    let channels = Config::two_shot(3, 2, &two([[1, 1, 1], [2, 1, 0], [3, 3, 3]])).two_channels(&[1, 2]);
    holds("two-shot, 3 ranks, ring 2, 2 channels", &channels);
    holds("two-shot, 3 ranks, ring 4", &Config::two_shot(3, 4, &two([[1, 0, 0], [2, 1, 0], [5, 5, 5]])));
}

#[test]
fn a_rank_that_gives_up_and_stores_nothing_from_then_on_makes_nobodys_result_wrong() {
    let parts = [[1, 1, 0], [2, 2, 0], [2, 1, 0]];
    for rank in 0..2 {
        let config = one_shot([1, 3, 5]).every_step().launches(2).gives_up(rank);
        holds(&format!("one-shot, rank {rank} gives up, every step"), &config);
        let config = one_shot([1, 2, 4]).every_flag().workers(2, 1).pollers(2).launches(3).gives_up(rank);
        holds(&format!("one-shot, 2 warps, rank {rank} gives up, every flag"), &config);
        let config = one_shot([3]).two_channels(&[1, 2]).every_flag().launches(2).gives_up(rank);
        holds(&format!("one-shot, 2 channels, rank {rank} gives up, every flag"), &config);
        let config = Config::two_shot(2, 1, &two(parts)).every_step().launches(2).gives_up(rank);
        holds(&format!("two-shot, rank {rank} gives up, every step"), &config);
    }
    for rank in 0..3 {
        let config = Config::two_shot(3, 1, &two([[1, 1, 1]])).every_flag().launches(2).gives_up(rank);
        holds(&format!("two-shot, 3 ranks, rank {rank} gives up, every flag"), &config);
    }
}

#[test]
fn ranks_that_give_up_one_after_the_other_make_nobodys_result_wrong() {
    let all = |config: Config| config.gives_up(0).gives_up(1).gives_up(2);
    holds("one-shot, any rank gives up, every step", &all(one_shot([1, 3, 5]).every_step().launches(2)));
    let config = Config::two_shot(2, 1, &two([[1, 1, 0], [2, 1, 0], [2, 2, 0]]));
    holds("two-shot, any rank gives up, every step", &all(config.every_step().launches(2)));
    let config = Config::two_shot(3, 1, &two([[1, 0, 0]])).every_flag().launches(2);
    holds("two-shot, 3 ranks, any rank gives up, every flag", &all(config));
}

// ---- what would hold too ------------------------------------------------------------------------------------------

#[test]
fn a_window_of_half_the_ring_would_do_if_no_channel_ever_lacked_a_chunk() {
    let config = one_shot([1, 2, 3, 4, 5, 6]).mutant(Mutant::Window(2), 4).invariants();
    holds("window of ring / 2, 1 channel", &config);
    let config = one_shot([2, 4, 6]).two_channels(&[1, 2]).mutant(Mutant::Window(2), 3).invariants();
    holds("window of ring / 2, 2 channels with as many chunks", &config);
}

#[test]
fn launches_without_chunks_would_do_the_ring_no_harm() {
    let config = one_shot([0, 1, 2]).every_step().mutant(Mutant::Configuration, 4);
    let report = explore(&Model::new(config.clone()), Order::Depth);
    println!("one-shot, launches without chunks: {} states", report.states);
    assert!(report.counterexample.is_none_or(|found| panic!("{}", render(&config, &found))));
}

#[test]
fn flags_awaited_as_at_least_their_value_would_do_as_no_peer_is_ever_further() {
    let parts = [[1, 1, 0], [2, 1, 0], [3, 3, 0]];
    holds("one-shot, at least", &one_shot([1, 2, 3, 5]).every_step().mutant(Mutant::AtLeast, 3).invariants());
    let config = Config::two_shot(2, 2, &two(parts)).every_step().mutant(Mutant::AtLeast, 2).invariants();
    holds("two-shot, at least", &config);
    let config = one_shot([1, 2, 4]).every_flag().gives_up(0).mutant(Mutant::AtLeast, 3).invariants();
    holds("one-shot, at least, rank 0 gives up", &config);
}

#[test]
fn a_base_advanced_by_the_own_channels_chunks_would_do_if_grids_never_changed() {
    let config = one_shot([1, 2, 3, 5]).two_channels(&[2]).mutant(Mutant::BaseByOwnChannel, 4).invariants();
    holds("base of the own channel, a block for each", &config);
}

// ---- what fails: Release and Acquire ------------------------------------------------------------------------------

/// Two-shot between two ranks over rings of one slot: whatever is wrong there is wrong in larger ones.
fn two_shot() -> Config {
    Config::two_shot(2, 1, &two([[1, 1, 0], [2, 2, 0], [2, 1, 0]]))
}

#[test]
fn flags_without_a_fence_are_rejected() {
    fails("one-shot: no fence", &one_shot([1, 2]).every_step().mutant(Mutant::NoFence, 1));
    fails("two-shot: no fence", &two_shot().every_step().mutant(Mutant::NoFence, 1));
}

#[test]
fn a_signaller_that_ignores_one_warps_word_is_rejected() {
    let fault = |config: Config| config.every_step().workers(2, 1).mutant(Mutant::IgnoresOneWarp, 1);
    fails("one-shot: one warp ignored", &fault(one_shot([1, 2])));
    fails("two-shot: one warp ignored", &fault(two_shot()));
}

#[test]
fn a_tile_that_is_told_of_before_all_lanes_of_its_warp_have_done_it_is_rejected() {
    let fault = |config: Config, role| config.every_step().mutant(Mutant::NoWarpBarrier(role), 1);
    fails("one-shot: scatterers without barrier", &fault(one_shot([1]), Role::Scatter));
    fails("one-shot: reducers without barrier", &fault(one_shot([6]), Role::Reduce));
    fails("two-shot: scatterers without barrier", &fault(two_shot(), Role::Scatter));
    fails("two-shot: reducers without barrier", &fault(two_shot(), Role::Reduce));
    fails("two-shot: collectors without barrier", &fault(two_shot(), Role::Collect));
}

#[test]
fn a_chunk_that_counts_as_complete_before_its_last_tile_is_rejected() {
    let fault = |config: Config| config.every_step().workers(1, 2).mutant(Mutant::CompleteTooEarly, 1);
    fails("one-shot: complete with the first tile", &fault(one_shot([1])));
    fails("two-shot: complete with the first tile", &fault(two_shot()));
}

#[test]
fn broadcast_flags_raised_as_far_as_has_been_scattered_are_rejected() {
    fails("broadcast as scattered", &two_shot().every_step().mutant(Mutant::BroadcastAsScattered, 1));
}

#[test]
fn payload_loaded_before_its_flag_was_acquired_is_rejected() {
    let fault = |config: Config, role| config.every_step().mutant(Mutant::LoadsAhead(role), 1);
    fails("one-shot: reducers load ahead", &fault(one_shot([1]), Role::Reduce));
    fails("two-shot: reducers load ahead", &fault(two_shot(), Role::Reduce));
    fails("two-shot: collectors load ahead", &fault(two_shot(), Role::Collect));
}

#[test]
fn waiting_for_the_nearest_peer_only_is_rejected() {
    let config = Config::two_shot(3, 1, &two([[1, 1, 1]])).mutant(Mutant::OnePeer, 1);
    fails("two-shot, 3 ranks: flags of one peer", &config);
}

// ---- what fails: Reuse --------------------------------------------------------------------------------------------

#[test]
fn scatterers_that_do_not_wait_for_room_are_rejected() {
    fails("one-shot: no room", &one_shot([5]).mutant(Mutant::NoRoom, 1));
    fails("one-shot: no room across launches", &one_shot([3, 4]).mutant(Mutant::NoRoom, 2).sequence(&[0, 1]));
    fails("two-shot: no room", &two_shot().mutant(Mutant::NoRoom, 1));
    let config = Config::two_shot(3, 2, &two([[3, 3, 3]])).mutant(Mutant::NoRoom, 1);
    fails("two-shot, 3 ranks: no room", &config);
}

#[test]
fn a_one_shot_window_of_half_the_ring_is_rejected_where_a_channel_lacks_its_last_chunk() {
    let config = one_shot([4, 5]).two_channels(&[2]).mutant(Mutant::Window(2), 2);
    fails("one-shot: window of ring / 2", &config);
}

#[test]
fn a_one_shot_window_of_the_ring_but_one_is_rejected() {
    fails("one-shot: window of ring - 1", &one_shot([1, 2, 3, 4, 5, 6]).mutant(Mutant::Window(3), 2));
}

#[test]
fn a_one_shot_ring_of_two_is_rejected() {
    fails("one-shot: no window at all", &Config::one_shot(2, &one([1])).mutant(Mutant::Configuration, 1));
}

#[test]
fn two_shot_scatterers_that_wait_for_what_was_reduced_instead_of_collected_are_rejected() {
    fails("two-shot: room by what was reduced", &two_shot().mutant(Mutant::RoomByReduced, 1));
}

#[test]
fn an_in_place_reducer_that_does_not_wait_for_its_chunks_scatter_is_rejected() {
    let config = Config::one_shot(4, &[Call::one_shot(1).in_place()]);
    fails("one-shot: in place", &config.every_step().mutant(Mutant::NoWaitInPlace, 1));
}

// ---- what fails: Ring and Progress --------------------------------------------------------------------------------

#[test]
fn a_base_that_is_not_advanced_is_rejected() {
    fails("one-shot: base stays", &one_shot([1, 2]).mutant(Mutant::BaseStays, 2));
    fails("two-shot: base stays", &two_shot().mutant(Mutant::BaseStays, 2));
}

#[test]
fn a_base_advanced_by_the_own_channels_chunks_is_rejected_once_grids_change() {
    let config = one_shot([1, 2, 3]).two_channels(&[1, 2]).mutant(Mutant::BaseByOwnChannel, 2);
    fails("one-shot: base of the own channel", &config);
}

#[test]
fn channels_taken_in_another_order_by_a_rank_are_rejected() {
    fails("one-shot: channels descend", &one_shot([2]).two_channels(&[1]).mutant(Mutant::ChannelsDescend, 1));
}

// ---- what fails: Bound --------------------------------------------------------------------------------------------

#[test]
fn workers_that_go_on_storing_to_peers_after_their_poller_gave_up_are_rejected() {
    let fault = |config: Config| config.gives_up(0).mutant(Mutant::StoresOn, 2);
    fails("one-shot: stores on", &fault(one_shot([4]).every_step()));
    fails("two-shot: stores on", &fault(two_shot().every_step()));
    let config = Config::two_shot(3, 1, &two([[1, 1, 1]]));
    fails("two-shot, 3 ranks: stores on", &fault(config.every_flag()));
}

#[test]
fn a_signaller_that_ignores_that_the_poller_gave_up_is_rejected() {
    let fault = |config: Config| config.every_flag().gives_up(0).mutant(Mutant::QuitIgnored, 1);
    fails("one-shot: quit ignored", &fault(one_shot([1, 2])));
    fails("two-shot: quit ignored", &fault(two_shot()));
}

#[test]
fn a_signaller_that_looks_at_quit_before_what_is_complete_is_rejected() {
    let fault = |config: Config| config.every_flag().gives_up(0).mutant(Mutant::QuitReadFirst, 1);
    fails("one-shot: quit read first", &fault(one_shot([1, 2])));
    fails("two-shot: quit read first", &fault(two_shot()));
}

#[test]
fn a_poller_that_says_why_after_it_has_said_that_all_is_here_is_rejected() {
    let fault = |config: Config, launches| config.every_flag().gives_up(0).mutant(Mutant::QuitSaidLast, launches);
    fails("one-shot: quit said last", &fault(one_shot([1, 2, 3, 4]), 2));
    fails("two-shot: quit said last", &fault(two_shot(), 1));
}

#[test]
fn a_launch_behind_one_whose_poller_gave_up_that_does_its_work_is_rejected() {
    let fault = |config: Config, launches| config.every_flag().gives_up(0).mutant(Mutant::GoesOn, launches);
    fails("one-shot: goes on", &fault(one_shot([1, 3]), 3));
    fails("two-shot: goes on", &fault(two_shot(), 2));
}

// ---- the invariants and the reductions ----------------------------------------------------------------------------

#[test]
fn the_invariants_are_broken_where_they_should_be() {
    let fault = one_shot([5]).mutant(Mutant::NoRoom, 1).invariants();
    assert!(matches!(found("no room", &fault, Order::Breadth), Violation::Overwritten { .. }));
    let fault = one_shot([1]).mutant(Mutant::BaseStays, 2).invariants();
    assert!(matches!(found("base stays", &fault, Order::Depth), Violation::FlagUnseen { .. }));
    let fault = one_shot([0, 1]).mutant(Mutant::Configuration, 2).invariants();
    assert!(matches!(found("a launch without chunks", &fault, Order::Breadth), Violation::EndedAlone { .. }));
}

#[test]
fn the_reduced_searches_are_not_blind_to_the_faults_that_the_full_search_finds() {
    let faults = [
        (Mutant::NoRoom, one_shot([5])),
        (Mutant::NoRoom, two_shot()),
        (Mutant::Window(3), one_shot([1, 2, 3, 4, 5, 6])),
        (Mutant::RoomByReduced, two_shot()),
        (Mutant::BaseStays, one_shot([1, 2])),
        (Mutant::BroadcastAsScattered, two_shot()),
        (Mutant::NoWaitInPlace, Config::one_shot(4, &[Call::one_shot(1).in_place()])),
        (Mutant::OnePeer, Config::two_shot(3, 1, &two([[1, 1, 1]]))),
    ];
    for (mutant, config) in faults {
        let fault = config.mutant(mutant, 2);
        for (search, fault) in [("every step", fault.clone().every_step()), ("every flag", fault.clone().every_flag())]
        {
            fails(&format!("{mutant:?}, {search}"), &fault);
        }
        fails(&format!("{mutant:?}, reduced"), &fault);
    }
}

// ---- longer -------------------------------------------------------------------------------------------------------

#[test]
#[ignore = "minutes"]
fn two_ranks_hold_with_more_chunks_channels_and_a_larger_ring() {
    holds("one-shot, ring 8, every step", &Config::one_shot(8, &one([1, 2, 3, 4, 5, 6])).every_step());
    holds("one-shot, ring 8, 2 channels", &Config::one_shot(8, &one([1, 2, 3, 4, 5, 6, 7])).two_channels(&[1, 2]));
    holds("one-shot, 2 channels, every step", &one_shot([1, 2, 3, 5]).two_channels(&[1, 2]).every_step());
}

#[test]
#[ignore = "minutes"]
fn two_shot_holds_with_more_chunks_and_warps() {
    let parts = [[1, 0, 0], [1, 1, 1], [2, 1, 0]];
    holds("two-shot, 3 ranks, 2 warps, 2 tiles", &Config::two_shot(3, 2, &two(parts)).workers(2, 2));
    holds("two-shot, 3 ranks, ring 2, every flag", &Config::two_shot(3, 2, &two([[1, 1, 1], [2, 1, 0]])).every_flag());
    holds(
        "two-shot, ring 2, every step",
        &Config::two_shot(2, 2, &two([[1, 0, 0], [1, 1, 0], [4, 3, 0]])).every_step(),
    );
    let parts = [[1, 1, 1], [1, 0, 0], [2, 1, 0]];
    holds("two-shot, 3 ranks, ring 1, every step", &Config::two_shot(3, 1, &two(parts)).every_step());
}

#[test]
#[ignore = "minutes"]
fn giving_up_harms_nobody_in_larger_configurations() {
    for rank in 0..3 {
        let parts = [[1, 0, 0], [1, 1, 1], [2, 1, 0]];
        let config = Config::two_shot(3, 1, &two(parts)).every_flag().launches(2).gives_up(rank);
        holds(&format!("two-shot, 3 ranks, rank {rank} gives up, every flag"), &config);
    }
    let config = Config::two_shot(2, 2, &two([[1, 1, 0], [2, 2, 0], [4, 4, 0]])).every_flag().launches(2);
    holds("two-shot, ring 2, rank 0 gives up, every flag", &config.gives_up(0));
    let config = Config::two_shot(3, 1, &two([[1, 1, 1]])).every_flag().launches(1);
    holds("two-shot, 3 ranks, any rank gives up, every flag", &config.gives_up(0).gives_up(1).gives_up(2));
    let config = one_shot([1, 2, 3]).two_channels(&[1, 2]).every_step().launches(2);
    holds("one-shot, 2 channels, rank 0 gives up, every step", &config.gives_up(0));
}
