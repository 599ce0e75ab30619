"""One rank of scripts/gpu/official_check: NCCL called directly, memory and references by PyTorch.

Values are small whole numbers, chosen so that every result is exact in every type; comparisons are of bits.
"""

import argparse
import ctypes
import faulthandler
import json
import os
import sys
import time

import torch

TYPES = {
    "int8": (0, torch.int8), "uint8": (1, torch.uint8), "int32": (2, torch.int32), "uint32": (3, torch.int32),
    "int64": (4, torch.int64), "uint64": (5, torch.int64), "float16": (6, torch.float16), "float32": (7, torch.float32),
    "float64": (8, torch.float64), "bfloat16": (9, torch.bfloat16), "float8e4m3": (10, torch.float8_e4m3fn),
    "float8e5m2": (11, torch.float8_e5m2),
}
OPS = ["sum", "prod", "max", "min", "avg"]
SIZES = [("AllReduce", 1 << 10), ("AllReduce", 64 << 10), ("AllReduce", 256 << 10), ("AllReduce", 1 << 20),
         ("AllReduce", 4 << 20), ("AllReduce", 64 << 20), ("SendRecv", 1 << 20), ("SendRecv", 16 << 20),
         ("AllGather", 16 << 20)]
TARGETS = {("AllReduce", 1 << 10): 1.5, ("AllReduce", 64 << 10): 4, ("AllReduce", 1 << 20): 6,
           ("AllReduce", 64 << 20): 20, ("SendRecv", 16 << 20): 10, ("AllGather", 16 << 20): 10}


class UniqueId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_byte * 128)]


def library():
    name = os.environ.get("NCCL_LIBRARY", "libnccl.so.2")
    try:
        return ctypes.CDLL(name)
    except OSError:
        import nvidia.nccl
        return ctypes.CDLL(os.path.join(list(nvidia.nccl.__path__)[0], "lib", "libnccl.so.2"))


class Rank:
    def __init__(self, options):
        self.rank, self.ranks, self.rounds = options.rank, options.ranks, 3 if options.quick else 4
        self.register, self.handles = options.register, []
        self.device = torch.device("cuda", self.rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        torch.zeros(1, device=self.device)
        self.nccl = library()
        version = ctypes.c_int()
        self.ok(self.nccl.ncclGetVersion(ctypes.byref(version)))
        self.version = version.value
        self.comm = ctypes.c_void_p()
        unique, path = UniqueId(), os.path.join(options.dir, "id")
        if self.rank == 0:
            self.ok(self.nccl.ncclGetUniqueId(ctypes.byref(unique)))
            with open(path + ".partial", "wb") as file:
                file.write(bytes(unique))
            os.rename(path + ".partial", path)
        while not os.path.exists(path):
            time.sleep(0.01)
        with open(path, "rb") as file:
            unique = UniqueId.from_buffer_copy(file.read())
        self.nccl.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, UniqueId, ctypes.c_int]
        self.ok(self.nccl.ncclCommInitRank(ctypes.byref(self.comm), self.ranks, unique, self.rank))
        self.stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def ok(self, code):
        if code != 0:
            raise RuntimeError(f"rank {self.rank}: NCCL returned {code}")

    def call(self, name, *arguments):
        wrapped = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        self.ok(getattr(self.nccl, name)(*wrapped, self.comm, self.stream))

    def registered(self, *tensors):
        for tensor in tensors:
            handle = ctypes.c_void_p()
            self.ok(self.nccl.ncclCommRegister(self.comm, ctypes.c_void_p(tensor.data_ptr()),
                                               ctypes.c_size_t(tensor.numel() * tensor.element_size()),
                                               ctypes.byref(handle)))
            self.handles.append((handle, tensor))

    def all_reduce(self, send, receive, count, dtype, op):
        self.call("ncclAllReduce", send, receive, ctypes.c_size_t(count), dtype, op)

    def send_recv(self, send, receive, count, to, source):
        self.ok(self.nccl.ncclGroupStart())
        self.call("ncclSend", send, ctypes.c_size_t(count), 0, to)
        self.call("ncclRecv", receive, ctypes.c_size_t(count), 0, source)
        self.ok(self.nccl.ncclGroupEnd())

    def close(self):
        torch.cuda.synchronize()
        for handle, _ in self.handles:
            self.ok(self.nccl.ncclCommDeregister(self.comm, handle))
        self.ok(self.nccl.ncclCommDestroy(self.comm))


def door_library():
    return os.environ.get("TWOSHOT_LIBRARY") or os.environ["NCCL_NET_PLUGIN"]


def reduced(door):
    """AllReduce slices that twoshot's kernels have reduced in this process."""
    routed, stock = ctypes.c_uint64(), ctypes.c_uint64()
    ctypes.CDLL(door).twoshot_counters(ctypes.byref(routed), ctypes.byref(stock))
    return routed.value


def sent(door):
    """Messages and bytes sent straight, messages and bytes sent through windows, memories without a straight way."""
    five = (ctypes.c_uint64 * 5)()
    ctypes.CDLL(door).twoshot_network_counters(five)
    return list(five)


def requests(door):
    """Requests of the collective network; nanoseconds of queueing them, of any under way, of none under way."""
    four = (ctypes.c_uint64 * 4)()
    ctypes.CDLL(door).twoshot_collnet_times(four)
    return list(four)


def values(seed, rank, ranks, count, op, signed):
    generator = torch.Generator().manual_seed(seed * 1013 + rank)
    if op == "prod":
        return torch.randint(1, 3, (count,), generator=generator)
    low = -2 if signed else 0
    numbers = torch.randint(low, 3, (count,), generator=generator)
    return numbers * ranks if op == "avg" else numbers


def expected(all_values, op):
    stacked = torch.stack(all_values)
    return {"sum": lambda: stacked.sum(0), "prod": lambda: stacked.prod(0), "max": lambda: stacked.max(0).values,
            "min": lambda: stacked.min(0).values, "avg": lambda: stacked.sum(0) // len(all_values)}[op]()


def as_bytes(numbers, torch_type):
    wide = numbers.to(torch.float32) if torch_type.is_floating_point else numbers
    return wide.to(torch_type).contiguous().view(torch.uint8)


def check_all_reduce(me):
    wrong = calls = 0
    for name, (number, torch_type) in TYPES.items():
        if number >= 10 and me.version < 22400:
            continue
        for op_number, op in enumerate(OPS):
            for round_, count in enumerate([1, 1021, 70_001 + 13 * op_number, 900_000 if op == "sum" else 4096][:me.rounds]):
                seed = number * 100 + op_number * 10 + round_
                signed = not name.startswith("u")
                numbers = [values(seed, rank, me.ranks, count, op, signed) for rank in range(me.ranks)]
                want = as_bytes(expected(numbers, op), torch_type)
                mine = as_bytes(numbers[me.rank], torch_type).to(me.device)
                out = torch.full((want.numel() + 64,), 0xA5, dtype=torch.uint8, device=me.device)
                if me.register and round_ == 3 and op == "sum":
                    me.registered(mine, out)
                me.all_reduce(mine, out, count, number, op_number)
                torch.cuda.current_stream().synchronize()  # a pageable copy would hold the driver, see docs/official-door.md
                got = out.cpu()
                good = torch.equal(got[:want.numel()], want) and bool((got[want.numel():] == 0xA5).all())
                calls += 1
                if not good:
                    wrong += 1
                    at = int((got[:want.numel()] != want).nonzero()[0]) if not torch.equal(got[:want.numel()], want) else -1
                    print(f"rank {me.rank}: AllReduce {name} {op} count {count}: wrong at byte {at}", flush=True)
    return calls, wrong


def check_others(me):
    wrong = calls = 0

    def data(seed, rank, count):
        generator = torch.Generator().manual_seed(seed * 7919 + rank)
        return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)

    def compare(what, got, want):
        nonlocal wrong, calls
        calls += 1
        torch.cuda.current_stream().synchronize()
        if not torch.equal(got.cpu(), want):
            wrong += 1
            print(f"rank {me.rank}: {what} is wrong", flush=True)

    n, everyone = ctypes.c_size_t, range(me.ranks)
    for count in [1, 4099, 1_000_003, 20_000_000][:me.rounds]:
        all_data = [data(count, rank, count) for rank in everyone]
        mine = all_data[me.rank].to(me.device)
        out = torch.zeros(count * me.ranks, dtype=torch.uint8, device=me.device)
        me.call("ncclAllGather", mine, out, n(count), 0)
        compare(f"AllGather of {count}", out, torch.cat(all_data))
        one = torch.zeros(count, dtype=torch.uint8, device=me.device)
        me.call("ncclBroadcast", mine, one, n(count), 0, me.ranks - 1)
        compare(f"Broadcast of {count}", one, all_data[-1])
        to, source = (me.rank + 1) % me.ranks, (me.rank - 1) % me.ranks
        one = torch.zeros(count, dtype=torch.uint8, device=me.device)
        me.send_recv(mine, one, count, to, source)
        compare(f"Send and Recv of {count}", one, all_data[source])
        small = max(1, count // 8)
        wide = [torch.stack([data(count + r, rank, small) for r in everyone]) for rank in everyone]
        send, out = wide[me.rank].to(me.device), torch.zeros(me.ranks, small, dtype=torch.uint8, device=me.device)
        me.ok(me.nccl.ncclGroupStart())
        for peer in everyone:
            me.call("ncclSend", send[peer], n(small), 0, peer)
            me.call("ncclRecv", out[peer], n(small), 0, peer)
        me.ok(me.nccl.ncclGroupEnd())
        compare(f"AlltoAll of {small}", out, torch.stack([wide[peer][me.rank] for peer in everyone]))
        numbers = [values(count, rank, me.ranks, small * me.ranks, "sum", True).to(torch.int32) for rank in everyone]
        total = torch.stack(numbers).sum(0).to(torch.int32)
        send, out = numbers[me.rank].to(me.device), torch.zeros(small, dtype=torch.int32, device=me.device)
        me.call("ncclReduceScatter", send, out, n(small), 2, 0)
        compare(f"ReduceScatter of {small}", out, total.view(me.ranks, small)[me.rank])
        out = torch.zeros(small * me.ranks, dtype=torch.int32, device=me.device)
        me.call("ncclReduce", send, out, n(small * me.ranks), 2, 0, 0)
        torch.cuda.synchronize()
        if me.rank == 0:
            compare(f"Reduce of {small * me.ranks}", out, total)
    return calls, wrong


def measure(me, what, size):
    send = torch.zeros(size, dtype=torch.uint8, device=me.device)
    receive = torch.zeros(size * (me.ranks if what == "AllGather" else 1), dtype=torch.uint8, device=me.device)
    to, source = (me.rank + 1) % me.ranks, (me.rank - 1) % me.ranks
    if me.register:
        me.registered(send, receive)
    # Bound beforehand, so that little of a call's time is Python's.
    nccl, rest = me.nccl, (me.comm, me.stream)
    at, into, n = ctypes.c_void_p(send.data_ptr()), ctypes.c_void_p(receive.data_ptr()), ctypes.c_size_t(size)
    integer = ctypes.c_int

    def bound(name, *arguments):
        function = getattr(nccl, name)
        return lambda: function(*arguments)

    reduce = bound("ncclAllReduce", at, into, ctypes.c_size_t(size // 2), integer(9), integer(0), *rest)
    gather = bound("ncclAllGather", at, into, n, integer(0), *rest)
    begin, end = bound("ncclGroupStart"), bound("ncclGroupEnd")
    there = bound("ncclSend", at, n, integer(0), integer(to), *rest)
    here = bound("ncclRecv", into, n, integer(0), integer(source), *rest)
    call = {"AllReduce": reduce, "SendRecv": lambda: begin() or there() or here() or end(), "AllGather": gather}[what]
    me.ok(call())
    door = door_library() if os.environ.get("TWOSHOT_MODE") == "collnet" else None
    before = requests(door) if door else None
    repeats = 200 if size <= 64 << 10 else 50 if size <= 1 << 20 else 10
    best = []
    for _ in range(3):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        best.append((time.perf_counter() - start) / repeats * 1e6)
    me.ok(call())
    torch.cuda.synchronize()
    if door and what == "AllReduce":
        count, queueing, under_way, none = (now - then for now, then in zip(requests(door), before))
        calls = 3 * (repeats + 3) + 1
        print(f"rank {me.rank}: {what} of {size}: {sorted(best)[1]:.1f} us, {count / calls:.1f} requests; each call: "
              f"{queueing / calls / 1e3:.1f} us queueing, {under_way / calls / 1e3:.1f} under way, {none / calls / 1e3:.1f} "
              "with none under way", flush=True)
    return sorted(best)[1]


def read_tables(paths):
    """The times of each section; none of one that did not come to its end."""
    tables = []
    for path in paths:
        try:
            with open(path) as file:
                tables.append({tuple(key): us for key, us in json.load(file)})
        except OSError:
            tables.append({})
    return tables


def compare_ideas(paths):
    """A column for each section, named after its folder."""
    tables = read_tables(paths)
    print("| call | bytes | " + " | ".join(os.path.basename(os.path.dirname(path)) for path in paths) + " |")
    print("|---|---:|" + "---:|" * len(paths))
    for key in SIZES:
        print(f"| {key[0]} | {key[1]} | " + " | ".join(f"{t[key]:.1f}" if key in t else "-" for t in tables) + " |")


def compare(paths):
    tables = read_tables(paths)
    print("| call | bytes | sockets, us | official door, us | times faster | wanted | ring over NVLink, us | pieces of 512 KiB, us | windows only, us |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for key in SIZES:
        every = [table.get(key) for table in tables]
        sockets, ours = every[:2]
        text = [f"{us:.1f}" if us else "-" for us in every]
        ratio = f"{sockets / ours:.1f}" if sockets and ours else "-"
        print(f"| {key[0]} | {key[1]} | {text[0]} | {text[1]} | {ratio} | {TARGETS.get(key, '-')} | " + " | ".join(text[2:]) + " |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--dir")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--register", action="store_true", help="ncclCommRegister for the buffers of AllReduce")
    parser.add_argument("--compare", nargs="+")
    parser.add_argument("--ideas", nargs="+")
    options = parser.parse_args()
    if options.compare:
        return compare(options.compare)
    if options.ideas:
        return compare_ideas(options.ideas)
    faulthandler.dump_traceback_later(55)  # what a run that stops was waiting for
    me = Rank(options)
    wrong = 0
    if options.check:
        for name, check in [("AllReduce", check_all_reduce), ("the other collectives", check_others)]:
            calls, bad = check(me)
            slices = reduced(door_library())
            wrong += bad + (slices == 0)
            print(f"rank {me.rank}: {name}: {calls} calls, {bad} wrong (NCCL {me.version}); "
                  f"{slices} slices reduced by twoshot's kernels so far", flush=True)
    if options.times:
        times = [(key, measure(me, *key)) for key in SIZES]
        if me.rank == 0:
            with open(os.path.join(options.dir, "times"), "w") as file:
                json.dump(times, file)
    if os.environ.get("TWOSHOT_MODE") == "collnet":
        straight, straight_bytes, window, window_bytes, refused = sent(door_library())
        print(f"rank {me.rank}: network: {straight} messages, {straight_bytes} B straight; {window}, {window_bytes} B "
              f"through windows; {refused} memories without a straight way", flush=True)
    me.close()
    return sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
