// The host's side: windows and payloads, verification, launches in graphs, and their times.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "sets.cuh"

#define CHECK(call)                                                                               \
  do {                                                                                            \
    const cudaError_t status_ = (call);                                                           \
    if (status_ != cudaSuccess) {                                                                 \
      std::printf("FAILED: %s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status_));        \
      std::fflush(stdout);                                                                        \
      std::_Exit(1);                                                                              \
    }                                                                                             \
  } while (0)

namespace {

// ---- verification ----

__global__ void check(const uint32_t* out, const uint32_t* expected, size_t words, size_t guard,
                      unsigned long long* wrong) {
  const size_t step = size_t{gridDim.x} * blockDim.x, first = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  unsigned long long bad = 0;
  for (size_t i = first; i < words; i += step) bad += out[i] != expected[i];
  for (size_t i = words + first; i < words + guard; i += step) bad += out[i] != 0xA5A5A5A5u;
  if (bad != 0) atomicAdd(wrong, bad);
}

__global__ void delay(uint32_t ns) {
  const uint64_t until = now_ns() + ns;
  while (now_ns() < until) {
  }
}

// ---- ranks ----

// A barrier of the ranks' threads.
class Meet {
 public:
  explicit Meet(int n) : n_(n) {}
  void wait() {
    const int turn = turn_.load();
    if (arrived_.fetch_add(1) + 1 == n_) {
      arrived_ = 0;
      turn_.fetch_add(1);
    } else {
      while (turn_.load() == turn) std::this_thread::yield();
    }
  }

 private:
  const int n_;
  std::atomic<int> arrived_{0}, turn_{0};
};

constexpr int kPayloads = 3;
struct Rank {
  int device = 0;
  cudaStream_t stream;
  cudaEvent_t begin, end;
  char *window, *out, *in[kPayloads], *expected[kPayloads];
  unsigned long long* wrong;
};

struct Best {
  double best = 1e9, median = 1e9;
  uint32_t blocks = 0;
  Set set{};
};

double seconds = 60;
std::vector<Rank> rank;
std::chrono::steady_clock::time_point began;
int tried = 0, wrongs = 0, untimed = 0;
std::vector<std::string> wrong_text;

double elapsed() { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); }
bool over() { return elapsed() > seconds - 1.0; }

// ---- launches and times ----

void launch(const Rank& me, const Set& s, uint32_t blocks, size_t dynamic, const Args& a) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(s.threads());
  config.dynamicSmemBytes = dynamic;
  config.stream = me.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, kernel_for(s), a));
}

std::map<std::tuple<Set, size_t, uint32_t>, bool> verified;

// Checked on the first visit, then timed. Both results are 1e9 where it is wrong or does not apply.
Best measure(const Set& s, size_t bytes, uint32_t blocks, int repeats) {
  Best result;
  result.blocks = blocks, result.set = s;
  Args common;
  size_t dynamic;
  if (!arguments(s, bytes, blocks, common, dynamic)) return result;
  if (over()) return untimed++, result;
  const auto key = std::tuple(s, bytes, blocks);
  const auto known = verified.find(key);
  if (known != verified.end() && !known->second) return result;
  const bool verify = known == verified.end();
  const size_t mib = bytes >> 20;  // every size is a power of two
  const int launches = mib <= 2 ? 50 : mib <= 8 ? 20 : mib <= 32 ? 10 : 6;
  tried++;

  Meet meet(ranks);
  std::atomic<unsigned long long> wrong{0}, errors{0};
  std::vector<std::vector<double>> us(repeats, std::vector<double>(ranks, 0.0));
  const auto work = [&](int r) {
    Rank& me = rank[r];
    CHECK(cudaSetDevice(me.device));
    Args a = common;
    a.rank = r;
    a.out = reinterpret_cast<uint64_t>(me.out);
    for (int p = 0; p < ranks; p++) a.window[p] = reinterpret_cast<uint64_t>(rank[p].window);
    const auto compare = [&](int payload) {
      check<<<128, 512, 0, me.stream>>>(reinterpret_cast<uint32_t*>(me.out),
                                        reinterpret_cast<uint32_t*>(me.expected[payload]), bytes / 4, kGuard / 4,
                                        me.wrong);
      CHECK(cudaGetLastError());
    };
    // After the stream is idle, everybody learns whether anything went wrong anywhere.
    const auto all_well = [&] {
      unsigned long long bad = 0;
      uint32_t error = 0;
      CHECK(cudaStreamSynchronize(me.stream));
      CHECK(cudaMemcpyAsync(&bad, me.wrong, sizeof bad, cudaMemcpyDeviceToHost, me.stream));
      CHECK(cudaMemcpyAsync(&error, me.window + kErrorOffset, sizeof error, cudaMemcpyDeviceToHost, me.stream));
      CHECK(cudaStreamSynchronize(me.stream));
      wrong += bad, errors += error;
      meet.wait();
      return wrong == 0 && errors == 0;
    };
    CHECK(cudaMemsetAsync(me.wrong, 0, sizeof *me.wrong, me.stream));
    if (verify) {
      CHECK(cudaStreamSynchronize(me.stream));
      meet.wait();
      for (int i = 0; i < 5; i++) {
        const int payload = (i + 1) % kPayloads;
        a.in = reinterpret_cast<uint64_t>(me.in[payload]);
        CHECK(cudaMemsetAsync(me.out, 0xA5, bytes + kGuard, me.stream));
        if (i % (ranks + 1) == r) {
          delay<<<1, 1, 0, me.stream>>>(30000);  // nobody should rely on the ranks' keeping step
          CHECK(cudaGetLastError());
        }
        launch(me, s, blocks, dynamic, a);
        compare(payload);
      }
      if (!all_well()) return;
    }
    a.in = reinterpret_cast<uint64_t>(me.in[0]);
    CHECK(cudaMemsetAsync(me.out, 0xA5, bytes + kGuard, me.stream));
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(me.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; i++) launch(me, s, blocks, dynamic, a);
    CHECK(cudaStreamEndCapture(me.stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaGraphUpload(executable, me.stream));
    CHECK(cudaStreamSynchronize(me.stream));
    for (int i = 0; i <= repeats; i++) {  // the first one warms up
      meet.wait();
      CHECK(cudaEventRecord(me.begin, me.stream));
      CHECK(cudaGraphLaunch(executable, me.stream));
      CHECK(cudaEventRecord(me.end, me.stream));
      CHECK(cudaEventSynchronize(me.end));
      float milliseconds = 0;
      CHECK(cudaEventElapsedTime(&milliseconds, me.begin, me.end));
      if (i > 0) us[i - 1][r] = 1000.0 * milliseconds / launches;
    }
    compare(0);
    all_well();
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
  };
  std::vector<std::thread> threads;
  for (int r = 1; r < ranks; r++) threads.emplace_back(work, r);
  work(0);
  for (auto& t : threads) t.join();

  const bool good = wrong == 0 && errors == 0;
  verified[key] = good;
  if (!good) {
    wrongs++;
    if (wrong_text.size() < 12) {
      char text[256];
      std::snprintf(text, sizeof text, "WRONG: %c %zu KiB, %u blocks, %s: %llu words wrong, %llu ranks gave up",
                    s.variant, bytes >> 10, blocks, s.text().c_str(), wrong.load(), errors.load());
      wrong_text.push_back(text);
      std::printf("%s\n", text);
    }
    for (auto& me : rank) {  // every GPU is idle
      CHECK(cudaSetDevice(me.device));
      CHECK(cudaMemset(me.window, 0, kDataOffset));
      CHECK(cudaDeviceSynchronize());
    }
    return result;
  }
  std::vector<double> slowest;
  for (const auto& one : us) slowest.push_back(*std::max_element(one.begin(), one.end()));
  std::sort(slowest.begin(), slowest.end());
  result.best = slowest.front();
  result.median = slowest[slowest.size() / 2];
  return result;
}

// ---- payloads and windows ----

uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

float from_bf16(uint16_t b) {
  const uint32_t bits = uint32_t{b} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void prepare() {
  multiprocessors = 1 << 30;
  for (int r = 0; r < ranks; r++) {
    Rank& me = rank[r];
    me.device = r % devices;
    CHECK(cudaSetDevice(me.device));
    int n = 0;
    CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, me.device));
    multiprocessors = std::min(multiprocessors, n);
    for (int d = 0; d < std::min(devices, ranks); d++) {
      if (d == me.device) continue;
      const cudaError_t status = cudaDeviceEnablePeerAccess(d, 0);
      if (status == cudaErrorPeerAccessAlreadyEnabled) (void)cudaGetLastError();
      else CHECK(status);
    }
    CHECK(cudaStreamCreateWithFlags(&me.stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&me.begin));
    CHECK(cudaEventCreate(&me.end));
    CHECK(cudaMalloc(&me.window, kDataOffset + 4 * kMaxBytes));
    CHECK(cudaMemset(me.window, 0, kDataOffset));
    CHECK(cudaMemset(me.window + kDataOffset, 0x5A, 4 * kMaxBytes));
    CHECK(cudaMalloc(&me.out, kMaxBytes + kGuard));
    CHECK(cudaMalloc(&me.wrong, sizeof *me.wrong));
    for (int p = 0; p < kPayloads; p++) {
      CHECK(cudaMalloc(&me.in[p], kMaxBytes));
      CHECK(cudaMalloc(&me.expected[p], kMaxBytes));
    }
    // Load everything now: a load behind a spinning peer would wait for it.
    for (const char v : std::string("ABCDEFGH")) {
      for (const Set& s : sets_of(v)) {
        const auto kernel = kernel_for(s);
        cudaFuncAttributes attributes;
        CHECK(cudaFuncGetAttributes(&attributes, kernel));
        if (s.opt == kStash) {
          CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int{kMaxStash}));
        }
        if (static_cast<uint32_t>(attributes.maxThreadsPerBlock) < s.threads()) {
          std::printf("FAILED: %c %s has more threads than %d\n", v, s.text().c_str(), attributes.maxThreadsPerBlock);
          std::_Exit(1);
        }
      }
    }
    check<<<1, 32, 0, me.stream>>>(nullptr, nullptr, 0, 0, me.wrong);
    delay<<<1, 1, 0, me.stream>>>(1);
    CHECK(cudaDeviceSynchronize());
  }
  const size_t count = kMaxBytes / 2;
  std::vector<std::vector<uint16_t>> data(ranks, std::vector<uint16_t>(count));
  std::vector<uint16_t> sums(count);
  const uint64_t seed = std::chrono::steady_clock::now().time_since_epoch().count();
  const size_t workers = std::min<size_t>(8, std::max(1u, std::thread::hardware_concurrency()));
  for (int p = 0; p < kPayloads; p++) {
    std::vector<std::thread> threads;
    for (size_t t = 0; t < workers; t++) {
      threads.emplace_back([&, t] {
        const size_t first = count / workers * t, last = t + 1 == workers ? count : count / workers * (t + 1);
        for (size_t i = first; i < last; i++) {
          float sum = 0;
          for (int r = 0; r < ranks; r++) {
            // Finite, of either sign, exponents 16 apart: rounding and the order of the sum matter.
            const uint64_t x = mix(seed + (i * kMaxRanks + r) * kPayloads + p);
            const auto value = static_cast<uint16_t>((x & 0x807F) | ((119 + (x >> 32) % 16) << 7));
            data[r][i] = value;
            sum = r == 0 ? from_bf16(value) : sum + from_bf16(value);
          }
          sums[i] = to_bf16(sum);
        }
      });
    }
    for (auto& t : threads) t.join();
    for (int r = 0; r < ranks; r++) {
      CHECK(cudaSetDevice(rank[r].device));
      CHECK(cudaMemcpy(rank[r].in[p], data[r].data(), kMaxBytes, cudaMemcpyHostToDevice));
      CHECK(cudaMemcpy(rank[r].expected[p], sums.data(), kMaxBytes, cudaMemcpyHostToDevice));
      CHECK(cudaDeviceSynchronize());
    }
  }
}

}  // namespace
