// A communicator of the simulated NCCL: state, registry, creation, end. Groups and execution build on this.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_abi.h"
#include "nccl_api.h"
#include "wire.h"

namespace simnccl {

// What every rank tells the others when a communicator begins.
struct RankInfo {
  uint64_t host;    // hash of NCCL_HOSTID, else of the host name
  uint64_t process;
  int32_t device;
  int32_t collnet;  // this rank has a CollNet plugin with devices and may use it
};

struct PreMulSum {
  bool used = false;
  double scale = 1.0;
  int64_t iscale = 1;
  int type = 0;
  const void* device = nullptr;  // read when the operation runs
};

// Memory that peers may put into. Made in the same order on all ranks, so its number is the same everywhere.
struct Window {
  uint8_t* address;
  size_t size;
};

struct PluginUse;   // plugin.cc
struct CollNetUse;  // collnet.cc

struct Comm {
  int rank = 0;
  int ranks = 0;
  int device = 0;
  bool blocking = true;
  uint64_t hash = 0;
  uint32_t nodes = 1;
  int traffic_class = NCCL_CONFIG_UNDEF_INT;
  std::string net_name;
  std::vector<RankInfo> peers;
  std::shared_ptr<PluginUse> plugin;
  std::shared_ptr<CollNetUse> collnet;

  std::atomic<int> state{ncclSuccess};  // what GetAsyncError says
  std::atomic<bool> stop{false};        // aborted or revoked: every wait ends
  std::atomic<bool> revoked{false};
  std::atomic<bool> finalized{false};
  std::atomic<bool> suspended{false};

  std::mutex exec;  // held by whoever exchanges on the link
  Link link;
  uint64_t sequence = 0;          // of stream operations, given at execution
  uint64_t control_sequence = 0;  // of split, shrink, grow

  // Eager operations of one communicator run in the order of their issue, whatever streams they are on.
  std::mutex order_lock;
  std::condition_variable order_changed;
  uint64_t issued = 0;
  uint64_t executed = 0;

  std::mutex ops_lock;
  std::vector<PreMulSum> ops;
  // What a program holds of one: an index in disguise, another on every rank and communicator, as NCCL's.
  int op_key() const { return int((hash * 0x9e3779b97f4a7c15ull + uint64_t(rank) * 0xd1342543de82ef95ull) >> 35); }
  int op_handle(size_t index) const { return ncclNumOps + (int(index) ^ op_key()); }
  size_t op_index(int handle) const { return size_t((handle - ncclNumOps) ^ op_key()); }

  std::mutex windows_lock;
  uint64_t windows_made = 0;
  std::map<uint64_t, Window> windows;

  ncclComm_t handle() { return reinterpret_cast<ncclComm_t>(this); }
};

using CommPtr = std::shared_ptr<Comm>;

// Registers a fresh communicator and returns it; the handle is valid at once, its state is InProgress.
CommPtr new_comm();
// Null, with a warning, for a handle that is not alive.
CommPtr find_comm(ncclComm_t handle, const char* caller);
void forget_comm(ncclComm_t handle);
// ncclSuccess when the communicator may take work.
ncclResult_t ready(const CommPtr& comm, const char* caller);

// Reads the caller's config into the communicator. `parent` gives what the caller left alone.
ncclResult_t apply_config(Comm& comm, const ncclConfig_t* config, const Comm* parent);
// Connects and meets the other ranks. Called on the thread of the caller or of a group.
ncclResult_t init_comm(Comm& comm, const Address& address, int rank, int ranks);
ncclResult_t split_comm(Comm& parent, int color, int key, Comm& child);
ncclResult_t shrink_comm(Comm& parent, const std::vector<int>& excluded, Comm& child, bool after_error);
ncclResult_t grow_comm(Comm* parent, int ranks, const ncclUniqueId* id, int rank, Comm& child);

// Waits until everything issued has run, or the communicator was stopped.
void wait_idle(Comm& comm);
// Sets the state after an operation failed; the first error stays.
void fail(Comm& comm, ncclResult_t error);

Address to_address(const ncclUniqueId& id);
ncclUniqueId to_id(const Address& address);
int current_device();

}  // namespace simnccl
