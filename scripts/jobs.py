"""Jobs of tests/sim/worker on GPUs or on simulated ones: where ranks run, what each said, and what a job that went well looks
like. soak.py, matrix.py and releases_check say what they run."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Failure(Exception):
    """What was wrong, with the output that shows it."""


def newest(pattern):
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"no {pattern}: build it, or name it by an option")
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
        sys.exit(f"the worker cannot be compiled (or name one by --worker):\n{said[-2000:]}")
    link = ["g++", "-pthread", "-Wl,-z,lazy", "-o", str(folder / "worker"), *objects]
    stubs = [f"-L{path}" for path in ("/usr/local/cuda/lib64/stubs", "/usr/lib/x86_64-linux-gnu",
                                      "/usr/lib/aarch64-linux-gnu", "/usr/lib64") if os.path.isdir(path)]
    for nccl in ("-lnccl", "-l:libnccl.so.2"):
        for cuda in ("-lcuda", "-l:libcuda.so.1"):
            done = subprocess.run(link + stubs + [nccl, cuda, "-ldl"], capture_output=True, text=True)
            if done.returncode == 0:
                return folder / "worker"
            said = done.stderr
    sys.exit(f"the worker cannot be linked (or name one by --worker):\n{said[-2000:]}")


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
                sys.exit("no GPU here (nvidia-smi -L); --sim N runs on simulated ones")
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


def deadline(place):
    # Simulated ranks share few cores.
    return {"TWOSHOT_TIMEOUT_MS": "60000" if place.simulated else "20000"}


def add_places(parser):
    """The options that a Place reads."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--gpus", type=int, metavar="N", help="ranks on this machine's GPUs")
    where.add_argument("--sim", metavar="N|HxG", help="simulated GPUs: N of one host, or H hosts of G each")
    parser.add_argument("--library", help="libtwoshot.so [the newest below target]")
    parser.add_argument("--worker", help="the worker [simulated: the build's; else compiled here]")
    parser.add_argument("--libs", help="folder of the simulated libraries [the newest below target]")


def main_of(main):
    """Runs it. A terminated run takes its ranks along: `run` ends them on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    sys.exit(main())
