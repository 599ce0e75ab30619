"""Times of whole steps that contain AllReduce, in microseconds, to a file. Started by scripts/gpu/torch_speed.

Every time is the median over repetitions of the slowest rank's. `--device cpu` runs the same code over gloo, small and for
its logic only: its times mean nothing.
"""

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class Clock:
    """Device time of repeated work on a GPU, wall time elsewhere."""

    def __init__(self, device):
        self.device = device

    def once(self, work):
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    def median(self, work, repetitions, calls=1):
        times = []
        for _ in range(repetitions):
            dist.barrier()
            mine = torch.tensor([self.once(work) / calls], device=self.device, dtype=torch.float64)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            times.append(mine.item())
        return statistics.median(times)


class Block(nn.Module):
    """A transformer layer of one token per sequence, split over the ranks as Megatron does: two AllReduce each."""

    def __init__(self, width, heads, ranks, context):
        super().__init__()
        own = width // ranks
        self.heads = heads // ranks
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * own, bias=False), nn.Linear(own, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * own, bias=False), nn.Linear(4 * own, width, bias=False)
        self.context = context

    def caches(self, batch, like):
        size = (batch, self.heads, self.context, self.out.in_features // self.heads)
        return [torch.randn(size, device=like.device, dtype=like.dtype) for _ in range(2)]

    def forward(self, x, caches):
        q, k, v = self.qkv(self.first(x)).view(x.shape[0], 3, self.heads, 1, -1).unbind(1)
        keys, values = (torch.cat([old, new], 2) for old, new in zip(caches, (k, v)))
        attended = self.out(F.scaled_dot_product_attention(q, keys, values).flatten(1))
        dist.all_reduce(attended)
        x = x + attended
        lifted = self.down(F.gelu(self.up(self.second(x))))
        dist.all_reduce(lifted)
        return x + lifted


def decode(options, clock, ranks, device, dtype):
    torch.manual_seed(1)
    blocks = [Block(options.width, options.heads, ranks, options.context).to(device, dtype) for _ in range(options.layers)]
    for batch in options.batches:
        x = torch.randn(batch, options.width, device=device, dtype=dtype)
        caches = [block.caches(batch, x) for block in blocks]

        def step():
            y = x
            for block, cache in zip(blocks, caches):
                y = block(y, cache)
            return y

        with torch.inference_mode():
            for _ in range(3):
                step()
            yield f"decode, batch {batch}, eager", clock.median(step, options.repetitions)
            if device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                graph.replay()
                yield f"decode, batch {batch}, graph", clock.median(graph.replay, options.repetitions)


def train(options, clock, ranks, device, dtype):
    torch.manual_seed(2)
    width = options.width
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(options.layers)]
    # Small buckets come often, as in small models; large ones are stock NCCL's.
    for bucket in options.buckets:
        model = nn.Sequential(*layers).to(device)
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=bucket)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
        x = torch.randn(32, width, device=device)

        def step():
            cast = torch.autocast(device.type, dtype) if device.type == "cuda" else contextlib.nullcontext()
            with cast:
                loss = model(x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

        for _ in range(3):
            step()
        yield f"DDP step, buckets of {bucket} MB", clock.median(step, options.repetitions)


def overlap(options, clock, ranks, device, dtype):
    side = options.width * 2
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    other = torch.cuda.Stream() if device.type == "cuda" else None
    for size in options.sizes:
        data = torch.randn(size // a.element_size(), device=device, dtype=dtype)

        def product():
            for _ in range(4):
                torch.mm(a, b)

        def both():
            if other is None:
                dist.all_reduce(data)
                return product()
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                for _ in range(4):
                    dist.all_reduce(data)
            product()
            torch.cuda.current_stream().wait_stream(other)

        for _ in range(3):
            both()
            data.normal_()
        yield f"4 products and 4 of {size} B", clock.median(both, options.repetitions)
    product()
    yield "4 products alone", clock.median(product, options.repetitions)


PARTS = {"decode": decode, "train": train, "overlap": overlap}


def numbers(text):
    return [int(word) for word in text.split(",")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--buckets", type=numbers, default=[1, 8, 25])
    parser.add_argument("--sizes", type=numbers, default=[65536, 1 << 20, 4 << 20, 16 << 20])
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    times = {}
    for part in options.parts.split(","):
        measured = PARTS[part](options, Clock(device), dist.get_world_size(), device, torch.bfloat16 if cuda else torch.float32)
        times.update(measured)
    if dist.get_rank() == 0:
        with open(options.save, "w") as file:
            json.dump(times, file)
    dist.barrier()
    dist.destroy_process_group()


main()
