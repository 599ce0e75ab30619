// Checks on one real GPU the kernels that multiply before a pre-multiplied sum, and times them: every type, any
// alignment, in and out of place, factor by value and on the device, chains of programmatic launches, eager and captured.
// Needs a GPU of compute capability 9.0 or newer, ends by itself within a minute.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 -I kernels -o scale_check scripts/gpu/scale_check.cu && ./scale_check
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernel_check_reference.h"
#include "scale.cuh"

#define TWOSHOT_DEFINE_SCALE(type)                                                                         \
  extern "C" __global__ void __launch_bounds__(TWOSHOT_MAX_THREADS, 1)                                     \
      twoshot_scale_##type(const __grid_constant__ TwoshotScaleArgs args) {                                \
    twoshot::Scale<twoshot::scale_##type>(args).run();                                                     \
  }
TWOSHOT_DEFINE_SCALE(f32)
TWOSHOT_DEFINE_SCALE(f16)
TWOSHOT_DEFINE_SCALE(bf16)
TWOSHOT_DEFINE_SCALE(i8)
TWOSHOT_DEFINE_SCALE(i32)
TWOSHOT_DEFINE_SCALE(i64)
TWOSHOT_DEFINE_SCALE(f64)
TWOSHOT_DEFINE_SCALE(fp8)

#define CHECK(call)                                                                                   \
  do {                                                                                                \
    const cudaError_t status_ = (call);                                                               \
    if (status_ != cudaSuccess) {                                                                     \
      std::printf("FAILED: %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

namespace {

constexpr size_t kGuard = 64;
constexpr uint8_t kPoison = 0xA5;
constexpr size_t kMost = size_t{64} << 20;

void (*kernel_of(Type type))(TwoshotScaleArgs) {
  switch (type) {
    case kI8: case kU8: return twoshot_scale_i8;
    case kI32: case kU32: return twoshot_scale_i32;
    case kI64: case kU64: return twoshot_scale_i64;
    case kF16: return twoshot_scale_f16;
    case kBF16: return twoshot_scale_bf16;
    case kF64: return twoshot_scale_f64;
    case kF32: return twoshot_scale_f32;
    default: return twoshot_scale_fp8;
  }
}

// An exact product as a float that rounds on to fewer bits as the product would: what is cut off leaves its mark.
float odd(double value) {
  float near = static_cast<float>(value);
  if (std::isnan(value) || static_cast<double>(near) == value) return near;
  uint32_t bits;
  std::memcpy(&bits, &near, 4);
  if (std::fabs(static_cast<double>(near)) > std::fabs(value)) bits--;
  bits |= 1;
  std::memcpy(&near, &bits, 4);
  return near;
}

uint64_t product(Type type, uint64_t a, uint64_t b) {
  if (!is_float(type)) return a * b;
  if (type == kF64) {
    double x, y;
    std::memcpy(&x, &a, 8);
    std::memcpy(&y, &b, 8);
    x *= y;
    std::memcpy(&a, &x, 8);
    return a;
  }
  const double exact = static_cast<double>(value_of(type, a)) * static_cast<double>(value_of(type, b));
  if (type == kF32) return bits_of(type, static_cast<float>(exact));
  // NCCL multiplies bytes in f16.
  if (size_of(type) == 1) return bits_of(type, value_of(kF16, narrow(kF16, odd(exact))));
  return narrow(type, odd(exact));
}

struct Bench {
  uint8_t *in, *out, *factor;
  cudaStream_t stream;
  Bench() {
    CHECK(cudaMalloc(&in, kMost + 2 * kGuard));
    CHECK(cudaMalloc(&out, kMost + 2 * kGuard));
    CHECK(cudaMalloc(&factor, 8));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
};

void launch(const Bench& bench, Type type, const uint8_t* in, uint8_t* out, size_t count, uint64_t factor, bool on_device,
            bool dependent, unsigned blocks) {
  const auto from = reinterpret_cast<uintptr_t>(in), to = reinterpret_cast<uintptr_t>(out);
  TwoshotScaleArgs args = {};
  args.in = from;
  args.out = to;
  args.count = count;
  args.head = (from ^ to) % 16 != 0 ? count : std::min<uint64_t>(count, (0 - from) % 16 / size_of(type));
  args.factor = factor;
  args.factor_address = on_device ? reinterpret_cast<uintptr_t>(bench.factor) : 0;
  args.type = type;
  args.trigger = 1;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = 256;
  config.stream = bench.stream;
  config.attrs = &attribute;
  config.numAttrs = dependent;
  CHECK(cudaLaunchKernelEx(&config, kernel_of(type), args));
}

unsigned long checked = 0;

void check(const Bench& bench, Type type, const Bytes& data, uint64_t factor, size_t in_at, size_t out_at, bool on_device) {
  const size_t size = size_of(type), count = data.size() / size;
  const bool in_place = in_at == SIZE_MAX;
  uint8_t* out = (in_place ? bench.in : bench.out) + kGuard + out_at;
  uint8_t* in = in_place ? out : bench.in + kGuard + in_at;
  CHECK(cudaMemsetAsync(bench.out, kPoison, data.size() + 2 * kGuard, bench.stream));
  CHECK(cudaMemsetAsync(bench.in, kPoison, data.size() + 2 * kGuard, bench.stream));
  CHECK(cudaMemcpyAsync(in, data.data(), data.size(), cudaMemcpyHostToDevice, bench.stream));
  if (on_device) CHECK(cudaMemcpyAsync(bench.factor, &factor, size, cudaMemcpyHostToDevice, bench.stream));
  launch(bench, type, in, out, count, on_device ? ~factor : factor, on_device, true, 1 + count % 37);
  Bytes got(data.size() + 2 * kGuard);
  uint8_t* whole = in_place ? bench.in : bench.out;
  CHECK(cudaMemcpyAsync(got.data(), whole, got.size(), cudaMemcpyDeviceToHost, bench.stream));
  CHECK(cudaStreamSynchronize(bench.stream));
  for (size_t i = 0; i < got.size(); i++) {
    const bool inside = i >= kGuard + out_at && i < kGuard + out_at + data.size();
    if (!inside && got[i] != kPoison) {
      std::printf("FAILED: %s: byte %zu outside the output was written\n", kTypeNames[type], i);
      std::exit(1);
    }
  }
  const uint64_t mask = ~uint64_t{0} >> (64 - 8 * size);
  for (size_t i = 0; i < count; i++) {
    const uint64_t wanted = product(type, bits_at(type, data.data(), i), factor & mask) & mask;
    const uint64_t have = bits_at(type, got.data() + kGuard + out_at, i);
    if (wanted == have || (is_nan(type, wanted) && is_nan(type, have))) continue;
    std::printf("FAILED: %s, element %zu of %zu: %llx times %llx is %llx, not %llx\n", kTypeNames[type], i, count,
                static_cast<unsigned long long>(bits_at(type, data.data(), i)),
                static_cast<unsigned long long>(factor & mask), static_cast<unsigned long long>(wanted),
                static_cast<unsigned long long>(have));
    std::exit(1);
  }
  checked += count;
}

// x * 3^n, each launch behind the one before it by programmatic launch only.
void chain(const Bench& bench, bool captured) {
  constexpr size_t kCount = 300001;
  constexpr int kTimes = 200;
  std::vector<uint32_t> data(kCount), got(kCount);
  for (size_t i = 0; i < kCount; i++) data[i] = static_cast<uint32_t>(i * 2654435761u);
  CHECK(cudaMemcpy(bench.in, data.data(), 4 * kCount, cudaMemcpyHostToDevice));
  cudaGraphExec_t exec = nullptr;
  if (captured) CHECK(cudaStreamBeginCapture(bench.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kTimes; i++) {
    uint8_t *from = i % 2 ? bench.out : bench.in, *to = i % 2 ? bench.in : bench.out;
    launch(bench, kU32, from, to, kCount, 3, false, true, 1 + static_cast<unsigned>(i % 64));
  }
  if (captured) {
    cudaGraph_t graph;
    CHECK(cudaStreamEndCapture(bench.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphLaunch(exec, bench.stream));
  }
  CHECK(cudaStreamSynchronize(bench.stream));
  CHECK(cudaMemcpy(got.data(), bench.in, 4 * kCount, cudaMemcpyDeviceToHost));
  uint32_t power = 1;
  for (int i = 0; i < kTimes; i++) power *= 3;
  for (size_t i = 0; i < kCount; i++) {
    if (got[i] == data[i] * power) continue;
    std::printf("FAILED: a chain of %s launches, element %zu\n", captured ? "captured" : "eager", i);
    std::exit(1);
  }
}

void times(const Bench& bench, Type type, size_t skew) {
  std::printf("%-5s %s", kTypeNames[type], skew ? "skewed " : "aligned");
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (const size_t bytes : {size_t{8}, size_t{64} << 10, size_t{1} << 20, size_t{8} << 20, size_t{32} << 20}) {
    constexpr int kTimes = 100;
    const size_t count = bytes / size_of(type);
    // As route::pass has it, with threads of 256.
    const auto blocks = static_cast<unsigned>(std::min<size_t>(256, std::max<size_t>(1, (skew ? count : bytes / 64) / 256)));
    auto run = [&] { launch(bench, type, bench.in, bench.out + skew, count, 1, false, true, blocks); };
    for (int i = 0; i < 10; i++) run();
    CHECK(cudaEventRecord(begin, bench.stream));
    for (int i = 0; i < kTimes; i++) run();
    CHECK(cudaEventRecord(end, bench.stream));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    std::printf("  %zu B: %.2f us", bytes, ms * 1000 / kTimes);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  Bench bench;
  std::mt19937_64 random(20261125);
  for (unsigned t = 0; t < kTypes; t++) {
    const auto type = static_cast<Type>(t);
    const size_t size = size_of(type);
    for (int round = 0; round < 60; round++) {
      const size_t count = 1 + random() % (round % 3 ? 200 : 50000);
      Bytes data(count * size);
      for (auto& byte : data) byte = static_cast<uint8_t>(random() >> 13);
      const size_t in_at = random() % (32 / size) * size, out_at = random() % (32 / size) * size;
      check(bench, type, data, random(), round % 4 == 0 ? SIZE_MAX : round % 2 ? out_at : in_at, out_at, round % 5 == 1);
    }
    if (size > 2) continue;
    // Every value, by every factor or by many.
    Bytes all((size_t{1} << (8 * size)) * size);
    for (size_t i = 0; i < all.size() / size; i++) std::memcpy(all.data() + i * size, &i, size);
    for (unsigned factor = 0; factor < 256; factor++) {
      check(bench, type, all, size == 1 ? factor : factor * 257u + factor / 3, 0, 0, factor % 2);
    }
  }
  std::printf("%lu products right\n", checked);
  for (int i = 0; i < 5; i++) chain(bench, i % 2);
  std::printf("chains of programmatic launches right, eager and captured\n");
  for (const Type type : {kF32, kBF16, kI8, kE4M3, kF64}) {
    times(bench, type, 0);
    times(bench, type, size_of(type));
  }
  std::printf("OK\n");
  return 0;
}
