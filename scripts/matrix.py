#!/usr/bin/env python3
"""What ncclAllReduce may be asked, cell by cell, on GPUs or on simulated ones.

A cell is a type x operation x count x placement x mode. Its result is that of the CPU reference to the last bit, on every
rank, where twoshot's limits for its communicator say that the call is routed; else the library's counters show that it went
to stock NCCL, and it is within the tolerance of another order of additions. Guard bytes and inputs are unchanged. Then the
same for pre-multiplied sums, with factors on the host and on the device.

It runs as one process per GPU and as one thread with all GPUs, in an order that the seed gives; what does not fit into
--limit is reported. Exit code 0: all cells that ran were right; 1: one was not; 2: it could not run.
"""

import argparse
import random
import re
import time

import jobs

# The worker's name, bytes of an element, and bytes of lines that carry one byte: src/call.rs.
TYPES = [("i8", 1, 2), ("u8", 1, 2), ("i32", 4, 2), ("u32", 4, 2), ("i64", 8, 2), ("u64", 8, 2), ("f16", 2, 1),
         ("f32", 4, 1), ("f64", 8, 2), ("bf16", 2, 1), ("e4m3", 1, 2), ("e5m2", 1, 2)]
# From this payload on the ring takes lines that carry half elsewhere, and up to this one 8-bit floats: src/route.rs.
WHOLE_LINES, FP8_MOST = 1 << 20, 4 << 20
OPERATIONS = ["sum", "prod", "max", "min", "avg"]
# Where the buffers lie; the last is another on every rank.
PLACEMENTS = ["inplace=0", "inplace=1", "offset=1 out_offset=3", "mixed"]
MODES = ["eager", "grouped", "captured"]
# A payload above this is reduced by several launches, unless it goes through the ring, whose chunks are these.
PIECE = 4 << 20
CHUNK = 8 << 10
# The most that goes through the ring here: once around it, with 24 channels of 32 chunks, and some more. A reference could
# not keep up with what the library would allow.
ENOUGH = (6 << 20) + 3 * CHUNK + 8
# Statements between two looks at the clock.
BATCH = 6
REPLAYS = 2


class Limits:
    """Payloads in bytes, as the library itself gives them for the communicator."""

    def __init__(self, ranks, oneshot, twoshot, bulk):
        self.ranks, self.oneshot, self.twoshot, self.bulk = ranks, oneshot, twoshot, bulk
        self.most = max(twoshot, bulk)

    def largest(self, dtype, size, carried):
        """The most elements that are routed. Lines of the other kinds carry eight bytes of payload in sixteen, but not in
        the ring."""
        if not self.bulk:
            return (self.most // 16 * 8 if carried == 2 else self.most) // size
        if dtype in ("e4m3", "e5m2") and self.twoshot > 0:
            return min(self.bulk, FP8_MOST)
        return self.bulk // size

    def counts(self, dtype, size, carried, rng):
        """Elements just below, on and just above every edge of the layout: line, slot, shard, switch of the algorithm,
        piece, largest payload; and any."""
        shards, bytes_ = self.ranks * 128, size * carried
        edges = [16, 128, 256, self.oneshot, shards, 2 * shards]
        counts = {edge // bytes_ + by for edge in edges for by in (-1, 0, 1)} | {1, 2, 3}
        if self.bulk:
            # Its first payload, and the edges of a chunk and of one on every rank.
            counts |= {edge // size + by for edge in (CHUNK, self.ranks * CHUNK) for by in (-1, 0, 1)}
            counts |= {self.twoshot // bytes_ + by for by in (0, 1)}
            if carried == 2:
                counts |= {WHOLE_LINES // size + by for by in (-1, 0)}
            counts = {count for count in counts if count <= self.largest(dtype, size, carried)}
        most = self.largest(dtype, size, carried)
        counts |= {most, most + 1}
        if self.most > PIECE and not self.bulk:
            counts.add(PIECE // bytes_ + 1)
        elif most > 2:
            counts.add(most - 1)
        counts.add(int(most ** rng.random()))
        counts = sorted(count for count in counts if count > 0)
        # Neighbours in time should differ much in size: what a stage was used for last must not matter.
        low, high = counts[:len(counts) // 2], counts[len(counts) // 2:]
        shuffled = []
        while high:
            shuffled.append(high.pop())
            shuffled += [low.pop()] if low else []
        return shuffled


class Cells:
    """The cells of one list of counts: the worker's statements, where their calls go, and how many cells they are."""

    def __init__(self, mode, counts, what, path):
        calls = f"counts={','.join(map(str, counts))} {what} exact={2 if path == 'routed' else 0}"
        self.cells, self.path, self.mode = len(counts), path, mode
        if mode == "eager":
            self.statements = [f"allreduce {calls} path={path}"]
        elif mode == "captured":
            self.statements = [f"capture {calls} path={path}", f"replay n={REPLAYS}", "drop_graphs"]
        elif path == "stock":
            # Stock NCCL gets a call when it is made, a kernel is launched at the end.
            self.statements = ["group_start", f"allreduce {calls} path=stock", "group_end"]
        else:
            self.statements = ["group_start", f"allreduce {calls}", "group_end path=routed"]


def plain(limits, modes, share, seed):
    """Type x operation x count x placement x mode. `share`: one statement in so many, and six counts of each."""
    rng, found, asked, number = random.Random(seed), [], set(), 0
    for t, (dtype, size, carried) in enumerate(TYPES):
        for o, op in enumerate(OPERATIONS):
            for m, mode in enumerate(MODES):
                for p, placement in enumerate(PLACEMENTS):
                    number += 1
                    if mode not in modes:
                        continue
                    counts = limits.counts(dtype, size, carried, rng)
                    # Neighbouring statements differ in their placement: every mode of every type and operation is met.
                    if (t + o + m + p + seed) % share:
                        continue
                    if share > 1:
                        first = rng.randrange(len(counts))
                        counts = (counts[first:] + counts[:first])[:6]
                    most = limits.largest(dtype, size, carried)
                    # Nothing to do, and stock NCCL's rules about arguments.
                    stock = [count for count in counts if count > most] + [0] * (mode == "eager")
                    ours = [count for count in counts if count <= most]
                    what = f"dtype={dtype} op={op} {placement} seed={seed % 100000 * 1000 + number}"
                    found += [Cells(mode, part, what, path) for path, part in (("routed", ours), ("stock", stock)) if part]
                    asked.add((dtype, op, mode))
    assert len(asked) == len(TYPES) * len(OPERATIONS) * len(modes), "a type, operation or mode is not asked"
    return found


def multiplied(limits, modes, share, seed):
    """Pre-multiplied sums: type x where the factor is x placement x mode x count, each with a factor of its own on every rank
    and a handle of its own. In a replay a factor on the device is another one, one on the host is not."""
    rng, found, number = random.Random(seed + 1), [], 0
    for t, (dtype, size, carried) in enumerate(TYPES):
        for s, scalar in enumerate(["host", "device"]):
            for m, mode in enumerate(MODES):
                for p, placement in enumerate(PLACEMENTS):
                    number += 1
                    if mode not in modes:
                        continue
                    most = limits.largest(dtype, size, carried)
                    counts = [1, max(1, 16 // size - 1), 16 // size, 64 // size + 1, most // 2 + 1, most]
                    # A quarter of the statements where not all are taken.
                    if share > 1 and (t + s + m + p + seed) % 4:
                        continue
                    what = f"dtype={dtype} op=premulsum scalar={scalar} {placement} seed={seed % 100000 * 1000 + number}"
                    found.append(Cells(mode, rng.sample(counts, 2), what, "routed"))
            # Beyond the limit, and a routed call behind it, whose order must not change.
            beyond = Cells("eager", [limits.most // size + 1], f"dtype={dtype} op=premulsum scalar={scalar}", "stock")
            behind = Cells("eager", [50], f"dtype={dtype}", "routed")
            found += [beyond, behind]
    return found


def program(found, seconds):
    """The worker's program. Its first call sets the communicator up; a capture could not."""
    lines = ["allreduce count=1", "describe"]
    for at in range(0, len(found), BATCH):
        lines.append(f"repeat n=1 seconds={seconds} since=start")
        lines += [statement for cells in found[at:at + BATCH] for statement in cells.statements]
        lines.append("end")
    return "\n".join(lines + ["sleep ms=150", "destroy", "release"])


DESCRIBED = re.compile(r"state (\d+), multicast (\d+), one-shot (\d+), two-shot (\d+), bulk (\d+)")


def described(ranks):
    """Multicast, and the limits of one-shot, of two-shot and of what goes through the ring."""
    said = {line["note"] for one in ranks for line in one.said("describe")}
    found = DESCRIBED.match(said.pop()) if len(said) == 1 else None
    jobs.expect(found, f"the ranks do not describe one communicator: {said}", ranks)
    state, multicast, *limits = map(int, found.groups())
    jobs.expect(state == 1, "twoshot is OFF", ranks)
    return multicast, *limits


def judge(found, ranks, lanes):
    """Which cells ran, by path, and what was wrong."""
    ran, wrong = {"routed": 0, "stock": 0}, []
    # Behind init, the first call, and the description.
    heard = [[line for line in one.lines if "cmd" in line][3:] for one in ranks]
    at = 0
    for cells in found:
        rows = [lines[at:at + len(cells.statements)] for lines in heard]
        if not all(len(row) == len(cells.statements) and row[0]["cmd"] == cells.statements[0].split()[0] for row in rows):
            break
        at += len(cells.statements)
        for one, row in zip(ranks, rows):
            wrong += [f"rank {one.rank}: {cells.statements}: {line.get('note', line)}" for line in row if not line["ok"]]
        digests = {tuple(line.get("digest") for line in row) for row in rows}
        if len(digests) > 1 and cells.path == "routed":
            wrong.append(f"{cells.statements}: the ranks have different bits: {digests}")
        checked = sum(line["calls"] for line in rows[0]) // (REPLAYS if cells.mode == "captured" else 1)
        if checked != cells.cells * lanes:
            wrong.append(f"{cells.statements}: {checked} calls were checked, not {cells.cells} on {lanes} rank(s)")
        ran[cells.path] += cells.cells
    return ran, wrong


def matrix(place, options, together, seconds, environment):
    """One job. Returns whether all was right."""
    place.together = together
    limits = Limits(place.ranks, *options.limits)
    asked = options.modes.split(","), options.share, options.seed
    found = plain(limits, *asked) + multiplied(limits, *asked)
    random.Random(options.seed).shuffle(found)
    began = time.monotonic()
    session, ranks = jobs.run(place, program(found, seconds), environment, seconds=seconds + 60)
    ran, wrong = judge(found, ranks, place.ranks if together else 1)
    cells, done = sum(cells.cells for cells in found), sum(ran.values())
    how = "one thread with all GPUs" if together else "one process per GPU"
    note = "" if done == cells else f"; the others did not fit into {seconds} s"
    print(f"{how}: {done} of {cells} cells ran, {ran['routed']} routed, {ran['stock']} by stock NCCL, {len(wrong)} wrong, "
          f"{time.monotonic() - began:.0f} s{note}", flush=True)
    for line in wrong[:20]:
        print(f"  {line}")
    if wrong:
        return False
    jobs.expect(done > 0, "no cell ran", ranks)
    multicast = described(ranks)[0]
    jobs.expect(multicast == options.multicast, f"multicast is {multicast}", ranks)
    jobs.expect_right(place, session, ranks)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_places(parser)
    parser.add_argument("--limit", type=int, default=300, metavar="SECONDS", help="time for all of it [300]")
    parser.add_argument("--seed", type=int, help="[random]")
    parser.add_argument("--share", type=int, default=1, help="take one statement in so many, and six counts of each [1: all]")
    parser.add_argument("--how", default="processes,thread", help="which of them, in turn [processes,thread]")
    parser.add_argument("--modes", default=",".join(MODES), help="which ways to call [all: %(default)s]")
    parser.add_argument("--oneshot", type=int, metavar="BYTES", help="another limit of one-shot than the library's own")
    parser.add_argument("--most", type=int, metavar="BYTES", help="another largest payload")
    parser.add_argument("--algo", help="TWOSHOT_ALGO, such as bulk")
    parser.add_argument("--multicast", type=int, default=0, choices=[0, 1], help="[0]")
    options = parser.parse_args()
    start = time.monotonic()
    options.seed = random.randrange(1 << 30) if options.seed is None else options.seed
    place = jobs.Place(options)
    environment = {**jobs.deadline(place), "TWOSHOT_MULTICAST": str(options.multicast)}
    # The worker's large buffers come and go with every call: let it keep their pages.
    environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
    if options.oneshot:
        environment["TWOSHOT_ONESHOT_MAX_BYTES"] = str(options.oneshot)
    if options.algo:
        environment["TWOSHOT_ALGO"] = options.algo
    if options.most:
        environment["TWOSHOT_MAX_BYTES"] = str(options.most)
    good, ways = True, options.how.split(",")
    try:
        _, ranks = jobs.run(place, "allreduce count=1\ndescribe\ndestroy\nrelease", environment)
        oneshot, twoshot, bulk = described(ranks)[1:]
        options.limits = oneshot, twoshot, min(bulk, options.most or ENOUGH)
        most = max(options.limits[1:])
        # The limit said aloud is that of pre-multiplied sums too.
        environment["TWOSHOT_MAX_BYTES"] = str(most)
        print(f"matrix: {place.ranks} ranks on {'simulated GPUs' if place.simulated else f'{place.gpus} GPU(s)'}, seed "
              f"{options.seed}, one-shot to {oneshot} B, two-shot to {twoshot} B, routed to {most} B, {place.library}", flush=True)
        for at, way in enumerate(ways):
            left = options.limit - (time.monotonic() - start)
            # What starting and ending takes, then the greater part for the first.
            seconds = max(1, int(left - 8) if at + 1 == len(ways) else int(left * 0.6) - 8)
            good &= matrix(place, options, way == "thread", seconds, environment)
    except jobs.Failure as failure:
        print(failure)
        good = False
    finally:
        place.close()
    print(f"matrix: {'all right' if good else 'FAILED'}, {time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    jobs.main_of(main)
