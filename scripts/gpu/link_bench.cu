// What two GPUs' links and memories give to ordinary kernels: the limits that docs/performance.md compares with. Every
// pair of GPUs works in both directions at once; 8 MiB each way, best of five, slowest GPU.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 -o link_bench scripts/gpu/link_bench.cu && ./link_bench
#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define CHECK(call)                                                                     \
  do {                                                                                  \
    const cudaError_t status_ = (call);                                                 \
    if (status_ != cudaSuccess) {                                                       \
      std::printf("FAILED: line %d: %s\n", __LINE__, cudaGetErrorString(status_));      \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

namespace {

enum Mode { kPush, kPushRelaxed, kLoadPush, kPull, kLocal, kModes };
const char* const kNames[kModes] = {"push from registers", "push, relaxed.sys", "load and push", "pull and store",
                                    "copy in own memory"};
constexpr size_t kBytes = size_t{8} << 20;

struct Line {
  uint32_t word[4];
};

__device__ Line load(uint64_t address) {
  Line v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(address)
               : "memory");
  return v;
}

template <bool RELAXED>
__device__ void store(uint64_t address, const Line& v) {
  if constexpr (RELAXED) {
    asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  } else {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
  }
}

template <Mode MODE>
__global__ void __launch_bounds__(512, 1) work(uint64_t in, uint64_t out, uint64_t peer, uint32_t lines) {
  const uint32_t step = gridDim.x * blockDim.x;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i + 3 * step < lines; i += 4 * step) {
    Line line[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const uint64_t offset = uint64_t{i + u * step} * 16;
      line[u] = MODE == kPush || MODE == kPushRelaxed ? Line{{i, i, i, i}} : load((MODE == kPull ? peer : in) + offset);
    }
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const uint64_t offset = uint64_t{i + u * step} * 16;
      store<MODE == kPushRelaxed>((MODE == kPull || MODE == kLocal ? out : peer) + offset, line[u]);
    }
  }
}

using Kernel = void (*)(uint64_t, uint64_t, uint64_t, uint32_t);
const Kernel kKernels[kModes] = {work<kPush>, work<kPushRelaxed>, work<kLoadPush>, work<kPull>, work<kLocal>};

}  // namespace

int main() {
  int devices = 0;
  CHECK(cudaGetDeviceCount(&devices));
  if (devices < 2) return std::printf("skipped: %d GPU(s), two are needed\n", devices), 0;
  constexpr int kGpus = 2;
  char *in[kGpus], *out[kGpus], *stage[kGpus];
  for (int r = 0; r < kGpus; r++) {
    CHECK(cudaSetDevice(r));
    CHECK(cudaDeviceEnablePeerAccess(1 - r, 0));
    CHECK(cudaMalloc(&in[r], kBytes));
    CHECK(cudaMalloc(&out[r], kBytes));
    CHECK(cudaMalloc(&stage[r], kBytes));
    CHECK(cudaMemset(in[r], r + 1, kBytes));
  }
  for (int mode = 0; mode < kModes; mode++) {
    std::printf("%-20s", kNames[mode]);
    for (const int blocks : {4, 8, 16, 24, 32, 64, 128}) {
      std::barrier meet(kGpus);
      double best[kGpus] = {1e9, 1e9};
      std::vector<std::thread> threads;
      for (int r = 0; r < kGpus; r++) {
        threads.emplace_back([&, r] {
          constexpr int kLaunches = 10;
          CHECK(cudaSetDevice(r));
          cudaStream_t stream;
          cudaEvent_t begin, end;
          CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
          CHECK(cudaEventCreate(&begin));
          CHECK(cudaEventCreate(&end));
          for (int repeat = 0; repeat < 6; repeat++) {
            meet.arrive_and_wait();
            CHECK(cudaEventRecord(begin, stream));
            for (int i = 0; i < kLaunches; i++) {
              kKernels[mode]<<<blocks, 512, 0, stream>>>(reinterpret_cast<uint64_t>(in[r]), reinterpret_cast<uint64_t>(out[r]),
                                                         reinterpret_cast<uint64_t>(stage[1 - r]), kBytes / 16);
            }
            CHECK(cudaEventRecord(end, stream));
            CHECK(cudaEventSynchronize(end));
            CHECK(cudaGetLastError());
            float milliseconds = 0;
            CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
            if (repeat > 0) best[r] = std::min(best[r], 1000.0 * milliseconds / kLaunches);
          }
        });
      }
      for (auto& thread : threads) thread.join();
      const double us = *std::max_element(best, best + kGpus);
      std::printf(" %3d: %4.0f GB/s", blocks, kBytes / us / 1e3);
    }
    std::printf("\n");
  }
}
