// Times the kernels of one or more fat binaries over real links: one process, a thread per rank, ranks spread over the
// GPUs, their windows mapped side by side as the library maps them. For every size and algorithm it tries grids, checks
// every answer, and prints the best time and grid of each binary, so that two builds are compared in one run.
//
//   g++ -std=c++20 -O2 -I kernels -I $CUDA/include -o sweep scripts/gpu/kernel_sweep.cc -lcuda -lpthread
//   ./sweep [--ranks N] [--max BYTES] [--blocks LIMIT] [--only one|two|bulk] [--full] [--host] [--unaligned] NAME=FATBIN...
//
// With --only bulk it tries channels, chunks that the ring holds, and sizes of a chunk instead of grids; with --ring
// CHANNELS,RING_LOG2,CHUNK_LOG2 as well, that one alone. --unaligned: buffers begin r + 1 elements off on rank r.
//
// Needs GPUs that reach each other. Never touches multicast. Every wait is bounded by the kernels' own deadline.
#include <cuda.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "args.h"

#define CHECK(call)                                                                            \
  do {                                                                                         \
    const CUresult status_ = (call);                                                           \
    if (status_ != CUDA_SUCCESS) {                                                             \
      const char* text_ = "?";                                                                 \
      cuGetErrorString(status_, &text_);                                                       \
      std::printf("FAILED: %s:%d: %s: %s\n", __FILE__, __LINE__, #call, text_);                \
      std::_Exit(1);                                                                           \
    }                                                                                          \
  } while (0)

namespace {

struct Options {
  unsigned ranks = 0, blocks = 132;
  size_t min = 1024, max = size_t{16} << 20, oneshot_max = size_t{16} << 20;
  bool one = true, two = true, bulk = false, full = false, host = false;
  bool unaligned = false;
  unsigned ring[3] = {};  // channels, ring_log2, chunk_log2; all 0: try
  bool trigger = false;  // every launch lets its successor in, as with TWOSHOT_PDL=1
  std::string type = "bf16";
  std::vector<std::pair<std::string, std::string>> images;

  size_t offset(unsigned r) const { return unaligned ? 2 * (r + 1) : 0; }
};

struct Rank {
  CUdevice device;
  CUcontext context;
  CUstream stream;
  CUdeviceptr in, out, control_on_device;
  TwoshotControl* control;
  std::vector<CUmodule> modules;
};

struct World {
  unsigned ranks;
  std::vector<Rank> rank;
  CUdeviceptr windows = 0;
  size_t stride = 0, stage = 0;

  World(const Options& options) : ranks(options.ranks), rank(options.ranks) {
    int devices = 0;
    CHECK(cuDeviceGetCount(&devices));
    stage = options.bulk ? TWOSHOT_STAGE_ALIGN : std::max(options.oneshot_max * ranks, 2 * (options.max + 128 * ranks));
    const size_t granule = size_t{2} << 20, ring = options.bulk ? (size_t{256} << 20) * (ranks - 1) : 0;
    stride = (TWOSHOT_HEADER_BYTES + TWOSHOT_STAGES * stage + ring + granule - 1) / granule * granule;
    CHECK(cuMemAddressReserve(&windows, stride * ranks, granule, 0, 0));
    std::vector<CUmemAccessDesc> access;
    for (int d = 0; d < devices; d++) {
      access.push_back({{CU_MEM_LOCATION_TYPE_DEVICE, d}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
    }
    for (unsigned r = 0; r < ranks; r++) {
      Rank& me = rank[r];
      CHECK(cuDeviceGet(&me.device, static_cast<int>(r % devices)));
      CHECK(cuDevicePrimaryCtxRetain(&me.context, me.device));
      CHECK(cuCtxSetCurrent(me.context));
      CUmemAllocationProp property = {};
      property.type = CU_MEM_ALLOCATION_TYPE_PINNED;
      property.location = {CU_MEM_LOCATION_TYPE_DEVICE, static_cast<int>(r % devices)};
      CUmemGenericAllocationHandle handle;
      CHECK(cuMemCreate(&handle, stride, &property, 0));
      CHECK(cuMemMap(windows + r * stride, stride, 0, handle, 0));
      CHECK(cuMemRelease(handle));
      CHECK(cuMemSetAccess(windows + r * stride, stride, access.data(), access.size()));
      CHECK(cuStreamCreate(&me.stream, CU_STREAM_NON_BLOCKING));
      CHECK(cuMemAlloc(&me.in, options.max + 4096));
      CHECK(cuMemAlloc(&me.out, options.max + 4096));
      CHECK(cuMemHostAlloc(reinterpret_cast<void**>(&me.control), 4096, CU_MEMHOSTALLOC_DEVICEMAP));
      CHECK(cuMemHostGetDevicePointer(&me.control_on_device, me.control, 0));
      for (const auto& [name, path] : options.images) {
        std::ifstream file(path, std::ios::binary);
        std::string image((std::istreambuf_iterator<char>(file)), {});
        CUmodule module;
        CHECK(cuModuleLoadData(&module, image.data()));
        me.modules.push_back(module);
      }
    }
  }

  void reset() {
    for (unsigned r = 0; r < ranks; r++) {
      CHECK(cuCtxSetCurrent(rank[r].context));
      CHECK(cuMemsetD32(windows + r * stride, 0, TWOSHOT_HEADER_BYTES / 4));
      CHECK(cuMemsetD32(windows + r * stride + TWOSHOT_HEADER_BYTES, TWOSHOT_SENTINEL,
                        (stride - TWOSHOT_HEADER_BYTES) / 4));
      *rank[r].control = TwoshotControl{};
      CHECK(cuCtxSynchronize());
    }
  }
};

float value(unsigned r, size_t i) { return static_cast<float>((i * 7 + r * 13 + i / 911) % 101); }

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

struct Result {
  double us = 1e9;
  unsigned blocks = 0, threads = 0;
};

struct Grid {
  unsigned blocks, threads;
  unsigned ring_log2 = 0, chunk_log2 = 0;  // bulk only, and then the blocks are the channels
};

// Channels, a ring and chunks of every size whose slots fit the ring's memory.
std::vector<Grid> rings(const Options& options) {
  if (options.ring[0] != 0) return {{options.ring[0], TWOSHOT_BULK_THREADS, options.ring[1], options.ring[2]}};
  std::vector<Grid> all;
  for (const unsigned channels : {16u, 20u, 24u, 32u, 48u, 64u, 128u}) {
    for (unsigned ring = 3; ring <= 5 && channels <= options.blocks; ring++) {
      for (unsigned chunk = 8; chunk <= 10; chunk++) {
        const size_t bytes = size_t{2} * channels << (ring + chunk + 4);
        if (bytes <= size_t{64} << 20) all.push_back({channels, TWOSHOT_BULK_THREADS, ring, chunk});
      }
    }
  }
  return all;
}

std::vector<Grid> grids(size_t lines, const Options& options) {
  std::vector<Grid> all;
  for (const unsigned threads : {64u, 128u, 256u, 384u, 512u}) {
    for (const unsigned blocks : {1u, 2u, 4u, 8u, 16u, 24u, 32u, 48u, 64u, 96u, 128u}) {
      const size_t need = (lines + threads - 1) / threads;
      if (blocks > options.blocks || (blocks > need && blocks > 1)) continue;
      if (need > size_t{blocks} * (options.full ? 64 : 24) && blocks != options.blocks) continue;
      if (threads < 128 && lines > 8192) continue;
      all.push_back({blocks, threads});
    }
  }
  return all;
}

// One configuration on all ranks: checked once, then graphs of launches; best of repeats, slowest rank.
double time_one(const Options& options, World& world, size_t image, const std::string& kernel, const Grid& grid,
                size_t bytes) {
  const unsigned launches = bytes >= (size_t{64} << 20) ? 5 : bytes >= (size_t{4} << 20) ? 20 : 50, repeats = 5;
  std::barrier meet(world.ranks);
  std::vector<double> best(world.ranks, 1e9);
  std::vector<std::thread> threads;
  for (unsigned r = 0; r < world.ranks; r++) {
    threads.emplace_back([&, r] {
      Rank& me = world.rank[r];
      CHECK(cuCtxSetCurrent(me.context));
      CUfunction function;
      CHECK(cuModuleGetFunction(&function, me.modules[image], kernel.c_str()));
      TwoshotArgs args = {};
      args.in = me.in + options.offset(r);
      args.out = me.out + options.offset(r);
      args.count = bytes / 2;
      args.windows = world.windows;
      args.window_stride = world.stride;
      args.control = me.control_on_device;
      args.stage_bytes = world.stage;
      args.timeout_ns = 2'000'000'000;
      args.rank = r;
      args.ranks = world.ranks;
      args.type = 9;
      args.trigger = options.trigger;
      args.channels = grid.blocks;
      args.ring_log2 = static_cast<uint16_t>(grid.ring_log2);
      args.chunk_log2 = static_cast<uint16_t>(grid.chunk_log2);
      CHECK(cuMemsetD8Async(me.out, 0xA5, bytes + options.offset(r), me.stream));
      CHECK(cuStreamSynchronize(me.stream));
      CUgraph graph;
      CUgraphExec executable;
      CHECK(cuStreamBeginCapture(me.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
      for (unsigned i = 0; i < launches; i++) {
        CUlaunchAttribute attribute = {};
        attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        CUlaunchConfig config = {};
        config.gridDimX = grid.blocks;
        config.blockDimX = grid.threads;
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
        config.hStream = me.stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
        void* parameters[] = {&args};
        CHECK(cuLaunchKernelEx(&config, function, parameters, nullptr));
      }
      CHECK(cuStreamEndCapture(me.stream, &graph));
      CHECK(cuGraphInstantiate(&executable, graph, 0));
      CHECK(cuGraphUpload(executable, me.stream));
      CHECK(cuStreamSynchronize(me.stream));
      CUevent begin, end;
      CHECK(cuEventCreate(&begin, 0));
      CHECK(cuEventCreate(&end, 0));
      for (unsigned repeat = 0; repeat < repeats; repeat++) {
        meet.arrive_and_wait();
        CHECK(cuEventRecord(begin, me.stream));
        CHECK(cuGraphLaunch(executable, me.stream));
        CHECK(cuEventRecord(end, me.stream));
        CHECK(cuEventSynchronize(end));
        float milliseconds = 0;
        CHECK(cuEventElapsedTime(&milliseconds, begin, end));
        if (repeat > 0) best[r] = std::min(best[r], 1000.0 * milliseconds / launches);
      }
      meet.arrive_and_wait();
      std::vector<uint16_t> got(bytes / 2);
      CHECK(cuMemcpyDtoH(got.data(), me.out + options.offset(r), bytes));
      if (me.control->fault != 0) {
        std::printf("FAILED: %s %u x %u, %zu B: rank %u fault %u, peer %u phase %u line %llu\n", kernel.c_str(), grid.blocks,
                    grid.threads, bytes, r, me.control->fault, me.control->peer, me.control->phase,
                    static_cast<unsigned long long>(me.control->line));
        std::_Exit(1);
      }
      const size_t every = bytes > size_t{8} << 20 ? 13 : 1;
      for (size_t i = 0; i < got.size(); i += every) {
        float sum = 0;
        for (unsigned q = 0; q < world.ranks; q++) sum += value(q, i);
        if (got[i] != to_bf16(sum)) {
          std::printf("FAILED: %s %u x %u, %zu B: rank %u element %zu is %04x, expected %04x\n", kernel.c_str(),
                      grid.blocks, grid.threads, bytes, r, i, got[i], to_bf16(sum));
          std::_Exit(1);
        }
      }
      CHECK(cuEventDestroy(begin));
      CHECK(cuEventDestroy(end));
      CHECK(cuGraphExecDestroy(executable));
      CHECK(cuGraphDestroy(graph));
    });
  }
  for (auto& thread : threads) thread.join();
  return *std::max_element(best.begin(), best.end());
}

// The best ring for each number of channels, of every image.
void sweep_rings(const Options& options, World& world, size_t bytes) {
  const bool special = world.ranks == 2;
  const std::string kernel = "twoshot_bulk_" + options.type + "_" + (special ? std::to_string(world.ranks) : "n") + "_uc";
  for (size_t image = 0; image < options.images.size(); image++) {
    std::printf("%6zu KiB %-8s", bytes >> 10, options.images[image].first.c_str());
    double best = 1e9;
    Grid with = {};
    unsigned channels = 0;
    const auto flush = [&] {
      if (best < 1e9) std::printf(" | %3u: %7.2f (%2u x %2u K)", channels, best, 1u << with.ring_log2, 16u << with.chunk_log2 >> 10);
      best = 1e9;
    };
    for (const Grid& grid : rings(options)) {
      if (grid.blocks != channels) flush();
      channels = grid.blocks;
      if (options.ring[0] == 0 && bytes / world.ranks < size_t{16} << grid.chunk_log2 << (channels > 16 ? 4 : 3)) continue;
      world.reset();  // slots lie elsewhere
      const double us = time_one(options, world, image, kernel, grid, bytes);
      if (us < best) best = us, with = grid;
    }
    flush();
    std::printf("\n");
  }
}

// Nanoseconds of host time of the driver calls that a routed call may make, on one stream, nobody waiting.
void time_host(World& world) {
  Rank& me = world.rank[0];
  CHECK(cuCtxSetCurrent(me.context));
  CUfunction function;
  CHECK(cuModuleGetFunction(&function, me.modules[0], "twoshot_oneshot_bf16_2_uc"));
  CUevent event, other;
  CHECK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
  CHECK(cuEventCreate(&other, CU_EVENT_DISABLE_TIMING));
  TwoshotArgs args = {};  // nothing to do: no elements, and an own window
  args.windows = world.windows;
  args.window_stride = world.stride;
  args.control = me.control_on_device;
  args.stage_bytes = world.stage;
  args.ranks = 2;
  const auto launch = [&](unsigned attributes) {
    CUlaunchAttribute attribute[2] = {};
    attribute[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute[0].value.programmaticStreamSerializationAllowed = 1;
    attribute[1].id = CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT;
    attribute[1].value.launchCompletionEvent.event = other;
    CUlaunchConfig config = {};
    config.gridDimX = config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = 128, config.blockDimY = config.blockDimZ = 1;
    config.hStream = me.stream;
    config.attrs = attribute;
    config.numAttrs = attributes;
    void* parameters[] = {&args};
    CHECK(cuLaunchKernelEx(&config, function, parameters, nullptr));
  };
  const auto time = [&](const char* what, auto call) {
    double best = 1e9;
    for (int round = 0; round < 20; round++) {
      CHECK(cuStreamSynchronize(me.stream));
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 100; i++) call();
      best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / 100);
    }
    std::printf("host: %-34s %7.0f ns\n", what, best);
  };
  time("launch", [&] { launch(0); });
  time("launch, programmatic", [&] { launch(1); });
  time("launch, programmatic, event inside", [&] { launch(2); });
  time("launch, programmatic + record", [&] { launch(1); CHECK(cuEventRecord(event, me.stream)); });
  time("launch + record", [&] { launch(0); CHECK(cuEventRecord(event, me.stream)); });
  time("record", [&] { CHECK(cuEventRecord(event, me.stream)); });
  time("context", [&] { CUcontext c; CHECK(cuCtxGetCurrent(&c)); });
  time("capture info", [&] {
    CUstreamCaptureStatus status;
    cuuint64_t id;
    CUgraph graph;
    const CUgraphNode* nodes;
    const CUgraphEdgeData* edges;
    size_t count;
    CHECK(cuStreamGetCaptureInfo(me.stream, &status, &id, &graph, &nodes, &edges, &count));
  });
  time("is capturing", [&] { CUstreamCaptureStatus status; CHECK(cuStreamIsCapturing(me.stream, &status)); });
  time("stream id", [&] { unsigned long long id; CHECK(cuStreamGetId(me.stream, &id)); });
  CHECK(cuStreamSynchronize(me.stream));
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Options options;
  for (int i = 1; i < argc; i++) {
    const std::string word = argv[i];
    const auto number = [&] { return std::strtoull(argv[++i], nullptr, 0); };
    if (word == "--ranks") options.ranks = static_cast<unsigned>(number());
    else if (word == "--max") options.max = number();
    else if (word == "--min") options.min = number();
    else if (word == "--oneshot-max") options.oneshot_max = number();
    else if (word == "--blocks") options.blocks = static_cast<unsigned>(number());
    else if (word == "--full") options.full = true;
    else if (word == "--host") options.host = true;
    else if (word == "--unaligned") options.unaligned = true;
    else if (word == "--ring") {
      if (std::sscanf(argv[++i], "%u,%u,%u", &options.ring[0], &options.ring[1], &options.ring[2]) != 3) return 2;
    }
    else if (word == "--trigger") options.trigger = true;
    else if (word == "--only") {
      const std::string only = argv[++i];
      options.one = only == "one", options.two = only == "two", options.bulk = only == "bulk";
    }
    else if (const auto at = word.find('='); at != std::string::npos) options.images.emplace_back(word.substr(0, at), word.substr(at + 1));
    else return std::printf("what is %s?\n", word.c_str()), 2;
  }
  CHECK(cuInit(0));
  int devices = 0;
  CHECK(cuDeviceGetCount(&devices));
  if (options.ranks == 0) options.ranks = static_cast<unsigned>(devices);
  World world(options);
  for (unsigned r = 0; r < world.ranks; r++) {
    CHECK(cuCtxSetCurrent(world.rank[r].context));
    std::vector<uint16_t> host(options.max / 2);
    for (size_t i = 0; i < host.size(); i++) host[i] = to_bf16(value(r, i));
    CHECK(cuMemcpyHtoD(world.rank[r].in + options.offset(r), host.data(), options.max));
  }
  char name[64];
  CHECK(cuDeviceGetName(name, sizeof name, 0));
  std::printf("%u ranks on %d x %s, bf16 sum, graphs, us per launch: best (blocks x threads), then within 32 blocks\n", world.ranks, devices, name);
  if (options.host) world.reset(), time_host(world);
  const bool special = world.ranks == 2 || world.ranks == 4 || world.ranks == 8;
  for (size_t bytes = options.min; bytes <= options.max; bytes *= bytes < 65536 ? 4 : 2) {
    if (options.bulk) {
      sweep_rings(options, world, bytes);
      continue;
    }
    std::printf("%9zu", bytes);
    for (const bool two : {false, true}) {
      if (two ? !options.two : !options.one || bytes > options.oneshot_max) continue;
      for (size_t image = 0; image < options.images.size(); image++) {
        const std::string kernel = std::string("twoshot_") + (two ? "twoshot" : "oneshot") + "_" + options.type + "_" +
                                   (special ? std::to_string(world.ranks) : "n") + "_uc";
        Result best, within;
        world.reset();
        const size_t lines = bytes / 16 / (two ? world.ranks : 1);
        for (const Grid& grid : grids(lines, options)) {
          const double us = time_one(options, world, image, kernel, grid, bytes);
          if (us < best.us) best = {us, grid.blocks, grid.threads};
          if (grid.blocks <= 32 && us < within.us) within = {us, grid.blocks, grid.threads};
        }
        std::printf(" | %s %s %7.2f (%3u x %3u) %7.2f (%2u x %3u)", two ? "two" : "one", options.images[image].first.c_str(),
                    best.us, best.blocks, best.threads, within.us, within.blocks, within.threads);
      }
    }
    std::printf("\n");
  }
}
