"""One rank of scripts/gpu/jax_check: sums over all processes by JAX, whose XLA calls NCCL, compared with a sum in rank order."""

import argparse
import ctypes
import sys

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--library", required=True)
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--ranks", type=int, required=True)
parser.add_argument("--coordinator", required=True)
options = parser.parse_args()

import jax  # noqa: E402

jax.distributed.initialize(options.coordinator, num_processes=options.ranks, process_id=options.rank, local_device_ids=[0])
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

mesh = Mesh(np.array(jax.devices()), ("ranks",))
sharding = NamedSharding(mesh, PartitionSpec("ranks"))
step = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "ranks"), mesh=mesh, in_specs=PartitionSpec("ranks"),
                             out_specs=PartitionSpec("ranks")))


def payload(seed, rank, count, dtype):
    return (np.random.default_rng(seed * 1009 + rank).standard_normal(count) * 8).astype(dtype)


def reference(seed, count, dtype):
    total = payload(seed, 0, count, dtype).astype(np.float32)
    for rank in range(1, options.ranks):
        total = total + payload(seed, rank, count, dtype).astype(np.float32)
    return total.astype(dtype)


wrong = calls = 0
for dtype in (np.float32, np.float16, jnp.bfloat16):
    for count in (1, 7, 1000, 4096, 65537, 1 << 20):
        for again in range(3):
            seed = calls + 1
            mine = payload(seed, options.rank, count, dtype)
            x = jax.make_array_from_single_device_arrays((options.ranks * count,), sharding,
                                                         [jax.device_put(mine, jax.local_devices()[0])])
            got = np.asarray(step(x).addressable_data(0))
            calls += 1
            expected = reference(seed, count, dtype)
            if got.tobytes() != expected.tobytes():
                wrong += 1
                print(f"rank {options.rank}: {np.dtype(dtype).name} {count} elements, call {again}: other bits", flush=True)
routed, stock = ctypes.c_uint64(), ctypes.c_uint64()
ctypes.CDLL(options.library).twoshot_counters(ctypes.byref(routed), ctypes.byref(stock))
names = {line.split()[-1] for line in open("/proc/self/maps") if "nccl" in line or "twoshot" in line}
print(f"rank {options.rank}: JAX {jax.__version__}, {calls} sums, {wrong} wrong, {routed.value} calls routed, {stock.value} "
      f"stock; {sorted(names)}", flush=True)
sys.exit(wrong != 0 or routed.value == 0)
