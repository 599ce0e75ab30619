// Lines of buffers that begin anywhere: what is read of them is the buffer's own, and what is made of it is right.
#define TWOSHOT_HOST 1
#include "exec.h"
#include "types.cuh"

#include <cstring>
#include <initializer_list>

const char* payload_stays_inside();

namespace {

using namespace twoshot;

alignas(16) uint8_t memory[512], target[512];

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
  return wrong;
}
