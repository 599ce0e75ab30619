// Lines of buffers that begin anywhere: what is read of them is the buffer's own, and what is made of it is right.
#define TWOSHOT_HOST 1
#include "exec.h"
#include "payload.cuh"
#include "types.cuh"

#include <cstring>
#include <initializer_list>

const char* payload_stays_inside();

namespace {

using namespace twoshot;

alignas(16) uint8_t memory[4608], target[4608];

template <typename T>
const char* check() {
  for (size_t offset = 0; offset < 16; offset += T::kBytes) {
    for (size_t count = 1; count < 7 * 16 / T::kBytes; count++) {
      const size_t bytes = count * T::kBytes;
      TwoshotArgs args = {};
      args.in = reinterpret_cast<uintptr_t>(memory + 64 + offset);
      args.count = count;
      for (size_t to = 0; to < 16; to += T::kBytes) {
        args.out = reinterpret_cast<uintptr_t>(target + 64 + to);
        const Payload<T, false> payload(args);
        if (payload.lines != (bytes + 15) / 16) return "a payload has another number of lines";
        std::memset(target, 0xA5, sizeof target);
        for (uint32_t line = 0; line < payload.lines; line++) {
          const size_t begin = offset + 16 * line, granules = begin / 16 * 16;
          const size_t end = granules + (begin % 16 != 0 ? 32 : 16);
          if (payload.full(line) && (granules < offset || end > offset + bytes)) return "a granule leaves its buffer";
          if (!payload.full(line) && line != 0 && line + 2 < payload.lines) return "a line in the middle goes by elements";
          const Line loaded = payload.load_any(line);
          const size_t there = bytes - 16 * line < 16 ? bytes - 16 * line : 16;
          uint8_t want[16] = {};
          std::memcpy(want, memory + 64 + begin, there);
          if (std::memcmp(want, &loaded, 16) != 0) return "a line has other bytes than its buffer";
          payload.store(line, loaded);
        }
        if (std::memcmp(target + 64 + to, memory + 64 + offset, bytes) != 0) return "a line was stored as another";
        for (size_t i = 0; i < sizeof target; i++) {
          if ((i < 64 + to || i >= 64 + to + bytes) && target[i] != 0xA5) return "a line was stored outside its buffer";
        }
      }
    }
  }
  return nullptr;
}

// A type of eight bytes whose lines are all payload, as in the ring.
struct Wide {
  static constexpr uint32_t kBytes = 8, kLineBytes = TWOSHOT_LINE_BYTES;
};

// And one of single bytes.
struct Narrow {
  static constexpr uint32_t kBytes = 1, kLineBytes = TWOSHOT_LINE_BYTES;
};

// What a warp loads and stores of the lines [begin, end) of a payload, 32 U of them at most, together.
template <bool FULL, bool ALIGNED, typename T, int U>
const char* run(const TwoshotArgs& args, uint32_t begin, uint32_t end) {
  const uint32_t lane = threadIdx.x;
  const Payload<T, ALIGNED> payload(args);
  if (lane == 0) std::memset(target, 0xA5, sizeof target);
  bar_warp_sync();
  Line line[U] = {};
  RawRun<ALIGNED, U> raw;
  payload.template load_run<FULL>(raw, begin + lane, end);
  payload.loaded_run(line, raw);
  for (uint32_t u = 0; u < U; u++) {
    const uint32_t i = begin + lane + 32 * u;
    if (i < end && !payload.full(i)) line[u] = payload.load_elements(i);
  }
  payload.template store_run<FULL>(begin + lane, line, end);
  bar_warp_sync();
  const size_t last = begin + 32 * U < end ? begin + 32 * U : end, bytes = args.count * T::kBytes;
  const size_t from = 16 * begin, stop = 16 * last < bytes ? 16 * last : bytes;
  const uint8_t* const in = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(args.in));
  const size_t out = static_cast<uintptr_t>(args.out) - reinterpret_cast<uintptr_t>(target);
  const char* wrong = nullptr;
  for (size_t i = lane; i < sizeof target; i += 32) {
    const size_t at = i - out;
    const bool inside = i >= out && at >= from && at < stop;
    if (!inside && target[i] != 0xA5) wrong = "a run was stored outside its lines";
    if (inside && target[i] != in[at]) wrong = "a run was stored as another";
  }
  bar_warp_sync();
  return wrong;
}

template <bool ALIGNED, typename T, int U>
const char* check_runs_of(const TwoshotArgs& args, bool& was_full) {
  const Payload<T, ALIGNED> payload(args);
  const char* wrong = nullptr;
  for (const uint32_t begin : {0u, 1u, 40u}) {
    if (begin >= payload.lines) continue;
    for (const uint32_t end : {payload.lines, begin + 1, begin + 31, begin + 32, begin + 33}) {
      if (end > payload.lines) continue;
      const char* found = run<false, ALIGNED, T, U>(args, begin, end);
      wrong = wrong ? wrong : found;
      bool all_full = end >= begin + 32 * U;
      for (uint32_t i = begin; i < begin + 32 * U; i++) all_full = all_full && payload.full(i);
      if (!all_full) continue;
      was_full = true;
      found = run<true, ALIGNED, T, U>(args, begin, end);
      wrong = wrong ? wrong : found;
    }
  }
  return wrong;
}

template <typename T, int U>
const char* check_run() {
  const char* wrong = nullptr;
  bool was_full[2] = {};
  for (size_t to = 0; to < 16; to += T::kBytes) {
    const size_t offset = (to * 5 + T::kBytes) % 16;  // from none to all but an element
    for (const size_t lines : {1, 2, 3, 32, 33, 34, 65, 127, 128, 129, 200}) {
      for (const size_t missing : {size_t{0}, size_t{1}, size_t{16} / T::kBytes - 1}) {
        TwoshotArgs args = {};
        args.in = reinterpret_cast<uintptr_t>(memory + 64 + offset);
        args.out = reinterpret_cast<uintptr_t>(target + 64 + to);
        args.count = lines * (16 / T::kBytes) - missing;
        if (args.count == 0) continue;
        const Payload<T, false> payload(args);
        for (uint32_t i = 0; i < payload.lines; i++) {
          const uint64_t granule = payload.granule_of(i), past = args.in + args.count * T::kBytes;
          if (payload.owns_granule_of(i) && (granule < args.in || granule + 16 > past)) return "a granule leaves its buffer";
          if (payload.full(i) && !(payload.owns_granule_of(i) && payload.owns_granule_of(i + 1))) {
            return "a full line is not loaded";
          }
        }
        const char* found = check_runs_of<false, T, U>(args, was_full[0]);
        wrong = wrong ? wrong : found;
        if (to != 0) continue;
        args.in = reinterpret_cast<uintptr_t>(memory + 64);
        found = check_runs_of<true, T, U>(args, was_full[1]);
        wrong = wrong ? wrong : found;
      }
    }
  }
  return wrong ? wrong : was_full[0] && was_full[1] ? nullptr : "no run was full";
}

}  // namespace

const char* payload_stays_inside() {
  for (size_t i = 0; i < sizeof memory; i++) memory[i] = static_cast<uint8_t>(i * 151 + i / 7);
  static const char* wrong = nullptr;
  const auto entry = [](const void*) {
    for (const char* found : {check<bf16>(), check<f32>(), check<Wide>(), check<Narrow>()}) wrong = wrong ? wrong : found;
  };
  sim::Launch one_thread = {};
  one_thread.grid = one_thread.block = 1;
  sim::run(sim::Kernel{"payload", entry, 0, 1, 1}, one_thread, nullptr);
  const auto run = [](const void*) {
    for (const char* found : {check_run<bf16, 4>(), check_run<f32, 1>(), check_run<f32, 4>(), check_run<Wide, 4>(),
                              check_run<Narrow, 1>(), check_run<Narrow, 4>()}) {
      wrong = wrong ? wrong : found;
    }
  };
  sim::Launch warp = one_thread;
  warp.block = 32;
  sim::run(sim::Kernel{"run", run, 0, 32, 1}, warp, nullptr);
  return wrong;
}
