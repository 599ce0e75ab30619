// What a rank stores to its peers once it has given up. Rank 0 runs the shipped kernels of the ring, its peers are played by
// hand and stand still in the launch before, whose data they have and have not used: nothing of it may change.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "args.h"
#include "exec.h"

std::string nothing_is_stored_where_a_peer_still_reads();

namespace {

constexpr size_t kStage = 64 * 1024, kRing = 512 * 1024;
constexpr size_t kWindow = TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStage + kRing;
constexpr unsigned kSlots = 4, kChunkLines = 128, kChunks = 4;

struct World {
  unsigned ranks, parts, peers, phases;  // two ranks: one-shot; more: two-shot
  std::vector<uint8_t> memory;
  uint8_t* windows;
  TwoshotControl control = {};

  explicit World(unsigned ranks)
      : ranks(ranks),
        parts(ranks == 2 ? 1 : ranks),
        peers(ranks - 1),
        phases(ranks == 2 ? 1 : 2),
        memory(ranks * kWindow + 128),
        windows(memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128)) {}

  uint8_t* ring(unsigned at) { return windows + at * kWindow + TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStage; }
  size_t nth(unsigned at, unsigned phase, unsigned source, unsigned k) const {
    return ((phase - 1) * peers + source - (source > at)) * kSlots + k % kSlots;
  }
  std::atomic<uint64_t>& flag(unsigned at, unsigned phase, unsigned source, unsigned k) {
    return *reinterpret_cast<std::atomic<uint64_t>*>(ring(at) + TWOSHOT_FLAG_BYTES * nth(at, phase, source, k));
  }
  float* slot(unsigned at, unsigned phase, unsigned source, unsigned k) {
    const size_t flags = TWOSHOT_FLAG_BYTES * phases * peers * kSlots;
    const size_t data = (flags + TWOSHOT_STAGE_ALIGN - 1) / TWOSHOT_STAGE_ALIGN * TWOSHOT_STAGE_ALIGN;
    return reinterpret_cast<float*>(ring(at) + data + nth(at, phase, source, k) * kChunkLines * TWOSHOT_LINE_BYTES);
  }

  // A launch of rank 0 with this value everywhere. `played`: the phases in which its peers send; where that is not all of
  // them it is told to give up, once it has done what it can.
  void launch(float value, unsigned played) {
    const size_t count = size_t{parts} * kChunks * kChunkLines * 4;
    std::vector<float> in(count, value), out(count);
    TwoshotArgs args = {};
    args.in = reinterpret_cast<uintptr_t>(in.data());
    args.out = reinterpret_cast<uintptr_t>(out.data());
    args.count = count;
    args.windows = reinterpret_cast<uintptr_t>(windows);
    args.window_stride = kWindow;
    args.control = reinterpret_cast<uintptr_t>(&control);
    args.stage_bytes = kStage;
    args.ranks = ranks;
    args.channels = 1;
    args.ring_log2 = 2;
    args.chunk_log2 = 7;
    std::thread others([&] {
      for (unsigned r = 1; r < ranks; r++) {
        for (unsigned k = 0; k < kChunks; k++) {
          for (unsigned phase = 1; phase <= played; phase++) {
            std::fill_n(slot(0, phase, r, k), kChunkLines * 4, 10.0f * static_cast<float>(r * phase));
            flag(0, phase, r, k).store(1, std::memory_order_release);
          }
        }
      }
      if (played == phases) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(150));
      __atomic_store_n(&control.abort, 1u, __ATOMIC_RELEASE);
    });
    const auto* kernel = twoshot::sim::find_kernel(ranks == 2 ? "twoshot_bulk_f32_2_uc" : "twoshot_bulk_f32_n_uc");
    twoshot::sim::run(*kernel, {1, TWOSHOT_BULK_THREADS, 0, 0, 0}, &args);
    others.join();
  }

  std::vector<uint8_t> of_peers() const { return {windows + kWindow, windows + ranks * kWindow}; }
};

// Peers are still in the launch that rank 0 has ended: a slot is stored into only where its chunk is known to be used. That
// is the first window of one-shot, and two-shot's scatter slots, which were reduced before rank 0 could end.
std::string gives_up_behind_a_launch_that_went_well(unsigned ranks) {
  World world(ranks);
  world.launch(1, world.phases);
  if (world.control.fault != TWOSHOT_FAULT_NONE) return "a launch that had everything gave up";
  const std::vector<uint8_t> memory = world.of_peers();
  world.launch(2, 0);
  if (world.control.fault != TWOSHOT_FAULT_ABORTED) return "a launch that had nothing did not give up";
  for (unsigned r = 1; r < ranks; r++) {
    for (unsigned phase = world.phases; phase <= world.phases; phase++) {
      for (unsigned k = ranks == 2 ? 1 : 0; k < kChunks; k++) {
        const auto same = [&](const void* now, size_t bytes) {
          const size_t offset = static_cast<size_t>(static_cast<const uint8_t*>(now) - (world.windows + kWindow));
          return std::memcmp(now, memory.data() + offset, bytes) == 0;
        };
        if (!same(world.slot(r, phase, 0, k), kChunkLines * TWOSHOT_LINE_BYTES)) {
          return "what a peer still reads was overwritten by a launch that gave up";
        }
        if (!same(&world.flag(r, phase, 0, k), TWOSHOT_FLAG_BYTES)) return "a launch that gave up raised a flag";
      }
    }
  }
  return {};
}

// Peers are still in the launch in which rank 0 gave up: the one behind it stores nothing at all.
std::string is_queued_behind_a_launch_that_gave_up(unsigned ranks) {
  World world(ranks);
  world.launch(1, world.phases - 1);
  if (world.control.fault != TWOSHOT_FAULT_ABORTED) return "a launch that lacked something did not give up";
  const std::vector<uint8_t> memory = world.of_peers();
  world.launch(2, 0);
  return memory == world.of_peers() ? std::string() : "a launch behind one that gave up stored to a peer";
}

}  // namespace

std::string nothing_is_stored_where_a_peer_still_reads() {
  for (unsigned ranks = 2; ranks <= 4; ranks++) {
    for (const auto& check : {gives_up_behind_a_launch_that_went_well, is_queued_behind_a_launch_that_gave_up}) {
      if (const std::string wrong = check(ranks); !wrong.empty()) return std::to_string(ranks) + " ranks: " + wrong;
    }
  }
  return {};
}
