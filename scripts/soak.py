#!/usr/bin/env python3
"""Runs real programs on GPUs or on simulated ones for a long time, and breaks them.

  soak       random sizes, types, groups, graphs, splits, creations, aborts and kills, until the time is over
  lifecycle  rounds of create, AllReduce, destroy, and rounds that abort in mid-flight: nothing may grow
  kill       kills a random rank at a random moment: the others abort in time, nothing stays, the next job is right
  beside     a communicator's set-up beside receives under way whose sends come behind it: it waits for nothing else

The programs are scripts for tests/sim/worker, a plain NCCL program that checks every result bit for bit; it is
compiled here where GPUs are used. Each round prints its seed: `--seed SEED --rounds 1` repeats it.
Exit code 0: all was right; 1: something was not, and the round's whole output is printed; 2: it could not run.
"""

import argparse
import random
import re
import signal
import sys
import time

from jobs import Failure, Place, add_places, deadline, expect, expect_right, main_of, run

# The longest that a survivor's ncclCommAbort may take.
ABORT_MS = 5000


# Programs ------------------------------------------------------------------------------------------------------------

def others(place, victim):
    return ",".join(str(rank) for rank in range(place.ranks) if rank != victim)


def counts(rng, most, n):
    return ",".join(str(int(most ** rng.random()) + rng.randrange(3)) for _ in range(n))


def order(place, name):
    """Stock NCCL's sums are another order's where there are more than two."""
    return " exact=0" if name.startswith("reduce") and not place.simulated and place.ranks > 2 else ""


def traffic(rng, most, place):
    """Calls on the current communicator."""
    types, ops = "f32,f16,bf16", rng.choice(["sum", "sum", "sum,max,min"])
    if rng.random() < 0.3:
        types += ",i8,u8,i32,u64,f64"
    if rng.random() < 0.6:
        return [f"random calls={rng.randrange(1, 12)} max={most} dtypes={types} ops={ops} seed={rng.randrange(1 << 30)} "
                f"streams={rng.choice([1, 1, 2, 3])} delays={rng.randrange(2)}", "stream i=0"]
    if rng.random() < 0.5:
        return [f"allreduce counts={counts(rng, most, 3)} reps=3 dtype={rng.choice(['f32', 'f16', 'bf16'])} mixed=1 "
                f"seed={rng.randrange(1 << 30)}"]
    name = rng.choice(["allgather", "reducescatter", "broadcast", "reduce", "sendrecv"])
    return [f"collective name={name} count={counts(rng, most // 8 + 2, 1)}{order(place, name)}"]


def group(rng, most):
    inner = [f"allreduce count={counts(rng, most, 1)} dtype={rng.choice(['f32', 'bf16'])}" for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.5:
        inner.insert(rng.randrange(len(inner) + 1), f"collective name=allgather count={counts(rng, 500, 1)}")
    return ["group_start", *inner, "group_end"]


def graph(rng, most, place):
    shape = rng.choice(["", "", " streams=2", " grouped=1"])
    mode = rng.choice(["thread", "global", "relaxed"])
    return [f"allreduce count={counts(rng, 100, 1)}",
            f"capture mode={mode} counts={counts(rng, most, rng.randrange(1, 4))}{shape}", f"replay n={rng.randrange(1, 5)}",
            *traffic(rng, most, place), f"replay n={rng.randrange(1, 4)}"]


def mid_flight(rng, place):
    """All but one rank are in a kernel that waits for that one; they abort, then it does."""
    victim = rng.randrange(place.ranks)
    rest = others(place, victim)
    # A simulated kernel on a crowded machine takes its time to see the abort.
    return ["allreduce count=500", "barrier", "hold", f"allreduce count={rng.randrange(1, 3000)} on={rest}",
            f"sleep ms={rng.randrange(1, 40)} on={rest}", f"abort on={rest}", "drop within=60000", "barrier",
            f"abort on={victim}"]


def wrong(rng, place):
    """Calls that must be refused and change nothing."""
    calls = ["raw comm=null expect=4", "raw dtype=99 expect=4", "raw op=-1 expect=4", "raw count=0 expect=0"]
    if place.simulated:
        calls.append("raw comm=stranger expect=4")
    return rng.sample(calls, 2)


def soak_program(rng, place, segments):
    # More than is routed between more than two would be summed in another order.
    most = rng.choice([20, 3000, 40000] if place.simulated else [100, 30000, 2000000 if place.ranks == 2 else 200000])
    program, graphs = ["init"], False
    for _ in range(segments):
        kind = rng.random()
        if kind < 0.4:
            program += traffic(rng, most, place)
        elif kind < 0.55:
            program += group(rng, min(most, 20000))
        elif kind < 0.7:
            program += graph(rng, min(most, 100000), place)
            graphs = True
        elif kind < 0.85:
            how = rng.choice(["color=0", "color=0 reverse", "mod=2", "div=2"])
            program += [f"split {how}", *traffic(rng, min(most, 20000), place), rng.choice(["destroy", "barrier; abort"])]
        elif kind < 0.93:
            program += ["finalize", "destroy", "init"] if rng.random() < 0.3 else ["destroy", "init"]
        elif kind < 0.95:
            # NCCL takes a call that it refuses for the end of a communicator that does not block.
            program += traffic(rng, most, place) if place.arguments else wrong(rng, place)
        else:
            program += [*mid_flight(rng, place), "init"]
        if graphs and rng.random() < 0.5:
            program, graphs = program + ["drop_graphs"], False
    # Every rank is routed at least once: what it was given so far may have been a communicator of its own, which is stock
    # NCCL's. The driver lets go of a graph's objects a moment later; what comes behind the last end of a communicator would
    # stay.
    return program + ["allreduce count=100", "drop_graphs", "sleep ms=150", "destroy", "release"]


# Modes ---------------------------------------------------------------------------------------------------------------


def soak_round(place, seed):
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return kill_round(place, seed)
    # Communicators that answer ncclInProgress.
    place.arguments = ["--blocking", "0"] if rng.random() < 0.25 else []
    program = "; ".join(soak_program(rng, place, rng.randrange(4, 16)))
    try:
        session, ranks = run(place, program, deadline(place), seconds=150)
        kind = ", non-blocking" if place.arguments else ""
        return f"{expect_right(place, session, ranks)} calls{kind}"
    except Failure as failure:
        raise Failure(f"{failure}\nthe program: {program}") from None


def kill_round(place, seed):
    rng = random.Random(seed)
    place.arguments = []
    victim = rng.randrange(place.ranks)
    # Only what is routed: a stock kernel that waits for a dead peer knows no deadline.
    most = rng.choice([100, 3000, 20000] if place.simulated else [1000, 100000, 500000])
    endless = (f"random calls=100000000 max={most} seed={seed} streams={rng.choice([1, 2])}" if rng.random() < 0.6
               else "replay n=100000000")
    prepare = f"capture counts={counts(rng, most, 3)}; " if endless.startswith("replay") else ""
    program = f"init; allreduce count=100 reps=3; {prepare}barrier; expect_error; {endless}; abort; drop_graphs"
    moment = rng.random() * 2

    def kill(ranks):
        start = time.monotonic()
        # Inside its set-up a peer's death is stock NCCL's to notice; this is about the time behind it.
        while not all(one.said("barrier") for one in ranks):
            if time.monotonic() - start > 90 or any(one.process.poll() is not None for one in ranks):
                raise Failure("the ranks did not start")
            time.sleep(0.01)
        time.sleep(moment)
        ranks[victim].process.send_signal(signal.SIGKILL)

    more = {"TWOSHOT_TIMEOUT_MS": "2000", "TWOSHOT_MAX_BYTES": "4M"}
    _, ranks = run(place, program, more, seconds=120, kill=kill)
    slowest = 0
    for one in ranks:
        if one.rank == victim:
            expect(one.process.returncode == -signal.SIGKILL, "the victim was not killed", ranks)
            continue
        expect(one.process.returncode == 0, f"survivor {one.rank} failed", ranks)
        took = one.said("abort")[-1]["ms"]
        expect(took < ABORT_MS, f"survivor {one.rank} took {took} ms to abort", ranks)
        slowest = max(slowest, took)
    pids = {one.process.pid for one in ranks}
    end = time.monotonic() + 20
    while place.gpu_processes() & pids or any(now > then + 64 for now, then in zip(place.memory_used(), place.before)):
        expect(time.monotonic() < end, f"a GPU process or its memory is left: {place.memory_used()} MiB", ranks)
        time.sleep(0.2)
    # The next job on the same GPUs.
    program = f"init; random calls=10 max={most} seed={seed}; destroy; release"
    session, ranks = run(place, program, deadline(place), seconds=120)
    expect_right(place, session, ranks)
    return f"rank {victim} killed after {moment:.2f} s, slowest abort {slowest:.0f} ms, next job right"


NUMBERS = re.compile(r"fds (\d+), threads (\d+), maps (\d+), vm (\d+) kB")
FREE = re.compile(r"free (\d+) of")


# Longer than any set-up takes that waits for its peers alone, shorter than a step's deadline.
SETUP_MS = 10000


def beside_round(place, seed):
    """Ranks 0 and 1 have a receive under way, each on a communicator of its own, whose send the other issues behind the
    first collective of a third one."""
    if place.ranks != 2:
        sys.exit("soak: beside is for two ranks")
    rng = random.Random(seed)
    first, second, most = rng.randrange(1, 5000), rng.randrange(1, 5000), rng.randrange(1, 50000)
    recv, send = "collective name=recv", "collective name=send"
    program = "; ".join([
        "init", "split color=0", "use comm=0", "split color=0",
        # Stock NCCL connects its peers at their first message, on both sides at once.
        "use comm=1", "collective name=sendrecv count=10", "use comm=2", "collective name=sendrecv count=10", "barrier", "hold",
        f"use comm=1 on=0; stream i=1 on=0; {recv} root=1 call=50 count={first} on=0",
        f"use comm=2 on=1; stream i=1 on=1; {recv} root=0 call=51 count={second} on=1",
        f"use comm=0; stream i=2; allreduce count={most} call=60",
        f"use comm=2 on=0; stream i=3 on=0; {send} root=1 call=51 count={second} on=0",
        f"use comm=1 on=1; stream i=3 on=1; {send} root=0 call=50 count={first} on=1",
        "flush", "use comm=0", f"allreduce count={most} reps=3", "destroy", "destroy", "destroy", "release", "sleep ms=50"])
    session, ranks = run(place, program, {"TWOSHOT_SETUP_TIMEOUT_MS": "20000", "TWOSHOT_SIM_CALLS_WAIT": "1"})
    expect_right(place, session, ranks)
    slowest = max(one.said("allreduce")[0]["ms"] for one in ranks)
    expect(slowest < SETUP_MS, f"the set-up took {slowest} ms: it waited for more than its peers", ranks)
    return f"set up in {slowest:.0f} ms"


def samples(one):
    """What a rank held at each sample: descriptors, threads, mappings, addresses in KiB, device bytes in use."""
    held = [NUMBERS.search(line["note"]).groups() for line in one.said("process")]
    free = [int(FREE.search(line["note"])[1]) for line in one.said("meminfo")]
    return [[*map(int, row), -bytes_free] for row, bytes_free in zip(held, free)]


def growth(place, body, batches, size, seconds, stock):
    """Growth from a warm start to the last sample, the worst of all ranks, and the rounds made."""
    # A thread that did a step of set-up may still be on its way out.
    sample = "barrier; sleep ms=200; process; meminfo"
    program = (f"repeat n=3; {body}; end; {sample}; "
               f"repeat n={batches} seconds={seconds}; repeat n={size}; {body}; end; {sample}; end; release")
    session, ranks = run(place, program, deadline(place), stock, seconds=seconds + 120)
    expect_right(place, session, ranks, routed=not stock)
    rows = [samples(one) for one in ranks]
    worst = [max(row[-1][i] - row[0][i] for row in rows) for i in range(5)]
    # Whether it grew once or goes on growing.
    series = [[(now[i] - rows[0][0][i]) for now in rows[0]] for i in range(5)]
    return worst, (len(rows[0]) - 1) * size, series


def lifecycle(place, options):
    # All together they take the limit at most, where it is not too short for anything: most of it the first.
    shares = {"all": (6, 2, 10), "ends": (8, 0, 9), "aborts": (0, 8, 9)}[options.part]
    share = max(10, options.limit // shares[2])
    rng = random.Random(options.seed)
    bodies = [("create/AllReduce/destroy", "init; random calls=2 seed=5 max=4000; destroy", options.rounds, 25, share * shares[0]),
              ("abort in mid-flight", "; ".join(["init", *mid_flight(rng, place)]), max(10, options.rounds // 10), 10, share * shares[1])]
    bodies = [body for body in bodies if body[-1] > 0]
    names = ["descriptors", "threads", "mappings", "addresses, KiB", "device bytes"]
    # What moves by itself: malloc's mappings and arenas; a GPU's memory in steps of its page.
    slack = [0, 0, 8, 256 << 10, 0 if place.simulated else 2 << 20]
    good = True
    for name, body, rounds, size, seconds in bodies:
        size = min(size, rounds)
        rounds -= rounds % size
        ours, made, series = growth(place, body, max(1, rounds // size), size, seconds, False)
        stock, stock_made, _ = growth(place, body, max(1, min(rounds, 100) // size), size, share, True)
        print(f"{name}: {made} rounds through twoshot, {stock_made} through stock NCCL alone")
        for what, own, theirs, spare, steps in zip(names, ours, stock, slack, series):
            allowed = spare + max(0, theirs) * made // max(1, stock_made)
            verdict = "flat" if own <= spare else "as stock NCCL" if own <= allowed else "GROWS"
            good &= own <= allowed
            print(f"  {what:<16} {own:>+12} (stock {theirs:+}): {verdict}")
            if own > spare:
                print(f"    rank 0 after each {size} rounds: {' '.join(f'{step:+}' for step in steps[1:])}")
        sys.stdout.flush()
        if made < rounds:
            print(f"  note: {rounds} rounds did not fit into {seconds} s")
    return good



def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["soak", "lifecycle", "kill", "beside"])
    add_places(parser)
    parser.add_argument("--limit", type=int, default=300, metavar="SECONDS", help="time for all of it [300]")
    parser.add_argument("--rounds", type=int, help="soak: as many as fit; lifecycle: 500; kill: 20; beside: 20")
    parser.add_argument("--part", default="all", choices=["all", "ends", "aborts"], help="lifecycle: rounds of this kind only")
    parser.add_argument("--seed", type=int, help="of the first round [random]")
    options = parser.parse_args()
    options.seed = random.randrange(1 << 30) if options.seed is None else options.seed
    options.rounds = options.rounds or {"soak": 1 << 30, "lifecycle": 500, "kill": 20, "beside": 20}[options.mode]
    place = Place(options)
    start = time.monotonic()
    print(f"{options.mode}: {place.ranks} ranks on {'simulated GPUs' if place.simulated else f'{place.gpus} GPU(s)'}, "
          f"{place.library}", flush=True)
    done = 0
    try:
        if options.mode == "lifecycle":
            return 0 if lifecycle(place, options) else 1
        work = {"soak": soak_round, "kill": kill_round, "beside": beside_round}[options.mode]
        while done < options.rounds and time.monotonic() - start < options.limit:
            seed, began = options.seed + done, time.monotonic()
            try:
                said = work(place, seed)
            except Failure as failure:
                print(f"{failure}\n{options.mode}: round {done + 1}, seed {seed}: FAILED", flush=True)
                return 1
            done += 1
            print(f"round {done}, seed {seed}: {said}, {time.monotonic() - began:.1f} s", flush=True)
        print(f"{options.mode}: {done} round(s), all right, {time.monotonic() - start:.0f} s")
        return 0
    except Failure as failure:
        print(f"{failure}\n{options.mode}: FAILED")
        return 1
    finally:
        place.close()



if __name__ == "__main__":
    main_of(main)
