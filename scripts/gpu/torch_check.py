"""PyTorch over NCCL with twoshot loaded: right results, eager and captured, and which calls were routed.

Start one process per rank through scripts/gpu/torch_check. Every rank regenerates every rank's input from a seed, so
the reference (f32 accumulation in rank order, rounded once) needs no communication.
"""

import argparse
import ctypes
import os
import sys
import time

import torch
import torch.distributed as dist

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64]
OPERATIONS = ["SUM", "PRODUCT", "MAX", "MIN", "AVG"]


def counters(library):
    routed, stock = ctypes.c_uint64(), ctypes.c_uint64()
    ctypes.CDLL(library).twoshot_counters(ctypes.byref(routed), ctypes.byref(stock))
    return routed.value, stock.value


def payload(seed, rank, count, dtype):
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    return (torch.randn(count, generator=generator) * 8).to(dtype)


def reference(seed, ranks, count, dtype):
    total = payload(seed, 0, count, dtype).float()
    for rank in range(1, ranks):
        total += payload(seed, rank, count, dtype).float()
    return total.to(dtype)


def any_payload(seed, rank, count, dtype):
    if dtype.is_floating_point:
        return payload(seed, rank, count, dtype)
    generator = torch.Generator().manual_seed(seed * 1009 + rank)
    return torch.randint(-(2**40), 2**40, (count,), generator=generator).to(dtype)


def folded(seed, ranks, count, dtype, operation):
    """As docs/numerics.md says: in f32 for f16 and bf16, in rank order, rounded once; integers wrap."""
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    step = {"PRODUCT": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum}.get(operation, torch.add)
    total = any_payload(seed, 0, count, dtype).to(wide)
    for rank in range(1, ranks):
        total = step(total, any_payload(seed, rank, count, dtype).to(wide))
    if operation == "AVG":
        total = total / ranks if dtype.is_floating_point else torch.div(total, ranks, rounding_mode="trunc")
    return total.to(dtype)


def same_bits(got, expected):
    return torch.equal(got.cpu().view(torch.uint8), expected.view(torch.uint8))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", required=True)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--max", type=int, default=300_000)
    parser.add_argument("--expect", choices=["routed", "stock"], default="routed")
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)

    wrong = 0
    for call in range(options.calls):
        generator = torch.Generator().manual_seed(call)
        count = int(torch.randint(1, options.max, (), generator=generator)) if call % 3 else call + 1
        dtype = DTYPES[call % 3]
        # The offset differs between ranks: alignment must not matter.
        offset = (call + rank) % 5
        buffer = torch.full((count + 16,), 77.0, dtype=dtype, device=device)
        view = buffer[offset:offset + count]
        view.copy_(payload(call, rank, count, dtype))
        if call % 11 == 0:
            time.sleep(0.02 * rank)
        dist.all_reduce(view)
        expected = reference(call, ranks, count, dtype)
        guards = torch.cat([buffer[:offset], buffer[offset + count:]])
        ok = same_bits(view, expected) and bool((guards == 77.0).all())
        if not ok:
            wrong += 1
            print(f"rank {rank}: call {call} {dtype} count {count} offset {offset} is wrong", flush=True)

    # Every operation on every type that torch has.
    for i, dtype in enumerate(DTYPES + OTHERS):
        for j, operation in enumerate(OPERATIONS):
            for count in (1, 77, 20_000):
                seed = 9000 + 100 * i + 10 * j + count
                buffer = any_payload(seed, rank, count, dtype).to(device)
                dist.all_reduce(buffer, op=getattr(dist.ReduceOp, operation))
                if not same_bits(buffer, folded(seed, ranks, count, dtype, operation)):
                    wrong += 1
                    print(f"rank {rank}: {operation} of {dtype}, count {count}, is wrong", flush=True)

    # Captured: one graph with three calls, replayed on new data, eager calls of other sizes in between.
    counts = [1000, 70_000, 1]
    buffers = [torch.zeros(count, dtype=torch.bfloat16, device=device) for count in counts]
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=side):
        for buffer in buffers:
            dist.all_reduce(buffer)
    for replay in range(8):
        for i, buffer in enumerate(buffers):
            buffer.copy_(payload(1000 + replay * 3 + i, rank, counts[i], torch.bfloat16))
        graph.replay()
        torch.cuda.synchronize()
        for i, buffer in enumerate(buffers):
            if not same_bits(buffer, reference(1000 + replay * 3 + i, ranks, counts[i], torch.bfloat16)):
                wrong += 1
                print(f"rank {rank}: replay {replay} buffer {i} is wrong", flush=True)
        small = payload(replay, rank, 17 + replay, torch.float32).to(device)
        dist.all_reduce(small)
        if not same_bits(small, reference(replay, ranks, 17 + replay, torch.float32)):
            wrong += 1
            print(f"rank {rank}: eager call after replay {replay} is wrong", flush=True)

    # In groups: the first collective of a new communicator, then more of them, and beside a send and a receive.
    group = dist.new_group(list(range(ranks)), device_id=device)
    for round_ in range(3):
        inputs = [payload(5000 + round_ * 4 + i, rank, 900 * i + 3, DTYPES[round_]).to(device) for i in range(4)]
        with dist._coalescing_manager(group=group, device=device):
            for tensor in inputs:
                dist.all_reduce(tensor, group=group)
        torch.cuda.synchronize()
        for i, tensor in enumerate(inputs):
            expected = reference(5000 + round_ * 4 + i, ranks, 900 * i + 3, DTYPES[round_])
            if not same_bits(tensor, expected):
                wrong += 1
                print(f"rank {rank}: coalesced round {round_} tensor {i} is wrong", flush=True)
        sent = torch.full((7,), float(rank), device=device)
        received = torch.empty(7, device=device)
        pairs = [
            dist.P2POp(dist.isend, sent, (rank + 1) % ranks, group),
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks, group),
        ]
        for work in dist.batch_isend_irecv(pairs):
            work.wait()
        torch.cuda.synchronize()
        wrong += int(received.tolist() != [float((rank - 1) % ranks)] * 7)

    # Everything else is stock NCCL's.
    gathered = torch.empty(ranks * 5, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((5,), float(rank), device=device))
    wrong += int(gathered.tolist() != [float(r) for r in range(ranks) for _ in range(5)])
    most = torch.tensor([float(rank)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    wrong += int(most.item() != ranks - 1)
    torch.cuda.synchronize()

    routed, stock = counters(options.library)
    print(f"rank {rank}: wrong {wrong}, routed {routed}, stock {stock}", flush=True)
    del graph
    dist.barrier()
    dist.destroy_process_group()
    expected = routed > options.calls if options.expect == "routed" else routed == 0
    sys.exit(0 if wrong == 0 and expected else 1)


main()
