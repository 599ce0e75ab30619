// Self-test of the kernels and of the executor: N ranks as N OS threads over plain memory, random calls, results
// compared bit for bit with an independent reference. Prints what it did; exits with 1 at the first difference.
//
//   g++ -std=c++17 -O1 -pthread -I. -I../../../kernels selftest.cc selftest_payload.cc selftest_giving_up.cc exec.cc fiber.cc half.cc kernels_host.cc
//
// With -DTWOSHOT_WITHOUT_REARM it must fail: the negative control.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "args.h"
#include "exec.h"
#include "selftest_reference.h"

// selftest_payload.cc: what the kernels read of a caller's buffer; what is wrong, or null.
const char* payload_stays_inside();
// selftest_giving_up.cc: the same of ranks that give up; empty if nothing is.
std::string nothing_is_stored_where_a_peer_still_reads();

namespace {

using twoshot::sim::find_kernel;
using twoshot::sim::Launch;

constexpr size_t kStageBytes = 256 * 1024;
constexpr size_t kRingBytes = 1024 * 1024;
constexpr size_t kWindowBytes = TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStageBytes + kRingBytes;
constexpr uint8_t kPoison = 0xA5;
constexpr size_t kGuard = 64;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

// ---- a group of ranks --------------------------------------------------------------------------------------------

struct Group {
  unsigned ranks;
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* windows;
  std::vector<TwoshotControl> controls;
  // Small ones, so that a call goes through the ring many times.
  uint32_t channels = 3;
  uint16_t ring_log2 = 2;

  explicit Group(unsigned ranks)
      : ranks(ranks), memory(new uint8_t[ranks * kWindowBytes + 128]), controls(ranks, TwoshotControl{}) {
    windows = memory.get() + (128 - reinterpret_cast<uintptr_t>(memory.get()) % 128);
    reset();
  }

  void reset() {
    for (unsigned r = 0; r < ranks; r++) {
      std::memset(window(r), 0, TWOSHOT_HEADER_BYTES);
      auto* words = reinterpret_cast<uint32_t*>(window(r) + TWOSHOT_HEADER_BYTES);
      std::fill(words, words + (TWOSHOT_STAGES * kStageBytes + kRingBytes) / 4, TWOSHOT_SENTINEL);
      controls[r] = TwoshotControl{};
    }
  }

  uint8_t* window(unsigned r) const { return windows + r * kWindowBytes; }

  TwoshotArgs args(unsigned rank, const void* in, void* out, size_t count) {
    TwoshotArgs args = {};
    args.in = reinterpret_cast<uintptr_t>(in);
    args.out = reinterpret_cast<uintptr_t>(out);
    args.count = count;
    args.windows = reinterpret_cast<uintptr_t>(windows);
    args.window_stride = kWindowBytes;
    args.control = reinterpret_cast<uintptr_t>(&controls[rank]);
    args.stage_bytes = kStageBytes;
    args.timeout_ns = 20'000'000'000u;
    args.rank = rank;
    args.ranks = ranks;
    args.channels = channels;
    args.ring_log2 = ring_log2;
    args.chunk_log2 = 7;
    return args;
  }
};

// The multicast address of the only group there is at a time: its fan-out stores to all windows.
constexpr uint64_t kMulticast = 0x4D00'0000'0000'0000u;
Group* multicast_group = nullptr;

enum Shape { kOneShot, kTwoShot, kSwitch, kBulk };
const char* const kShapeNames[] = {"oneshot", "twoshot", "switch", "bulk"};

std::string kernel_name(Shape shape, Type type, unsigned ranks, bool generic, bool multicast) {
  const bool special = !generic && shape != kSwitch && (ranks == 2 || ((ranks == 4 || ranks == 8) && shape != kBulk));
  return std::string("twoshot_") + kShapeNames[shape] + "_" + kTypeNames[type] + "_" +
         (special ? std::to_string(ranks) : "n") + "_" + (multicast ? "mc" : "uc");
}

// Bytes of a stage that a call needs.
size_t stage_need(Shape shape, unsigned ranks, size_t bytes) {
  if (shape == kBulk) return 0;  // a ring holds any payload
  const size_t lines = (bytes + 15) / 16;
  const size_t part = ((shape == kOneShot ? lines : (lines + ranks - 1) / ranks) + 7) / 8 * 8;
  const size_t chunks = (part + TWOSHOT_CHUNK_LINES - 1) / TWOSHOT_CHUNK_LINES;
  const size_t arrivals = shape == kSwitch ? chunks * ((ranks + TWOSHOT_LINE_FLAGS - 1) / TWOSHOT_LINE_FLAGS) : 0;
  return ((shape == kOneShot ? 1 : 2) * ranks * part + arrivals) * 16;
}

struct Buffer {
  std::vector<uint8_t> bytes;
  uint8_t* data;
  size_t size;

  Buffer(size_t size, size_t misaligned) : bytes(size + 2 * kGuard + 32, kPoison), size(size) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(bytes.data()) + kGuard;
    data = bytes.data() + kGuard + (16 - start % 16) % 16 + misaligned;
  }
  bool guards_intact() const {
    return std::all_of(data - kGuard, data, [](uint8_t b) { return b == kPoison; }) &&
           std::all_of(data + size, data + size + kGuard - 16, [](uint8_t b) { return b == kPoison; });
  }
};

void fill(std::mt19937_64& random, Type type, uint8_t* data, size_t count) {
  const size_t bytes = count * (type == kF32 ? 4 : 2);
  switch (random() % 4) {
    case 0:  // any bits: NaN, infinity, subnormals, everything
      for (size_t i = 0; i < bytes; i++) data[i] = static_cast<uint8_t>(random());
      break;
    case 1:  // the sentinel, its replacement, halves of them, -0.0
      for (size_t i = 0; i < bytes; i += 2) {
        static const uint16_t kHalves[] = {0xFFFA, 0xFFFA, 0xFFFA, 0xFFFB, 0x8000, 0x0000};
        std::memcpy(data + i, &kHalves[random() % 6], 2);
      }
      break;
    case 2:  // -0.0 and the smallest subnormals
      for (size_t i = 0; i < bytes; i += type == kF32 ? 4 : 2) {
        const uint32_t value = random() % 3;
        const uint32_t bits = (type == kF32 ? 0x80000000u : 0x8000u) ^ value;
        std::memcpy(data + i, &bits, type == kF32 ? 4 : 2);
      }
      break;
    default:  // ordinary numbers
      for (size_t i = 0; i < count; i++) {
        const float value = static_cast<float>(static_cast<int>(random() % 20001) - 10000) / 64;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (type == kF16) bits = narrow(value, 5, 10);
        if (type == kBF16) bits = narrow(value, 8, 7);
        std::memcpy(data + i * (type == kF32 ? 4 : 2), &bits, type == kF32 ? 4 : 2);
      }
  }
}

// One call on every rank: what each rank does with it may differ, what is reduced may not.
struct Call {
  Shape shape;
  bool generic, multicast;
  Type type;
  size_t count;
  std::vector<Buffer> in, out;
  std::vector<bool> in_place;
  std::vector<std::vector<uint8_t>> given;
  std::vector<uint8_t> expected;
  std::vector<Range> ranges;  // of a sum in the switch
  std::vector<Launch> launches;
};

Call random_call(std::mt19937_64& random, unsigned ranks, bool generic, bool multicast, bool disturbed) {
  Call call = {};
  call.shape = static_cast<Shape>(random() % 3);
  if (call.shape == kSwitch && !multicast) call.shape = kBulk;
  call.generic = generic;
  call.multicast = multicast;
  call.type = static_cast<Type>(random() % 3);
  const size_t size = call.type == kF32 ? 4 : 2;
  do {
    call.count = 1 + random() % (random() % 4 == 0 ? (call.shape == kBulk ? 60000 : 20000) : 600);
  } while (stage_need(call.shape, ranks, call.count * size) > kStageBytes);
  const size_t bytes = call.count * size;
  for (unsigned r = 0; r < ranks; r++) {
    const bool aligned = random() % 2 == 0;
    call.in.emplace_back(bytes, aligned ? 0 : random() % (16 / size) * size);
    call.out.emplace_back(bytes, aligned ? 0 : random() % (16 / size) * size);
    call.in_place.push_back(random() % 4 == 0);
    fill(random, call.type, call.in[r].data, call.count);
    call.given.emplace_back(call.in[r].data, call.in[r].data + bytes);
    const unsigned block = call.shape == kBulk     ? TWOSHOT_BULK_THREADS
                           : call.shape == kSwitch ? TWOSHOT_CHUNK_LINES << random() % 2
                                                   : 32u << random() % 3;
    call.launches.push_back({1 + static_cast<unsigned>(random() % 5), block, 0, disturbed ? random() | 1 : 0,
                             disturbed && random() % 4 == 0 ? 300u : 0});
  }
  std::vector<const uint8_t*> in;
  for (auto& given : call.given) in.push_back(given.data());
  call.expected.resize(bytes);
  reference(call.type, in, call.count, call.expected.data());
  for (size_t i = 0; call.shape == kSwitch && i < call.count; i++) call.ranges.push_back(range_of(call.type, in, i));
  return call;
}

void check(const Call& call, unsigned rank, const std::string& where) {
  const Buffer& out = call.in_place[rank] ? call.in[rank] : call.out[rank];
  const size_t size = call.type == kF32 ? 4 : 2;
  for (size_t i = 0; i < call.count; i++) {
    if (call.shape == kSwitch && within(call.type, call.ranges[i], out.data, i)) continue;
    if (call.shape != kSwitch && std::memcmp(out.data + i * size, call.expected.data() + i * size, size) == 0) continue;
    uint32_t got = 0, want = 0;
    std::memcpy(&got, out.data + i * size, size);
    std::memcpy(&want, call.expected.data() + i * size, size);
    char text[160];
    std::snprintf(text, sizeof text, ": element %zu of %zu is %08x, expected %08x", i, call.count, got, want);
    fail(where + text);
  }
  if (!call.in[rank].guards_intact() || !call.out[rank].guards_intact()) fail(where + ": wrote outside the buffer");
  if (!call.in_place[rank] && std::memcmp(call.in[rank].data, call.given[rank].data(), call.given[rank].size()) != 0) {
    fail(where + ": the input changed");
  }
}

void check_same_bits(const Call& call) {
  const auto result = [&](unsigned rank) { return (call.in_place[rank] ? call.in[rank] : call.out[rank]).data; };
  for (unsigned r = 1; r < call.in.size(); r++) {
    if (std::memcmp(result(0), result(r), call.expected.size()) != 0) fail("ranks got different bits");
  }
}

void random_calls(unsigned ranks, unsigned calls, uint64_t seed, bool generic, bool multicast, bool disturbed,
                  uint32_t first_epoch = 0) {
  Group group(ranks);
  for (unsigned r = 0; r < ranks; r++) {
    auto* state = reinterpret_cast<TwoshotState*>(group.window(r));
    for (TwoshotEpoch& epoch : state->epoch) epoch.number = first_epoch;
    state->ticket = 2 * first_epoch;
  }
  multicast_group = &group;
  std::mt19937_64 random(seed);
  group.channels = 1 + static_cast<uint32_t>(random() % (ranks > 8 ? 2 : 4));
  group.ring_log2 = static_cast<uint16_t>(2 + random() % 2);
  const size_t slots = size_t{2} * (ranks - 1) * group.channels << group.ring_log2;
  if (slots * (TWOSHOT_FLAG_BYTES + (TWOSHOT_LINE_BYTES << 7)) + TWOSHOT_STAGE_ALIGN > kRingBytes) fail("the ring is too small");
  for (unsigned done = 0; done < calls;) {
    // A batch of calls back to back, so that ranks drift apart by a launch.
    std::vector<Call> batch;
    for (unsigned i = 0; i < 10 && done < calls; i++, done++) {
      batch.push_back(random_call(random, ranks, generic, multicast, disturbed));
    }
    std::vector<std::thread> threads;
    for (unsigned r = 0; r < ranks; r++) {
      threads.emplace_back([&, r] {
        for (Call& call : batch) {
          void* out = call.in_place[r] ? call.in[r].data : call.out[r].data;
          TwoshotArgs args = group.args(r, call.in[r].data, out, call.count);
          args.multicast = multicast ? kMulticast : 0;
          const std::string name = kernel_name(call.shape, call.type, ranks, generic, multicast);
          const auto* kernel = find_kernel(name.c_str());
          if (kernel == nullptr) fail("no kernel " + name);
          twoshot::sim::run(*kernel, call.launches[r], &args);
          const TwoshotControl& control = group.controls[r];
          if (control.fault != 0) {
            fail(name + ": rank " + std::to_string(r) + " recorded fault " + std::to_string(control.fault) +
                 ", peer " + std::to_string(control.peer) + ", line " + std::to_string(control.line));
          }
          check(call, r, name + " with " + std::to_string(ranks) + " ranks, rank " + std::to_string(r));
        }
      });
    }
    for (auto& thread : threads) thread.join();
    for (const Call& call : batch) check_same_bits(call);
  }
  // What was polled was re-armed: every stage is all sentinel again.
  for (unsigned r = 0; r < ranks; r++) {
    const auto* words = reinterpret_cast<const uint32_t*>(group.window(r) + TWOSHOT_HEADER_BYTES);
    for (size_t i = 0; i < TWOSHOT_STAGES * kStageBytes / 4; i++) {
      if (words[i] != TWOSHOT_SENTINEL) fail("a stage word was left behind");
    }
    const auto* state = reinterpret_cast<const TwoshotState*>(group.window(r));
    for (const TwoshotEpoch& epoch : state->epoch) {
      // Epochs are counted modulo 2^32 - 1, a multiple of the number of stages.
      if (epoch.number != (uint64_t{first_epoch} + calls) % 0xFFFFFFFFu) fail("an epoch replica was left behind");
    }
  }
  std::printf("%u ranks: %u calls%s%s%s: every bit as expected\n", ranks, calls, generic ? ", generic" : "",
              multicast ? ", multicast" : "", disturbed ? ", disturbed" : "");
}

// Blocks that run one after the other: each still has to find this launch's epoch, though earlier ones advanced theirs.
void one_block_at_a_time() {
  constexpr unsigned kRanks = 3;
  Group group(kRanks);
  std::mt19937_64 random(5);
  for (unsigned i = 0; i < 6; i++) {
    Call call = random_call(random, kRanks, false, false, false);
    std::vector<std::thread> threads;
    for (unsigned r = 0; r < kRanks; r++) {
      threads.emplace_back([&, r] {
        call.launches[r] = {5, call.shape == kBulk ? TWOSHOT_BULK_THREADS : 64u, 1, 0, 0};
        void* out = call.in_place[r] ? call.in[r].data : call.out[r].data;
        const TwoshotArgs args = group.args(r, call.in[r].data, out, call.count);
        const std::string name = kernel_name(call.shape, call.type, kRanks, false, false);
        twoshot::sim::run(*find_kernel(name.c_str()), call.launches[r], &args);
        check(call, r, "one block at a time, " + name);
      });
    }
    for (auto& thread : threads) thread.join();
  }
  std::printf("one block at a time: every bit as expected\n");
}

// ---- faults --------------------------------------------------------------------------------------------------------

struct Lone {
  Group group{4};
  std::vector<uint8_t> in = std::vector<uint8_t>(4096), out = std::vector<uint8_t>(4096);

  bool in_switch = false, in_bulk = false, in_one_shot = false;

  void launch(uint64_t timeout_ns) {
    TwoshotArgs args = group.args(1, in.data(), out.data(), 1024);
    args.timeout_ns = timeout_ns;
    args.multicast = kMulticast;
    const char* kernel = in_switch ? "twoshot_switch_f32_n_mc" : in_bulk       ? "twoshot_bulk_f32_n_uc"
                         : in_one_shot ? "twoshot_oneshot_f32_4_uc"
                                       : "twoshot_twoshot_f32_4_uc";
    const unsigned block = in_switch ? 128u : in_bulk ? TWOSHOT_BULK_THREADS : 64u;
    twoshot::sim::run(*find_kernel(kernel), {2, block, 0, 0, 0}, &args);
  }
  // As if these ranks had laid out and announced their inputs.
  void announce(std::vector<unsigned> ranks) {
    auto* line = reinterpret_cast<uint32_t*>(group.window(1) + TWOSHOT_HEADER_BYTES + 2 * 4 * 64 * 16);
    for (const unsigned r : ranks) line[r] = 0;
  }
  void expect(uint32_t fault, const char* what) {
    const TwoshotControl& control = group.controls[1];
    if (control.fault != fault) fail(std::string(what) + ": fault is " + std::to_string(control.fault));
    const uint32_t kernel = in_switch ? TWOSHOT_KERNEL_SWITCH : in_bulk       ? TWOSHOT_KERNEL_BULK
                            : in_one_shot ? TWOSHOT_KERNEL_ONESHOT
                                          : TWOSHOT_KERNEL_TWOSHOT;
    if (control.kernel != kernel || control.count != 1024 || control.peer == 1 || control.peer > 3 ||
        control.phase != TWOSHOT_PHASE_SCATTER || control.line >= (in_one_shot ? 256 : 64)) {
      fail(std::string(what) + ": the record is not what happened");
    }
    std::printf("%s: recorded, peer %u missing\n", what, control.peer);
    stores_no_more();
  }
  // Peers may be launches behind: nothing of theirs changes any more.
  void stores_no_more() {
    const std::vector<uint8_t> memory(group.windows, group.windows + group.ranks * kWindowBytes);
    for (uint8_t i = 1; i <= 4; i++) {
      std::fill(in.begin(), in.end(), i);
      launch(0);
    }
    for (unsigned r = 0; r < group.ranks; r++) {
      if (r != 1 && std::memcmp(memory.data() + r * kWindowBytes, group.window(r), kWindowBytes) != 0) {
        fail("a launch behind one that gave up stored to a peer");
      }
    }
  }
};

void faults() {
  {
    Lone lone;
    lone.launch(100'000'000);
    lone.expect(TWOSHOT_FAULT_DEADLINE, "deadline");
    lone.launch(0);  // leaves at once, though it has no deadline: the fault stands
    lone.expect(TWOSHOT_FAULT_DEADLINE, "launch after a fault");
  }
  {
    Lone lone;
    std::thread host([&] {
      usleep(50'000);
      __atomic_store_n(&lone.group.controls[1].abort, 1u, __ATOMIC_RELEASE);
    });
    lone.launch(0);
    host.join();
    lone.expect(TWOSHOT_FAULT_ABORTED, "abort");
  }
  {
    Lone lone;
    lone.in_one_shot = true;
    lone.launch(100'000'000);
    lone.expect(TWOSHOT_FAULT_DEADLINE, "deadline in one-shot");
  }
  for (const unsigned missing : {0u, 2u, 3u}) {
    // The flags of the others are there: shards of 64 lines are one chunk, and it is the first channel's.
    Lone lone;
    lone.in_bulk = true;
    const uint64_t first_turn = 1;
    const auto flag = [&](unsigned phase, unsigned peer) {
      uint8_t* ring = lone.group.window(1) + TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStageBytes;
      const size_t index = ((phase - 1) * 3 + peer - (peer > 1 ? 1 : 0)) * lone.group.channels;
      return ring + TWOSHOT_FLAG_BYTES * (index << lone.group.ring_log2);
    };
    for (const unsigned peer : {0u, 2u, 3u}) {
      if (peer != missing) std::memcpy(flag(TWOSHOT_PHASE_SCATTER, peer), &first_turn, 8);
      std::memcpy(flag(TWOSHOT_PHASE_BROADCAST, peer), &first_turn, 8);
    }
    lone.launch(100'000'000);
    lone.expect(TWOSHOT_FAULT_DEADLINE, "deadline in bulk");
    if (lone.group.controls[1].peer != missing) fail("the missing rank is another");
    // Whoever gives up says nothing to anybody: what it has scattered it may say, what it has reduced it must not.
    for (const unsigned r : {0u, 2u, 3u}) {
      const uint8_t* ring = lone.group.window(r) + TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStageBytes;
      const size_t of_rank_1 = (3 + 1 - (1 > r ? 1 : 0)) * lone.group.channels << lone.group.ring_log2;
      uint64_t broadcast;
      std::memcpy(&broadcast, ring + TWOSHOT_FLAG_BYTES * of_rank_1, 8);
      if (broadcast == first_turn) fail("a result without all ranks");
    }
  }
  for (const unsigned missing : {0u, 2u, 3u}) {
    // Nothing is loaded, let alone published, before the last rank has announced its input.
    Lone lone;
    multicast_group = &lone.group;
    lone.in_switch = true;
    std::vector<unsigned> others;
    for (unsigned r = 0; r < 4; r++) {
      if (r != missing && r != 1) others.push_back(r);
    }
    lone.announce(others);
    lone.launch(100'000'000);
    lone.expect(TWOSHOT_FAULT_DEADLINE, "deadline in the switch");
    if (lone.group.controls[1].peer != missing) fail("the missing rank is another");
    const auto* results = reinterpret_cast<const uint32_t*>(lone.group.window(0) + TWOSHOT_HEADER_BYTES);
    for (size_t w = 4 * 4 * 64; w < 4 * 2 * 4 * 64; w++) {
      if (results[w] != TWOSHOT_SENTINEL) fail("a result without all ranks");
    }
  }
  {
    // The second launch finds that the first is not done.
    Lone lone;
    std::thread other([&] { lone.launch(0); });
    usleep(50'000);
    lone.launch(0);
    other.join();
    if (lone.group.controls[1].fault != TWOSHOT_FAULT_OVERLAP) fail("overlap was not detected");
    std::printf("overlap: recorded\n");
  }
}

}  // namespace

extern "C" void twoshot_sim_multimem_store(uint64_t va, const uint32_t words[4]) {
  for (unsigned r = 0; r < multicast_group->ranks; r++) {
    auto* target = reinterpret_cast<uint32_t*>(multicast_group->window(r) + (va - kMulticast));
    for (unsigned w = 0; w < 4; w++) __atomic_store_n(target + w, words[w], __ATOMIC_RELAXED);
  }
}

extern "C" unsigned twoshot_sim_multimem_load(uint64_t va, uint32_t words[][4], unsigned) {
  for (unsigned r = 0; r < multicast_group->ranks; r++) {
    const auto* source = reinterpret_cast<const uint32_t*>(multicast_group->window(r) + (va - kMulticast));
    for (unsigned w = 0; w < 4; w++) words[r][w] = __atomic_load_n(source + w, __ATOMIC_ACQUIRE);
  }
  return multicast_group->ranks;
}

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (const char* wrong = payload_stays_inside()) fail(wrong);
  if (const std::string wrong = nothing_is_stored_where_a_peer_still_reads(); !wrong.empty()) fail(wrong);
  const unsigned calls = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 200;
  const uint64_t seed = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1;
  for (const unsigned ranks : {2u, 3u, 4u, 5u, 8u, 16u}) {
    random_calls(ranks, calls, seed + ranks, false, false, false);
    random_calls(ranks, calls / 4, seed + ranks, false, true, false);
    random_calls(ranks, calls / 4, seed + ranks, false, false, true);
    random_calls(ranks, calls / 8, seed + ranks, false, true, true);
  }
  random_calls(4, calls / 4, seed, true, false, true);
  random_calls(8, calls / 4, seed, true, true, false);
  // Over the wrap of the epoch, which a busy communicator reaches within hours.
  random_calls(3, 40, seed, false, false, true, 0xFFFFFFFF - 20);
  random_calls(4, 40, seed, false, true, false, 0xFFFFFFFF - 21);
  one_block_at_a_time();
  faults();
  std::printf("ok\n");
}
