"""Many AllReduces through PyTorch whose size, type and kernel change from call to call, with a new random payload in
each and random delays per rank; then every 16-bit pattern. Every result is compared bit by bit, on every rank, with a
sum in rank order accumulated in f32; a sample of those references is itself compared with the CPU's.

Start one process per rank through scripts/gpu/torch_check: SCRIPT=torch_random.py scripts/gpu/torch_check N LIBRARY.
"""

import argparse
import ctypes
import math
import os
import random
import sys
import time

import torch
import torch.distributed as dist

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def counters(library):
    routed, stock = ctypes.c_uint64(), ctypes.c_uint64()
    ctypes.CDLL(library).twoshot_counters(ctypes.byref(routed), ctypes.byref(stock))
    return routed.value, stock.value


def payload(seed, rank, count, dtype, device):
    generator = torch.Generator(device).manual_seed(seed * 1009 + rank)
    if seed % 7 == 0:  # any bits at all
        words = torch.randint(-(2**31), 2**31, (count,), generator=generator, device=device, dtype=torch.int64)
        return words.to(BITS[dtype]).view(dtype)
    return (torch.randn(count, generator=generator, device=device) * 8).to(dtype)


def reduced(terms, dtype):
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.to(dtype)


def differs(got, expected, dtype):
    """Number of elements whose bits differ; the bits of a NaN are whatever the hardware makes of it."""
    nan = got.isnan() & expected.isnan()
    return ((got.view(BITS[dtype]) != expected.view(BITS[dtype])) & ~nan).sum()


def patterns(dtype, rank, device):
    low = torch.arange(65536, dtype=torch.int64, device=device)
    other = (low * 40503 + 12345) % 65536
    mixed = torch.stack([low, other, other, low], dim=1).flatten()
    return ((mixed * (2 * rank + 1) + rank * 7919) % 65536).to(torch.int32).to(torch.int16).view(dtype)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", required=True)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--max", type=int, default=400_000)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    same, own = random.Random(20), random.Random(rank)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    references = 0
    start, done = time.monotonic(), 0
    stop = torch.zeros((), device=device)
    for call in range(options.calls):
        dtype = DTYPES[same.randrange(3)]
        count = int(math.exp(same.uniform(0, math.log(options.max))))
        terms = [payload(call, r, count, dtype, device) for r in range(ranks)]
        offset = own.randrange(6)
        buffer = torch.full((count + 8,), 77.0, dtype=dtype, device=device)
        view = buffer[offset:offset + count]
        view.copy_(terms[rank])
        if own.random() < 0.02:
            torch.cuda._sleep(own.randrange(400_000))
        if own.random() < 0.001:
            time.sleep(own.random() * 0.01)
        dist.all_reduce(view)
        expected = reduced(terms, dtype)
        wrong += differs(view, expected, dtype)
        wrong += (buffer[:offset] != 77.0).sum() + (buffer[offset + count:] != 77.0).sum()
        if call % 997 == 0:
            on_cpu = reduced([term.cpu() for term in terms], dtype)
            references += int(differs(expected.cpu(), on_cpu, dtype))
        done += 1
        if call % 1000 == 999:
            stop.fill_(float(time.monotonic() - start > options.seconds))
            dist.all_reduce(stop)
            if stop.item() > 0:
                break
    random_wrong = wrong.item()
    for dtype in (torch.float16, torch.bfloat16):
        for limit in (16384, 65536, 262144):
            for part in torch.arange(0, 262144, limit).tolist():
                terms = [patterns(dtype, r, device)[part:part + limit] for r in range(ranks)]
                view = terms[rank].clone()
                dist.all_reduce(view)
                wrong += differs(view, reduced(terms, dtype), dtype)
    torch.cuda.synchronize()
    routed, stock = counters(options.library)
    print(
        f"rank {rank}: {done} random calls, {random_wrong} elements wrong; all patterns, {wrong.item() - random_wrong} wrong; "
        f"{references} references differ from the CPU's; routed {routed}, stock {stock}, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if wrong.item() == 0 and references == 0 and routed >= done else 1)


main()
