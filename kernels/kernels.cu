// Every kernel that the library can launch, and nothing else: twoshot_{shape}_{type}_{ranks}_{uc|mc}.
// ranks: 2, 4 and 8 are compiled for that number, n takes any. uc pushes to each peer, mc to the multicast window.
// f32, f16 and bf16 only sum; all other types (of folds.cuh, several of NCCL's each) do what TwoshotArgs.op says.
// twoshot_scale_{type} multiplies by a factor what one of those then sums.
#include "bulk.cuh"
#include "oneshot.cuh"
#include "scale.cuh"
#include "switch.cuh"
#include "twoshot.cuh"

// X(shape, type, ranks' name, ranks or 0, door, multicast)
#define TWOSHOT_DOORS(X, shape, type, name, ranks) \
  X(shape, type, name, ranks, uc, false)           \
  X(shape, type, name, ranks, mc, true)
#define TWOSHOT_RANKS(X, shape, type) \
  TWOSHOT_DOORS(X, shape, type, 2, 2) \
  TWOSHOT_DOORS(X, shape, type, 4, 4) \
  TWOSHOT_DOORS(X, shape, type, 8, 8) \
  TWOSHOT_DOORS(X, shape, type, n, 0)
#define TWOSHOT_TYPES(X, shape) \
  TWOSHOT_RANKS(X, shape, f32)  \
  TWOSHOT_RANKS(X, shape, f16)  \
  TWOSHOT_RANKS(X, shape, bf16)
#define TWOSHOT_FOLDS(X, shape)         \
  TWOSHOT_DOORS(X, shape, f32op, n, 0)  \
  TWOSHOT_DOORS(X, shape, f16op, n, 0)  \
  TWOSHOT_DOORS(X, shape, bf16op, n, 0) \
  TWOSHOT_DOORS(X, shape, i8, n, 0)     \
  TWOSHOT_DOORS(X, shape, i32, n, 0)    \
  TWOSHOT_DOORS(X, shape, i64, n, 0)    \
  TWOSHOT_DOORS(X, shape, f64, n, 0)    \
  TWOSHOT_DOORS(X, shape, fp8, n, 0)
// One for each type, whatever the ranks: the switch does what depends on their number.
#define TWOSHOT_SWITCH(X)           \
  X(switch, f32, n, 0, mc, true) \
  X(switch, f16, n, 0, mc, true) \
  X(switch, bf16, n, 0, mc, true)
// Every rank stores to every other: no multicast. Two ranks have a form of their own, in every type.
#define TWOSHOT_BULK_RANKS(X, type)   \
  X(bulk, type, 2, 2, uc, false)      \
  X(bulk, type, n, 0, uc, false)
#define TWOSHOT_BULK(X)         \
  TWOSHOT_BULK_RANKS(X, f32)    \
  TWOSHOT_BULK_RANKS(X, f16)    \
  TWOSHOT_BULK_RANKS(X, bf16)   \
  TWOSHOT_BULK_RANKS(X, f32op)  \
  TWOSHOT_BULK_RANKS(X, f16op)  \
  TWOSHOT_BULK_RANKS(X, bf16op) \
  TWOSHOT_BULK_RANKS(X, i8)     \
  TWOSHOT_BULK_RANKS(X, i32)    \
  TWOSHOT_BULK_RANKS(X, i64)    \
  TWOSHOT_BULK_RANKS(X, f64)    \
  TWOSHOT_BULK_RANKS(X, fp8)
#define TWOSHOT_KERNELS(X)  \
  TWOSHOT_TYPES(X, oneshot) \
  TWOSHOT_TYPES(X, twoshot) \
  TWOSHOT_FOLDS(X, oneshot) \
  TWOSHOT_FOLDS(X, twoshot) \
  TWOSHOT_SWITCH(X)         \
  TWOSHOT_BULK(X)

// X(type); i8, i32 and i64 stand for the unsigned types too, fp8 for e4m3 and e5m2.
#define TWOSHOT_SCALES(X) X(f32) X(f16) X(bf16) X(i8) X(i32) X(i64) X(f64) X(fp8)

// One block per multiprocessor is enough; not told so, ptxas would rather spill than exceed 64 registers.
#define TWOSHOT_DEFINE(shape, type, name, ranks, door, multicast)                             \
  extern "C" __global__ void __launch_bounds__(TWOSHOT_MAX_THREADS, 1)                        \
      twoshot_##shape##_##type##_##name##_##door(const __grid_constant__ TwoshotArgs args) { \
    twoshot::run_##shape<twoshot::type, ranks, multicast>(args);                              \
  }

TWOSHOT_KERNELS(TWOSHOT_DEFINE)

#define TWOSHOT_DEFINE_SCALE(type)                                                                                \
  extern "C" __global__ void __launch_bounds__(TWOSHOT_MAX_THREADS, 1)                                            \
      twoshot_scale_##type(const __grid_constant__ TwoshotScaleArgs args) {                                       \
    twoshot::Scale<twoshot::scale_##type>(args).run();                                                            \
  }

TWOSHOT_SCALES(TWOSHOT_DEFINE_SCALE)
