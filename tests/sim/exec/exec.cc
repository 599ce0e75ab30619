// The scheduler: runs the fibers of a launch in passes until all have returned. A pass in which no thread wrote
// anything, met a barrier or returned is a pass of pure polling: then the CPU is given up for a while, because the
// ranks waited for share it.
#include "exec.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fiber.h"
#include "host_ptx.h"

namespace twoshot::sim {
namespace {

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

constexpr unsigned kWarp = 32, kWords = TWOSHOT_BLOCK_WORDS;

struct Block {
  unsigned index;
  unsigned live;     // threads that have not returned
  unsigned waiting;  // threads at the barrier
  size_t first;      // its first fiber
  uint32_t words[kWords];  // of shared memory
};

struct Fiber {
  void* stack_pointer;
  State state;
  unsigned thread;
  Block* block;
  // What the lanes of the warp may fetch: of this exchange and of the one before, which not all may have read yet.
  uint32_t shown[2][4];
  unsigned exchanges;
};

// As many free blocks as there are, up to `most`.
unsigned take(std::atomic<int>& room, unsigned most) {
  int free = room.load();
  while (free > 0) {
    const int taken = std::min(free, static_cast<int>(most));
    if (room.compare_exchange_weak(free, free - taken)) return static_cast<unsigned>(taken);
  }
  return 0;
}

void sleep_us(uint64_t us) {
  const timespec time = {static_cast<time_t>(us / 1000000), static_cast<long>(us % 1000000 * 1000)};
  nanosleep(&time, nullptr);
}

class Executor {
 public:
  Executor(const Kernel& kernel, const Launch& launch, const void* params, Stacks& stacks)
      : kernel_(kernel), launch_(launch), params_(params), stacks_(stacks), random_(launch.seed * 2 + 1) {
    place_.grid.x = launch.grid;
    place_.block.x = launch.block;
  }

  void run() {
    if (launch_.seed != 0 && launch_.delay_us != 0) sleep_us(random() % (launch_.delay_us + 1));
    const unsigned limit = launch_.resident_blocks;
    const unsigned slots = limit == 0 ? launch_.grid : std::min(limit, launch_.grid);
    blocks_.resize(slots);
    fibers_.resize(size_t{slots} * launch_.block);
    order_.resize(fibers_.size());
    for (size_t i = 0; i < order_.size(); i++) order_[i] = i;
    for (Fiber& fiber : fibers_) fiber.state = State::kDone;
    grow(slots);

    unsigned idle = 0;
    while (returned_ < launch_.grid) {
      const uint64_t before = progress_;
      grow(slots);
      pass();
      idle = progress_ == before ? idle + 1 : 0;
      if (idle > 16) {
        sleep_us(std::min(10u * (idle - 16), 200u));
      } else if (idle > 0) {
        sched_yield();
      }
    }
    for (size_t i = 0; i < size_t{admitted_} * launch_.block; i++) stacks_.check(i);
  }

  // ---- called by fibers ----

  const Place& place() const { return place_; }
  void progressed() { progress_++; }
  void yield() { twoshot_sim_switch(&fibers_[current_].stack_pointer, scheduler_); }

  void barrier() {
    Fiber& self = fibers_[current_];
    self.state = State::kAtBarrier;
    self.block->waiting++;
    progress_++;
    release(*self.block);
    yield();
  }

  void warp_barrier() {
    progress_++;
    warp_meet();
  }

  void warp_meet() {
    Fiber& self = fibers_[current_];
    self.state = State::kAtWarpBarrier;
    const unsigned first = self.thread / kWarp * kWarp, end = std::min(first + kWarp, launch_.block);
    Fiber* const warp = &fibers_[self.block->first];
    bool all = true;
    for (unsigned t = first; t < end; t++) all = all && (warp[t].state == State::kAtWarpBarrier || warp[t].state == State::kDone);
    for (unsigned t = first; t < end && all; t++) {
      if (warp[t].state == State::kAtWarpBarrier) warp[t].state = State::kReady;
    }
    yield();
  }

  void warp_exchange(const uint32_t mine[4], unsigned lane, uint32_t theirs[4]) {
    const size_t self = current_;
    const unsigned turn = fibers_[self].exchanges++ % 2;
    std::copy_n(mine, 4, fibers_[self].shown[turn]);
    warp_barrier();
    const unsigned thread = fibers_[self].thread / kWarp * kWarp + lane;
    std::copy_n(fibers_[fibers_[self].block->first + thread].shown[turn], 4, theirs);
  }

  // No progress: warps vote on whether to go on waiting.
  bool warp_any(bool mine) {
    const size_t self = current_;
    const unsigned turn = fibers_[self].exchanges++ % 2;
    fibers_[self].shown[turn][0] = mine;
    warp_meet();
    const size_t first = fibers_[self].block->first + fibers_[self].thread / kWarp * kWarp;
    bool any = false;
    for (unsigned lane = 0; lane < kWarp; lane++) any = any || fibers_[first + lane].shown[turn][0] != 0;
    return any;
  }

  uint32_t& word(uint32_t index) { return fibers_[current_].block->words[index]; }

  bool preempt() {
    if (launch_.seed == 0 || random() % 8 != 0) return false;
    if (launch_.delay_us != 0 && random() % 256 == 0) sleep_us(random() % (launch_.delay_us + 1));
    progress_++;
    yield();
    return true;
  }

  uint64_t random() {  // xorshift64*
    random_ ^= random_ >> 12;
    random_ ^= random_ << 25;
    random_ ^= random_ >> 27;
    return random_ * 0x2545F4914F6CDD1Dull >> 16;
  }

 private:
  static void enter();

  // Admits blocks that have not begun as far as the device has room for them.
  void grow(unsigned slots) {
    unsigned more = std::min(slots - admitted_, launch_.grid - started_);
    if (more == 0) return;
    if (launch_.room != nullptr) more = take(*launch_.room, more);
    for (; more > 0; more--, admitted_++) admit(blocks_[admitted_], size_t{admitted_} * launch_.block);
  }

  void admit(Block& block, size_t first) {
    block = Block{started_++, launch_.block, 0, first, {}};
    std::fill(std::begin(block.words), std::end(block.words), 0xA5A5A5A5u);  // nobody may rely on what shared memory holds
    for (unsigned t = 0; t < launch_.block; t++) {
      fibers_[first + t] = Fiber{stacks_.prepare(first + t, enter), State::kReady, t, &block, {}, 0};
    }
  }

  // Threads that have returned no longer count, as on the GPU.
  void release(Block& block) {
    if (block.waiting == 0 || block.waiting < block.live) return;
    block.waiting = 0;
    for (unsigned t = 0; t < launch_.block; t++) {
      Fiber& fiber = fibers_[block.first + t];
      if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
    }
  }

  void pass() {
    if (launch_.seed != 0) {
      for (size_t i = order_.size(); i > 1; i--) std::swap(order_[i - 1], order_[random() % i]);
    }
    for (const size_t i : order_) {
      Fiber& fiber = fibers_[i];
      if (fiber.state != State::kReady) continue;
      current_ = i;
      place_.block_index.x = fiber.block->index;
      place_.thread_index.x = fiber.thread;
      twoshot_sim_switch(&scheduler_, fiber.stack_pointer);
      if (fiber.state == State::kDone) retire(*fiber.block);
    }
  }

  void retire(Block& block) {
    progress_++;
    if (--block.live > 0) {
      release(block);
      return;
    }
    returned_++;
    if (started_ < launch_.grid) {
      admit(block, block.first);
    } else if (launch_.room != nullptr) {
      launch_.room->fetch_add(1);
    }
  }

  const Kernel& kernel_;
  const Launch& launch_;
  const void* params_;
  Stacks& stacks_;
  uint64_t random_;
  Place place_ = {};
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;
  std::vector<size_t> order_;
  void* scheduler_ = nullptr;
  size_t current_ = 0;
  unsigned started_ = 0, returned_ = 0, admitted_ = 0;
  uint64_t progress_ = 0;
};

thread_local Executor* executor = nullptr;
thread_local Stacks stacks;

void Executor::enter() {
  Executor& self = *executor;
  self.kernel_.entry(self.params_);
  self.fibers_[self.current_].state = State::kDone;
  self.yield();
  std::abort();  // nobody resumes a fiber that is done
}

}  // namespace

const Place& here() { return executor->place(); }
void barrier() { executor->barrier(); }
void warp_barrier() { executor->warp_barrier(); }
void warp_exchange(const uint32_t mine[4], unsigned lane, uint32_t theirs[4]) {
  executor->warp_exchange(mine, lane, theirs);
}
bool warp_any(bool mine) { return executor->warp_any(mine); }
uint32_t& block_word(uint32_t index) { return executor->word(index); }
void pause() { executor->yield(); }
void progressed() { executor->progressed(); }
bool preempt() { return executor->preempt(); }
unsigned tear_order() { return static_cast<unsigned>(executor->random()); }

void run(const Kernel& kernel, const Launch& launch, const void* params) {
  if (executor != nullptr || launch.block == 0 || launch.block > static_cast<unsigned>(kernel.max_threads)) {
    std::fprintf(stderr, "twoshot sim: bad launch of %s: %u blocks of %u threads\n", kernel.name, launch.grid,
                 launch.block);
    std::abort();
  }
  Executor self(kernel, launch, params, stacks);
  executor = &self;
  self.run();
  executor = nullptr;
}

}  // namespace twoshot::sim
