// Group semantics and the launch of operations: nothing runs before the outermost end of a thread's group.
#pragma once

#include <functional>

#include "comm.h"

namespace simnccl {

enum class Call {
  kAllReduce,
  kReduce,
  kBroadcast,
  kAllGather,
  kReduceScatter,
  kAlltoAll,
  kGather,
  kScatter,
  kSend,
  kRecv,
  kSignal,
  kWaitSignal
};

struct Op {
  Call call;
  const char* name;
  const void* in;
  void* out;
  size_t count;
  int type;
  int op = 0;
  int root = 0;  // or peer
  PreMulSum scalar = {};
  bool collnet = false;  // decided at launch
  uint64_t window = 0;   // of a signal; 0: it brings no data
  size_t offset = 0;
  std::vector<ncclWaitSignalDesc_t> waits = {};
};

ncclResult_t group_start();
ncclResult_t group_end();
ncclResult_t group_simulate_end();
// Remembers the first error of a call inside a group and returns it.
ncclResult_t group_note(ncclResult_t error);

// Runs `job` for a new communicator: here, at the end of the group, or in the background when it does not block.
// `owner` is set to NULL if the job says that this rank has no part in it.
// Of a `parent` that does not block NCCL says success at once, fills `owner` in when the child is complete, and the
// parent is in progress until then.
ncclResult_t submit_init(const CommPtr& comm, ncclComm_t* owner, std::function<ncclResult_t()> job, bool absent = false,
                         const CommPtr& parent = nullptr);
ncclResult_t submit_op(const CommPtr& comm, const Op& op, cudaStream_t stream);

// ops.cc: executes one operation. The caller holds comm.exec.
ncclResult_t execute(Comm& comm, const Op& op);

}  // namespace simnccl
