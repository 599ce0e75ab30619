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
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The longest that a survivor's ncclCommAbort may take.
ABORT_MS = 5000


class Failure(Exception):
    """What was wrong, with the output that shows it."""


def newest(pattern):
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"soak: no {pattern}: build it, or name it by an option")
    return found[-1]


def compile_worker(folder):
    """The worker against the system's NCCL. Functions that an older one lacks are weak."""
    sources = sorted((ROOT / "tests/sim/worker").glob("*.cc"))
    objects = [str(folder / f"{path.stem}.o") for path in sources]
    compile_ = ["g++", "-O2", "-std=c++17", "-pthread", "-c"]
    compile_ += [f"-I{ROOT / part}" for part in ("include", "tests/sim/worker", "kernels")]
    parts = [subprocess.Popen([*compile_, "-o", out, str(path)], stderr=subprocess.PIPE, text=True)
             for path, out in zip(sources, objects)]
    said = "".join([part.communicate()[1] for part in parts])
    if any(part.returncode for part in parts):
        sys.exit(f"soak: the worker cannot be compiled (or name one by --worker):\n{said[-2000:]}")
    link = ["g++", "-pthread", "-Wl,-z,lazy", "-o", str(folder / "worker"), *objects]
    stubs = [f"-L{path}" for path in ("/usr/local/cuda/lib64/stubs", "/usr/lib/x86_64-linux-gnu",
                                      "/usr/lib/aarch64-linux-gnu", "/usr/lib64") if os.path.isdir(path)]
    for nccl in ("-lnccl", "-l:libnccl.so.2"):
        for cuda in ("-lcuda", "-l:libcuda.so.1"):
            done = subprocess.run(link + stubs + [nccl, cuda, "-ldl"], capture_output=True, text=True)
            if done.returncode == 0:
                return folder / "worker"
            said = done.stderr
    sys.exit(f"soak: the worker cannot be linked (or name one by --worker):\n{said[-2000:]}")


class Place:
    """Where ranks run: simulated GPUs of a session folder, or this machine's."""

    def __init__(self, options):
        self.options = options
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="twoshot-soak-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.simulated = options.sim is not None
        self.jobs = 0
        # One process whose one thread has all GPUs, instead of one process for each.
        self.together = False
        # More of the worker's options.
        self.arguments = []
        if self.simulated:
            hosts, _, gpus = options.sim.rpartition("x")
            self.hosts, self.gpus = int(hosts or 1), int(gpus)
            self.ranks = self.hosts * self.gpus
            self.libs = pathlib.Path(options.libs or newest("target/*/build/twoshot-sim-*/out/lib/libnccl.so.2").parent)
            self.worker = pathlib.Path(options.worker or self.libs.parent / "bin/sim_worker")
        else:
            self.hosts, self.ranks = 1, options.gpus
            self.gpus = len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.split("GPU ")) - 1
            if self.gpus < 1:
                sys.exit("soak: no GPU here (nvidia-smi -L); --sim N runs on simulated ones")
            self.worker = pathlib.Path(options.worker or compile_worker(self.folder))
        self.library = pathlib.Path(options.library or newest("target/*/libtwoshot.so")).resolve()

        self.before = self.memory_used()

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def session(self):
        """A fresh folder for one job: unique id, barriers, and the simulator's machine room."""
        self.jobs += 1
        session = self.folder / f"job{self.jobs}"
        session.mkdir()
        if self.simulated:
            fabric = "74776f73686f742d6661627269632d31" if self.hosts > 1 else "0" * 32
            lines = [f"host {host} gpus={self.gpus} fabric=completed uuid={fabric} clique=1 "
                     f"imex={int(self.hosts > 1)} link=nvlink" for host in range(self.hosts)]
            (session / "topology").write_text("\n".join(lines) + "\n")
        return session

    def environment(self, session, rank, more, stock):
        drop = ("TWOSHOT_", "NCCL_NET_PLUGIN", "LD_PRELOAD")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        kept["NCCL_DEBUG"] = os.environ.get("NCCL_DEBUG", "WARN")
        # Multicast only where somebody asked for it.
        kept.setdefault("NCCL_NVLS_ENABLE", "1" if self.simulated else "0")
        if not stock:
            kept["NCCL_NET_PLUGIN"] = str(self.library)
        if self.simulated:
            host, gpu = divmod(rank, self.gpus)
            kept.update({
                "TWOSHOT_SIM_DIR": str(session), "TWOSHOT_SIM_HOST": str(host), "TWOSHOT_SIM_RANK": str(rank),
                "TWOSHOT_HOST_ID": f"sim-host-{host}", "NCCL_HOSTID": f"sim-host-{host}",
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(self.gpus))) if self.together else str(gpu),
                "LD_LIBRARY_PATH": str(self.libs)})
        elif self.gpus < self.ranks:
            kept.update({"TWOSHOT_SHARED_GPU": "1", "NCCL_HOSTID": f"emulated-{rank}", "NCCL_SOCKET_IFNAME": "lo"})
        kept.update({name: value.replace("{rank}", str(rank)) for name, value in more.items()})
        return kept

    def device(self, rank):
        return 0 if self.simulated else rank % self.gpus

    def live(self, session, pid):
        """What a simulated process left with the driver: the counters' table of 64-byte slots. A module a device may stay,
        and its reference to the context."""
        path = session / f"stats.{pid}"
        data = path.read_bytes() if path.exists() else b""
        slots = [data[at:at + 64] for at in range(0, len(data), 64)]
        values = {slot[:56].split(b"\0")[0].decode(): int.from_bytes(slot[56:], sys.byteorder) for slot in slots}
        for name in ("live.contexts", "live.modules"):
            values[name] = max(0, values.get(name, 0) - values.get("live.modules", 0))
        return {name: value for name, value in values.items() if name.startswith("live.") and value}

    def gpu_processes(self):
        if self.simulated:
            return set()
        asked = subprocess.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=60)
        return {int(word) for word in asked.stdout.split() if word.isdigit()}


    def memory_used(self):
        """MiB in use on each GPU, whoever holds them: in a container the processes themselves may not be listed."""
        if self.simulated:
            return []
        asked = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                               capture_output=True, text=True, timeout=60)
        return [int(word) for word in asked.stdout.split() if word.isdigit()]


class Rank:
    """One process, heard line by line."""

    def __init__(self, place, session, rank, program, more, stock, seconds):
        command = [str(place.worker), "--rank", str(rank), "--ranks", str(place.ranks), "--device", str(place.device(rank)),
                   "--id", str(session / "unique-id"), "--timeout", str(seconds), "--program", program]
        command += place.arguments + (["--gpus", str(place.ranks)] if place.together else [])
        self.rank, self.lines, self.noise = rank, [], []
        self.process = subprocess.Popen(command, env=place.environment(session, rank, more, stock), text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        errors="replace")
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                try:
                    self.lines.append(json.loads(line))
                    continue
                except ValueError:
                    pass
            self.noise.append(line)

    def said(self, command):
        return [line for line in list(self.lines) if line.get("cmd") == command]

    def summary(self):
        return next((line for line in reversed(self.lines) if line.get("summary")), {})

    def text(self):
        lines = [json.dumps(line) for line in self.lines]
        return f"--- rank {self.rank}: exit {self.process.returncode}\n" + "\n".join(lines[-40:]) + "\n" + "".join(self.noise[-60:])


def run(place, program, more=None, stock=False, seconds=120, kill=None):
    """Runs one job to its end. `kill(ranks)` is called beside it. No process is ever left."""
    session = place.session()
    ranks = []
    # Too long for an argument.
    if len(program) > 100000:
        (session / "program").write_text(program)
        program = str(session / "program")
    try:
        for rank in range(1 if place.together else place.ranks):
            ranks.append(Rank(place, session, rank, program, more or {}, stock, seconds))
        if kill:
            kill(ranks)
        end = time.monotonic() + seconds + 20
        for one in ranks:
            try:
                one.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Failure("a rank never ended") from None
        for one in ranks:
            one.reader.join(10)
        return session, ranks
    except Failure as failure:
        for one in ranks:
            one.process.kill()
            one.process.wait()
        raise Failure("\n".join([str(failure)] + [one.text() for one in ranks])) from None
    finally:
        for one in ranks:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()


def expect(condition, what, ranks):
    if not condition:
        raise Failure("\n".join([what] + [one.text() for one in ranks]))


def expect_right(place, session, ranks, routed=True):
    """Every rank ended well, was routed, and left nothing."""
    for one in ranks:
        expect(one.process.returncode == 0 and one.summary().get("ok"), f"rank {one.rank} failed", ranks)
        expect(not routed or one.summary().get("routed", 0) > 0, f"rank {one.rank} was never routed", ranks)
        if place.simulated:
            left = place.live(session, one.process.pid)
            expect(not left, f"rank {one.rank} left {left} behind", ranks)
    return sum(one.summary().get("calls", 0) for one in ranks)


# Programs ------------------------------------------------------------------------------------------------------------

def others(place, victim):
    return ",".join(str(rank) for rank in range(place.ranks) if rank != victim)


def counts(rng, most, n):
    return ",".join(str(int(most ** rng.random()) + rng.randrange(3)) for _ in range(n))


def traffic(rng, most):
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
    return [f"collective name={name} count={counts(rng, most // 8 + 2, 1)}"]


def group(rng, most):
    inner = [f"allreduce count={counts(rng, most, 1)} dtype={rng.choice(['f32', 'bf16'])}" for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.5:
        inner.insert(rng.randrange(len(inner) + 1), f"collective name=allgather count={counts(rng, 500, 1)}")
    return ["group_start", *inner, "group_end"]


def graph(rng, most):
    shape = rng.choice(["", "", " streams=2", " grouped=1"])
    mode = rng.choice(["thread", "global", "relaxed"])
    return [f"allreduce count={counts(rng, 100, 1)}",
            f"capture mode={mode} counts={counts(rng, most, rng.randrange(1, 4))}{shape}", f"replay n={rng.randrange(1, 5)}",
            *traffic(rng, most), f"replay n={rng.randrange(1, 4)}"]


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
    most = rng.choice([20, 3000, 40000]) if place.simulated else rng.choice([100, 30000, 2000000])
    program, graphs = ["init"], False
    for _ in range(segments):
        kind = rng.random()
        if kind < 0.4:
            program += traffic(rng, most)
        elif kind < 0.55:
            program += group(rng, min(most, 20000))
        elif kind < 0.7:
            program += graph(rng, min(most, 100000))
            graphs = True
        elif kind < 0.85:
            how = rng.choice(["color=0", "color=0 reverse", "mod=2", "div=2"])
            program += [f"split {how}", *traffic(rng, min(most, 20000)), rng.choice(["destroy", "barrier; abort"])]
        elif kind < 0.93:
            program += ["finalize", "destroy", "init"] if rng.random() < 0.3 else ["destroy", "init"]
        elif kind < 0.95:
            program += wrong(rng, place)
        else:
            program += [*mid_flight(rng, place), "init"]
        if graphs and rng.random() < 0.5:
            program, graphs = program + ["drop_graphs"], False
    # The driver lets go of a graph's objects a moment later; what comes behind the last end of a communicator would stay.
    return program + ["drop_graphs", "sleep ms=150", "destroy", "release"]


# Modes ---------------------------------------------------------------------------------------------------------------

def deadline(place):
    # Simulated ranks share few cores.
    return {"TWOSHOT_TIMEOUT_MS": "60000" if place.simulated else "20000"}


def soak_round(place, seed):
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return kill_round(place, seed)
    program = "; ".join(soak_program(rng, place, rng.randrange(4, 16)))
    try:
        session, ranks = run(place, program, deadline(place), seconds=150)
        return f"{expect_right(place, session, ranks)} calls"
    except Failure as failure:
        raise Failure(f"{failure}\nthe program: {program}") from None


def kill_round(place, seed):
    rng = random.Random(seed)
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


def add_places(parser):
    """The options that a Place reads."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpus", type=int, metavar="N", help="ranks on this machine's GPUs")
    where.add_argument("--sim", metavar="N|HxG", help="simulated GPUs: N of one host, or H hosts of G each")
    parser.add_argument("--library", help="libtwoshot.so [the newest below target]")
    parser.add_argument("--worker", help="the worker [simulated: the build's; else compiled here]")
    parser.add_argument("--libs", help="folder of the simulated libraries [the newest below target]")


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


def main_of(main):
    """Runs it. A terminated run takes its ranks along: `run` ends them on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    sys.exit(main())


if __name__ == "__main__":
    main_of(main)
