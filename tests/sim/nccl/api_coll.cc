// The public API: reduction operators, collectives, point to point. Argument checks here, work in group.cc and ops.cc.
#include <alloca.h>

#include <cstdlib>
#include <cstring>

#include "debug.h"
#include "export.h"
#include "group.h"
#include "numeric.h"

using namespace simnccl;

namespace {

bool reenter() {
  static const bool on = env_flag("SIM_NCCL_REENTER");
  return on;
}

bool reduces(Call call) {
  return call == Call::kAllReduce || call == Call::kReduce || call == Call::kReduceScatter;
}

bool rooted(Call call) {
  return call == Call::kReduce || call == Call::kBroadcast || call == Call::kGather || call == Call::kScatter ||
         call == Call::kSend || call == Call::kRecv || call == Call::kSignal;
}

// `SIM_NCCL_STACK=BYTES`: a collective needs so much stack, as one that connects its peers does.
void use_stack() {
  static const size_t bytes = size_t(env_number("SIM_NCCL_STACK", 0));
  if (!bytes) return;
  auto* at = static_cast<volatile char*>(alloca(bytes));
  for (size_t i = bytes; i >= 4096; i -= 4096) at[i - 1] = 1;
}

ncclResult_t submit(Op op, ncclComm_t comm, cudaStream_t stream) {
  use_stack();
  if (reenter()) {
    int count = 0;
    ncclCommCount(comm, &count);
  }
  CommPtr found = find_comm(comm, op.name);
  ncclResult_t status = ready(found, op.name);
  if (status != ncclSuccess) return group_note(status);
  int types = version() >= 22400 ? ncclNumTypes : ncclFloat8e4m3;
  if (op.type < 0 || op.type >= types) {
    SIM_WARN("%s : invalid type %d", op.name, op.type);
    return group_note(ncclInvalidArgument);
  }
  if (rooted(op.call) && (op.root < 0 || op.root >= found->ranks)) {
    SIM_WARN("%s : invalid root %d (root should be in the 0..%d range)", op.name, op.root, found->ranks);
    return group_note(ncclInvalidArgument);
  }
  if (reduces(op.call)) {
    std::lock_guard<std::mutex> guard(found->ops_lock);
    size_t custom = found->op_index(op.op);
    bool known = op.op >= 0 && (op.op < ncclNumOps || (custom < found->ops.size() && found->ops[custom].used));
    if (!known) {
      SIM_WARN("%s : invalid reduction operation %d", op.name, op.op);
      return group_note(ncclInvalidArgument);
    }
    if (op.op >= ncclNumOps) {
      op.scalar = found->ops[custom];
      if (op.scalar.type != op.type) {
        SIM_WARN("%s : reduction operation %d was made for another type", op.name, op.op);
        return group_note(ncclInvalidArgument);
      }
    }
  }
  // Stock NCCL believes any count; tests that pass impossible ones want an answer and no crash.
  static const char* const most = getenv("SIM_NCCL_MAX_COUNT");
  if (most && op.count > strtoull(most, nullptr, 10)) return group_note(ncclInvalidArgument);
  if (found->suspended) return group_note(ncclInvalidUsage);
  bool one_sided = op.call == Call::kSignal || op.call == Call::kWaitSignal;
  if (op.count == 0 && !one_sided) return ncclSuccess;
  static const bool trace = getenv("NCCL_DEBUG_SUBSYS") && strstr(getenv("NCCL_DEBUG_SUBSYS"), "COLL");
  if (trace) {
    SIM_INFO("%s: sendbuff %p recvbuff %p count %zu datatype %d op %d root %d comm %p [nranks=%d] stream %p", op.name,
             op.in, op.out, op.count, op.type, op.op, op.root, static_cast<void*>(comm), found->ranks,
             static_cast<void*>(stream));
  }
  return submit_op(found, op, stream);
}

}  // namespace

SIM_EXPORT ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void* scalar, ncclDataType_t type,
                                                 ncclScalarResidence_t residence, ncclComm_t comm) {
  SIM_ENTER(ncclRedOpCreatePreMulSum);
  CommPtr found = find_comm(comm, "ncclRedOpCreatePreMulSum");
  ncclResult_t status = ready(found, "ncclRedOpCreatePreMulSum");
  if (status != ncclSuccess) return status;
  if (!op || !scalar || !type_size(type)) return ncclInvalidArgument;
  PreMulSum entry;
  entry.used = true;
  entry.type = type;
  if (residence == ncclScalarDevice) {
    entry.device = scalar;
  } else {
    read_scalar(type, scalar, &entry.scale, &entry.iscale);
  }
  std::lock_guard<std::mutex> guard(found->ops_lock);
  size_t at = 0;
  while (at < found->ops.size() && found->ops[at].used) ++at;
  if (at == found->ops.size()) found->ops.emplace_back();
  found->ops[at] = entry;
  *op = found->op_handle(at);
  return ncclSuccess;
}
SIM_ALIAS(ncclRedOpCreatePreMulSum);

SIM_EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t comm) {
  SIM_ENTER(ncclRedOpDestroy);
  CommPtr found = find_comm(comm, "ncclRedOpDestroy");
  if (!found) return ncclInvalidArgument;
  std::lock_guard<std::mutex> guard(found->ops_lock);
  size_t at = found->op_index(op);
  if (op < ncclNumOps || at >= found->ops.size() || !found->ops[at].used) return ncclInvalidArgument;
  found->ops[at] = PreMulSum();
  return ncclSuccess;
}
SIM_ALIAS(ncclRedOpDestroy);

SIM_EXPORT ncclResult_t ncclAllReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                      ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclAllReduce);
  return submit({Call::kAllReduce, "ncclAllReduce", in, out, count, type, op}, comm, stream);
}
SIM_ALIAS(ncclAllReduce);

SIM_EXPORT ncclResult_t ncclReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                   int root, ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclReduce);
  return submit({Call::kReduce, "ncclReduce", in, out, count, type, op, root}, comm, stream);
}
SIM_ALIAS(ncclReduce);

SIM_EXPORT ncclResult_t ncclBroadcast(const void* in, void* out, size_t count, ncclDataType_t type, int root,
                                      ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclBroadcast);
  return submit({Call::kBroadcast, "ncclBroadcast", in, out, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclBroadcast);

SIM_EXPORT ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                                  cudaStream_t stream) {
  SIM_ENTER(ncclBcast);
  if (reenter()) return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
  return submit({Call::kBroadcast, "ncclBroadcast", buffer, buffer, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclBcast);

SIM_EXPORT ncclResult_t ncclReduceScatter(const void* in, void* out, size_t out_count, ncclDataType_t type,
                                          ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclReduceScatter);
  return submit({Call::kReduceScatter, "ncclReduceScatter", in, out, out_count, type, op}, comm, stream);
}
SIM_ALIAS(ncclReduceScatter);

SIM_EXPORT ncclResult_t ncclAllGather(const void* in, void* out, size_t in_count, ncclDataType_t type,
                                      ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclAllGather);
  return submit({Call::kAllGather, "ncclAllGather", in, out, in_count, type}, comm, stream);
}
SIM_ALIAS(ncclAllGather);

#ifndef SIM_NCCL_OLD
SIM_EXPORT ncclResult_t ncclAlltoAll(const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                                     cudaStream_t stream) {
  SIM_ENTER(ncclAlltoAll);
  return submit({Call::kAlltoAll, "ncclAlltoAll", in, out, count, type}, comm, stream);
}
SIM_ALIAS(ncclAlltoAll);

SIM_EXPORT ncclResult_t ncclGather(const void* in, void* out, size_t count, ncclDataType_t type, int root,
                                   ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclGather);
  return submit({Call::kGather, "ncclGather", in, out, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclGather);

SIM_EXPORT ncclResult_t ncclScatter(const void* in, void* out, size_t count, ncclDataType_t type, int root,
                                    ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclScatter);
  return submit({Call::kScatter, "ncclScatter", in, out, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclScatter);

// The configuration of one call steers resources, never the result: the simulation has none to steer.
SIM_EXPORT ncclResult_t ncclAllReduceConfig(const void* in, void* out, size_t count, ncclDataType_t type,
                                            ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream,
                                            const ncclCollConfig_t*) {
  SIM_ENTER(ncclAllReduceConfig);
  return submit({Call::kAllReduce, "ncclAllReduce", in, out, count, type, op}, comm, stream);
}
SIM_ALIAS(ncclAllReduceConfig);

SIM_EXPORT ncclResult_t ncclReduceConfig(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                         int root, ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t*) {
  SIM_ENTER(ncclReduceConfig);
  return submit({Call::kReduce, "ncclReduce", in, out, count, type, op, root}, comm, stream);
}
SIM_ALIAS(ncclReduceConfig);

SIM_EXPORT ncclResult_t ncclBroadcastConfig(const void* in, void* out, size_t count, ncclDataType_t type, int root,
                                            ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t*) {
  SIM_ENTER(ncclBroadcastConfig);
  return submit({Call::kBroadcast, "ncclBroadcast", in, out, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclBroadcastConfig);

SIM_EXPORT ncclResult_t ncclReduceScatterConfig(const void* in, void* out, size_t out_count, ncclDataType_t type,
                                                ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream,
                                                const ncclCollConfig_t*) {
  SIM_ENTER(ncclReduceScatterConfig);
  return submit({Call::kReduceScatter, "ncclReduceScatter", in, out, out_count, type, op}, comm, stream);
}
SIM_ALIAS(ncclReduceScatterConfig);

SIM_EXPORT ncclResult_t ncclAllGatherConfig(const void* in, void* out, size_t in_count, ncclDataType_t type,
                                            ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t*) {
  SIM_ENTER(ncclAllGatherConfig);
  return submit({Call::kAllGather, "ncclAllGather", in, out, in_count, type}, comm, stream);
}
SIM_ALIAS(ncclAllGatherConfig);

SIM_EXPORT ncclResult_t ncclAlltoAllConfig(const void* in, void* out, size_t count, ncclDataType_t type,
                                           ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t*) {
  SIM_ENTER(ncclAlltoAllConfig);
  return submit({Call::kAlltoAll, "ncclAlltoAll", in, out, count, type}, comm, stream);
}
SIM_ALIAS(ncclAlltoAllConfig);

SIM_EXPORT ncclResult_t ncclGatherConfig(const void* in, void* out, size_t count, ncclDataType_t type, int root,
                                         ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t*) {
  SIM_ENTER(ncclGatherConfig);
  return submit({Call::kGather, "ncclGather", in, out, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclGatherConfig);

SIM_EXPORT ncclResult_t ncclScatterConfig(const void* in, void* out, size_t count, ncclDataType_t type, int root,
                                          ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t*) {
  SIM_ENTER(ncclScatterConfig);
  return submit({Call::kScatter, "ncclScatter", in, out, count, type, 0, root}, comm, stream);
}
SIM_ALIAS(ncclScatterConfig);

SIM_EXPORT ncclResult_t ncclPutSignal(const void* in, size_t count, ncclDataType_t type, int peer, ncclWindow_t window,
                                      size_t offset, int signal, int context, unsigned int flags, ncclComm_t comm,
                                      cudaStream_t stream) {
  SIM_ENTER(ncclPutSignal);
  if (signal || context || flags || !window || (count && !in)) return group_note(ncclInvalidArgument);
  Op op = {Call::kSignal, "ncclPutSignal", in, nullptr, count, type, 0, peer};
  op.window = reinterpret_cast<uintptr_t>(window);
  op.offset = offset;
  return submit(op, comm, stream);
}
SIM_ALIAS(ncclPutSignal);

SIM_EXPORT ncclResult_t ncclSignal(int peer, int signal, int context, unsigned int flags, ncclComm_t comm,
                                   cudaStream_t stream) {
  SIM_ENTER(ncclSignal);
  if (signal || context || flags) return group_note(ncclInvalidArgument);
  return submit({Call::kSignal, "ncclSignal", nullptr, nullptr, 0, ncclInt8, 0, peer}, comm, stream);
}
SIM_ALIAS(ncclSignal);

SIM_EXPORT ncclResult_t ncclWaitSignal(int count, ncclWaitSignalDesc_t* waits, ncclComm_t comm, cudaStream_t stream) {
  SIM_ENTER(ncclWaitSignal);
  if (count <= 0 || !waits) return group_note(ncclInvalidArgument);
  Op op = {Call::kWaitSignal, "ncclWaitSignal", nullptr, nullptr, 0, ncclInt8};
  op.waits.assign(waits, waits + count);
  CommPtr found = find_comm(comm, "ncclWaitSignal");
  for (const ncclWaitSignalDesc_t& wait : op.waits) {
    bool known = found && wait.peer >= 0 && wait.peer < found->ranks;
    if (!known || wait.opCnt < 0 || wait.sigIdx || wait.ctx) return group_note(ncclInvalidArgument);
  }
  return submit(op, comm, stream);
}
SIM_ALIAS(ncclWaitSignal);
#endif

SIM_EXPORT ncclResult_t ncclSend(const void* in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                                 cudaStream_t stream) {
  SIM_ENTER(ncclSend);
  return submit({Call::kSend, "ncclSend", in, nullptr, count, type, 0, peer}, comm, stream);
}
SIM_ALIAS(ncclSend);

SIM_EXPORT ncclResult_t ncclRecv(void* out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                                 cudaStream_t stream) {
  SIM_ENTER(ncclRecv);
  return submit({Call::kRecv, "ncclRecv", nullptr, out, count, type, 0, peer}, comm, stream);
}
SIM_ALIAS(ncclRecv);
