// What the programs of sim_plugin have in common: memory with guards, rendezvous, a ring of connections.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_abi.h"
#include "tables.h"

namespace driver {

constexpr size_t kGuard = 64;
constexpr uint8_t kPoison = 0xa5;

struct Options {
  std::string library, dir, program, memory = "mixed";
  int version = 11, rank = 0, ranks = 1;
  unsigned seed = 1;
};

inline void check(bool good, const std::string& what) {
  if (!good) throw std::runtime_error(what);
}
inline void ok(int code, const char* what) {
  if (code != ncclSuccess) throw std::runtime_error(std::string(what) + " gave " + std::to_string(code));
}
inline void cuda(CUresult code, const char* what) {
  if (code != CUDA_SUCCESS) throw std::runtime_error(std::string(what) + " gave CUDA error " + std::to_string(code));
}

inline auto soon() { return std::chrono::steady_clock::now() + std::chrono::seconds(60); }
inline void in_time(std::chrono::steady_clock::time_point until, const char* what) {
  if (std::chrono::steady_clock::now() > until) throw std::runtime_error(std::string(what) + " did not happen in time");
  std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// Files beside each other stand in for NCCL's bootstrap.
inline void publish(const Options& o, const std::string& name, const std::vector<uint8_t>& bytes) {
  std::string path = o.dir + "/" + name, partial = path + ".partial" + std::to_string(getpid());
  FILE* file = fopen(partial.c_str(), "wb");
  check(file && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size(), "writing " + path);
  fclose(file);
  check(rename(partial.c_str(), path.c_str()) == 0, "naming " + path);
}
inline std::vector<uint8_t> await(const Options& o, const std::string& name, size_t bytes) {
  std::string path = o.dir + "/" + name;
  for (auto until = soon();; in_time(until, path.c_str())) {
    FILE* file = fopen(path.c_str(), "rb");
    if (!file) continue;
    std::vector<uint8_t> got(bytes);
    size_t n = fread(got.data(), 1, bytes, file);
    fclose(file);
    check(n == bytes, path + " is short");
    return got;
  }
}
inline void barrier(const Options& o, const std::string& name) {
  publish(o, name + "." + std::to_string(o.rank), {1});
  for (int r = 0; r < o.ranks; ++r) await(o, name + "." + std::to_string(r), 1);
}

enum class Kind { host, plain, mapped };

// Memory with guards around it: of the host, of cuMemAlloc, or mapped from a handle that can be exported, which is what
// NCCL's own buffers are. In this simulation the host can look at all of it.
class Memory {
 public:
  void* mr = nullptr;

  Memory(size_t bytes, Kind kind) : bytes_(bytes), kind_(kind) {
    size_t whole = bytes + 2 * kGuard;
    if (kind == Kind::host) {
      base_ = static_cast<uint8_t*>(malloc(whole));
    } else if (kind == Kind::plain) {
      CUdeviceptr address = 0;
      cuda(cuMemAlloc_v2(&address, whole), "cuMemAlloc");
      base_ = reinterpret_cast<uint8_t*>(uintptr_t(address));
    } else {
      whole = map(whole, 0);
    }
    memset(base_, kPoison, whole);
  }
  Memory(size_t bytes, bool host) : Memory(bytes, host ? Kind::host : Kind::plain) {}
  Memory(Memory&& other) noexcept
      : mr(other.mr), base_(other.base_), bytes_(other.bytes_), mapped_(other.mapped_), kind_(other.kind_) {
    other.base_ = nullptr;
  }
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (!base_) return;
    if (kind_ == Kind::host) free(base_);
    else if (kind_ == Kind::plain) cuMemFree_v2(CUdeviceptr(uintptr_t(base_)));
    else unmap();
  }
  uint8_t* data() { return base_ + kGuard; }
  size_t size() const { return bytes_; }
  int type() const { return kind_ == Kind::host ? NCCL_PTR_HOST : NCCL_PTR_CUDA; }

  // Other memory at the same address, poisoned.
  void replace() {
    check(kind_ == Kind::mapped, "only mapped memory can be replaced");
    CUdeviceptr address = CUdeviceptr(uintptr_t(base_));
    cuda(cuMemUnmap(address, mapped_), "cuMemUnmap");
    fill(address);
    memset(base_, kPoison, mapped_);
  }

  // What lies outside the first `bytes` is as it was.
  void untouched_beyond(size_t bytes) const {
    for (size_t i = 0; i < kGuard; ++i) check(base_[i] == kPoison, "a guard in front was written");
    for (size_t i = kGuard + bytes; i < kGuard + bytes_ + kGuard; ++i) {
      check(base_[i] == kPoison, "a byte behind a message was written");
    }
  }

 private:
  static CUmemAllocationProp properties() {
    int fabric = 0;
    CUdevice device;
    cuda(cuCtxGetDevice(&device), "cuCtxGetDevice");
    cuda(cuDeviceGetAttribute(&fabric, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, device), "an attribute");
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemAllocationProp both = prop;
    both.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | CU_MEM_HANDLE_TYPE_FABRIC;
    // Where the host is in a fabric.
    CUmemGenericAllocationHandle probe;
    size_t granule = 0;
    cuda(cuMemGetAllocationGranularity(&granule, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "the granularity");
    if (fabric && cuMemCreate(&probe, granule, &both, 0) == CUDA_SUCCESS) {
      cuMemRelease(probe);
      return both;
    }
    return prop;
  }
  // Rounds up to whole granules and maps.
  size_t map(size_t whole, CUdeviceptr address) {
    CUmemAllocationProp prop = properties();
    size_t granule = 0;
    cuda(cuMemGetAllocationGranularity(&granule, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "the granularity");
    mapped_ = (whole + granule - 1) / granule * granule;
    cuda(cuMemAddressReserve(&address, mapped_, 0, 0, 0), "cuMemAddressReserve");
    base_ = reinterpret_cast<uint8_t*>(uintptr_t(address));
    fill(address);
    return mapped_;
  }
  void fill(CUdeviceptr address) {
    CUmemAllocationProp prop = properties();
    CUmemGenericAllocationHandle handle;
    CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    cuda(cuMemCreate(&handle, mapped_, &prop, 0), "cuMemCreate");
    cuda(cuMemMap(address, mapped_, 0, handle, 0), "cuMemMap");
    cuda(cuMemSetAccess(address, mapped_, &access, 1), "cuMemSetAccess");
    // The mapping holds it.
    cuda(cuMemRelease(handle), "cuMemRelease");
  }
  void unmap() {
    CUdeviceptr address = CUdeviceptr(uintptr_t(base_));
    cuMemUnmap(address, mapped_);
    cuMemAddressFree(address, mapped_);
  }

  uint8_t* base_;
  size_t bytes_, mapped_ = 0;
  Kind kind_;
};

// Byte `i` of message `number` of a rank.
inline uint8_t content(int rank, uint64_t number, size_t i) {
  uint64_t x = (uint64_t(rank) << 40) ^ (number << 20) ^ (i * 0x9e3779b97f4a7c15ull);
  return uint8_t((x ^ (x >> 29) ^ (x >> 13)) * 0xbf58476d1ce4e5b9ull >> 56);
}

struct Ring {
  void* send = nullptr;
  void* recv = nullptr;
};

inline Ring connect_ring(const Options& o, const Net& net, const std::string& name, bool late = false) {
  std::vector<uint8_t> mine(NCCL_NET_HANDLE_MAXSIZE);
  void* listener = nullptr;
  ok(net.listen(0, mine.data(), &listener), "listen");
  check(listener != nullptr, "no listener");
  publish(o, name + "." + std::to_string(o.rank), mine);
  auto next = await(o, name + "." + std::to_string((o.rank + 1) % o.ranks), NCCL_NET_HANDLE_MAXSIZE);
  Ring ring;
  bool again = false;
  if (late && o.rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(700));
  for (auto until = soon(); !ring.send || !ring.recv; in_time(until, "connecting")) {
    if (!ring.send) ok(net.connect(0, next.data(), &ring.send), "connect");
    if (!ring.recv) ok(net.accept(listener, &ring.recv), "accept");
    again = again || !ring.send;
  }
  if (late && o.rank == o.ranks - 1) check(again, "connect did not say that it has to be tried again");
  ok(net.close_listen(listener), "closeListen");
  return ring;
}

inline void close_ring(const Net& net, Ring& ring) {
  ok(net.close_send(ring.send), "closeSend");
  ok(net.close_recv(ring.recv), "closeRecv");
}

struct Flight {
  void* request;
  std::vector<size_t> buffers;  // which of the memories it is about
  bool receive = false;
};

// Waits for all, testing in any order.
inline void wait_all(const Net& net, std::vector<Flight>& flights, std::mt19937& random,
              const std::function<void(const Flight&, const int*)>& done_with) {
  for (auto until = soon(); !flights.empty();) {
    size_t at = random() % flights.size();
    int done = 0, sizes[8] = {};
    ok(net.test(flights[at].request, &done, sizes), "test");
    if (!done) {
      in_time(until, "a request");
      continue;
    }
    done_with(flights[at], sizes);
    flights.erase(flights.begin() + long(at));
  }
}

// What the library says of its senders: messages and bytes sent straight, messages and bytes sent through windows, and
// memories that have no straight way.
struct Traffic {
  uint64_t straight, straight_bytes, window, window_bytes, refused;
};
Traffic traffic(const Options& o);

// Programs of direct.cc.
void direct(const Options& o);
void again(const Options& o);
void vanish(const Options& o);
void little(const Options& o);

}  // namespace driver
