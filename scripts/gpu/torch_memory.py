"""AllReduce on buffers from everywhere: cudaMalloc, a stream-ordered pool, managed memory, the virtual memory management
API, ncclMemAlloc, and memory that is registered with the communicator. Every result is compared bit for bit.

Start one process per rank: SCRIPT=torch_memory.py scripts/gpu/torch_check N LIBRARY. For expandable segments set
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which makes the kind `torch` virtual memory too.
"""

import argparse
import ctypes
import os
import sys

import torch
import torch.distributed as dist

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64]
COUNTS = [1, 7, 1000, 65536, 200_003]


def library(*names):
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {names}")


class Memory:
    """Device memory at an address, as torch takes it."""

    def __init__(self, address, count, dtype, typestr):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (count,), "typestr": typestr, "strides": None, "version": 3, "stream": None,
        }


def checked(code, what):
    if code != 0:
        raise RuntimeError(f"{what}: error {code}")


def virtual_memory(driver, bytes_, device):
    class Location(ctypes.Structure):
        _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]

    class Properties(ctypes.Structure):
        _fields_ = [("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", Location), ("win32", ctypes.c_void_p),
                    ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort),
                    ("reserved", ctypes.c_ubyte * 4)]

    class Access(ctypes.Structure):
        _fields_ = [("location", Location), ("flags", ctypes.c_int)]

    properties = Properties(type=1, location=Location(1, device))
    granularity = ctypes.c_size_t()
    checked(driver.cuMemGetAllocationGranularity(ctypes.byref(granularity), ctypes.byref(properties), 0), "granularity")
    size = (bytes_ + granularity.value - 1) // granularity.value * granularity.value
    handle, address = ctypes.c_ulonglong(), ctypes.c_ulonglong()
    checked(driver.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(properties), ctypes.c_ulonglong(0)),
            "cuMemCreate")
    checked(driver.cuMemAddressReserve(ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_size_t(0),
                                       ctypes.c_ulonglong(0), ctypes.c_ulonglong(0)), "cuMemAddressReserve")
    checked(driver.cuMemMap(address, ctypes.c_size_t(size), ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0)), "cuMemMap")
    access = Access(Location(1, device), 3)
    checked(driver.cuMemSetAccess(address, ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1)), "cuMemSetAccess")
    return address.value


def allocators(device):
    """Name and a function that gives an address. What is taken is kept until the process ends."""
    runtime = library("libcudart.so.13", "libcudart.so.12", "libcudart.so")
    driver = library("libcuda.so.1")
    pointer = ctypes.c_void_p

    def malloc(bytes_):
        at = pointer()
        checked(runtime.cudaMalloc(ctypes.byref(at), ctypes.c_size_t(bytes_)), "cudaMalloc")
        return at.value

    def pool(bytes_):
        at = pointer()
        checked(runtime.cudaMallocAsync(ctypes.byref(at), ctypes.c_size_t(bytes_),
                                        pointer(torch.cuda.current_stream().cuda_stream)), "cudaMallocAsync")
        return at.value

    def managed(bytes_):
        at = pointer()
        checked(runtime.cudaMallocManaged(ctypes.byref(at), ctypes.c_size_t(bytes_), ctypes.c_uint(1)), "cudaMallocManaged")
        return at.value

    def virtual(bytes_):
        return virtual_memory(driver, bytes_, device.index)

    return {"cudaMalloc": malloc, "cudaMallocAsync": pool, "cudaMallocManaged": managed, "cuMemCreate": virtual}


TYPESTR = {
    torch.float32: "<f4", torch.float16: "<f2", torch.float64: "<f8", torch.int8: "|i1", torch.uint8: "|u1",
    torch.int32: "<i4", torch.int64: "<i8",
}


def view(address, count, dtype, device):
    if dtype == torch.bfloat16:
        return torch.as_tensor(Memory(address, count, dtype, "<i2"), device=device).view(torch.bfloat16)
    return torch.as_tensor(Memory(address, count, dtype, TYPESTR[dtype]), device=device)


def payload(seed, rank, count, dtype):
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    if dtype.is_floating_point:
        return (torch.randn(count, generator=generator, dtype=torch.float32) * 8).to(dtype)
    return torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator).to(dtype)


def reference(seed, ranks, count, dtype):
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = payload(seed, 0, count, dtype).to(wide)
    for rank in range(1, ranks):
        total = total + payload(seed, rank, count, dtype).to(wide)
    return total.to(dtype)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", required=True)
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    dist.all_reduce(torch.ones(1, device=device))
    room = max(COUNTS) * 8 + 4096
    places = {name: take(room) for name, take in allocators(device).items()}
    group = dist.group.WORLD._get_backend(device)
    kept = []
    try:
        pool = torch.cuda.MemPool(group.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            kept.append(torch.zeros(room, dtype=torch.uint8, device=device))
        places["ncclMemAlloc"] = kept[0].data_ptr()
        group.register_mem_pool(pool)
        kept.append(pool)
        places["registered"] = kept[0].data_ptr()
    except (AttributeError, RuntimeError) as error:
        print(f"rank {rank}: no registered memory: {error}", flush=True)
    kept.append(torch.zeros(room, dtype=torch.uint8, device=device))
    places["torch"] = kept[-1].data_ptr()
    wrong, calls, seed = 0, 0, 0
    names = sorted(places)
    for dtype in DTYPES:
        for count in COUNTS:
            for name in names + ["mixed"]:
                seed += 1
                # Every rank another kind of memory, and another offset, in elements.
                own = names[(rank + seed) % len(names)] if name == "mixed" else name
                offset = (seed + rank * 3) % 5
                at = places[own] + offset * dtype.itemsize
                tensor = view(at, count, dtype, device)
                tensor.copy_(payload(seed, rank, count, dtype))
                dist.all_reduce(tensor)
                calls += 1
                expected = reference(seed, ranks, count, dtype)
                if not torch.equal(tensor.cpu().view(torch.uint8), expected.view(torch.uint8)):
                    wrong += 1
                    print(f"rank {rank}: {own} {dtype} count {count} offset {offset} is wrong", flush=True)
    torch.cuda.synchronize()
    routed, stock = ctypes.c_uint64(), ctypes.c_uint64()
    ctypes.CDLL(options.library).twoshot_counters(ctypes.byref(routed), ctypes.byref(stock))
    print(f"rank {rank}: {len(names)} kinds of memory ({', '.join(names)}), {calls} calls, wrong {wrong}, "
          f"routed {routed.value}, stock {stock.value}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if wrong == 0 and routed.value >= calls else 1)


main()
