//! Ranks that give up: with quiet launches behind them no peer's launch ends well with a wrong result, without it does.

use super::model::call::{Call, Shape};
use super::model::config::{Config, Mutant};
use super::model::search::Order;
use super::model::state::describe;
use super::*;

const TWO_3: Call = Call::two_shot(3);
/// What the kernels did before the model found the harm in it.
const ALL_WORK: Mutant = Mutant::LaunchesBehind(u8::MAX);

/// Each rank in turn is the one that gives up.
fn each_holds(what: &str, config: &Config) {
    for rank in 0..config.ranks {
        holds(&format!("rank {rank} gives up, {what}"), &config.clone().gives_up(rank));
    }
}

fn all_hold(what: &str, config: &Config) {
    holds(&format!("any rank gives up, {what}"), &config.clone().all_give_up());
}

#[track_caller]
fn one_fails(what: &str, config: Config) {
    fails(&format!("gives up, {what}"), &config.eager(), Order::Breadth);
}

#[test]
fn a_rank_that_gives_up_spoils_no_result_if_the_launches_behind_it_are_quiet() {
    each_holds("2 ranks, 2 calls, every step", &Config::shipped(2, &[ONE_1, TWO_1]).every_step());
    each_holds("2 ranks, 4 calls, every landing", &Config::shipped(2, &SMALL).every_landing());
    each_holds("2 ranks, 2 stages, every step", &Config::shipped(2, &[ONE_1, TWO_1]).stages(2).every_step());
    holds("rank 1 gives up, 3 ranks, every landing", &Config::shipped(3, &[ONE_1]).every_landing().gives_up(1));
    each_holds("3 ranks, two-shot, every landing", &Config::shipped(3, &[TWO_1, TWO_2]).every_landing());
    each_holds("3 ranks, 4 calls", &Config::shipped(3, &SMALL));
}

#[test]
fn ranks_of_which_any_may_give_up_spoil_no_result() {
    all_hold("2 ranks, one-shot, every step", &Config::shipped(2, &[ONE_1]).every_step());
    all_hold("2 ranks, two-shot, every step", &Config::shipped(2, &[TWO_1]).every_step());
    all_hold("2 ranks, 2 calls, every landing", &Config::shipped(2, &[ONE_1, TWO_2]).every_landing());
    all_hold("3 ranks, 4 calls", &Config::shipped(3, &SMALL));
}

#[test]
fn threads_that_go_on_in_a_launch_that_others_gave_up_spoil_no_result() {
    let two = Config::shipped(2, &[TWO_2]).shapes(&SHAPES).every_landing();
    all_hold("2 ranks, two-shot, 3 shapes, every landing", &two);
    each_holds("2 ranks, two-shot, 3 shapes, every landing, quiet at once", &two.quiet_at_once());
    for call in [ONE_2, TWO_3] {
        let config = Config::shipped(2, &[call]).shapes(&SHAPES[1..]).every_landing();
        each_holds(&format!("2 ranks, {}, 2 shapes, every landing", describe(call)), &config);
    }
    let ahead = Config { interleaved: true, ..Config::shipped(2, &[ONE_2, TWO_2]) };
    all_hold("2 ranks, push and poll line by line, every landing", &ahead.every_landing());
}

#[test]
fn ranks_that_give_up_spoil_no_result_over_multicast_or_in_the_switch() {
    let calls = multicast([ONE_1, TWO_1]);
    all_hold("2 ranks, multicast, every landing", &Config::shipped(2, &calls).every_landing());
    all_hold("2 ranks, switch, 1 line, every landing", &Config::shipped(2, &[SWITCH_1]).every_landing());
    all_hold("2 ranks, switch, 2 lines, every landing", &Config::shipped(2, &[SWITCH_2]).every_landing());
    let wide = Config::shipped(2, &[SWITCH_WIDE]).shapes(&[Shape::TWO_THREADS]);
    all_hold("2 ranks, switch, two threads to a chunk", &wide);
    let calls = [SWITCH_2, TWO_2.multicast(), ONE_1.multicast(), TWO_1];
    each_holds("3 ranks, switch and others", &Config::shipped(3, &calls));
}

#[test]
fn launches_behind_one_that_gave_up_are_rejected_if_they_do_their_work() {
    let switch = [SWITCH_1, SWITCH_2];
    for call in [ONE_1, TWO_1, TWO_2, ONE_1.multicast(), TWO_1.multicast()].into_iter().chain(switch) {
        for rank in 0..2 {
            let config = Config::shipped(2, &[call]).mutant(ALL_WORK, 4).gives_up(rank);
            one_fails(&format!("{}, rank {rank}, launches behind work", describe(call)), config);
        }
    }
    let config = Config::shipped(3, &[ONE_1]).mutant(ALL_WORK, 4).gives_up(1);
    one_fails("3 ranks, launches behind work", config);
}

/// The peer is then in the launch before the one that gave up; otherwise it is in that one.
#[test]
fn two_launches_behind_one_that_gave_up_are_rejected_if_they_do_their_work() {
    let config = Config::shipped(2, &[ONE_1]).mutant(Mutant::LaunchesBehind(2), 4).gives_up(0);
    one_fails("one-shot, 2 launches behind work", config);
    let config = Config::shipped(2, &[TWO_2, ONE_2]).mutant(Mutant::LaunchesBehind(2), 4).sequence(&[0, 0, 0, 1]);
    one_fails("two-shot, then one-shot, 2 launches behind work", config.gives_up(1));
}

#[test]
fn the_first_launch_behind_one_that_gave_up_may_do_its_work_with_three_stages_but_not_with_two() {
    let works = |config: Config| Config { mutant: Some(Mutant::LaunchesBehind(1)), ..config };
    each_holds("2 ranks, 1 launch behind works", &works(Config::shipped(2, &[ONE_1, TWO_1]).every_landing()));
    let config = Config::shipped(2, &[ONE_1]).stages(2).mutant(Mutant::LaunchesBehind(1), 4);
    one_fails("2 stages, 1 launch behind works", config.gives_up(0));
}

#[test]
fn a_thread_that_gives_up_and_publishes_what_it_has_is_rejected() {
    for call in [TWO_1, TWO_1.multicast()] {
        let config = Config::shipped(2, &[call]).mutant(Mutant::PublishesUnfinished, 2).gives_up(0);
        one_fails("unfinished sums are published", config);
    }
}

#[test]
#[ignore = "minutes"]
fn ranks_that_give_up_spoil_no_result_with_more_calls_and_shapes() {
    each_holds("2 ranks, 4 calls, every step", &Config::shipped(2, &SMALL).every_step());
    all_hold("2 ranks, 4 calls, every landing", &Config::shipped(2, &SMALL).every_landing());
    each_holds(
        "2 ranks, 4 calls, 3 shapes, every landing",
        &Config::shipped(2, &SMALL).shapes(&SHAPES).every_landing(),
    );
    for call in [ONE_2, TWO_3] {
        let config = Config::shipped(2, &[call]).shapes(&SHAPES[1..]).every_landing();
        all_hold(&format!("2 ranks, {}, 2 shapes, every landing", describe(call)), &config);
        let what = format!("2 ranks, {}, 2 shapes, every landing, quiet at once", describe(call));
        each_holds(&what, &config.quiet_at_once());
    }
    all_hold("3 ranks, two-shot, every landing", &Config::shipped(3, &[TWO_1, TWO_2]).every_landing());
    each_holds("3 ranks, one-shot and two-shot, every landing", &Config::shipped(3, &[ONE_1, TWO_1]).every_landing());
    each_holds("3 ranks, 6 calls, 2 shapes", &Config::shipped(3, &LARGE).shapes(&SHAPES[..2]));
}

#[test]
#[ignore = "minutes"]
fn ranks_that_give_up_spoil_no_result_over_multicast_or_in_the_switch_with_more_calls_and_shapes() {
    let config = Config::shipped(2, &multicast(SMALL)).every_landing().gives_up(1);
    holds("rank 1 gives up, 2 ranks, multicast, 4 calls, every landing", &config);
    each_holds("2 ranks, switch, 1 line, every step", &Config::shipped(2, &[SWITCH_1]).every_step());
    each_holds("3 ranks, switch, every landing", &Config::shipped(3, &[SWITCH_1]).every_landing());
    let wide = Config::shipped(2, &[SWITCH_WIDE]).shapes(&[Shape::TWO_THREADS]);
    each_holds("2 ranks, switch, two threads to a chunk, every landing", &wide.every_landing());
    let calls = [SWITCH_1, SWITCH_2, TWO_2.multicast(), ONE_2.multicast()];
    each_holds("3 ranks, switch and others, 2 shapes", &Config::shipped(3, &calls).shapes(&SHAPES[..2]));
}
