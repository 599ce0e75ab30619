// Calls that are wrong, and calls that are given up. Nothing of theirs is checked but that they end. See worker.h.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "nccl_calls.h"
#include "worker.h"

namespace worker {

// Memory that is mapped and is no communicator: what a program that mixes up its handles passes.
alignas(64) static char stranger[1 << 16];

// `comm=null`, `stranger`, `gone` (the last one that ended); else the current one.
ncclComm_t Driver::handle_by_name(const Statement& s, Lane& lane) {
  std::string name = s.text("comm", "live");
  if (name == "null") return nullptr;
  if (name == "stranger") return reinterpret_cast<ncclComm_t>(stranger + size_t(s.number("at", 0)));
  if (name == "gone") return gone_;
  if (name != "live") throw std::runtime_error("unknown communicator " + name);
  return lane.member().comm;
}

bool Driver::wait_idle(Lane& lane, long ms) {
  use_lane(lane);
  auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
  for (CUstream stream : lane.streams) {
    while (cuStreamQuery(stream) == CUDA_ERROR_NOT_READY) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  }
  return true;
}

// One AllReduce or AllGather with any arguments: `count` (any integer, `max` is the largest), `dtype` and `op` as
// numbers, `send=null`, `receive=null`, `comm` as above. `expect=C`: what the call answers, -1 for any error. It ends, or
// the communicator reports an error, `within` milliseconds. `ends=error`: it must be an error, the call's or a later one.
void Driver::raw(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    Call c;
    c.lane = lane;
    c.in = take(*lane, size_t(s.number("bytes", 1 << 16)), false);
    c.out = take(*lane, size_t(s.number("bytes", 1 << 16)), false);
    CUstream stream = lane->current();
    accept_cuda(cuMemsetD8Async(c.in.base, 0x11, c.in.capacity, stream), "cuMemsetD8Async");
    if (!wait_idle(*lane, 5000)) throw std::runtime_error("the stream is busy");
    auto pointer = [&](const char* key, CUdeviceptr address) {
      return s.text(key, "") == "null" ? nullptr : reinterpret_cast<void*>(uintptr_t(address));
    };
    std::string word = s.text("count", "100");
    size_t count = word == "max" ? SIZE_MAX : size_t(strtoull(word.c_str(), nullptr, 0));
    int type = int(s.number("dtype", ncclFloat32));
    int op = int(s.number("op", ncclSum));
    ncclComm_t comm = handle_by_name(s, *lane);
    void* send = pointer("send", c.in.base);
    void* receive = pointer("receive", c.out.base);
    ncclResult_t result = s.text("name", "allreduce") == "allgather"
                              ? call::ncclAllGather(send, receive, count, type, comm, stream)
                              : call::ncclAllReduce(send, receive, count, type, op, comm, stream);
    note("the call gave " + std::to_string(result));
    long expect = s.number("expect", ncclSuccess);
    if (s.has("expect") && (expect == -1 ? result == ncclSuccess : result != expect)) {
      failed_ = true;
      note("expected " + std::to_string(expect));
    }
    ncclResult_t later = ncclSuccess;
    auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(s.number("within", 10000));
    while (result == ncclSuccess && later == ncclSuccess && !wait_idle(*lane, 5)) {
      if (comm == lane->member().comm) call::ncclCommGetAsyncError(comm, &later);
      if (std::chrono::steady_clock::now() > deadline) {
        failed_ = true;
        note("it did not end");
        return;
      }
    }
    if (result == ncclSuccess && comm == lane->member().comm) call::ncclCommGetAsyncError(comm, &later);
    note("the communicator says " + std::to_string(later));
    if (s.text("ends", "") == "error" && result == ncclSuccess && later == ncclSuccess) {
      failed_ = true;
      note("expected an error");
    }
    if (wait_idle(*lane, 1000)) {
      give_back(c);
    } else {
      abandoned_.push_back(c);
    }
  }
}

// Operations as programs mistake them: used with another type, used and destroyed again when it is gone, a handle that
// comes back with another factor. The answers are NCCL's, and the last call's result is that of the last factor.
void Driver::operations(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    ncclComm_t comm = lane->member().comm;
    CUstream stream = lane->current();
    constexpr size_t kCount = 100;
    Buffer buffer = take(*lane, kCount * 4, false);
    void* data = reinterpret_cast<void*>(uintptr_t(buffer.base));
    auto expect = [&](ncclResult_t got, ncclResult_t wanted, const char* what) {
      if (got == wanted) return;
      failed_ = true;
      note(std::string(what) + " gave " + std::to_string(got));
    };
    auto reduce = [&](ncclRedOp_t op, int type) {
      return call::ncclAllReduce(data, data, kCount, type, op, comm, stream);
    };
    accept_cuda(cuMemsetD32Async(buffer.base, 0x3f800000, kCount, stream), "cuMemsetD32Async");
    float two = 2, three = 3;
    ncclRedOp_t first, second;
    expect(call::ncclRedOpCreatePreMulSum(&first, &two, ncclFloat32, ncclScalarHostImmediate, comm), ncclSuccess, "create");
    expect(reduce(first, ncclFloat16), ncclInvalidArgument, "another type");
    expect(reduce(first, ncclUint32), ncclInvalidArgument, "another type of the same size");
    expect(reduce(first ^ 1, ncclFloat32), ncclInvalidArgument, "a handle that nobody made");
    expect(call::ncclRedOpDestroy(first, comm), ncclSuccess, "destroy");
    expect(reduce(first, ncclFloat32), ncclInvalidArgument, "a call with one that is gone");
    expect(call::ncclRedOpDestroy(first, comm), ncclInvalidArgument, "a second destroy");
    expect(call::ncclRedOpCreatePreMulSum(&second, &three, ncclFloat32, ncclScalarHostImmediate, comm), ncclSuccess,
           "create");
    expect(second, first, "the handle that was free");
    expect(reduce(second, ncclFloat32), ncclSuccess, "a call with the new one");
    // A factor is read when the operation is made, and an operation may go while calls with it are under way.
    three = 5;
    expect(call::ncclRedOpDestroy(second, comm), ncclSuccess, "destroy");
    std::vector<float> got(kCount);
    accept_cuda(cuMemcpyDtoHAsync_v2(got.data(), buffer.base, kCount * 4, stream), "cuMemcpyDtoHAsync");
    accept(sync(*lane), "sync");
    for (float value : got) {
      if (value != 3.0f * float(lane->member().ranks)) {
        failed_ = true;
        note("got " + std::to_string(value));
        break;
      }
    }
    lane->pool.push_back(buffer);
  }
}

// Gives up the calls that `hold` left under way: waits for the streams, looks at nothing.
void Driver::drop(const Statement& s) {
  held_ = false;
  for (Lane* lane : concerned(s)) {
    if (!wait_idle(*lane, s.number("within", 5000))) {
      failed_ = true;
      note("a kernel still runs");
      return;
    }
  }
  for (Call& c : pending_) give_back(c);
  pending_.clear();
}

}  // namespace worker
