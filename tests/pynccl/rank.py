"""One rank of a job that reaches NCCL as vLLM does: through vLLM's own pynccl_wrapper.py, read out of its wheel.

Usage: rank.py WHEEL_FILES RANK RANKS UNIQUE_ID_FILE

Only what the wrapper imports is stood in for (torch's types and vLLM's logger, settings and platform); the wrapper, and
the search for the library where the release has it in a file of its own, are vLLM's.
"""

import ctypes
import importlib.util
import os
import pathlib
import random
import struct
import sys
import time
import types

RANK_TIMEOUT = 60
MODE_THREAD_LOCAL = 1


def module(name, **contents):
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)
    return made


def stand_in():
    """What the wrapper's imports find."""

    class Logger:
        def __getattr__(self, level):
            return lambda text, *values, **_: print(f"vllm {level}: " + str(text) % values, file=sys.stderr)

    kinds = "int8 uint8 int32 int64 float16 float32 float64 bfloat16 float8_e4m3fn".split()
    operations = types.SimpleNamespace(SUM="sum", PRODUCT="product", MAX="max", MIN="min", AVG="avg")
    module("torch", dtype=str, version=types.SimpleNamespace(cuda="13.0", hip=None), **{kind: kind for kind in kinds})
    module("torch.distributed", ReduceOp=operations, ProcessGroup=object)
    path = os.environ.get("VLLM_NCCL_SO_PATH")
    module("vllm")
    module("vllm.envs", VLLM_NCCL_SO_PATH=path, VLLM_USE_NCCL_SYMM_MEM=False, VLLM_NCCL_INCLUDE_PATH=None)
    module("vllm.logger", init_logger=lambda name: Logger())
    platform = types.SimpleNamespace(is_rocm=lambda: False, fp8_dtype=lambda: "float8_e4m3fn")
    module("vllm.platforms", current_platform=platform)
    # Older releases keep this in a file of three thousand lines.
    module("vllm.utils", find_nccl_library=lambda: path)


def load(name, path):
    """A real file of the wheel under its own module name."""
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


class Cuda:
    """The driver, called by its own names."""

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)
        self.stream = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(self.stream), 1)

    def __call__(self, name, *arguments):
        result = getattr(self.library, name)(*arguments)
        if result != 0:
            raise RuntimeError(f"{name}: CUDA error {result}")

    def allocate(self, size):
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def write(self, address, data):
        self("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))

    def read(self, address, size):
        data = ctypes.create_string_buffer(size)
        self("cuMemcpyDtoH_v2", data, address, ctypes.c_size_t(size))
        return data.raw

    def synchronize(self):
        self("cuStreamSynchronize", self.stream)


def payload(seed, rank, count, kind):
    """Random numbers that the type holds exactly."""
    source = random.Random(f"{seed} {rank}")
    values = [source.uniform(-100, 100) for _ in range(count)]
    return struct.unpack(f"<{count}{kind}", struct.pack(f"<{count}{kind}", *values))


def expected(seed, ranks, count, kind):
    """The sum in the order of ranks, rounded once. With two ranks a sum of doubles, rounded, is that of f32, too."""
    assert ranks == 2
    sums = map(sum, zip(*(payload(seed, rank, count, kind) for rank in range(ranks))))
    return struct.pack(f"<{count}{kind}", *sums)


def unique_id(nccl, kind, rank, path):
    """Rank 0's, through a file."""
    if rank == 0:
        made = nccl.ncclGetUniqueId()
        part = path.with_suffix(".part")
        part.write_bytes(bytes(made))
        part.rename(path)
        return made
    end = time.monotonic() + RANK_TIMEOUT
    while not path.exists():
        if time.monotonic() > end:
            raise RuntimeError("no unique id")
        time.sleep(0.01)
    return kind.from_buffer_copy(path.read_bytes())


def main():
    files, rank, ranks = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    stand_in()
    if (files / "nccl.py").exists():
        load("vllm.utils.nccl", files / "nccl.py")
    wrapper = load("vllm.distributed.device_communicators.pynccl_wrapper", files / "pynccl_wrapper.py")

    cuda = Cuda()
    nccl = wrapper.NCCLLibrary()
    wanted = [function.name for function in wrapper.NCCLLibrary.exported_functions]
    missing = [name for name in wanted if name not in nccl._funcs]
    assert not missing, f"not found: {missing}"
    stock = ctypes.c_int()
    ctypes.CDLL(os.environ["TWOSHOT_NCCL_LIBRARY"]).ncclGetVersion(ctypes.byref(stock))
    version = stock.value
    assert nccl.ncclGetVersion() == f"{version // 10000}.{version // 100 % 100}.{version % 100}", version

    identity = unique_id(nccl, wrapper.ncclUniqueId, rank, pathlib.Path(sys.argv[4]))
    comm = nccl.ncclCommInitRank(ranks, identity, rank)
    limit = 20000
    send, receive = cuda.allocate(4 * limit), cuda.allocate(4 * limit)
    types_of = {"f": "float32", "e": "float16"}

    def reduce(count, kind):
        datatype = wrapper.ncclDataTypeEnum.from_torch(types_of[kind])
        operation = wrapper.ncclRedOpTypeEnum.from_torch(sys.modules["torch.distributed"].ReduceOp.SUM)
        buffers = wrapper.buffer_type(send.value), wrapper.buffer_type(receive.value)
        nccl.ncclAllReduce(*buffers, count, datatype, operation, comm, wrapper.cudaStream_t(cuda.stream.value))

    def verify(seed, count, kind, run):
        size = struct.calcsize(f"<{count}{kind}")
        cuda.write(send, struct.pack(f"<{count}{kind}", *payload(seed, rank, count, kind)))
        cuda.write(receive, os.urandom(size))
        run()
        cuda.synchronize()
        assert cuda.read(receive, size) == expected(seed, ranks, count, kind), f"wrong: {seed}, {count} of {kind}"

    eager = [(1, "f"), (4099, "e"), (limit, "f"), (777, "e")]
    for seed, (count, kind) in enumerate(eager):
        verify(seed, count, kind, lambda: reduce(count, kind))

    captured = [(3000, "e"), (5001, "f")]
    for seed, (count, kind) in enumerate(captured):
        cuda("cuStreamBeginCapture_v2", cuda.stream, MODE_THREAD_LOCAL)
        reduce(count, kind)
        graph, replay = ctypes.c_void_p(), ctypes.c_void_p()
        cuda("cuStreamEndCapture", cuda.stream, ctypes.byref(graph))
        cuda("cuGraphInstantiateWithFlags", ctypes.byref(replay), graph, ctypes.c_uint64(0))
        for turn in range(3):
            verify(f"{seed} {turn}", count, kind, lambda: cuda("cuGraphLaunch", replay, cuda.stream))
        cuda("cuGraphExecDestroy", replay)
        cuda("cuGraphDestroy", graph)

    routed, left = ctypes.c_uint64(), ctypes.c_uint64()
    nccl.lib.twoshot_counters(ctypes.byref(routed), ctypes.byref(left))
    nccl.ncclCommDestroy(comm)
    print(f"functions {len(wanted)} calls {len(eager) + len(captured)} routed {routed.value} stock {left.value}")


if __name__ == "__main__":
    main()
