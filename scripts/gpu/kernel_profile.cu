// Times the kernels on one GPU whose ranks are rows of blocks of one launch, so that a profiler, which runs launches one after
// the other, can look at them too; scripts/gpu/profile_check does that. There is no link: what is measured is what a block can
// do, with loads, stores and polls that end in the second-level cache.
//
//   nvcc -std=c++17 -O2 -arch=sm_90 -I kernels -o profile scripts/gpu/kernel_profile.cu && ./profile [OPTION...]
//
// --shape one|two|bulk  --ranks 2|4|8  --bytes N  --blocks N (of each rank)  --threads N  --ring LOG2  --chunk LOG2
// --unaligned (buffers begin r + 1 elements off on rank r)  --in-place  --launches N (0: a second one alone, for a profiler to pick)
// bf16 sums; every answer is compared.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bulk.cuh"
#include "oneshot.cuh"
#include "twoshot.cuh"

#define CHECK(call)                                                                                   \
  do {                                                                                                \
    const cudaError_t status_ = (call);                                                               \
    if (status_ != cudaSuccess) {                                                                     \
      std::printf("FAILED: %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

namespace {

constexpr unsigned kMaxRanks = 8;
constexpr uint64_t kTimeoutNs = 2'000'000'000;

struct AllArgs {
  TwoshotArgs rank[kMaxRanks];
};

struct Options {
  std::string shape = "bulk";
  unsigned ranks = 2, blocks = 24, threads = TWOSHOT_BULK_THREADS, ring = 5, chunk = 9, launches = 20;
  size_t bytes = size_t{16} << 20;
  bool unaligned = false, in_place = false;
};

#define TWOSHOT_ALL_RANKS(shape, ranks_name, ranks)                                                              \
  __global__ void __launch_bounds__(TWOSHOT_MAX_THREADS, 1) shape##_##ranks_name(const AllArgs args) {           \
    twoshot::run_##shape<twoshot::bf16, ranks, false>(args.rank[blockIdx.y]);                                    \
  }
TWOSHOT_ALL_RANKS(oneshot, 2, 2)
TWOSHOT_ALL_RANKS(oneshot, 4, 4)
TWOSHOT_ALL_RANKS(oneshot, 8, 8)
TWOSHOT_ALL_RANKS(twoshot, 2, 2)
TWOSHOT_ALL_RANKS(twoshot, 4, 4)
TWOSHOT_ALL_RANKS(twoshot, 8, 8)
TWOSHOT_ALL_RANKS(bulk, 2, 2)
TWOSHOT_ALL_RANKS(bulk, n, 0)

using Kernel = void (*)(AllArgs);

Kernel kernel_of(const Options& options) {
  const bool two = options.ranks == 2, four = options.ranks == 4;
  if (options.shape == "one") return two ? oneshot_2 : four ? oneshot_4 : oneshot_8;
  if (options.shape == "two") return two ? twoshot_2 : four ? twoshot_4 : twoshot_8;
  return two ? bulk_2 : bulk_n;
}

// Whole numbers, so that every sum is exact.
float value(unsigned rank, size_t i) { return static_cast<float>((i * 7 + rank * 13 + i / 911) % 31); }

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

struct World {
  const Options& options;
  size_t stage, stride;
  uint8_t* windows;
  TwoshotControl* control;
  uint8_t* control_on_device;
  std::vector<uint8_t*> in, out;

  size_t room() const { return options.bytes + 4096; }
  size_t offset(unsigned r) const { return options.unaligned ? 2 * (r + 1) : 0; }

  explicit World(const Options& options) : options(options) {
    const bool bulk = options.shape == "bulk";
    stage = bulk ? TWOSHOT_STAGE_ALIGN : options.shape == "one" ? options.bytes * options.ranks : 2 * (options.bytes + 128 * options.ranks);
    const size_t slots = (size_t{2} * (options.ranks - 1) * options.blocks) << options.ring;
    const size_t ring = bulk ? slots * (TWOSHOT_FLAG_BYTES + (size_t{16} << options.chunk)) + 4096 : 0;
    stride = (TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * stage + ring + 4095) / 4096 * 4096;
    CHECK(cudaMalloc(&windows, stride * options.ranks));
    CHECK(cudaHostAlloc(&control, options.ranks * sizeof *control, cudaHostAllocMapped));
    CHECK(cudaHostGetDevicePointer(&control_on_device, control, 0));
    const std::vector<uint32_t> sentinel((stride - TWOSHOT_HEADER_BYTES) / 4, TWOSHOT_SENTINEL);
    for (unsigned r = 0; r < options.ranks; r++) {
      CHECK(cudaMemset(windows + r * stride, 0, TWOSHOT_HEADER_BYTES));
      CHECK(cudaMemcpy(windows + r * stride + TWOSHOT_HEADER_BYTES, sentinel.data(), sentinel.size() * 4, cudaMemcpyHostToDevice));
      control[r] = TwoshotControl{};
      in.push_back(nullptr), out.push_back(nullptr);
      CHECK(cudaMalloc(&in[r], room()));
      if (options.in_place) out[r] = in[r];
      else CHECK(cudaMalloc(&out[r], room()));
    }
  }

  void fill() {
    std::vector<uint16_t> data(options.bytes / 2);
    for (unsigned r = 0; r < options.ranks; r++) {
      if (!options.in_place) CHECK(cudaMemset(out[r], 0xA5, room()));
      for (size_t i = 0; i < data.size(); i++) data[i] = to_bf16(value(r, i));
      CHECK(cudaMemcpy(in[r] + offset(r), data.data(), options.bytes, cudaMemcpyHostToDevice));
    }
    CHECK(cudaDeviceSynchronize());
  }

  void launch() {
    AllArgs all = {};
    for (unsigned r = 0; r < options.ranks; r++) {
      TwoshotArgs& args = all.rank[r];
      args.in = reinterpret_cast<uint64_t>(in[r]) + offset(r);
      args.out = reinterpret_cast<uint64_t>(out[r]) + offset(r);
      args.count = options.bytes / 2;
      args.windows = reinterpret_cast<uint64_t>(windows);
      args.window_stride = stride;
      args.control = reinterpret_cast<uint64_t>(control_on_device + r * sizeof(TwoshotControl));
      args.stage_bytes = stage;
      args.timeout_ns = kTimeoutNs;
      args.rank = r;
      args.ranks = options.ranks;
      args.type = 9;
      args.channels = options.blocks;
      args.ring_log2 = static_cast<uint16_t>(options.ring);
      args.chunk_log2 = static_cast<uint16_t>(options.chunk);
    }
    kernel_of(options)<<<dim3(options.blocks, options.ranks), options.threads>>>(all);
    CHECK(cudaGetLastError());
  }

  void compare() {
    std::vector<uint16_t> got(options.bytes / 2);
    for (unsigned r = 0; r < options.ranks; r++) {
      CHECK(cudaMemcpy(got.data(), out[r] + offset(r), options.bytes, cudaMemcpyDeviceToHost));
      for (size_t i = 0; i < got.size(); i++) {
        float sum = 0;
        for (unsigned s = 0; s < options.ranks; s++) sum += value(s, i);
        if (got[i] == to_bf16(sum) && control[r].fault == 0) continue;
        std::printf("FAILED: rank %u element %zu is %04x, expected %04x, fault %u\n", r, i, got[i], to_bf16(sum), control[r].fault);
        std::exit(1);
      }
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    const auto number = [&] { return i + 1 < argc ? std::strtoull(argv[++i], nullptr, 0) : 0; };
    if (word == "--shape" && i + 1 < argc) options.shape = argv[++i];
    else if (word == "--ranks") options.ranks = static_cast<unsigned>(number());
    else if (word == "--bytes") options.bytes = number();
    else if (word == "--blocks") options.blocks = static_cast<unsigned>(number());
    else if (word == "--threads") options.threads = static_cast<unsigned>(number());
    else if (word == "--ring") options.ring = static_cast<unsigned>(number());
    else if (word == "--chunk") options.chunk = static_cast<unsigned>(number());
    else if (word == "--launches") options.launches = static_cast<unsigned>(number());
    else if (word == "--unaligned") options.unaligned = true;
    else if (word == "--in-place") options.in_place = true;
    else return std::printf("what is %s?\n", word.c_str()), 2;
  }
  if (options.ranks != 2 && options.ranks != 4 && options.ranks != 8) return std::printf("2, 4 or 8 ranks\n"), 2;
  World world(options);
  // Sums in place would grow from launch to launch: the first one is compared, and times do not depend on values.
  world.fill();
  world.launch();
  CHECK(cudaDeviceSynchronize());
  world.compare();
  if (options.launches == 0) {
    world.launch();
    CHECK(cudaDeviceSynchronize());
    return 0;
  }
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (unsigned round = 0; round < 5; round++) {
    CHECK(cudaEventRecord(begin));
    for (unsigned i = 0; i < options.launches; i++) world.launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    times.push_back(1000.0 * milliseconds / options.launches);
  }
  if (!options.in_place) world.compare();
  std::sort(times.begin(), times.end());
  std::printf("%s, %u ranks, %9zu B, %3u blocks, %s%s: %8.2f us, %8.2f, %8.2f\n", options.shape.c_str(), options.ranks, options.bytes,
              options.blocks, options.unaligned ? "unaligned" : "aligned", options.in_place ? ", in place" : "", times[0], times[2],
              times[4]);
}
