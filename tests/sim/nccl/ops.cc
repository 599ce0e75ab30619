// Execution of the operations on device memory, which the simulation lets the host read and write. Runs inside host
// functions, so it calls nothing of the driver.
#include <cstring>

#include "collnet.h"
#include "debug.h"
#include "group.h"
#include "numeric.h"

namespace simnccl {
namespace {

void place(void* out, size_t offset, const Bytes& data, size_t from, size_t bytes) {
  if (bytes) std::memmove(static_cast<uint8_t*>(out) + offset, data.data() + from, bytes);
}

ncclResult_t gather(Comm& comm, const void* data, size_t bytes, Result* result) {
  Frame head;
  head.mode = kGather;
  head.sequence = comm.sequence++;
  return comm.link.exchange(head, {}, data, bytes, result);
}

ncclResult_t reduced(Comm& comm, const Op& op, size_t elements, Result* result) {
  Frame head;
  head.mode = kReduce;
  head.type = op.type;
  head.op = op.op;
  head.sequence = comm.sequence++;
  if (op.op >= ncclNumOps) {
    head.op = kPreMulSum;
    head.scale = op.scalar.scale;
    head.iscale = op.scalar.iscale;
    if (op.scalar.device) read_scalar(op.scalar.type, op.scalar.device, &head.scale, &head.iscale);
  }
  size_t bytes = elements * type_size(op.type);
  ncclResult_t status = comm.link.exchange(head, {}, op.in, bytes, result);
  if (status == ncclSuccess && result->blobs.at(0).size() != bytes) return ncclInternalError;
  return status;
}

// The blob of one rank, checked for its length.
ncclResult_t place_blob(const Result& result, int rank, void* out, size_t offset, size_t from, size_t bytes) {
  const Bytes& blob = result.blobs.at(size_t(rank));
  if (blob.size() < from + bytes) {
    SIM_WARN("rank %d gave %zu bytes where %zu were due", rank, blob.size(), from + bytes);
    return ncclInvalidUsage;
  }
  place(out, offset, blob, from, bytes);
  return ncclSuccess;
}

}  // namespace

// What a signal brings along, before its data.
struct SignalHead {
  uint64_t window;
  uint64_t offset;
};

static ncclResult_t signal(Comm& comm, const Op& op, size_t bytes) {
  SignalHead head = {op.window, op.offset};
  Bytes message(sizeof head + bytes);
  std::memcpy(message.data(), &head, sizeof head);
  if (bytes) std::memcpy(message.data() + sizeof head, op.in, bytes);
  return comm.link.send(op.root, message.data(), message.size(), 1);
}

// The data of a put is written when its signal is waited for: no sooner is it promised to be there.
static ncclResult_t take_signal(Comm& comm, int peer) {
  Bytes message;
  ncclResult_t status = comm.link.receive(peer, &message, 1);
  if (status != ncclSuccess) return status;
  SignalHead head;
  std::memcpy(&head, message.data(), sizeof head);
  if (head.window == 0) return ncclSuccess;
  std::lock_guard<std::mutex> guard(comm.windows_lock);
  auto found = comm.windows.find(head.window);
  size_t bytes = message.size() - sizeof head;
  if (found == comm.windows.end() || head.offset > found->second.size || bytes > found->second.size - head.offset) {
    SIM_WARN("rank %d put %zu bytes at %lu of a window that does not hold them", peer, bytes,
             (unsigned long)head.offset);
    return ncclInvalidUsage;
  }
  place(found->second.address, head.offset, message, sizeof head, bytes);
  return ncclSuccess;
}

ncclResult_t execute(Comm& comm, const Op& op) {
  count_execution(op.name);
  size_t bytes = op.count * type_size(op.type);
  int ranks = comm.ranks;
  bool root = comm.rank == op.root;
  Result result;
  ncclResult_t status = ncclSuccess;
  switch (op.call) {
    case Call::kAllReduce:
      if (op.collnet) return collnet_allreduce(comm, op.in, op.out, op.count, op.type, op.op);
      status = reduced(comm, op, op.count, &result);
      if (status == ncclSuccess) place(op.out, 0, result.blobs[0], 0, bytes);
      return status;
    case Call::kReduce:
      status = reduced(comm, op, op.count, &result);
      if (status == ncclSuccess && root) place(op.out, 0, result.blobs[0], 0, bytes);
      return status;
    case Call::kReduceScatter:
      status = reduced(comm, op, op.count * size_t(ranks), &result);
      if (status == ncclSuccess) place(op.out, 0, result.blobs[0], bytes * size_t(comm.rank), bytes);
      return status;
    case Call::kBroadcast:
      status = gather(comm, op.in, root ? bytes : 0, &result);
      return status == ncclSuccess ? place_blob(result, op.root, op.out, 0, 0, bytes) : status;
    case Call::kAllGather:
      status = gather(comm, op.in, bytes, &result);
      for (int r = 0; r < ranks && status == ncclSuccess; ++r) {
        status = place_blob(result, r, op.out, bytes * size_t(r), 0, bytes);
      }
      return status;
    case Call::kGather:
      status = gather(comm, op.in, bytes, &result);
      for (int r = 0; r < ranks && root && status == ncclSuccess; ++r) {
        status = place_blob(result, r, op.out, bytes * size_t(r), 0, bytes);
      }
      return status;
    case Call::kScatter:
      status = gather(comm, op.in, root ? bytes * size_t(ranks) : 0, &result);
      return status == ncclSuccess ? place_blob(result, op.root, op.out, 0, bytes * size_t(comm.rank), bytes) : status;
    case Call::kAlltoAll:
      status = gather(comm, op.in, bytes * size_t(ranks), &result);
      for (int r = 0; r < ranks && status == ncclSuccess; ++r) {
        status = place_blob(result, r, op.out, bytes * size_t(r), bytes * size_t(comm.rank), bytes);
      }
      return status;
    case Call::kSend:
      return comm.link.send(op.root, op.in, bytes);
    case Call::kRecv: {
      Bytes data;
      status = comm.link.receive(op.root, &data);
      if (status != ncclSuccess) return status;
      if (data.size() != bytes) {
        SIM_WARN("received %zu bytes from rank %d, expected %zu", data.size(), op.root, bytes);
        return ncclInvalidUsage;
      }
      place(op.out, 0, data, 0, bytes);
      return ncclSuccess;
    }
    case Call::kSignal:
      return signal(comm, op, bytes);
    case Call::kWaitSignal:
      for (const ncclWaitSignalDesc_t& wait : op.waits) {
        for (int i = 0; i < wait.opCnt && status == ncclSuccess; ++i) status = take_signal(comm, wait.peer);
      }
      return status;
  }
  return ncclInternalError;
}

}  // namespace simnccl
