// The public API: library, communicators, groups, registration. Argument checks here, work in comm.cc and group.cc.
//
// With SIM_NCCL_REENTER=1 some functions call other exported functions through the procedure linkage table, as a stock
// library built with default visibility may, so that an interposer that mistakes them for the user's calls is caught.
#include <unistd.h>

#include <cstring>
#include <thread>

#include "cuda_abi.h"
#include "debug.h"
#include "export.h"
#include "collnet.h"
#include "group.h"
#include "numeric.h"
#include "plugin.h"

using namespace simnccl;

namespace {

bool reenter() {
  static const bool on = env_flag("SIM_NCCL_REENTER");
  return on;
}

ncclResult_t init_rank(ncclComm_t* comm, int ranks, const ncclUniqueId& id, int rank, const ncclConfig_t* config,
                       int device) {
  if (!comm || ranks < 1 || rank < 0 || rank >= ranks) {
    SIM_WARN("Invalid rank requested : %d/%d", rank, ranks);
    return group_note(ncclInvalidArgument);
  }
  CommPtr made = new_comm();
  ncclResult_t status = apply_config(*made, config, nullptr);
  if (status != ncclSuccess) {
    forget_comm(made->handle());
    *comm = nullptr;
    return group_note(status);
  }
  made->device = device;
  Address address = to_address(id);
  return submit_init(made, comm, [made, address, rank, ranks] { return init_comm(*made, address, rank, ranks); });
}

// Ends the life of a communicator. With `abort` nothing waits for peers.
ncclResult_t end_comm(ncclComm_t handle, const CommPtr& comm, bool abort) {
  if (abort) {
    comm->stop = true;
    comm->link.shut();
  } else {
    wait_idle(*comm);
  }
  // What runs holds this lock and ends now; what is still queued behind other work finds the communicator stopped.
  {
    std::lock_guard<std::mutex> guard(comm->exec);
    collnet_detach(*comm);
    comm->stop = true;
    comm->link.close();
  }
  plugin_detach(*comm);
  forget_comm(handle);
  // What this process's hub still owes to others must leave before the process can.
  flush_hubs();
  SIM_INFO("comm %p rank %d nranks %d cudaDev %d - %s COMPLETE", static_cast<void*>(handle), comm->rank, comm->ranks,
           comm->device, abort ? "Abort" : "Destroy");
  return ncclSuccess;
}

}  // namespace

SIM_EXPORT ncclResult_t ncclGetVersion(int* out) {
  SIM_ENTER(ncclGetVersion);
  if (!out) return ncclInvalidArgument;
  *out = version();
  return ncclSuccess;
}
SIM_ALIAS(ncclGetVersion);

SIM_EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  SIM_ENTER(ncclGetUniqueId);
  if (!id) return ncclInvalidArgument;
  Address address;
  ncclResult_t status = start_hub(&address);
  if (status == ncclSuccess) *id = to_id(address);
  return status;
}
SIM_ALIAS(ncclGetUniqueId);

SIM_EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case ncclSystemError:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case ncclInternalError:
      return "internal error";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInProgress:
      return "NCCL operation in progress";
    default:
      return "unknown result code";
  }
}
SIM_ALIAS(ncclGetErrorString);

SIM_EXPORT const char* ncclGetLastError(ncclComm_t) {
  static thread_local std::string text;
  text = last_error();
  return text.c_str();
}
SIM_ALIAS(ncclGetLastError);

SIM_EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  SIM_ENTER(ncclCommInitRank);
  return init_rank(comm, ranks, id, rank, nullptr, current_device());
}
SIM_ALIAS(ncclCommInitRank);

SIM_EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                               ncclConfig_t* config) {
  SIM_ENTER(ncclCommInitRankConfig);
  return init_rank(comm, ranks, id, rank, config, current_device());
}
SIM_ALIAS(ncclCommInitRankConfig);

#ifndef SIM_NCCL_OLD
SIM_EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int ranks, int rank, int id_count,
                                                 ncclUniqueId* ids, ncclConfig_t* config) {
  SIM_ENTER(ncclCommInitRankScalable);
  if (!ids || id_count < 1 || id_count > ranks) return group_note(ncclInvalidArgument);
  return init_rank(comm, ranks, ids[0], rank, config, current_device());
}
SIM_ALIAS(ncclCommInitRankScalable);
#endif

SIM_EXPORT ncclResult_t ncclCommInitAll(ncclComm_t* comms, int count, const int* devices) {
  SIM_ENTER(ncclCommInitAll);
  if (!comms || count < 1) return ncclInvalidArgument;
  ncclUniqueId id;
  if (!reenter()) {
    Address address;
    ncclResult_t status = start_hub(&address);
    if (status != ncclSuccess) return status;
    id = to_id(address);
    group_start();
    for (int r = 0; r < count; ++r) init_rank(&comms[r], count, id, r, nullptr, devices ? devices[r] : r);
    return group_end();
  }
  ncclResult_t status = ncclGetUniqueId(&id);
  if (status != ncclSuccess) return status;
  CUcontext before = nullptr;
  cuCtxGetCurrent(&before);
  ncclGroupStart();
  for (int r = 0; r < count; ++r) {
    CUdevice device = devices ? devices[r] : r;
    CUcontext context = nullptr;
    if (cuDevicePrimaryCtxRetain(&context, device) != CUDA_SUCCESS) return ncclUnhandledCudaError;
    cuCtxSetCurrent(context);
    ncclCommInitRank(&comms[r], count, id, r);
    cuDevicePrimaryCtxRelease_v2(device);
  }
  cuCtxSetCurrent(before);
  return ncclGroupEnd();
}
SIM_ALIAS(ncclCommInitAll);

SIM_EXPORT ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* child, ncclConfig_t* config) {
  SIM_ENTER(ncclCommSplit);
  CommPtr parent = find_comm(comm, "ncclCommSplit");
  ncclResult_t status = ready(parent, "ncclCommSplit");
  if (status != ncclSuccess || !child) return group_note(status != ncclSuccess ? status : ncclInvalidArgument);
  bool absent = color == NCCL_SPLIT_NOCOLOR;
  CommPtr made = new_comm();
  status = apply_config(*made, config, parent.get());
  if (status != ncclSuccess) {
    forget_comm(made->handle());
    return group_note(status);
  }
  return submit_init(
      made, child, [made, parent, color, key] { return split_comm(*parent, color, key, *made); }, absent, parent);
}
SIM_ALIAS(ncclCommSplit);

#ifndef SIM_NCCL_OLD
SIM_EXPORT ncclResult_t ncclCommShrink(ncclComm_t comm, int* excluded, int count, ncclComm_t* child,
                                       ncclConfig_t* config, int flags) {
  SIM_ENTER(ncclCommShrink);
  CommPtr parent = find_comm(comm, "ncclCommShrink");
  if (!parent || !child || count < 1 || !excluded) return group_note(ncclInvalidArgument);
  bool abort = flags & NCCL_SHRINK_ABORT;
  if (abort) {
    // The parent's operations end; the connection to the hub stays, as the survivors meet there.
    parent->revoked = true;
    parent->link.revoke();
  } else {
    ncclResult_t status = ready(parent, "ncclCommShrink");
    if (status != ncclSuccess) return group_note(status);
  }
  std::vector<int> out(excluded, excluded + count);
  for (int rank : out) {
    if (rank < 0 || rank >= parent->ranks || rank == parent->rank) return group_note(ncclInvalidArgument);
  }
  CommPtr made = new_comm();
  ncclResult_t status = apply_config(*made, config, parent.get());
  if (status != ncclSuccess) {
    forget_comm(made->handle());
    return group_note(status);
  }
  return submit_init(made, child, [made, parent, out, abort] { return shrink_comm(*parent, out, *made, abort); }, false,
                     parent);
}
SIM_ALIAS(ncclCommShrink);

SIM_EXPORT ncclResult_t ncclCommGetUniqueId(ncclComm_t comm, ncclUniqueId* id) {
  SIM_ENTER(ncclCommGetUniqueId);
  if (!find_comm(comm, "ncclCommGetUniqueId") || !id) return ncclInvalidArgument;
  Address address;
  ncclResult_t status = start_hub(&address);
  if (status == ncclSuccess) *id = to_id(address);
  return status;
}
SIM_ALIAS(ncclCommGetUniqueId);

SIM_EXPORT ncclResult_t ncclCommGrow(ncclComm_t comm, int ranks, const ncclUniqueId* id, int rank, ncclComm_t* child,
                                     ncclConfig_t* config) {
  SIM_ENTER(ncclCommGrow);
  CommPtr parent = comm ? find_comm(comm, "ncclCommGrow") : nullptr;
  if (!child || (comm && !parent) || (!comm && !id)) return group_note(ncclInvalidArgument);
  if (parent) {
    ncclResult_t status = ready(parent, "ncclCommGrow");
    if (status != ncclSuccess) return group_note(status);
  }
  CommPtr made = new_comm();
  ncclResult_t status = apply_config(*made, config, parent.get());
  if (status != ncclSuccess) {
    forget_comm(made->handle());
    return group_note(status);
  }
  made->device = current_device();
  bool with_id = id != nullptr;
  ncclUniqueId copy = {};
  if (id) copy = *id;
  return submit_init(made, child, [made, parent, ranks, with_id, copy, rank] {
    return grow_comm(parent.get(), ranks, with_id ? &copy : nullptr, rank, *made);
  }, false, parent);
}
SIM_ALIAS(ncclCommGrow);

SIM_EXPORT ncclResult_t ncclCommRevoke(ncclComm_t comm, int flags) {
  SIM_ENTER(ncclCommRevoke);
  CommPtr found = find_comm(comm, "ncclCommRevoke");
  if (!found || flags != NCCL_REVOKE_DEFAULT) return ncclInvalidArgument;
  found->revoked = true;
  found->link.revoke();
  return ncclSuccess;
}
SIM_ALIAS(ncclCommRevoke);

SIM_EXPORT ncclResult_t ncclCommSuspend(ncclComm_t comm, int flags) {
  SIM_ENTER(ncclCommSuspend);
  CommPtr found = find_comm(comm, "ncclCommSuspend");
  ncclResult_t status = ready(found, "ncclCommSuspend");
  if (status != ncclSuccess) return status;
  if (flags != NCCL_SUSPEND_MEM) return ncclInvalidArgument;
  wait_idle(*found);
  found->suspended = true;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommSuspend);

SIM_EXPORT ncclResult_t ncclCommResume(ncclComm_t comm) {
  SIM_ENTER(ncclCommResume);
  CommPtr found = find_comm(comm, "ncclCommResume");
  if (!found) return ncclInvalidArgument;
  if (!found->suspended) return ncclInvalidUsage;
  found->suspended = false;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommResume);

SIM_EXPORT ncclResult_t ncclCommWindowRegister(ncclComm_t comm, void* address, size_t size, ncclWindow_t* window, int) {
  SIM_ENTER(ncclCommWindowRegister);
  CommPtr found = find_comm(comm, "ncclCommWindowRegister");
  ncclResult_t status = ready(found, "ncclCommWindowRegister");
  if (status != ncclSuccess || !address || !size || !window) return status ? status : ncclInvalidArgument;
  std::lock_guard<std::mutex> guard(found->windows_lock);
  found->windows[++found->windows_made] = {static_cast<uint8_t*>(address), size};
  *window = reinterpret_cast<ncclWindow_t>(uintptr_t(found->windows_made));
  return ncclSuccess;
}
SIM_ALIAS(ncclCommWindowRegister);

SIM_EXPORT ncclResult_t ncclCommWindowDeregister(ncclComm_t comm, ncclWindow_t window) {
  SIM_ENTER(ncclCommWindowDeregister);
  CommPtr found = find_comm(comm, "ncclCommWindowDeregister");
  if (!found) return ncclInvalidArgument;
  std::lock_guard<std::mutex> guard(found->windows_lock);
  return found->windows.erase(reinterpret_cast<uintptr_t>(window)) ? ncclSuccess : ncclInvalidArgument;
}
SIM_ALIAS(ncclCommWindowDeregister);

SIM_EXPORT ncclResult_t ncclGroupSimulateEnd(void*) {
  SIM_ENTER(ncclGroupSimulateEnd);
  return group_simulate_end();
}
SIM_ALIAS(ncclGroupSimulateEnd);
#endif

SIM_EXPORT ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  SIM_ENTER(ncclCommFinalize);
  CommPtr found = find_comm(comm, "ncclCommFinalize");
  ncclResult_t status = ready(found, "ncclCommFinalize");
  if (status != ncclSuccess) return status;
  found->finalized = true;
  if (found->blocking) {
    wait_idle(*found);
    return ncclSuccess;
  }
  found->state = ncclInProgress;
  std::thread([found] {
    wait_idle(*found);
    int expected = ncclInProgress;
    found->state.compare_exchange_strong(expected, ncclSuccess);
  }).detach();
  return ncclInProgress;
}
SIM_ALIAS(ncclCommFinalize);

SIM_EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  SIM_ENTER(ncclCommDestroy);
  if (!comm) return ncclSuccess;
  CommPtr found = find_comm(comm, "ncclCommDestroy");
  if (!found) return ncclInvalidArgument;
  if (reenter()) {
    ncclResult_t state;
    ncclCommGetAsyncError(comm, &state);
  }
  if (found->state == ncclInProgress) return ready(found, "ncclCommDestroy");
  return end_comm(comm, found, false);
}
SIM_ALIAS(ncclCommDestroy);

SIM_EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
  SIM_ENTER(ncclCommAbort);
  if (!comm) return ncclSuccess;
  CommPtr found = find_comm(comm, "ncclCommAbort");
  return found ? end_comm(comm, found, true) : ncclInvalidArgument;
}
SIM_ALIAS(ncclCommAbort);

SIM_EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  SIM_ENTER(ncclCommGetAsyncError);
  CommPtr found = find_comm(comm, "ncclCommGetAsyncError");
  if (!found || !error) return ncclInvalidArgument;
  if (found->state == ncclSuccess && !found->finalized && found->exec.try_lock()) {
    fail(*found, found->link.drain());
    found->exec.unlock();
  }
  *error = found->state;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommGetAsyncError);

SIM_EXPORT ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  SIM_ENTER(ncclCommCount);
  CommPtr found = find_comm(comm, "ncclCommCount");
  if (!found || !count || found->state == ncclInProgress) return ncclInvalidArgument;
  *count = found->ranks;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommCount);

SIM_EXPORT ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  SIM_ENTER(ncclCommCuDevice);
  CommPtr found = find_comm(comm, "ncclCommCuDevice");
  if (!found || !device || found->state == ncclInProgress) return ncclInvalidArgument;
  *device = found->device;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommCuDevice);

SIM_EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  SIM_ENTER(ncclCommUserRank);
  CommPtr found = find_comm(comm, "ncclCommUserRank");
  if (!found || !rank || found->state == ncclInProgress) return ncclInvalidArgument;
  *rank = found->rank;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommUserRank);

SIM_EXPORT ncclResult_t ncclCommRegister(const ncclComm_t comm, void* address, size_t size, void** handle) {
  SIM_ENTER(ncclCommRegister);
  if (!find_comm(comm, "ncclCommRegister") || !address || !size || !handle) return ncclInvalidArgument;
  *handle = new char;
  return ncclSuccess;
}
SIM_ALIAS(ncclCommRegister);

SIM_EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t comm, void* handle) {
  SIM_ENTER(ncclCommDeregister);
  if (!find_comm(comm, "ncclCommDeregister")) return ncclInvalidArgument;
  delete static_cast<char*>(handle);
  return ncclSuccess;
}
SIM_ALIAS(ncclCommDeregister);

SIM_EXPORT ncclResult_t ncclMemAlloc(void** address, size_t size) {
  SIM_ENTER(ncclMemAlloc);
  if (!address || !size) return ncclInvalidArgument;
  CUdeviceptr memory = 0;
  if (cuMemAlloc_v2(&memory, size) != CUDA_SUCCESS) return ncclUnhandledCudaError;
  *address = reinterpret_cast<void*>(uintptr_t(memory));
  return ncclSuccess;
}
SIM_ALIAS(ncclMemAlloc);

SIM_EXPORT ncclResult_t ncclMemFree(void* address) {
  SIM_ENTER(ncclMemFree);
  if (!address) return ncclSuccess;
  bool freed = cuMemFree_v2(CUdeviceptr(reinterpret_cast<uintptr_t>(address))) == CUDA_SUCCESS;
  return freed ? ncclSuccess : ncclUnhandledCudaError;
}
SIM_ALIAS(ncclMemFree);

SIM_EXPORT ncclResult_t ncclGroupStart(void) {
  SIM_ENTER(ncclGroupStart);
  return group_start();
}
SIM_ALIAS(ncclGroupStart);

SIM_EXPORT ncclResult_t ncclGroupEnd(void) {
  SIM_ENTER(ncclGroupEnd);
  return group_end();
}
SIM_ALIAS(ncclGroupEnd);
