// Runs the project's kernels on the CPU: one fiber per GPU thread, on the calling OS thread. Device addresses are
// addresses of this process. Who includes this: the software driver (libcuda.so.1) and the self-test.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace twoshot::sim {

struct Launch {
  unsigned grid;             // blocks
  unsigned block;            // threads per block
  unsigned resident_blocks;  // blocks that run at the same time; the next starts when one ends. 0: all
  uint64_t seed;             // 0: threads in order; else their order, preemption and tearing of stores are drawn from it
  unsigned delay_us;         // with a seed: sleeps of up to this long at the start and now and then after it
  std::atomic<int>* room = nullptr;  // free blocks of the device, shared by its launches. nullptr: enough for all
};

struct Kernel {
  const char* name;
  void (*entry)(const void* params);  // params: what the launch's first kernel parameter points to
  size_t param_bytes;
  int max_threads;
  int registers;
};

const Kernel* find_kernel(const char* name);  // nullptr: no such kernel

// Returns when every thread of the launch has returned. Any number of OS threads may call it at the same time.
void run(const Kernel& kernel, const Launch& launch, const void* params);

}  // namespace twoshot::sim

// Provided by whoever links the executor: one 16-byte store to every window behind a multicast address, and one load
// from each of them, which returns how many there are.
extern "C" void twoshot_sim_multimem_store(uint64_t va, const uint32_t words[4]);
extern "C" unsigned twoshot_sim_multimem_load(uint64_t va, uint32_t words[][4], unsigned most);
