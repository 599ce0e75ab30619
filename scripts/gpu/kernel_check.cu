// Checks the unicast kernels on one real GPU and times them: N ranks are N streams of the same device, their windows
// ordinary device memory. What this proves is the arithmetic, the protocol and programmatic launch on hardware; what
// it cannot show is NVLink. Needs a GPU of compute capability 9.0 or newer, ends by itself within two minutes.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I kernels -o kernel_check scripts/gpu/kernel_check.cu && ./kernel_check
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels.cu"
#include "kernel_check_payloads.h"
#include "kernel_check_prototype.cuh"
#include "kernel_check_reference.h"

#define CHECK(call)                                                                                   \
  do {                                                                                                \
    const cudaError_t status_ = (call);                                                               \
    if (status_ != cudaSuccess) {                                                                     \
      std::printf("FAILED: %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

namespace {

using KernelPointer = void (*)(TwoshotArgs);
#define TWOSHOT_ROW(shape, type, name, ranks, door, multicast) \
  {"twoshot_" #shape "_" #type "_" #name "_" #door, twoshot_##shape##_##type##_##name##_##door},
const std::map<std::string, KernelPointer> kKernels = {TWOSHOT_KERNELS(TWOSHOT_ROW)};

constexpr size_t kStageBytes = size_t{16} << 20;
constexpr size_t kWindowBytes = TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStageBytes;
constexpr size_t kPayloadBytes = size_t{4} << 20;
constexpr unsigned kMaxRanks = 8;
constexpr uint8_t kPoison = 0xA5;

// ---- ranks on one device -------------------------------------------------------------------------------------------

struct Device {
  uint8_t* windows = nullptr;
  uint8_t* in[kMaxRanks];
  uint8_t* out[kMaxRanks];
  cudaStream_t stream[kMaxRanks];
  TwoshotControl* control = nullptr;  // host memory
  uint8_t* control_on_device = nullptr;

  Device() {
    CHECK(cudaMalloc(&windows, kMaxRanks * kWindowBytes));
    for (unsigned r = 0; r < kMaxRanks; r++) {
      CHECK(cudaMalloc(&in[r], kPayloadBytes + 64));
      CHECK(cudaMalloc(&out[r], kPayloadBytes + 64));
      CHECK(cudaStreamCreateWithFlags(&stream[r], cudaStreamNonBlocking));
    }
    CHECK(cudaHostAlloc(&control, kMaxRanks * sizeof *control, cudaHostAllocMapped));
    CHECK(cudaHostGetDevicePointer(&control_on_device, control, 0));
    reset();
  }

  // As set-up leaves the windows: header zero, stages sentinel.
  void reset() {
    CHECK(cudaDeviceSynchronize());
    const std::vector<uint32_t> sentinel((kWindowBytes - TWOSHOT_HEADER_BYTES) / 4, TWOSHOT_SENTINEL);
    for (unsigned r = 0; r < kMaxRanks; r++) {
      CHECK(cudaMemset(windows + r * kWindowBytes, 0, TWOSHOT_HEADER_BYTES));
      CHECK(cudaMemcpy(windows + r * kWindowBytes + TWOSHOT_HEADER_BYTES, sentinel.data(), sentinel.size() * 4,
                       cudaMemcpyHostToDevice));
      control[r] = TwoshotControl{};
    }
    CHECK(cudaDeviceSynchronize());
  }

  void synchronise(unsigned ranks, const std::string& what) {
    CHECK(cudaDeviceSynchronize());
    for (unsigned r = 0; r < ranks; r++) {
      if (control[r].fault == 0) continue;
      std::printf("FAILED: %s: rank %u fault %u: epoch %u peer %u phase %u line %llu\n", what.c_str(), r,
                  control[r].fault, control[r].epoch, control[r].peer, control[r].phase,
                  static_cast<unsigned long long>(control[r].line));
      std::exit(1);
    }
  }
};

struct Shape {
  bool two, generic;
  Type type;
  unsigned blocks, threads;
  Op op = kSum;
};

// The kernels' name for a type and an operation.
std::string class_name(Type type, Op op) {
  switch (type) {
    case kI8: case kU8: return "i8";
    case kI32: case kU32: return "i32";
    case kI64: case kU64: return "i64";
    case kE4M3: case kE5M2: return "fp8";
    case kF64: return "f64";
    default: return kTypeNames[type] + std::string(specialised(type, op) ? "" : "op");
  }
}

std::string kernel_name(const Shape& shape, unsigned ranks) {
  const bool special =
      specialised(shape.type, shape.op) && !shape.generic && (ranks == 2 || ranks == 4 || ranks == 8);
  return std::string("twoshot_") + (shape.two ? "twoshot" : "oneshot") + "_" + class_name(shape.type, shape.op) + "_" +
         (special ? std::to_string(ranks) : "n") + "_uc";
}

// Results that are NaN, but not the NaN of the reference, by type. Only the specialised sums promise its bits.
size_t other_nans[kTypes];

template <typename Function, typename... Values>
void launch_programmatic(Function function, unsigned blocks, unsigned threads, cudaStream_t stream, Values... values) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, function, values...));
}

TwoshotArgs arguments(const Device& device, unsigned ranks, unsigned rank, const void* in, void* out, size_t count) {
  TwoshotArgs args = {};
  args.in = reinterpret_cast<uint64_t>(in);
  args.out = reinterpret_cast<uint64_t>(out);
  args.count = count;
  args.windows = reinterpret_cast<uint64_t>(device.windows);
  args.window_stride = kWindowBytes;
  args.control = reinterpret_cast<uint64_t>(device.control_on_device + rank * sizeof(TwoshotControl));
  args.stage_bytes = kStageBytes;
  args.timeout_ns = 3'000'000'000u;
  args.rank = rank;
  args.ranks = ranks;
  return args;
}

// Blocks that two launches of every rank can have resident together, whatever the multiprocessor also has to do.
unsigned most_blocks(unsigned ranks) {
  int processors = 0;
  CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  return std::max(1u, std::min(16u, static_cast<unsigned>(processors) / (2 * ranks)));
}

// One call on all ranks. misaligned[r] (elements) shifts rank r's buffers, in_place[r] lets it write over its input.
void call(Device& device, const Shape& shape, const std::vector<Bytes>& in, size_t count,
          const std::vector<unsigned>& misaligned, const std::vector<bool>& in_place, const char* what) {
  const auto ranks = static_cast<unsigned>(in.size());
  const size_t size = size_of(shape.type), bytes = count * size;
  std::vector<uint8_t*> source(ranks), target(ranks);
  for (unsigned r = 0; r < ranks; r++) {
    source[r] = device.in[r] + 16 + misaligned[r] * size;
    target[r] = in_place[r] ? source[r] : device.out[r] + 16 + misaligned[r] * size;
    CHECK(cudaMemset(device.out[r], kPoison, bytes + 64));
    CHECK(cudaMemset(device.in[r], kPoison, bytes + 64));
    CHECK(cudaMemcpy(source[r], in[r].data(), bytes, cudaMemcpyHostToDevice));
  }
  CHECK(cudaDeviceSynchronize());
  const std::string name = kernel_name(shape, ranks);
  for (unsigned r = 0; r < ranks; r++) {
    TwoshotArgs args = arguments(device, ranks, r, source[r], target[r], count);
    args.type = shape.type;
    args.op = shape.op;
    launch_programmatic(kKernels.at(name), shape.blocks, shape.threads, device.stream[r], args);
  }
  device.synchronise(ranks, name + " " + what);
  const Bytes expected = reference(shape.type, shape.op, in, count);
  Bytes first;
  for (unsigned r = 0; r < ranks; r++) {
    Bytes got(bytes + 32);
    CHECK(cudaMemcpy(got.data(), target[r] - 16, bytes + 32, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < bytes + 32; i++) {
      const bool guard = i < 16 || i >= bytes + 16;
      const uint8_t want = guard ? kPoison : expected[i - 16];
      if (got[i] == want) continue;
      if (!guard && !specialised(shape.type, shape.op)) {
        const size_t element = (i - 16) / size;
        if (is_nan(shape.type, bits_at(shape.type, expected.data(), element)) &&
            is_nan(shape.type, bits_at(shape.type, got.data() + 16, element))) {
          other_nans[shape.type]++;
          i = 16 + (element + 1) * size - 1;
          continue;
        }
      }
      std::printf("FAILED: %s %s %s %s, %u ranks, %zu elements, rank %u: byte %lld is %02x, expected %02x\n",
                  name.c_str(), kTypeNames[shape.type], kOpNames[shape.op], what, ranks, count, r,
                  static_cast<long long>(i) - 16, got[i], want);
      std::exit(1);
    }
    // Whatever a NaN's bits are, they are the same everywhere.
    if (r == 0) first = got;
    if (got != first) {
      std::printf("FAILED: %s %s: rank %u has other bits than rank 0\n", name.c_str(), what, r);
      std::exit(1);
    }
  }
}

// ---- payloads and operations ---------------------------------------------------------------------------------------

void check_operations(Device& device, unsigned ranks) {
  const std::vector<unsigned> aligned(ranks, 0);
  const std::vector<bool> apart(ranks, false);
  const unsigned blocks = most_blocks(ranks);
  for (const bool two : {false, true}) {
    for (const Op op : {kSum, kProd, kMax, kMin, kAvg}) {
      for (const Type type : {kI8, kU8, kE4M3, kE5M2}) {
        call(device, {two, true, type, blocks, 512, op}, byte_pairs(ranks), 65536, aligned, apart, "byte pairs");
      }
      for (const Type type : {kI64, kU64, kF64}) {
        call(device, {two, true, type, blocks, 512, op}, wide_boundaries(ranks), 48 * 48, aligned, apart, "boundaries");
      }
      for (const Type type : {kI32, kU32, kF32}) {
        call(device, {two, true, type, blocks, 512, op}, f32_boundaries(ranks), 1600, aligned, apart, "boundaries");
      }
      for (const Type type : {kF16, kBF16}) {
        call(device, {two, true, type, blocks, 512, op}, all_patterns(ranks), 131072, aligned, apart, "all patterns");
      }
    }
  }
}

void check_values(Device& device, unsigned ranks) {
  const std::vector<unsigned> aligned(ranks, 0);
  const std::vector<bool> apart(ranks, false);
  for (const bool two : {false, true}) {
    for (const bool generic : {false, true}) {
      const unsigned blocks = most_blocks(ranks);
      call(device, {two, generic, kF32, blocks, 512}, f32_boundaries(ranks), 1600, aligned, apart, "boundaries");
      call(device, {two, generic, kF16, blocks, 512}, all_patterns(ranks), 131072, aligned, apart, "all patterns");
      call(device, {two, generic, kBF16, blocks, 512}, all_patterns(ranks), 131072, aligned, apart, "all patterns");
    }
  }
}

void check_random(Device& device, unsigned ranks, unsigned calls) {
  std::mt19937_64 random(ranks);
  for (unsigned i = 0; i < calls; i++) {
    const auto type = static_cast<Type>(random() % kTypes);
    const auto op = static_cast<Op>(random() % kOps);
    const size_t most = i % 5 == 0 ? 300'000 : i % 5 == 1 ? 40 : 5'000;
    // One-shot keeps every rank's lines in a stage.
    const size_t room = (kStageBytes / ranks - 256) / size_of(type) / (half_lines(type) ? 2 : 1);
    const size_t count = 1 + random() % std::min(most, room);
    std::vector<unsigned> misaligned(ranks, 0);
    std::vector<bool> in_place(ranks);
    for (unsigned r = 0; r < ranks; r++) {
      if (random() % 2 == 0) misaligned[r] = random() % (16 / size_of(type));
      in_place[r] = random() % 3 == 0;
    }
    const Shape shape = {random() % 2 == 0, random() % 2 == 0, type,
                         1 + static_cast<unsigned>(random() % most_blocks(ranks)),
                         32 * (1 + static_cast<unsigned>(random() % 16)), op};
    call(device, shape, random_payload(random, type, ranks, count), count, misaligned, in_place, "random");
  }
}

// ---- graphs --------------------------------------------------------------------------------------------------------

struct Graphs {
  std::vector<cudaGraphExec_t> executables;

  template <typename Launch>
  Graphs(Device& device, unsigned ranks, unsigned launches, Launch launch) : executables(ranks) {
    for (unsigned r = 0; r < ranks; r++) {
      cudaGraph_t graph;
      CHECK(cudaStreamBeginCapture(device.stream[r], cudaStreamCaptureModeThreadLocal));
      for (unsigned i = 0; i < launches; i++) launch(r, i);
      CHECK(cudaStreamEndCapture(device.stream[r], &graph));
      CHECK(cudaGraphInstantiate(&executables[r], graph, 0));
      CHECK(cudaGraphDestroy(graph));
      // Uploaded now: an upload while a peer's kernel spins on this rank would wait for that kernel.
      CHECK(cudaGraphUpload(executables[r], device.stream[r]));
    }
    CHECK(cudaDeviceSynchronize());
  }
  ~Graphs() {
    for (auto executable : executables) CHECK(cudaGraphExecDestroy(executable));
  }
};

// Chains of calls of changing shape and size, each on the result of the one before; replayed with new payloads.
void check_graph(Device& device, unsigned ranks) {
  constexpr unsigned kLaunches = 7;
  const size_t count = 20'000;
  const auto length = [&](unsigned i) { return count - 2'711 * i; };
  const Graphs graphs(device, ranks, kLaunches, [&](unsigned r, unsigned i) {
    const Shape shape = {i % 2 == 1, i % 3 == 2, kF32, 1 + i % most_blocks(ranks), 256};
    uint8_t* from = i % 2 == 0 ? device.in[r] : device.out[r];
    uint8_t* to = i % 2 == 0 ? device.out[r] : device.in[r];
    launch_programmatic(kKernels.at(kernel_name(shape, ranks)), shape.blocks, shape.threads, device.stream[r],
                        arguments(device, ranks, r, from, to, length(i)));
  });
  std::mt19937_64 random(99);
  for (unsigned replay = 0; replay < 8; replay++) {
    std::vector<Bytes> values = random_payload(random, kF32, ranks, count);
    for (unsigned r = 0; r < ranks; r++) {
      CHECK(cudaMemcpy(device.in[r], values[r].data(), values[r].size(), cudaMemcpyHostToDevice));
    }
    CHECK(cudaDeviceSynchronize());
    for (unsigned r = 0; r < ranks; r++) CHECK(cudaGraphLaunch(graphs.executables[r], device.stream[r]));
    device.synchronise(ranks, "graph");
    Bytes expected;
    for (unsigned i = 0; i < kLaunches; i++) {
      expected = reference(kF32, kSum, values, length(i));
      values.assign(ranks, expected);
    }
    for (unsigned r = 0; r < ranks; r++) {
      Bytes got(expected.size());
      CHECK(cudaMemcpy(got.data(), device.out[r], got.size(), cudaMemcpyDeviceToHost));
      if (got != expected) {
        std::printf("FAILED: replay %u of a graph, %u ranks, rank %u differs\n", replay, ranks, r);
        std::exit(1);
      }
    }
  }
}

// ---- time ----------------------------------------------------------------------------------------------------------

// Microseconds per launch: graphs of 100 launches, the rank that starts last, best of 8.
template <typename Launch>
double time_launches(Device& device, unsigned ranks, Launch launch) {
  constexpr unsigned kLaunches = 100;
  const Graphs graphs(device, ranks, kLaunches, launch);
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  double best = 1e9;
  for (unsigned repeat = 0; repeat < 8; repeat++) {
    for (unsigned r = 0; r < ranks; r++) {
      if (r == ranks - 1) CHECK(cudaEventRecord(start, device.stream[r]));
      CHECK(cudaGraphLaunch(graphs.executables[r], device.stream[r]));
      if (r == ranks - 1) CHECK(cudaEventRecord(stop, device.stream[r]));
    }
    device.synchronise(ranks, "timing");
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
    if (repeat > 0) best = std::min(best, 1000.0 * milliseconds / kLaunches);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  return best;
}

__global__ void empty_kernel() {
  twoshot::griddepcontrol_launch_dependents_if(true);
  twoshot::griddepcontrol_wait();
}

struct Best {
  double us = 1e9;
  unsigned blocks = 0, threads = 0;
  void offer(double candidate, unsigned b, unsigned t) {
    if (candidate < us) *this = Best{candidate, b, t};
  }
};

void time_table(Device& device) {
  constexpr unsigned kRanks = 4;
  std::printf("empty kernel: %.2f us\n", time_launches(device, kRanks, [&](unsigned r, unsigned) {
                launch_programmatic(empty_kernel, 1, 32, device.stream[r]);
              }));
  std::printf("4 ranks on one GPU, f32, us per launch (blocks x threads); prototype: arrival counter, clear-ahead\n");
  std::printf("%10s %24s %24s %24s %24s\n", "bytes", "one-shot", "prototype", "two-shot", "prototype");
  for (size_t bytes = 1024; bytes <= kPayloadBytes; bytes *= 4) {
    Best best[4];
    for (const unsigned threads : {128u, 256u, 512u}) {
      for (unsigned blocks = 1; blocks <= most_blocks(kRanks); blocks *= 2) {
        for (const bool two : {false, true}) {
          const size_t lines = bytes / 16 / (two ? kRanks : 1), need = (lines + threads - 1) / threads;
          if ((blocks > need && blocks > 1) || need > size_t{blocks} * 32 || (!two && bytes > (1u << 20))) continue;
          device.reset();
          const Shape shape = {two, false, kF32, blocks, threads};
          const KernelPointer kernel = kKernels.at(kernel_name(shape, kRanks));
          best[two * 2].offer(time_launches(device, kRanks,
                                            [&](unsigned r, unsigned) {
                                              launch_programmatic(kernel, blocks, threads, device.stream[r],
                                                                  arguments(device, kRanks, r, device.in[r],
                                                                            device.out[r], bytes / 4));
                                            }),
                              blocks, threads);
          device.reset();
          prototype::Pointers pointers = {};
          for (unsigned r = 0; r < kRanks; r++) {
            pointers.stage[r] = device.windows + r * kWindowBytes + TWOSHOT_HEADER_BYTES;
            pointers.state[r] = reinterpret_cast<uint32_t*>(device.windows + r * kWindowBytes);
          }
          best[two * 2 + 1].offer(
              time_launches(device, kRanks,
                            [&](unsigned r, unsigned) {
                              launch_programmatic(two ? prototype::twoshot<kRanks> : prototype::oneshot<kRanks>, blocks,
                                                  threads, device.stream[r],
                                                  reinterpret_cast<const uint4*>(device.in[r]),
                                                  reinterpret_cast<uint4*>(device.out[r]), pointers, r, bytes / 16);
                            }),
              blocks, threads);
        }
      }
    }
    std::printf("%10zu", bytes);
    for (const Best& b : best) {
      if (b.blocks == 0) {
        std::printf(" %24s", "-");
      } else {
        std::printf("      %8.2f (%2u x %3u)", b.us, b.blocks, b.threads);
      }
    }
    std::printf("\n");
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  // Every rank's stream needs a hardware queue of its own: they wait for each other.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  alarm(115);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, compute capability %d.%d\n", properties.name, properties.major, properties.minor);
  Device device;
  for (const unsigned ranks : {2u, 3u, 4u, 5u, 8u}) {
    device.reset();
    check_values(device, ranks);
    check_operations(device, ranks);
    check_random(device, ranks, 240);
    check_graph(device, ranks);
    std::printf("%u ranks: every bit as expected\n", ranks);
  }
  for (unsigned t = 0; t < kTypes; t++) {
    if (other_nans[t] != 0) std::printf("%s: %zu NaN results with other bits than 0x7F..F\n", kTypeNames[t], other_nans[t]);
  }
  time_table(device);
  std::printf("ok\n");
}
