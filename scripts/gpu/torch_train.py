"""A small model trained in the ways that PyTorch programs train one, over NCCL: every way's loss curve, to a file.

Started by scripts/gpu/torch_train, with libtwoshot.so loaded and without. The same seeds on every run; the sums of
gradients may differ in their last bits (docs/numerics.md), so the curves are compared within a tolerance.
"""

import argparse
import ctypes
import json
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class Model(nn.Module):
    def __init__(self, width=256, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                                  nn.Linear(2 * width, width)) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def batch(step, rank, device, size=32, width=256):
    generator = torch.Generator().manual_seed(step * 131 + rank)
    x = torch.randn(size, width, generator=generator)
    # A function that can be learned.
    y = (x[:, :10].cumsum(1) + 0.1 * torch.randn(size, 10, generator=generator)).argmax(1)
    return x.to(device), y.to(device)


def model_on(device):
    torch.manual_seed(7)
    return Model().to(device)


def mean_loss(loss):
    total = loss.detach().clone()
    dist.all_reduce(total, op=dist.ReduceOp.AVG)
    return total.item()


def plain_steps(model, optimiser, steps, rank, device):
    curve = []
    for step in range(steps):
        x, y = batch(step, rank, device)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(mean_loss(loss))
    return curve


def ddp(steps, rank, ranks, device):
    model = nn.parallel.DistributedDataParallel(model_on(device), device_ids=[device.index], bucket_cap_mb=1)
    return plain_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps, rank, device)


def ddp_bf16(steps, rank, ranks, device):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    model = nn.parallel.DistributedDataParallel(model_on(device), device_ids=[device.index], bucket_cap_mb=1)
    model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return plain_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps, rank, device)


def fsdp(steps, rank, ranks, device):
    from torch.distributed.fsdp import fully_shard
    model = model_on(device)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return plain_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), steps, rank, device)


def tensor_parallel(steps, rank, ranks, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    mesh = init_device_mesh("cuda", (ranks,))
    model = model_on(device)
    for layer in model.layers:
        parallelize_module(layer, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    # All ranks of a tensor parallel group see the same batch.
    return plain_steps(model, optimiser, steps, 0, device)


def coalesced(steps, rank, ranks, device):
    model = model_on(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    curve = []
    for step in range(steps):
        x, y = batch(step, rank, device)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        with dist._coalescing_manager(device=device, async_ops=True) as works:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)
        works.wait()
        optimiser.step()
        curve.append(mean_loss(loss))
    return curve


def graphs(steps, rank, ranks, device):
    """Forward, backward, AllReduce and the step in one CUDA graph."""
    model = model_on(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    x, y = batch(0, rank, device)
    x, y = x.clone(), y.clone()

    def step_once():
        optimiser.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)
        optimiser.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step_once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step_once()
    curve = []
    for step in range(steps):
        new_x, new_y = batch(step, rank, device)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        # An eager call of another size in between.
        curve.append(mean_loss(loss))
    torch.cuda.synchronize()
    del graph
    return curve


WAYS = [ddp, ddp_bf16, fsdp, tensor_parallel, coalesced, graphs]


def recorded(device):
    """What the flight recorder has seen: collectives, and those that were not complete."""
    import pickle
    trace = pickle.loads(torch._C._distributed_c10d._dump_nccl_trace())
    entries = trace["entries"]
    return len(entries), sum(entry["state"] != "completed" for entry in entries)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ways", default=",".join(way.__name__ for way in WAYS))
    parser.add_argument("--save", required=True)
    parser.add_argument("--loaded", type=int, required=True)
    options = parser.parse_args()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("nccl", device_id=device)
    curves = {}
    for way in WAYS:
        if way.__name__ not in options.ways.split(","):
            continue
        try:
            curves[way.__name__] = way(options.steps, rank, ranks, device)
        except (ImportError, AttributeError) as error:
            # A function that this PyTorch lacks; it lacks it with the library and without.
            curves[way.__name__] = None
            if rank == 0:
                print(f"{way.__name__}: not in this PyTorch: {error}", flush=True)
    torch.cuda.synchronize()
    # The watchdog notes an end when it next looks.
    time.sleep(2)
    entries, incomplete = recorded(device)
    routed, stock = ctypes.c_uint64(), ctypes.c_uint64()
    if options.loaded:
        ctypes.CDLL(options.library).twoshot_counters(ctypes.byref(routed), ctypes.byref(stock))
    if rank == 0:
        print(f"flight recorder: {entries} collectives, {incomplete} not complete; routed {routed.value}, "
              f"left to stock {stock.value}", flush=True)
        with open(options.save, "w") as file:
            json.dump({"curves": curves, "routed": routed.value, "recorded": entries, "incomplete": incomplete}, file)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0)


main()
