// See comm.h. Of the driver it touches the current context's device number alone.
#include "comm.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <unordered_map>

#include "collnet.h"
#include "debug.h"
#include "plugin.h"

namespace simnccl {
namespace {

constexpr uint64_t kControlChannel = 1;

// Never destroyed: host functions may still run while the process exits.
std::mutex& registry_lock() {
  static auto* lock = new std::mutex;
  return *lock;
}
std::unordered_map<ncclComm_t, CommPtr>& registry() {
  static auto* map = new std::unordered_map<ncclComm_t, CommPtr>;
  return *map;
}

uint64_t fnv(const void* data, size_t bytes, uint64_t hash = 14695981039346656037ull) {
  auto from = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ from[i]) * 1099511628211ull;
  return hash;
}

uint64_t host_hash() {
  if (const char* id = getenv("NCCL_HOSTID")) return fnv(id, strlen(id));
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return fnv(name, strlen(name));
}

ncclResult_t control_gather(Comm& comm, const void* data, size_t bytes, Result* result,
                            const std::vector<uint32_t>& members = {}, uint64_t channel = kControlChannel) {
  std::lock_guard<std::mutex> guard(comm.exec);
  Frame head;
  head.mode = kGather;
  head.channel = channel;
  head.sequence = comm.control_sequence++;
  return comm.link.exchange(head, members, data, bytes, result);
}

// Every rank of a new group learns the address of the hub that the group's first rank starts.
ncclResult_t form_group(Comm& parent, const std::vector<int>& group, int color_seen, Comm& child,
                        const std::vector<uint32_t>& members, uint64_t channel) {
  Address mine = {};
  bool leader = color_seen && !group.empty() && group[0] == parent.rank;
  if (leader) {
    ncclResult_t status = start_hub(&mine);
    if (status != ncclSuccess) return status;
  }
  Result addresses;
  ncclResult_t status = control_gather(parent, &mine, leader ? sizeof mine : 0, &addresses, members, channel);
  if (status != ncclSuccess || !color_seen) return status;
  size_t index = size_t(group[0]);
  if (!members.empty()) {
    index = size_t(std::find(members.begin(), members.end(), uint32_t(group[0])) - members.begin());
  }
  if (addresses.blobs.at(index).size() != sizeof(Address)) return ncclInternalError;
  Address address;
  std::memcpy(&address, addresses.blobs[index].data(), sizeof address);
  int rank = int(std::find(group.begin(), group.end(), parent.rank) - group.begin());
  child.device = parent.device;
  return init_comm(child, address, rank, int(group.size()));
}

}  // namespace

CommPtr new_comm() {
  auto comm = std::make_shared<Comm>();
  comm->state = ncclInProgress;
  std::lock_guard<std::mutex> guard(registry_lock());
  registry()[comm->handle()] = comm;
  return comm;
}

CommPtr find_comm(ncclComm_t handle, const char* caller) {
  if (!handle) {
    SIM_WARN("%s : comm argument is NULL", caller);
    return nullptr;
  }
  std::lock_guard<std::mutex> guard(registry_lock());
  auto found = registry().find(handle);
  if (found != registry().end()) return found->second;
  SIM_WARN("%s : comm %p is not valid, it was destroyed or never made", caller, static_cast<void*>(handle));
  return nullptr;
}

void forget_comm(ncclComm_t handle) {
  std::lock_guard<std::mutex> guard(registry_lock());
  registry().erase(handle);
}

ncclResult_t ready(const CommPtr& comm, const char* caller) {
  if (!comm) return ncclInvalidArgument;
  int state = comm->state.load();
  if (state == ncclInProgress) {
    SIM_WARN("%s : Attempt to use communicator before the previous operation returned ncclSuccess", caller);
    return ncclInvalidArgument;
  }
  if (state != ncclSuccess) return state;
  if (comm->finalized || comm->revoked || comm->stop) {
    SIM_WARN("%s : communicator was finalized, revoked or aborted", caller);
    return ncclInvalidUsage;
  }
  return ncclSuccess;
}

ncclResult_t apply_config(Comm& comm, const ncclConfig_t* config, const Comm* parent) {
  if (parent) {
    comm.blocking = parent->blocking;
    comm.traffic_class = parent->traffic_class;
    comm.net_name = parent->net_name;
  } else if (const char* text = getenv("NCCL_COMM_BLOCKING")) {
    comm.blocking = strcmp(text, "0") != 0;
  }
  if (!config) return ncclSuccess;
  if (config->magic != NCCL_API_MAGIC || config->size < offsetof(ncclConfig_t, cgaClusterSize)) {
    SIM_WARN("ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER");
    return ncclInvalidArgument;
  }
  if (config->blocking != NCCL_CONFIG_UNDEF_INT) {
    if (config->blocking != 0 && config->blocking != 1) {
      SIM_WARN("Invalid config blocking attribute value %d", config->blocking);
      return ncclInvalidArgument;
    }
    comm.blocking = config->blocking != 0;
  }
  if (config->size > offsetof(ncclConfig_t, netName) && config->netName) comm.net_name = config->netName;
  if (config->size > offsetof(ncclConfig_t, trafficClass)) comm.traffic_class = config->trafficClass;
  return ncclSuccess;
}

ncclResult_t init_comm(Comm& comm, const Address& address, int rank, int ranks) {
  comm.rank = rank;
  comm.ranks = ranks;
  comm.hash = fnv(&address, sizeof address);
  SIM_INFO("ncclCommInitRank comm %p rank %d nranks %d cudaDev %d commId 0x%lx - Init START",
           static_cast<void*>(comm.handle()), rank, ranks, comm.device, (unsigned long)comm.hash);
  ncclResult_t status = plugin_attach(comm);
  if (status != ncclSuccess) return status;
  std::lock_guard<std::mutex> guard(comm.exec);
  status = comm.link.connect(address, rank, ranks, &comm.stop);
  if (status != ncclSuccess) return status;
  RankInfo mine = {host_hash(), uint64_t(getpid()), comm.device, collnet_possible(comm) ? 1 : 0};
  Frame head;
  head.mode = kGather;
  head.sequence = comm.sequence++;
  Result all;
  status = comm.link.exchange(head, {}, &mine, sizeof mine, &all);
  if (status != ncclSuccess) return status;
  std::vector<uint64_t> hosts;
  for (const Bytes& blob : all.blobs) {
    RankInfo info;
    if (blob.size() != sizeof info) return ncclInternalError;
    std::memcpy(&info, blob.data(), sizeof info);
    comm.peers.push_back(info);
    if (std::find(hosts.begin(), hosts.end(), info.host) == hosts.end()) hosts.push_back(info.host);
  }
  comm.nodes = uint32_t(hosts.size());
  status = tuner_attach(comm);
  if (status == ncclSuccess) status = collnet_attach(comm);
  if (status != ncclSuccess) return status;
  SIM_INFO("ncclCommInitRank comm %p rank %d nranks %d cudaDev %d commId 0x%lx - Init COMPLETE",
           static_cast<void*>(comm.handle()), rank, ranks, comm.device, (unsigned long)comm.hash);
  return ncclSuccess;
}

ncclResult_t split_comm(Comm& parent, int color, int key, Comm& child) {
  int32_t mine[2] = {color, key};
  Result all;
  ncclResult_t status = control_gather(parent, mine, sizeof mine, &all);
  if (status != ncclSuccess) return status;
  std::vector<std::pair<int, int>> order;  // key, parent rank
  for (int r = 0; r < parent.ranks; ++r) {
    int32_t theirs[2];
    std::memcpy(theirs, all.blobs.at(size_t(r)).data(), sizeof theirs);
    if (theirs[0] == color && color != NCCL_SPLIT_NOCOLOR) order.emplace_back(theirs[1], r);
  }
  std::sort(order.begin(), order.end());
  std::vector<int> group;
  for (auto& entry : order) group.push_back(entry.second);
  return form_group(parent, group, color != NCCL_SPLIT_NOCOLOR, child, {}, kControlChannel);
}

ncclResult_t shrink_comm(Comm& parent, const std::vector<int>& excluded, Comm& child, bool after_error) {
  std::vector<uint32_t> members;
  std::vector<int> group;
  for (int r = 0; r < parent.ranks; ++r) {
    if (std::find(excluded.begin(), excluded.end(), r) != excluded.end()) continue;
    members.push_back(uint32_t(r));
    group.push_back(r);
  }
  if (group.empty()) return ncclInvalidArgument;
  // After an error the survivors may have counted differently: their own channel begins anew.
  uint64_t channel = fnv(members.data(), members.size() * sizeof(uint32_t)) | (uint64_t(1) << 63);
  if (after_error) parent.control_sequence = 0;
  return form_group(parent, group, 1, child, members, channel);
}

ncclResult_t grow_comm(Comm* parent, int ranks, const ncclUniqueId* id, int rank, Comm& child) {
  if (!parent) return id ? init_comm(child, to_address(*id), rank, ranks) : ncclInvalidArgument;
  // Only the member that made the id holds it; the others learn it here.
  Result all;
  ncclResult_t status = control_gather(*parent, id, id ? sizeof *id : 0, &all);
  if (status != ncclSuccess) return status;
  for (const Bytes& blob : all.blobs) {
    if (blob.size() != sizeof(ncclUniqueId)) continue;
    ncclUniqueId shared;
    std::memcpy(&shared, blob.data(), sizeof shared);
    child.device = parent->device;
    return init_comm(child, to_address(shared), parent->rank, ranks);
  }
  return ncclInvalidArgument;
}

void wait_idle(Comm& comm) {
  std::unique_lock<std::mutex> guard(comm.order_lock);
  while (comm.executed != comm.issued) comm.order_changed.wait_for(guard, std::chrono::milliseconds(50));
}

void fail(Comm& comm, ncclResult_t error) {
  if (error == ncclSuccess || comm.stop || comm.revoked) return;
  int before = comm.state;
  do {
    if (before != ncclSuccess && before != ncclInProgress) return;
  } while (!comm.state.compare_exchange_weak(before, error));
  SIM_WARN("comm %p rank %d: asynchronous error %d", static_cast<void*>(comm.handle()), comm.rank, error);
}

Address to_address(const ncclUniqueId& id) {
  Address address;
  static_assert(sizeof address <= sizeof id, "a unique id holds an address");
  std::memcpy(&address, &id, sizeof address);
  return address;
}

ncclUniqueId to_id(const Address& address) {
  ncclUniqueId id;
  std::memset(&id, 0, sizeof id);
  std::memcpy(&id, &address, sizeof address);
  return id;
}

int current_device() {
  CUdevice device = 0;
  return cuCtxGetDevice(&device) == CUDA_SUCCESS ? device : 0;
}

}  // namespace simnccl
