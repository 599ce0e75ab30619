// The shipped kernels compiled for the CPU: the very kernels.cu, with ptx.cuh's names from host_ptx.h.
#define TWOSHOT_HOST 1
#include "kernels.cu"

#include <cstring>

#include "exec.h"

namespace twoshot::sim {
namespace {

#define TWOSHOT_ROW(shape, type, name, ranks, door, multicast)                                             \
  Kernel{"twoshot_" #shape "_" #type "_" #name "_" #door,                                                  \
         [](const void* params) {                                                                          \
           twoshot_##shape##_##type##_##name##_##door(*static_cast<const TwoshotArgs*>(params));           \
         },                                                                                                \
         sizeof(TwoshotArgs), TWOSHOT_MAX_THREADS, 64},

#define TWOSHOT_SCALE_ROW(type)                                                                                        \
  Kernel{"twoshot_scale_" #type,                                                                                       \
         [](const void* params) { twoshot_scale_##type(*static_cast<const TwoshotScaleArgs*>(params)); },              \
         sizeof(TwoshotScaleArgs), TWOSHOT_MAX_THREADS, 64},

constexpr Kernel kKernels[] = {TWOSHOT_KERNELS(TWOSHOT_ROW) TWOSHOT_SCALES(TWOSHOT_SCALE_ROW)};

}  // namespace

const Kernel* find_kernel(const char* name) {
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  }
  return nullptr;
}

}  // namespace twoshot::sim
