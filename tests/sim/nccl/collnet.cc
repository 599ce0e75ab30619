// See collnet.h. Ranks with the same index inside their nodes form one collective network, as NCCL's rails do; what the
// ranks of one node have to add beforehand goes over the hub.
//
// Slices travel through buffers that were registered at creation, in device memory when the plugin can take it.
#include "collnet.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "debug.h"
#include "numeric.h"
#include "plugin.h"

namespace simnccl {
namespace {

// A plugin's data path is called on a thread of its own, as NCCL's proxy does: inside a host function it might not use
// the driver. One job at a time.
class Proxy {
 public:
  ~Proxy() {
    if (!thread_.joinable()) return;
    {
      std::lock_guard<std::mutex> guard(lock_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void start() {
    CUcontext context = nullptr;
    cuCtxGetCurrent(&context);
    thread_ = std::thread([this, context] {
      if (context) cuCtxSetCurrent(context);
      std::unique_lock<std::mutex> guard(lock_);
      for (;;) {
        changed_.wait(guard, [this] { return ending_ || job_; });
        if (ending_) return;
        guard.unlock();
        ncclResult_t result = job_();
        guard.lock();
        result_ = result;
        job_ = nullptr;
        changed_.notify_all();
      }
    });
  }

  ncclResult_t run(std::function<ncclResult_t()> job) {
    std::unique_lock<std::mutex> guard(lock_);
    job_ = std::move(job);
    changed_.notify_all();
    changed_.wait(guard, [this] { return !job_; });
    return result_;
  }

 private:
  std::thread thread_;
  std::mutex lock_;
  std::condition_variable changed_;
  std::function<ncclResult_t()> job_;
  ncclResult_t result_ = ncclSuccess;
  bool ending_ = false;
};

}  // namespace

struct CollNetUse {
  CollNetApi api;
  Proxy proxy;
  void* coll = nullptr;
  std::vector<uint32_t> node;  // ranks of this node
  size_t local = 0;            // own index among them
  size_t slice = 0;            // bytes
  size_t depth = 2;            // slices in flight
  bool device_memory = false;
  uint8_t* buffer = nullptr;  // depth times (send slice, receive slice)
  void* send_mr = nullptr;
  void* recv_mr = nullptr;
  uint64_t sequence = 0;
  uint64_t channel = 0;

  uint8_t* send_slot(size_t i) { return buffer + (i % depth) * slice; }
  uint8_t* recv_slot(size_t i) { return buffer + (depth + i % depth) * slice; }
};

bool collnet_possible(const Comm& comm) {
  return comm.plugin && comm.plugin->collnet && env_flag("NCCL_COLLNET_ENABLE");
}

namespace {

void release_buffer(CollNetUse& use) {
  if (!use.buffer) return;
  if (use.device_memory) {
    cuMemFree_v2(CUdeviceptr(reinterpret_cast<uintptr_t>(use.buffer)));
  } else {
    free(use.buffer);
  }
  use.buffer = nullptr;
}

ncclResult_t take_buffer(CollNetUse& use) {
  size_t half = use.depth * use.slice;
  if (use.device_memory) {
    CUdeviceptr address = 0;
    if (cuMemAlloc_v2(&address, 2 * half) != CUDA_SUCCESS) return ncclUnhandledCudaError;
    use.buffer = reinterpret_cast<uint8_t*>(uintptr_t(address));
  } else {
    use.buffer = static_cast<uint8_t*>(aligned_alloc(4096, (2 * half + 4095) / 4096 * 4096));
    if (!use.buffer) return ncclSystemError;
  }
  int type = use.device_memory ? NCCL_PTR_CUDA : NCCL_PTR_HOST;
  ncclResult_t status = use.api.reg(use.coll, use.buffer, half, type, &use.send_mr);
  if (status == ncclSuccess) status = use.api.reg(use.coll, use.buffer + half, half, type, &use.recv_mr);
  return status;
}

// Ranks of this node, and this rail: the ranks at the same index of their nodes. Empty if nodes differ in size.
std::vector<uint32_t> find_rail(const Comm& comm, CollNetUse& use) {
  std::vector<uint64_t> hosts;
  std::vector<std::vector<uint32_t>> nodes;
  for (int r = 0; r < comm.ranks; ++r) {
    uint64_t host = comm.peers[size_t(r)].host;
    size_t at = size_t(std::find(hosts.begin(), hosts.end(), host) - hosts.begin());
    if (at == hosts.size()) {
      hosts.push_back(host);
      nodes.emplace_back();
    }
    nodes[at].push_back(uint32_t(r));
    if (r == comm.rank) use.local = nodes[at].size() - 1;
  }
  std::vector<uint32_t> rail;
  for (auto& node : nodes) {
    if (node.size() != nodes[0].size()) return {};
    rail.push_back(node[use.local]);
    if (std::find(node.begin(), node.end(), uint32_t(comm.rank)) != node.end()) use.node = node;
  }
  return rail;
}

}  // namespace

ncclResult_t collnet_attach(Comm& comm) {
  for (const RankInfo& peer : comm.peers) {
    if (!peer.collnet) return ncclSuccess;
  }
  if (comm.nodes < 2) return ncclSuccess;
  auto use = std::make_shared<CollNetUse>();
  std::vector<uint32_t> rail = find_rail(comm, *use);
  if (rail.empty()) return ncclSuccess;
  use->api = comm.plugin->collnet_api;
  use->channel = 2 + (uint64_t(use->node[0]) << 8);
  size_t largest = 0;
  int pointers = 0;
  ncclResult_t status = use->api.properties(0, &largest, &pointers);
  use->slice = size_t(env_number("SIM_NCCL_COLLNET_SLICE", 512 * 1024));
  if (largest > 0) use->slice = std::min(use->slice, largest);
  use->slice = std::max<size_t>(use->slice / 64 * 64, 64);
  use->depth = size_t(std::max(1l, env_number("SIM_NCCL_COLLNET_DEPTH", 2)));
  use->device_memory = pointers & NCCL_PTR_CUDA;

  void* listener = nullptr;
  uint8_t handle[NCCL_NET_HANDLE_MAXSIZE] = {};
  if (status == ncclSuccess) status = use->api.listen(comm.plugin->collnet_context, 0, handle, &listener);
  int32_t ok = status == ncclSuccess;
  Bytes mine(sizeof ok + sizeof handle);
  std::memcpy(mine.data(), &ok, sizeof ok);
  std::memcpy(mine.data() + sizeof ok, handle, sizeof handle);
  Frame head;
  head.mode = kGather;
  head.sequence = comm.sequence++;
  Result all;
  ncclResult_t link = comm.link.exchange(head, {}, mine.data(), mine.size(), &all);
  if (link != ncclSuccess) return link;
  std::vector<Bytes> handles;
  std::vector<void*> pointers_to;
  for (uint32_t rank : rail) {
    handles.emplace_back(all.blobs.at(rank).begin() + sizeof ok, all.blobs.at(rank).end());
  }
  for (auto& bytes : handles) pointers_to.push_back(bytes.data());
  for (const Bytes& blob : all.blobs) {
    int32_t theirs;
    std::memcpy(&theirs, blob.data(), sizeof theirs);
    ok = ok && theirs;
  }
  int index = int(std::find(rail.begin(), rail.end(), uint32_t(comm.rank)) - rail.begin());
  if (ok) {
    status = use->api.connect(pointers_to.data(), int(rail.size()), index, listener, &use->coll);
    if (status == ncclSuccess && !use->coll) status = ncclInternalError;
    if (status == ncclSuccess) status = take_buffer(*use);
  }
  if (listener) use->api.close_listen(listener);

  // NCCL falls back on all ranks when one could not connect.
  int32_t up = ok && status == ncclSuccess;
  head.sequence = comm.sequence++;
  Result votes;
  link = comm.link.exchange(head, {}, &up, sizeof up, &votes);
  bool everyone = link == ncclSuccess;
  for (const Bytes& blob : votes.blobs) {
    int32_t theirs;
    std::memcpy(&theirs, blob.data(), sizeof theirs);
    everyone = everyone && theirs;
  }
  comm.collnet = use;
  if (!everyone) {
    SIM_INFO("CollNet is not available on every rank (here: %d), not using it", status);
    collnet_detach(comm);
    return link;
  }
  use->proxy.start();
  SIM_INFO("CollNet %s: rail of %zu ranks, slices of %zu bytes", use->api.name, rail.size(), use->slice);
  return ncclSuccess;
}

bool collnet_takes(Comm& comm, int type, int op, size_t count) {
  // NCCL runs an average as a sum with a factor, and a factor needs its own kernels: neither goes to CollNet here.
  bool base = comm.collnet && op <= ncclMin;
  if (base) {
    int supported = 0;
    base = comm.collnet->api.reduce_support(type, op, &supported) == ncclSuccess && supported;
  }
  return tuner_prefers_collnet(comm, ncclFuncAllReduce, count * type_size(type), base);
}

namespace {

// Sends the `mine` elements behind `source` through the plugin in slices. Runs on the proxy's thread.
ncclResult_t run_slices(Comm& comm, CollNetUse& use, const uint8_t* source, size_t mine, int type, int op,
                        Bytes& reduced) {
  size_t element = type_size(type);
  struct Flight {
    size_t number, offset, elements;
    void* request;
  };
  std::deque<Flight> flights;
  size_t per_slice = use.slice / element;
  size_t issued = 0;
  size_t number = 0;
  while (issued < mine || !flights.empty()) {
    if (comm.stop) return ncclInternalError;
    if (issued < mine && flights.size() < use.depth) {
      size_t elements = std::min(per_slice, mine - issued);
      std::memcpy(use.send_slot(number), source + issued * element, elements * element);
      void* request = nullptr;
      ncclResult_t status = use.api.iallreduce(use.coll, use.send_slot(number), use.recv_slot(number), elements, type,
                                               op, use.send_mr, use.recv_mr, &request);
      if (status != ncclSuccess) return status;
      if (request) {
        flights.push_back({number++, issued, elements, request});
        issued += elements;
        continue;
      }
    }
    if (!flights.empty()) {
      Flight& first = flights.front();
      int done = 0;
      int size = 0;
      ncclResult_t status = use.api.test(first.request, &done, &size);
      if (status != ncclSuccess) return status;
      if (done) {
        if (use.device_memory) {
          void* flush = nullptr;
          status = use.api.iflush(use.coll, use.recv_slot(first.number), int(first.elements * element), use.recv_mr,
                                  &flush);
          for (done = 0; status == ncclSuccess && flush && !done;) status = use.api.test(flush, &done, nullptr);
          if (status != ncclSuccess) return status;
        }
        std::memcpy(reduced.data() + first.offset * element, use.recv_slot(first.number), first.elements * element);
        flights.pop_front();
        continue;
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return ncclSuccess;
}

}  // namespace

ncclResult_t collnet_allreduce(Comm& comm, const void* in, void* out, size_t count, int type, int op) {
  CollNetUse& use = *comm.collnet;
  size_t element = type_size(type);
  size_t members = use.node.size();
  // Own part of the node's sum; the parts of all members together are the buffer.
  size_t share = (count + members - 1) / members;
  size_t from = std::min(count, use.local * share);
  size_t mine = std::min(count, from + share) - from;
  Result sum;
  const uint8_t* source = static_cast<const uint8_t*>(in) + from * element;
  if (members > 1) {
    Frame head;
    head.mode = kReduce;
    head.type = type;
    head.op = op;
    head.channel = use.channel;
    head.sequence = use.sequence++;
    ncclResult_t status = comm.link.exchange(head, use.node, in, count * element, &sum);
    if (status != ncclSuccess) return status;
    source = sum.blobs.at(0).data() + from * element;
  }

  Bytes reduced(mine * element);
  ncclResult_t reduced_status =
      use.proxy.run([&] { return run_slices(comm, use, source, mine, type, op, reduced); });
  if (reduced_status != ncclSuccess) return reduced_status;
  count_execution("collnet");
  if (members == 1) {
    if (mine) std::memcpy(out, reduced.data(), reduced.size());
    return ncclSuccess;
  }
  Frame head;
  head.mode = kGather;
  head.channel = use.channel;
  head.sequence = use.sequence++;
  Result parts;
  ncclResult_t status = comm.link.exchange(head, use.node, reduced.data(), reduced.size(), &parts);
  if (status != ncclSuccess) return status;
  auto* to = static_cast<uint8_t*>(out);
  for (const Bytes& part : parts.blobs) {
    if (!part.empty()) std::memcpy(to, part.data(), part.size());
    to += part.size();
  }
  return ncclSuccess;
}

void collnet_detach(Comm& comm) {
  if (!comm.collnet) return;
  CollNetUse& use = *comm.collnet;
  if (use.coll) {
    if (use.send_mr) use.api.dereg(use.coll, use.send_mr);
    if (use.recv_mr) use.api.dereg(use.coll, use.recv_mr);
    use.api.close_coll(use.coll);
  }
  release_buffer(use);
  comm.collnet.reset();
}

}  // namespace simnccl
