// Stacks and switches between them, for x86-64 and 64-bit Arm. No system call per switch. Knows nothing of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace twoshot::sim {

// Saves the caller's registers on its stack, its stack pointer in *from, and goes on where `to` was saved.
extern "C" void twoshot_sim_switch(void** from, void* to) __attribute__((visibility("hidden")));

constexpr size_t kStackBytes = 64 * 1024;

// Stacks of one OS thread, allocated once and reused; memory is touched only as deep as a fiber goes.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  // The saved stack pointer of a new fiber on stack `index`, which will call entry() and must never return from it.
  void* prepare(size_t index, void (*entry)());

  // Aborts the process if a fiber ran over the end of its stack.
  void check(size_t index) const;

 private:
  static constexpr size_t kPerSlab = 128;
  char* base(size_t index) const { return slabs_[index / kPerSlab] + index % kPerSlab * kStackBytes; }
  std::vector<char*> slabs_;
};

}  // namespace twoshot::sim
