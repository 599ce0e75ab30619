//! Exhaustive interleavings of the sentinel protocol: the shipped variant and the classical one hold, their mutants fail.
//!
//! Each test prints the number of states it visited (`--nocapture`), each rejected mutant its counterexample. The tests
//! marked `ignored` explore larger configurations in minutes: `cargo test --release --test protocol_model -- --ignored`.
#![forbid(unsafe_code)]

#[path = "model/giving_up.rs"]
mod giving_up;
mod model;

use model::call::{Call, Shape};
use model::config::{Config, Mutant};
use model::machine::{Model, Violation};
use model::search::{Order, explore};
use model::trace::render;

const ONE_1: Call = Call::one_shot(1);
const ONE_2: Call = Call::one_shot(2);
const TWO_1: Call = Call::two_shot(1);
const TWO_2: Call = Call::two_shot(2);
/// With 2 ranks: slots of 1 and 2 lines, a shard of one line owned by one rank, shards of one line for each.
const SMALL: [Call; 4] = [ONE_1, ONE_2, TWO_1, TWO_2];
/// With 3 ranks three lines are the first size that gives every rank a shard; with 2 ranks the first uneven shards.
const LARGE: [Call; 6] = [ONE_1, ONE_2, Call::one_shot(3), TWO_1, TWO_2, Call::two_shot(3)];
/// Sums in the switch: with 2 ranks one line (one rank owns all), two (a line for each), three (two lines for rank 0).
const SWITCH_1: Call = Call::switch(1, 1);
const SWITCH_2: Call = Call::switch(2, 1);
const SWITCH_3: Call = Call::switch(3, 1);
/// Two threads announce one chunk.
const SWITCH_WIDE: Call = Call::switch(3, 2);
const SHAPES: [Shape; 3] = [Shape::SINGLE, Shape::TWO_BLOCKS, Shape::TWO_THREADS];

fn multicast<const N: usize>(calls: [Call; N]) -> [Call; N] {
    calls.map(Call::multicast)
}

#[track_caller]
fn holds(what: &str, config: &Config) {
    let report = explore(&Model::new(config.clone()), Order::Depth);
    println!("{what}: {} states, {} transitions, {:.2?}", report.states, report.transitions, report.time);
    if let Some(found) = &report.counterexample {
        // Again, breadth first, for a run that a person can read.
        let shortest = explore(&Model::new(config.clone()), Order::Breadth).counterexample;
        panic!("{what}:\n{}", render(config, shortest.as_ref().unwrap_or(found)));
    }
    assert!(report.rests > 0, "{what}: no run ever came to rest");
}

/// The search finds harm: a wrong result or a hang, not merely a broken invariant.
#[track_caller]
fn fails(what: &str, config: &Config, order: Order) {
    let report = explore(&Model::new(config.clone()), order);
    let (states, time) = (report.states, report.time);
    let found = report.counterexample.unwrap_or_else(|| panic!("{what}: not rejected in {states} states"));
    println!("{what}: rejected after {states} states, {time:.2?}\n{}", render(config, &found));
    assert!(matches!(
        found.violation,
        Violation::WrongWord { .. } | Violation::WrongResult { .. } | Violation::Deadlock
    ));
}

fn two_communicators(config: Config) -> Config {
    Config { communicators: 2, ..config }
}

fn with_set_up(config: Config) -> Config {
    Config { initialise: true, ..config }
}

// ---- what holds ---------------------------------------------------------------------------------------------------

#[test]
fn two_ranks_hold_in_every_interleaving_of_every_store_for_any_number_of_launches() {
    holds("immediate, 2 ranks, every step", &Config::shipped(2, &SMALL).every_step());
}

#[test]
fn two_ranks_hold_when_every_launch_of_every_rank_has_another_shape() {
    let config = Config::shipped(2, &SMALL).shapes(&SHAPES).every_landing();
    holds("immediate, 2 ranks, 3 shapes, every landing", &config);
}

#[test]
fn three_ranks_hold_in_every_order_of_landing() {
    holds("immediate, 3 ranks, one-shot, every landing", &Config::shipped(3, &[ONE_1]).every_landing());
    holds("immediate, 3 ranks, two-shot, every landing", &Config::shipped(3, &[TWO_1, TWO_2]).every_landing());
}

#[test]
fn three_ranks_hold_with_every_mix_of_algorithms_and_sizes() {
    holds("immediate, 3 ranks, 6 calls", &Config::shipped(3, &LARGE));
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    holds("immediate, 3 ranks, 6 calls, 2 shapes", &Config::shipped(3, &LARGE).shapes(&shapes));
}

#[test]
fn multicast_holds_when_the_own_copy_is_polled_too() {
    let config = Config::shipped(2, &multicast([ONE_1, TWO_1])).every_landing();
    holds("immediate, 2 ranks, multicast, every landing", &config);
    let config = Config::shipped(2, &multicast(LARGE)).shapes(&SHAPES);
    holds("immediate, 2 ranks, multicast, 6 calls, 3 shapes", &config);
    holds("immediate, 3 ranks, multicast, 4 calls", &Config::shipped(3, &multicast(SMALL)));
}

#[test]
fn unicast_and_multicast_calls_may_follow_each_other() {
    let calls = [ONE_1, TWO_2, ONE_2.multicast(), TWO_1.multicast()];
    holds("immediate, 2 ranks, unicast and multicast", &Config::shipped(2, &calls).shapes(&SHAPES));
    holds("immediate, 3 ranks, unicast and multicast", &Config::shipped(3, &calls));
}

#[test]
fn sums_in_the_switch_hold_in_every_interleaving_of_every_store_for_any_number_of_launches() {
    holds("switch, 2 ranks, 1 line, every step", &Config::shipped(2, &[SWITCH_1]).every_step());
}

#[test]
fn sums_in_the_switch_hold_in_every_order_of_landing() {
    holds("switch, 2 ranks, every landing", &Config::shipped(2, &[SWITCH_2]).every_landing());
    holds("switch, 3 ranks, every landing", &Config::shipped(3, &[SWITCH_1]).every_landing());
}

#[test]
fn sums_in_the_switch_hold_when_every_rank_has_another_shape() {
    holds("switch, 2 ranks, 3 shapes", &Config::shipped(2, &[SWITCH_1, SWITCH_2]).shapes(&SHAPES));
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    holds("switch, 2 ranks, 3 lines, 2 shapes", &Config::shipped(2, &[SWITCH_3, SWITCH_1]).shapes(&shapes));
    let wide = Config::shipped(2, &[SWITCH_WIDE]).shapes(&[Shape::TWO_THREADS]);
    holds("switch, 2 ranks, two threads to a chunk", &wide);
    holds("switch, 3 ranks, 2 shapes", &Config::shipped(3, &[SWITCH_1, SWITCH_2]).shapes(&shapes));
}

#[test]
fn sums_in_the_switch_may_follow_one_shot_and_two_shot_and_the_other_way_round() {
    let calls = [SWITCH_2, TWO_2.multicast(), ONE_1.multicast(), SWITCH_1, TWO_1];
    holds("switch and others, 2 ranks", &Config::shipped(2, &calls));
    holds("switch and others, 3 ranks", &Config::shipped(3, &calls));
    holds("switch and others, 2 ranks, 2 stages", &Config::shipped(2, &calls).stages(2));
}

#[test]
fn two_stages_would_suffice() {
    holds("immediate, 2 stages, every step", &Config::shipped(2, &SMALL).stages(2).every_step());
    holds("immediate, 2 stages, 3 ranks", &Config::shipped(3, &LARGE).stages(2));
}

#[test]
fn the_classical_lagged_clear_holds_too() {
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    let calls = [ONE_1, TWO_1];
    holds("lagged, 2 ranks, every landing", &Config::lagged(2, &calls).every_landing());
    holds("lagged, 2 ranks, 2 shapes", &Config::lagged(2, &SMALL).shapes(&shapes));
    holds("lagged, 3 ranks", &Config::lagged(3, &SMALL));
}

#[test]
fn set_up_holds_when_every_window_is_filled_before_the_first_launch_of_any_rank() {
    let config = Config::shipped(2, &[ONE_1, TWO_1]).every_step().launches(2);
    holds("set-up with a barrier", &with_set_up(config));
}

#[test]
fn two_communicators_hold_with_stages_of_their_own() {
    let config = Config::shipped(2, &[ONE_1, TWO_1]).launches(4);
    holds("two communicators, own stages", &two_communicators(config));
}

#[test]
fn an_epoch_that_wraps_at_a_multiple_of_the_stages_holds() {
    // 3 is to 4 as 2^32 - 1 to 2^32: the counter skips its last value.
    for epoch_modulus in [3, 6] {
        let config = Config { epoch_modulus, ..Config::shipped(2, &[ONE_1, TWO_1]).launches(7) };
        holds(&format!("epoch modulo {epoch_modulus}"), &config);
    }
}

// ---- what fails: the shipped variant ------------------------------------------------------------------------------

#[test]
fn one_stage_is_rejected() {
    let config = Config::shipped(2, &[ONE_1]).stages(1).mutant(Mutant::Configuration, 2);
    fails("one stage", &config, Order::Breadth);
}

#[test]
fn rearming_the_wrong_stage_is_rejected() {
    let config = Config::shipped(2, &[ONE_1]).mutant(Mutant::WrongStage, 4);
    fails("re-arm of the next stage", &config.eager(), Order::Breadth);
}

#[test]
fn rearming_a_fixed_size_is_rejected() {
    let config = Config::shipped(2, &[ONE_1, ONE_2]).mutant(Mutant::FixedSize(2), 4);
    fails("re-arm of a fixed size", &config.eager(), Order::Breadth);
}

#[test]
fn rearming_the_own_shard_only_is_rejected() {
    let config = Config::shipped(2, &[TWO_1, TWO_2]).mutant(Mutant::OwnShardOnly, 4);
    fails("re-arm of the own shard", &config.eager(), Order::Breadth);
}

#[test]
fn polling_one_word_of_a_line_is_rejected() {
    let config = Config::shipped(2, &SMALL).mutant(Mutant::OneWord, 4);
    fails("poll of one word", &config, Order::Breadth);
    let config = Config::lagged(2, &[ONE_1]).mutant(Mutant::OneWord, 4);
    fails("lagged: poll of one word", &config, Order::Breadth);
}

#[test]
fn a_launch_that_does_not_wait_for_the_rearm_of_the_one_before_is_rejected() {
    let config = Config::shipped(2, &[ONE_1]).mutant(Mutant::NoReleaseAtEnd, 4);
    fails("no release at the end of a launch", &config.eager(), Order::Breadth);
}

#[test]
fn a_block_that_starts_while_the_launch_before_still_runs_is_rejected() {
    let config = Config::shipped(2, &[ONE_1, ONE_2]).shapes(&[Shape::TWO_BLOCKS]);
    let config = config.mutant(Mutant::NoGridWait, 4).sequence(&[1, 0, 0, 1]);
    fails("no wait for the whole grid", &config.eager(), Order::Breadth);
}

#[test]
fn an_epoch_advanced_before_the_whole_block_has_read_it_is_rejected() {
    let config = Config::shipped(2, &[ONE_2]).shapes(&[Shape::TWO_THREADS]);
    fails("no barrier in the block", &config.mutant(Mutant::NoBlockBarrier, 2).eager(), Order::Breadth);
}

#[test]
fn a_block_that_advances_only_its_own_replica_is_rejected() {
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    let config = Config::shipped(2, &[ONE_2]).shapes(&shapes);
    fails("own replica only", &config.mutant(Mutant::OwnReplicaOnly, 3).eager(), Order::Breadth);
}

#[test]
fn a_multicast_copy_that_its_sender_does_not_poll_is_rejected() {
    let config = Config::shipped(2, &multicast([ONE_1, ONE_2]));
    let config = config.mutant(Mutant::OwnCopyNotPolled, 4).sequence(&[0, 0, 0, 1]);
    fails("own copy not polled", &config.eager(), Order::Breadth);
}

#[test]
fn a_launch_without_lines_is_rejected() {
    let config = Config::shipped(2, &[ONE_1, Call::one_shot(0)]);
    let config = config.mutant(Mutant::Configuration, 4).sequence(&[0, 1, 1, 0]);
    fails("launches without lines", &config.eager(), Order::Breadth);
}

#[test]
fn an_epoch_that_wraps_between_multiples_of_the_stages_is_rejected() {
    let config = Config { epoch_modulus: 4, ..Config::shipped(2, &[ONE_1]).mutant(Mutant::Configuration, 5) };
    fails("epoch modulo 4, as 2^32 with 3 stages", &config.eager(), Order::Breadth);
}

#[test]
fn ranks_that_disagree_on_the_algorithm_are_rejected() {
    let config = Config::shipped(2, &[ONE_1, TWO_1]).mutant(Mutant::Disagreement, 2);
    fails("ranks disagree", &config, Order::Breadth);
}

#[test]
fn a_window_filled_after_a_peer_may_have_sent_is_rejected() {
    let config = Config::shipped(2, &[ONE_1]).mutant(Mutant::NoInitBarrier, 1);
    fails("no barrier after the fill", &with_set_up(config), Order::Breadth);
}

#[test]
fn two_communicators_on_one_set_of_stages_are_rejected() {
    let config = Config::shipped(2, &[ONE_1]).mutant(Mutant::SharedStages, 1);
    fails("shared stages", &two_communicators(config), Order::Breadth);
}

// ---- what fails: sums in the switch -------------------------------------------------------------------------------

#[test]
fn an_arrival_that_overtakes_the_inputs_it_speaks_of_is_rejected() {
    let config = Config::shipped(2, &[SWITCH_1]).mutant(Mutant::ArrivalWithoutInputs, 2);
    fails("switch: arrival without release", &config, Order::Breadth);
}

#[test]
fn a_load_through_the_switch_before_the_arrivals_were_seen_is_rejected() {
    let config = Config::shipped(2, &[SWITCH_1]).mutant(Mutant::LoadWithoutAcquire, 2);
    fails("switch: load without acquire", &config, Order::Breadth);
}

#[test]
fn an_arrival_for_a_block_that_has_not_laid_out_all_its_input_is_rejected() {
    let config = Config::shipped(2, &[SWITCH_WIDE]).shapes(&[Shape::TWO_THREADS]);
    let config = config.mutant(Mutant::AnnouncedBeforeBarrier, 2);
    fails("switch: announced before the barrier", &config.eager(), Order::Breadth);
}

#[test]
fn arrivals_known_by_the_block_that_sends_them_are_rejected() {
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    let config = Config::shipped(2, &[SWITCH_3]).shapes(&shapes).mutant(Mutant::ArrivalsByBlock, 2);
    fails("switch: arrivals by block", &config.eager(), Order::Breadth);
}

#[test]
fn a_rank_that_does_not_wait_for_its_own_input_is_rejected() {
    let config = Config::shipped(2, &[SWITCH_1]).mutant(Mutant::OwnArrivalSkipped, 2);
    fails("switch: own arrival skipped", &config, Order::Breadth);
}

#[test]
fn arrivals_that_are_not_rearmed_are_rejected() {
    let config = Config::shipped(2, &[SWITCH_1]).mutant(Mutant::ArrivalsNotRearmed, 4);
    fails("switch: arrivals of three launches ago", &config.eager(), Order::Breadth);
}

#[test]
fn arrivals_rearmed_while_the_block_still_polls_them_are_rejected() {
    let config = Config::shipped(2, &[SWITCH_WIDE]).shapes(&[Shape::TWO_THREADS]);
    let config = config.mutant(Mutant::ArrivalsRearmedEarly, 2);
    fails("switch: no barrier before the re-arm", &config.eager(), Order::Breadth);
}

#[test]
fn inputs_rearmed_before_every_owner_has_loaded_them_are_rejected() {
    let config = Config::shipped(2, &[SWITCH_2]).mutant(Mutant::InputsRearmedEarly, 2);
    fails("switch: inputs re-armed too early", &config.eager(), Order::Breadth);
}

#[test]
fn inputs_that_are_not_rearmed_are_rejected() {
    let config = Config::shipped(2, &[SWITCH_2, TWO_2]).mutant(Mutant::InputsNotRearmed, 4).sequence(&[0, 0, 0, 1]);
    fails("switch: an input taken for a share of a shard", &config.eager(), Order::Breadth);
}

#[test]
fn one_stage_for_sums_in_the_switch_is_rejected() {
    let config = Config::shipped(2, &[SWITCH_1]).stages(1).mutant(Mutant::Configuration, 2);
    fails("switch: one stage", &config, Order::Breadth);
}

// ---- what fails: the lagged variant -------------------------------------------------------------------------------

#[test]
fn a_lagged_clear_of_the_stage_of_the_next_epoch_is_rejected() {
    let config = Config::lagged(2, &[ONE_1]).mutant(Mutant::WrongStage, 4);
    fails("lagged: clear of (e + 1) % 3", &config.eager(), Order::Breadth);
}

#[test]
fn a_lagged_clear_by_the_size_of_the_current_call_is_rejected() {
    let config = Config::lagged(2, &[ONE_1, ONE_2]);
    let config = config.mutant(Mutant::ThisCallsSize, 4).sequence(&[1, 0, 0, 1]);
    fails("lagged: clear by this call's size", &config.eager(), Order::Breadth);
}

#[test]
fn a_lagged_arrival_without_release_is_rejected() {
    let config = Config::lagged(2, &[ONE_1]).shapes(&[Shape::TWO_BLOCKS]);
    let config = config.mutant(Mutant::ArrivalWithoutRelease, 2);
    fails("lagged: arrival without release", &config.eager(), Order::Breadth);
}

#[test]
fn a_lagged_clear_that_outlives_its_launch_is_rejected() {
    let config = Config::lagged(2, &[ONE_1]).mutant(Mutant::NoReleaseAtEnd, 5);
    fails("lagged: no release at the end of a launch", &config.eager(), Order::Depth);
}

// ---- the reduction itself -----------------------------------------------------------------------------------------

#[test]
fn the_reduced_search_is_not_blind_to_the_faults_that_the_full_search_finds() {
    let faults = [
        (Mutant::WrongStage, Config::shipped(2, &SMALL)),
        (Mutant::FixedSize(2), Config::shipped(2, &SMALL)),
        (Mutant::OwnShardOnly, Config::shipped(3, &SMALL)),
        (Mutant::NoReleaseAtEnd, Config::shipped(2, &SMALL)),
        (Mutant::OwnCopyNotPolled, Config::shipped(2, &multicast(SMALL))),
        (Mutant::Disagreement, Config::shipped(2, &[ONE_1, TWO_1])),
        (Mutant::SharedStages, two_communicators(Config::shipped(2, &SMALL))),
        (Mutant::Configuration, Config::shipped(2, &SMALL).stages(1)),
        (Mutant::LaunchesBehind(u8::MAX), Config::shipped(2, &SMALL).all_give_up()),
        (Mutant::WrongStage, Config::lagged(2, &SMALL)),
        (Mutant::ThisCallsSize, Config::lagged(2, &SMALL)),
        (Mutant::NoReleaseAtEnd, Config::lagged(2, &SMALL)),
    ];
    for (mutant, config) in faults {
        let faulty = Config { mutant: Some(mutant), ..config };
        let mut runs = vec![faulty.clone().launches(5)];
        if faulty.communicators == 1 {
            runs.push(faulty);
        }
        for config in runs {
            let report = explore(&Model::new(config.clone()), Order::Depth);
            println!("reduced search, {mutant:?}, {:?}: {} states", config.horizon, report.states);
            assert!(report.counterexample.is_some(), "{mutant:?}");
        }
    }
}

// ---- longer -------------------------------------------------------------------------------------------------------

#[test]
#[ignore = "minutes; release profile"]
fn two_ranks_hold_in_every_interleaving_with_more_calls_and_shapes() {
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    holds("immediate, 2 ranks, 2 shapes, every step", &Config::shipped(2, &SMALL).shapes(&shapes).every_step());
    let config = Config::shipped(2, &LARGE).shapes(&SHAPES).every_landing();
    holds("immediate, 2 ranks, 6 calls, 3 shapes, every landing", &config);
    let config = Config::shipped(2, &multicast(SMALL)).shapes(&shapes).every_landing();
    holds("immediate, 2 ranks, multicast, 2 shapes, every landing", &config);
    holds("lagged, 2 ranks, every step, 4 launches", &Config::lagged(2, &[ONE_1]).every_step().launches(4));
    let config = Config::lagged(2, &[ONE_1, TWO_1]).shapes(&shapes).every_landing();
    holds("lagged, 2 ranks, 2 shapes, every landing", &config);
}

#[test]
#[ignore = "minutes; release profile"]
fn sums_in_the_switch_hold_with_more_lines_and_shapes() {
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    let config = Config::shipped(2, &[SWITCH_1, SWITCH_2]).shapes(&shapes).every_landing();
    holds("switch, 2 ranks, 2 shapes, every landing", &config);
    let wide = Config::shipped(2, &[SWITCH_WIDE]).shapes(&[Shape::TWO_THREADS]);
    holds("switch, 2 ranks, two threads to a chunk, every landing", &wide.every_landing());
    let calls = [SWITCH_1, SWITCH_2, TWO_2.multicast(), ONE_2.multicast()];
    holds("switch and others, 3 ranks, 2 shapes", &Config::shipped(3, &calls).shapes(&shapes));
}

#[test]
#[ignore = "minutes; release profile"]
fn three_ranks_hold_with_more_calls_and_shapes() {
    let shapes = [Shape::SINGLE, Shape::TWO_BLOCKS];
    let calls = [ONE_1, TWO_1, TWO_2];
    holds("immediate, 3 ranks, mixed, every landing", &Config::shipped(3, &calls).every_landing());
    holds("immediate, 3 ranks, 6 calls, 3 shapes", &Config::shipped(3, &LARGE).shapes(&SHAPES));
    let config = Config { interleaved: true, ..Config::shipped(3, &LARGE).shapes(&SHAPES) };
    holds("immediate, 3 ranks, push and poll line by line", &config);
    let config = Config::shipped(3, &multicast(LARGE)).shapes(&shapes);
    holds("immediate, 3 ranks, multicast, 6 calls, 2 shapes", &config);
    holds("immediate, 2 stages, 3 ranks, 3 shapes", &Config::shipped(3, &LARGE).stages(2).shapes(&SHAPES));
    holds("lagged, 3 ranks, 4 calls, 2 shapes", &Config::lagged(3, &SMALL).shapes(&shapes));
}
