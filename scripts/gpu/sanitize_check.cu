// The unicast kernels for compute-sanitizer: all ranks are rows of blocks of one launch, because the tools may run
// launches one after the other, and ranks wait for each other. Sizes, alignments and grids change; results are compared.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

constexpr unsigned kMaxRanks = 4;
constexpr size_t kStageBytes = size_t{1} << 20;
// A ring of few and small chunks, so that a call goes through it many times.
constexpr unsigned kChannels = 3, kRingLog2 = 2, kChunkLog2 = 7;
constexpr size_t kRingBytes = (size_t{2} * 3 * kChannels << kRingLog2) * (TWOSHOT_FLAG_BYTES + (16u << kChunkLog2)) + 128;
constexpr size_t kWindowBytes = TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * kStageBytes + (kRingBytes + 127) / 128 * 128;
constexpr unsigned kMaxCount = 20'000;
constexpr int kPoison = 0xA5;

struct AllArgs {
  TwoshotArgs rank[kMaxRanks];
};

enum Shape { kOneShot, kTwoShot, kBulk };

template <Shape SHAPE, typename T, int N>
__global__ void __launch_bounds__(SHAPE == kBulk ? TWOSHOT_BULK_THREADS : TWOSHOT_MAX_THREADS, 1)
    all_ranks(const AllArgs args) {
  if constexpr (SHAPE == kOneShot) {
    twoshot::run_oneshot<T, N, false>(args.rank[blockIdx.y]);
  } else if constexpr (SHAPE == kTwoShot) {
    twoshot::run_twoshot<T, N, false>(args.rank[blockIdx.y]);
  } else {
    twoshot::run_bulk<T, N, false>(args.rank[blockIdx.y]);
  }
}

// An allocation of its own for each buffer, so that memcheck sees every byte beyond it.
struct Rank {
  uint8_t* in = nullptr;
  uint8_t* out = nullptr;
};

uint8_t* windows;
TwoshotControl* control;
uint8_t* control_on_device;
uint64_t seed = 1;

uint64_t next() {
  seed ^= seed << 13;
  seed ^= seed >> 7;
  return seed ^= seed << 17;
}

// Whole numbers: every sum is exact in every order and type.
float value(unsigned rank, unsigned i, unsigned call) { return float((rank * 7 + i * 3 + call) % 33) - 16; }

template <typename T>
T encode(float x);
template <>
float encode<float>(float x) { return x; }
template <>
uint16_t encode<uint16_t>(float x) {  // bf16; small whole numbers need no rounding
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t(bits >> 16);
}

template <Shape SHAPE, typename T, typename Word, int N>
void call(unsigned ranks, unsigned count, unsigned number) {
  const unsigned blocks = 1 + next() % 3, threads = SHAPE == kBulk ? TWOSHOT_BULK_THREADS : 32 * (1 + next() % 8);
  AllArgs all = {};
  std::vector<Rank> mine(ranks);
  std::vector<unsigned> shift(ranks);
  for (unsigned r = 0; r < ranks; r++) {
    shift[r] = next() % 2 ? next() % (16 / sizeof(Word)) : 0;
    const size_t bytes = (count + shift[r]) * sizeof(Word);
    CHECK(cudaMalloc(&mine[r].in, bytes));
    CHECK(cudaMalloc(&mine[r].out, bytes));
    CHECK(cudaMemset(mine[r].out, kPoison, bytes));
    std::vector<Word> data(count + shift[r]);
    for (unsigned i = 0; i < count; i++) data[i + shift[r]] = encode<Word>(value(r, i, number));
    CHECK(cudaMemcpy(mine[r].in, data.data(), bytes, cudaMemcpyHostToDevice));
    TwoshotArgs& args = all.rank[r];
    args.in = reinterpret_cast<uint64_t>(mine[r].in) + shift[r] * sizeof(Word);
    args.out = reinterpret_cast<uint64_t>(mine[r].out) + shift[r] * sizeof(Word);
    args.count = count;
    args.windows = reinterpret_cast<uint64_t>(windows);
    args.window_stride = kWindowBytes;
    args.control = reinterpret_cast<uint64_t>(control_on_device + r * sizeof(TwoshotControl));
    args.stage_bytes = kStageBytes;
    args.rank = r;
    args.ranks = ranks;
    args.channels = kChannels;
    args.ring_log2 = kRingLog2;
    args.chunk_log2 = kChunkLog2;
  }
  all_ranks<SHAPE, T, N><<<dim3(blocks, ranks), threads>>>(all);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  for (unsigned r = 0; r < ranks; r++) {
    std::vector<Word> got(count + shift[r]);
    CHECK(cudaMemcpy(got.data(), mine[r].out, got.size() * sizeof(Word), cudaMemcpyDeviceToHost));
    for (unsigned i = 0; i < count; i++) {
      float sum = 0;
      for (unsigned s = 0; s < ranks; s++) sum += value(s, i, number);
      if (got[i + shift[r]] == encode<Word>(sum) && control[r].fault == 0) continue;
      std::printf("FAILED: call %u, %u ranks, %u elements: rank %u, element %u, fault %u\n", number, ranks, count, r, i,
                  control[r].fault);
      std::exit(1);
    }
    CHECK(cudaFree(mine[r].in));
    CHECK(cudaFree(mine[r].out));
  }
}

template <int N>
void calls(unsigned ranks) {
  // As set-up leaves the windows: header zero, stages sentinel.
  const std::vector<uint32_t> sentinel((kWindowBytes - TWOSHOT_HEADER_BYTES) / 4, TWOSHOT_SENTINEL);
  for (unsigned r = 0; r < ranks; r++) {
    CHECK(cudaMemset(windows + r * kWindowBytes, 0, TWOSHOT_HEADER_BYTES));
    CHECK(cudaMemcpy(windows + r * kWindowBytes + TWOSHOT_HEADER_BYTES, sentinel.data(), sentinel.size() * 4,
                     cudaMemcpyHostToDevice));
    control[r] = TwoshotControl{};
  }
  unsigned number = 0;
  for (unsigned count : {1u, 3u, 37u, 1000u, 4099u, kMaxCount, 5u, 2000u}) {
    call<kOneShot, twoshot::f32, float, N>(ranks, count, number++);
    call<kTwoShot, twoshot::f32, float, N>(ranks, count, number++);
    call<kTwoShot, twoshot::bf16, uint16_t, N>(ranks, count, number++);
    call<kOneShot, twoshot::bf16, uint16_t, N>(ranks, count, number++);
    call<kBulk, twoshot::bf16, uint16_t, N>(ranks, count, number++);
    call<kBulk, twoshot::f32, float, N>(ranks, count, number++);
  }
  std::printf("%u ranks: %u calls, every element as expected\n", ranks, number);
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  alarm(280);
  CHECK(cudaMalloc(&windows, kMaxRanks * kWindowBytes));
  CHECK(cudaHostAlloc(&control, kMaxRanks * sizeof *control, cudaHostAllocMapped));
  CHECK(cudaHostGetDevicePointer(&control_on_device, control, 0));
  calls<2>(2);
  calls<0>(3);
  calls<4>(4);
  CHECK(cudaFree(windows));
  CHECK(cudaFreeHost(control));
  std::printf("ok\n");
}
