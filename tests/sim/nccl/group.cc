// See group.h. Launches host functions on the caller's streams; uses nothing else of the driver but the capture state
// of a stream and the current context, which threads of a group inherit.
#include "group.h"

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

#include "collnet.h"
#include "debug.h"

namespace simnccl {
namespace {

struct InitJob {
  CommPtr comm;
  ncclComm_t* owner;
  std::function<ncclResult_t()> job;
  bool absent;
  // Of a child of one that does not block: in progress until the child is there, which `owner` holds only then.
  CommPtr parent;
};

// The operations of one communicator on one stream: one host function.
struct Batch {
  CommPtr comm;
  cudaStream_t stream;
  std::vector<Op> ops;
  bool captured = false;
  uint64_t ticket = 0;
};

struct Group {
  int depth = 0;
  ncclResult_t error = ncclSuccess;
  std::vector<InitJob> inits;
  std::vector<std::unique_ptr<Batch>> batches;
};

thread_local Group group;

void retire(Comm& comm) {
  std::lock_guard<std::mutex> guard(comm.order_lock);
  ++comm.executed;
  comm.order_changed.notify_all();
}

// These only hand something over.
bool sends(const Op& op) { return op.call == Call::kSend || op.call == Call::kSignal; }

// An operation may run while the next one of its group is still being launched.
bool usable(const Comm& comm) {
  int state = comm.state;
  return !comm.stop && !comm.revoked && (state == ncclSuccess || state == ncclInProgress);
}

void run_ops(Batch& batch) {
  Comm& comm = *batch.comm;
  // Sends only hand data over, so they go first: a receive of the same group may wait for the peer's.
  for (const Op& op : batch.ops) {
    if (sends(op) && usable(comm)) fail(comm, execute(comm, op));
  }
  if (!batch.captured) {
    std::unique_lock<std::mutex> guard(comm.order_lock);
    comm.order_changed.wait(guard, [&] { return comm.executed == batch.ticket; });
  }
  for (const Op& op : batch.ops) {
    if (sends(op)) continue;
    std::lock_guard<std::mutex> guard(comm.exec);
    if (usable(comm)) fail(comm, execute(comm, op));
  }
}

void host_function(void* data) {
  auto* batch = static_cast<Batch*>(data);
  run_ops(*batch);
  if (batch->captured) return;  // belongs to a graph, which may run it again
  retire(*batch->comm);
  delete batch;
}

ncclResult_t launch(std::unique_ptr<Batch> batch) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (cuStreamIsCapturing(batch->stream, &status) != CUDA_SUCCESS) return ncclUnhandledCudaError;
  batch->captured = status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
  Comm& comm = *batch->comm;
  CommPtr keep = batch->comm;
  cudaStream_t stream = batch->stream;
  for (Op& op : batch->ops) {
    if (op.call == Call::kAllReduce) op.collnet = collnet_takes(comm, op.type, op.op, op.count);
  }
  if (batch->captured) {
    // The graph's life is the caller's business; what its nodes point to lives as long as the process.
    Batch* kept = batch.release();
    return cuLaunchHostFunc(stream, host_function, kept) == CUDA_SUCCESS ? ncclSuccess : ncclUnhandledCudaError;
  }
  {
    std::lock_guard<std::mutex> guard(comm.order_lock);
    batch->ticket = comm.issued++;
  }
  Batch* raw = batch.release();
  if (cuLaunchHostFunc(stream, host_function, raw) == CUDA_SUCCESS) return ncclSuccess;
  // The ticket must still be called in its turn.
  raw->ops.clear();
  run_ops(*raw);
  retire(comm);
  delete raw;
  return ncclUnhandledCudaError;
}

ncclResult_t run_init(const InitJob& init) {
  ncclResult_t status = init.job();
  Comm& comm = *init.comm;
  if (!comm.blocking && status == ncclSuccess) {
    const char* hold = getenv("SIM_NCCL_INPROGRESS_MS");
    bool forever = hold && std::string(hold) == "forever";
    auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(env_number("SIM_NCCL_INPROGRESS_MS", 0));
    while (!comm.stop && (forever || std::chrono::steady_clock::now() < until)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  comm.state = status;
  if (status != ncclSuccess && comm.blocking && init.owner) {
    forget_comm(comm.handle());
    *init.owner = nullptr;
  }
  if (init.parent) {
    if (status == ncclSuccess && init.owner) __atomic_store_n(init.owner, comm.handle(), __ATOMIC_RELEASE);
    int expected = ncclInProgress;
    init.parent->state.compare_exchange_strong(expected, status);
  }
  return status;
}

// A thread of its own, with the caller's context.
std::thread spawn(std::function<void()> body) {
  CUcontext context = nullptr;
  cuCtxGetCurrent(&context);
  return std::thread([context, body = std::move(body)] {
    if (context) cuCtxSetCurrent(context);
    body();
  });
}

ncclResult_t run_inits(std::vector<InitJob>& inits, bool* in_progress) {
  std::vector<std::thread> threads;
  std::vector<ncclResult_t> results(inits.size(), ncclSuccess);
  for (size_t i = 0; i < inits.size(); ++i) {
    if (!inits[i].comm->blocking) {
      *in_progress = true;
      if (inits[i].parent) inits[i].parent->state = ncclInProgress;
      InitJob job = inits[i];
      spawn([job] { run_init(job); }).detach();
    } else if (inits.size() == 1) {
      results[i] = run_init(inits[i]);
    } else {
      threads.push_back(spawn([&inits, &results, i] { results[i] = run_init(inits[i]); }));
    }
  }
  for (auto& thread : threads) thread.join();
  for (auto& init : inits) {
    // No color: the rank took part and has no communicator.
    if (init.absent && init.comm->blocking) forget_comm(init.comm->handle());
  }
  for (ncclResult_t result : results) {
    if (result != ncclSuccess) return result;
  }
  return ncclSuccess;
}

// The launches of communicators that do not block: on a thread of its own, in its own time, and until that is over they
// are in progress. In a capture at once: the program goes on to end it.
void launch_later(std::vector<std::unique_ptr<Batch>> batches) {
  static std::atomic<uint64_t> launches{0};
  auto shared = std::make_shared<std::vector<std::unique_ptr<Batch>>>(std::move(batches));
  for (auto& batch : *shared) batch->comm->state = ncclInProgress;
  std::vector<CommPtr> comms;
  for (auto& batch : *shared) comms.push_back(batch->comm);
  uint64_t number = ++launches;
  spawn([shared, comms, number] {
    // Sometimes the caller is faster, sometimes this is.
    std::this_thread::sleep_for(std::chrono::microseconds(number * 0x9e3779b97f4a7c15ull >> 53));
    for (auto& batch : *shared) {
      CommPtr comm = batch->comm;
      ncclResult_t error = launch(std::move(batch));
      if (error != ncclSuccess) comm->state = error;
    }
    for (const CommPtr& comm : comms) {
      int expected = ncclInProgress;
      comm->state.compare_exchange_strong(expected, ncclSuccess);
    }
  }).detach();
}

bool captures(cudaStream_t stream) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  return cuStreamIsCapturing(stream, &status) == CUDA_SUCCESS && status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

ncclResult_t finish(bool run) {
  std::vector<InitJob> inits = std::move(group.inits);
  std::vector<std::unique_ptr<Batch>> batches = std::move(group.batches);
  ncclResult_t error = group.error;
  group = Group();
  if (error != ncclSuccess || !run) {
    for (auto& init : inits) {
      forget_comm(init.comm->handle());
      if (init.owner) *init.owner = nullptr;
    }
    return error;
  }
  bool in_progress = false;
  error = run_inits(inits, &in_progress);
  std::vector<std::unique_ptr<Batch>> later;
  for (auto& batch : batches) {
    if (error != ncclSuccess) break;
    if (!batch->comm->blocking) in_progress = true;
    if (!batch->comm->blocking && !captures(batch->stream)) {
      later.push_back(std::move(batch));
    } else {
      error = launch(std::move(batch));
    }
  }
  if (error != ncclSuccess) return error;
  if (!later.empty()) launch_later(std::move(later));
  return in_progress ? ncclInProgress : ncclSuccess;
}

}  // namespace

ncclResult_t group_start() {
  ++group.depth;
  return ncclSuccess;
}

ncclResult_t group_end() {
  if (group.depth == 0) {
    SIM_WARN("ncclGroupEnd: not in a group call.");
    return ncclInvalidUsage;
  }
  if (--group.depth > 0) return ncclSuccess;
  return finish(true);
}

ncclResult_t group_simulate_end() {
  if (group.depth == 0) return ncclInvalidUsage;
  if (--group.depth > 0) return ncclSuccess;
  return finish(false);
}

ncclResult_t group_note(ncclResult_t error) {
  if (group.depth > 0 && group.error == ncclSuccess && error != ncclInProgress) group.error = error;
  return error;
}

ncclResult_t submit_init(const CommPtr& comm, ncclComm_t* owner, std::function<ncclResult_t()> job, bool absent,
                         const CommPtr& parent) {
  const bool later = parent && !parent->blocking && !comm->blocking;
  *owner = absent || later ? nullptr : comm->handle();
  group.inits.push_back({comm, absent ? nullptr : owner, std::move(job), absent, later ? parent : nullptr});
  if (group.depth > 0) return ncclSuccess;
  ncclResult_t status = finish(true);
  // NCCL drops it here: who has such a parent asks the parent.
  return later && status == ncclInProgress ? ncclResult_t(ncclSuccess) : status;
}

ncclResult_t submit_op(const CommPtr& comm, const Op& op, cudaStream_t stream) {
  Batch* batch = nullptr;
  for (auto& known : group.batches) {
    if (known->comm == comm && known->stream == stream) batch = known.get();
  }
  if (!batch) {
    group.batches.push_back(std::make_unique<Batch>());
    batch = group.batches.back().get();
    batch->comm = comm;
    batch->stream = stream;
  }
  batch->ops.push_back(op);
  return group.depth > 0 ? ncclSuccess : finish(true);
}

}  // namespace simnccl
