// Stacks and switches between them; see fiber.h.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
// System V: rbx, rbp, r12 to r15 belong to the caller.
asm(R"(
.text
.hidden twoshot_sim_switch
.globl twoshot_sim_switch
.type twoshot_sim_switch, @function
twoshot_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size twoshot_sim_switch, .-twoshot_sim_switch
)");
#elif defined(__aarch64__)
// AAPCS64: x19 to x30 and the low halves of v8 to v15 belong to the caller.
asm(R"(
.text
.hidden twoshot_sim_switch
.globl twoshot_sim_switch
.type twoshot_sim_switch, %function
twoshot_sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size twoshot_sim_switch, .-twoshot_sim_switch
)");
#else
#error "the executor's fibers are written for x86-64 and aarch64"
#endif

namespace twoshot::sim {
namespace {

constexpr uint64_t kCanary = 0x5AFE57AC4B07704Bull;
constexpr size_t kCanaryWords = 8;

}  // namespace

Stacks::~Stacks() {
  for (char* slab : slabs_) munmap(slab, kPerSlab * kStackBytes);
}

void* Stacks::prepare(size_t index, void (*entry)()) {
  while (index / kPerSlab >= slabs_.size()) {
    void* slab = mmap(nullptr, kPerSlab * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) {
      std::perror("twoshot sim: mmap of fiber stacks");
      std::abort();
    }
    slabs_.push_back(static_cast<char*>(slab));
  }
  for (size_t i = 0; i < kCanaryWords; i++) std::memcpy(base(index) + 8 * i, &kCanary, 8);

  auto* top = reinterpret_cast<uint64_t*>(base(index) + kStackBytes);
#if defined(__x86_64__)
  // Six registers and the return address; on entry the stack is 16-byte aligned plus 8, as after a call.
  top -= 8;
  std::memset(top, 0, 8 * sizeof *top);
  top[6] = reinterpret_cast<uint64_t>(entry);
#else
  top -= 20;
  std::memset(top, 0, 20 * sizeof *top);
  top[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
  return top;
}

void Stacks::check(size_t index) const {
  for (size_t i = 0; i < kCanaryWords; i++) {
    uint64_t word;
    std::memcpy(&word, base(index) + 8 * i, 8);
    if (word != kCanary) {
      std::fprintf(stderr, "twoshot sim: a fiber ran over the end of its %zu-byte stack\n", kStackBytes);
      std::abort();
    }
  }
}

}  // namespace twoshot::sim
