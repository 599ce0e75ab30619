// Collective calls: plan, prepare buffers with guards and poison, issue, wait, check. See worker.h.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "nccl_calls.h"
#include "worker.h"

namespace worker {
namespace {

constexpr size_t kGuard = 64;
constexpr uint8_t kPoison = 0xa5;

CUdeviceptr data_of(const Buffer& buffer, size_t offset) { return buffer.base + kGuard + offset; }
void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(uintptr_t(address)); }

// Elements that a rank reads and writes in one call.
size_t in_count(const Call& c) {
  bool wide = c.coll == Coll::kReduceScatter || c.coll == Coll::kAlltoAll ||
              (c.coll == Coll::kScatter && c.member.rank == c.root);
  return wide ? c.count * size_t(c.member.ranks) : c.count;
}
size_t out_count(const Call& c) {
  bool wide = c.coll == Coll::kAllGather || c.coll == Coll::kAlltoAll || c.coll == Coll::kGather;
  return wide ? c.count * size_t(c.member.ranks) : c.count;
}
bool writes(const Call& c) {
  if (c.coll == Coll::kSend) return false;
  return (c.coll != Coll::kReduce && c.coll != Coll::kGather) || c.member.rank == c.root;
}

Coll coll_by_name(const std::string& name) {
  static const std::map<std::string, Coll> names = {
      {"allreduce", Coll::kAllReduce},         {"reduce", Coll::kReduce},     {"broadcast", Coll::kBroadcast},
      {"bcast", Coll::kBcast},                 {"allgather", Coll::kAllGather}, {"reducescatter", Coll::kReduceScatter},
      {"alltoall", Coll::kAlltoAll},           {"gather", Coll::kGather},     {"scatter", Coll::kScatter},
      {"sendrecv", Coll::kSendRecv},           {"send", Coll::kSend},         {"recv", Coll::kRecv},
      {"put", Coll::kPut}};
  auto found = names.find(name);
  if (found == names.end()) throw std::runtime_error("unknown collective " + name);
  return found->second;
}

}  // namespace

std::vector<Lane*> Driver::concerned(const Statement& s) {
  std::vector<Lane*> lanes;
  for (Lane& lane : lanes_) {
    if (s.concerns(lane.rank)) lanes.push_back(&lane);
  }
  return lanes;
}

void Driver::use_lane(Lane& lane) {
  if (lanes_.size() > 1) cuCtxSetCurrent(lane.context);
}

Buffer Driver::take(Lane& lane, size_t bytes, bool from_nccl) {
  for (size_t i = 0; i < lane.pool.size(); ++i) {
    if (lane.pool[i].capacity < bytes || lane.pool[i].from_nccl != from_nccl) continue;
    Buffer found = lane.pool[i];
    lane.pool.erase(lane.pool.begin() + long(i));
    return found;
  }
  Buffer made;
  made.capacity = (bytes + 65535) / 65536 * 65536;
  made.from_nccl = from_nccl;
  if (from_nccl) {
    void* address = nullptr;
    accept(call::ncclMemAlloc(&address, made.capacity), "ncclMemAlloc");
    made.base = CUdeviceptr(reinterpret_cast<uintptr_t>(address));
  } else {
    accept_cuda(cuMemAlloc_v2(&made.base, made.capacity), "cuMemAlloc");
  }
  return made;
}

void Driver::give_back(Call& c) {
  if (c.window) accept(call::ncclCommWindowDeregister(c.member.comm, c.window), "ncclCommWindowDeregister");
  c.window = nullptr;
  if (c.out.base && c.out.base != c.in.base) c.lane->pool.push_back(c.out);
  if (c.in.base) c.lane->pool.push_back(c.in);
  if (c.factor.base) c.lane->pool.push_back(c.factor);
  c.factor = Buffer();
  c.in = c.out = Buffer();
}

Call Driver::plan(const Statement& s, Lane& lane, uint64_t number) {
  Call c;
  c.lane = &lane;
  c.member = lane.member();
  c.coll = coll_by_name(s.text("name", "allreduce"));
  c.type = type_by_name(s.text("dtype", "f32"));
  c.scaled = s.text("op", "sum") == "premulsum";
  c.op = c.scaled ? int(ncclSum) : op_by_name(s.text("op", "sum"));
  if (c.type < 0 || c.op < 0) throw std::runtime_error("unknown dtype or op");
  c.count = size_t(s.number("count", 1000));
  c.root = int(s.number("root", 0)) % std::max(1, c.member.ranks);
  c.payload.seed = uint64_t(s.number("seed", 1));
  c.payload.call = uint64_t(s.number("call", long(number)));
  c.payload.first = uint64_t(s.number("first", 0));
  for (const std::string& word : split_list(s.text("words", ""), ',')) {
    c.payload.kind = Payload::kWords;
    c.payload.words.push_back(uint32_t(strtoul(word.c_str(), nullptr, 16)));
  }
  c.on_device = s.text("scalar", "host") == "device";
  c.exact = int(s.number("exact", options_.exact));
  c.configured = s.number("config", 0) != 0;
  c.extended = s.text("by", "") == "extension";
  if (s.has("pairs")) c.payload.kind = Payload::kPairs;
  c.payload.special = s.number("special", c.op == ncclSum || c.exact == 2) != 0;
  c.factor_call = c.payload.call;
  c.each_factor = s.text("factor", "") == "each";
  std::vector<std::string> makers = split_list(s.text("maker", ""), ',');
  // One for all ranks, or one for each.
  if (!makers.empty()) c.maker = makers.size() == 1 ? makers[0] : makers.at(size_t(c.member.rank));
  if (c.maker == "name") c.maker.clear();
  c.in_place = s.number("inplace", 0) != 0;
  c.in_offset = size_t(s.number("offset", 0)) * type_bytes(c.type);
  c.out_offset = size_t(s.number("out_offset", s.number("offset", 0))) * type_bytes(c.type);
  c.nccl_memory = s.text("memory", "cuda") == "nccl";
  return c;
}

void Driver::prepare(Call& c) {
  use_lane(*c.lane);
  size_t element = type_bytes(c.type);
  size_t in_bytes = in_count(c) * element;
  size_t out_bytes = out_count(c) * element;
  c.check_input = true;
  c.in = take(*c.lane, std::max(in_bytes, c.in_place ? out_bytes : 0) + c.in_offset + 2 * kGuard, c.nccl_memory);
  if (c.in_place) {
    c.out = c.in;
    c.out_offset = c.in_offset;
  } else {
    c.out = take(*c.lane, out_bytes + c.out_offset + 2 * kGuard, c.nccl_memory);
  }
  if (c.coll == Coll::kPut) {
    accept(call::ncclCommWindowRegister(c.member.comm, pointer(c.out.base), c.out.capacity, &c.window,
                                        NCCL_WIN_COLL_SYMMETRIC),
           "ncclCommWindowRegister");
  }
  if (c.scaled && c.on_device) {
    c.factor = take(*c.lane, sizeof(uint64_t), false);
    accept_cuda(cuMemsetD8Async(c.factor.base, kPoison, sizeof(uint64_t), c.lane->current()), "cuMemsetD8Async");
  }
  refresh(c);
}

// Every rank's factor of a call.
static std::vector<uint64_t> factors_of(const Call& c) {
  Payload payload = c.payload;
  payload.call = c.factor_call;
  std::vector<uint64_t> factors;
  for (int r = 0; r < c.member.ranks; ++r) factors.push_back(factor_of(payload, c.type, r, c.each_factor));
  return factors;
}

// Fresh payload, poisoned output, guards: on the call's stream, so that they are part of the program under test.
void Driver::refresh(Call& c) {
  use_lane(*c.lane);
  CUstream stream = c.lane->current();
  size_t element = type_bytes(c.type);
  Bytes data = make_input(c.payload, c.type, c.member.rank, 0, in_count(c));
  if (!c.in_place) {
    size_t span = out_count(c) * element + c.out_offset + 2 * kGuard;
    accept_cuda(cuMemsetD8Async(c.out.base, kPoison, span, stream), "cuMemsetD8Async");
  }
  size_t at = kGuard + c.in_offset;
  size_t spread = 0;
  if (c.in_place && c.coll == Coll::kAllGather) spread = data.size() * size_t(c.member.rank);
  size_t image_bytes = std::max(data.size() + spread, c.in_place ? out_count(c) * element : 0) + at + kGuard;
  c.image = std::make_shared<Bytes>(image_bytes, kPoison);
  std::copy(data.begin(), data.end(), c.image->begin() + long(at + spread));
  accept_cuda(cuMemcpyHtoDAsync_v2(c.in.base, c.image->data(), image_bytes, stream), "cuMemcpyHtoDAsync");
  if (c.factor.base) {
    // Written in stream order: whoever reads it before the call runs reads poison, or the factor of the replay before.
    c.factor_call = c.payload.call;
    c.factor_image = std::make_shared<uint64_t>(factors_of(c).at(size_t(c.member.rank)));
    accept_cuda(cuMemcpyHtoDAsync_v2(c.factor.base, c.factor_image.get(), 8, stream), "cuMemcpyHtoDAsync");
  }
}

// Which of the ways to NCCL's function a program goes: by name; `second`, by its name with a p; `stock`, by an address
// that it looked up in the library itself; `late`, through an object that is loaded for it.
static decltype(&ncclRedOpCreatePreMulSum) make_operation(const std::string& maker) {
  using Make = decltype(&ncclRedOpCreatePreMulSum);
  if (maker.empty()) return &call::ncclRedOpCreatePreMulSum;
  if (maker == "second") return &call::pncclRedOpCreatePreMulSum;
  const char* path = maker == "late" ? getenv("SIM_LATE_OBJECT") : getenv("TWOSHOT_NCCL_LIBRARY");
  void* object = dlopen(path ? path : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  void* made = object ? dlsym(object, maker == "late" ? "sim_late_create" : "ncclRedOpCreatePreMulSum") : nullptr;
  if (!made) throw std::runtime_error(std::string("no way to make an operation: ") + dlerror());
  return reinterpret_cast<Make>(made);
}

ncclResult_t Driver::issue(Call& c) {
  use_lane(*c.lane);
  CUstream stream = c.lane->current();
  size_t element = type_bytes(c.type);
  CUdeviceptr in = data_of(c.in, c.in_offset);
  CUdeviceptr out = data_of(c.out, c.out_offset);
  if (c.in_place && c.coll == Coll::kAllGather) in += c.count * element * size_t(c.member.rank);
  if (c.in_place && c.coll == Coll::kReduceScatter) out += c.count * element * size_t(c.member.rank);
  ncclComm_t comm = c.member.comm;
  int op = c.op;
  ncclResult_t result = ncclInvalidArgument;
  if (c.scaled) {
    uint64_t factor = factors_of(c).at(size_t(c.member.rank));
    void* scalar = c.on_device ? pointer(c.factor.base) : &factor;
    ncclScalarResidence_t where = c.on_device ? ncclScalarDevice : ncclScalarHostImmediate;
    result = make_operation(c.maker)(&op, scalar, c.type, where, comm);
    factor = 0;  // read by now, or never
    if (result != ncclSuccess) return result;
  }
  switch (c.coll) {
    case Coll::kAllReduce:
      if (c.configured) {
        // On the stack, as a program would have it: whoever makes the call later needs a copy.
        ncclCollConfig_t config = {};
        config.size = sizeof config;
        config.magic = NCCL_API_MAGIC;
        config.version = NCCL_VERSION_CODE;
        config.minCTAs = config.nvlsCTAs = config.cgaClusterSize = config.CTAPolicy = NCCL_CONFIG_UNDEF_INT;
        config.maxCTAs = 4;
        config.forceAlgSelection = 1;
        result = call::ncclAllReduceConfig(pointer(in), pointer(out), c.count, c.type, op, comm, stream, &config);
        std::memset(&config, 0xff, sizeof config);
        break;
      }
      result = (c.extended ? extension().all_reduce : call::ncclAllReduce)(pointer(in), pointer(out), c.count, c.type,
                                                                           op, comm, stream);
      break;
    case Coll::kReduce:
      result = call::ncclReduce(pointer(in), pointer(out), c.count, c.type, op, c.root, comm, stream);
      break;
    case Coll::kBroadcast:
      result = call::ncclBroadcast(pointer(in), pointer(out), c.count, c.type, c.root, comm, stream);
      break;
    case Coll::kBcast:
      // In place by its nature; the input of the root is the buffer of all.
      result = call::ncclBcast(pointer(in), c.count, c.type, c.root, comm, stream);
      break;
    case Coll::kAllGather:
      result = call::ncclAllGather(pointer(in), pointer(out), c.count, c.type, comm, stream);
      break;
    case Coll::kReduceScatter:
      result = call::ncclReduceScatter(pointer(in), pointer(out), c.count, c.type, op, comm, stream);
      break;
    case Coll::kAlltoAll:
      result = call::ncclAlltoAll(pointer(in), pointer(out), c.count, c.type, comm, stream);
      break;
    case Coll::kGather:
      result = call::ncclGather(pointer(in), pointer(out), c.count, c.type, c.root, comm, stream);
      break;
    case Coll::kScatter:
      result = call::ncclScatter(pointer(in), pointer(out), c.count, c.type, c.root, comm, stream);
      break;
    case Coll::kSend:
      result = call::ncclSend(pointer(in), c.count, c.type, c.root, comm, stream);
      break;
    case Coll::kRecv:
      result = call::ncclRecv(pointer(out), c.count, c.type, c.root, comm, stream);
      break;
    case Coll::kSendRecv: {
      int next = (c.member.rank + 1) % c.member.ranks;
      int previous = (c.member.rank + c.member.ranks - 1) % c.member.ranks;
      call::ncclGroupStart();
      result = call::ncclSend(pointer(in), c.count, c.type, next, comm, stream);
      ncclResult_t received = call::ncclRecv(pointer(out), c.count, c.type, previous, comm, stream);
      ncclResult_t ended = call::ncclGroupEnd();
      if (result == ncclSuccess) result = received;
      if (result == ncclSuccess) result = ended;
      break;
    }
    case Coll::kPut: {
      int next = (c.member.rank + 1) % c.member.ranks;
      int previous = (c.member.rank + c.member.ranks - 1) % c.member.ranks;
      // The receiver has poisoned its output when it says so. On the stack: who makes the call later needs a copy.
      ncclWaitSignalDesc_t wait = {1, next, 0, 0};
      ncclResult_t results[4];
      results[0] = call::ncclSignal(previous, 0, 0, 0, comm, stream);
      results[1] = call::ncclWaitSignal(1, &wait, comm, stream);
      results[2] = call::ncclPutSignal(pointer(in), c.count, c.type, next, c.window, kGuard + c.out_offset, 0, 0, 0, comm,
                                       stream);
      wait.peer = previous;
      results[3] = call::ncclWaitSignal(1, &wait, comm, stream);
      std::memset(&wait, 0xff, sizeof wait);
      result = ncclSuccess;
      for (ncclResult_t one : results) {
        if (result == ncclSuccess) result = one;
      }
      break;
    }
  }
  if (c.scaled) {
    ncclResult_t destroyed = call::ncclRedOpDestroy(op, comm);
    if (result == ncclSuccess) result = destroyed;
  }
  return result;
}

// What the output must hold.
static Expectation expectation(const Call& c) {
  Expectation expected;
  auto append = [&](int rank, size_t first) {
    Bytes part = make_input(c.payload, c.type, rank, first, c.count);
    expected.bits.insert(expected.bits.end(), part.begin(), part.end());
  };
  int ranks = c.member.ranks;
  size_t own = size_t(c.member.rank) * c.count;
  switch (c.coll) {
    case Coll::kAllReduce:
    case Coll::kReduce:
    case Coll::kReduceScatter:
      expected = reduce_reference(c.payload, c.type, c.op, ranks, c.coll == Coll::kReduceScatter ? own : 0, c.count,
                                  c.scaled ? factors_of(c) : std::vector<uint64_t>(), c.exact != 2);
      break;
    case Coll::kBroadcast:
    case Coll::kBcast:
    case Coll::kRecv:
      append(c.root, 0);
      break;
    case Coll::kScatter:
      append(c.root, own);
      break;
    case Coll::kSendRecv:
    case Coll::kPut:
      append((c.member.rank + ranks - 1) % ranks, 0);
      break;
    default:
      for (int r = 0; r < ranks; ++r) append(r, c.coll == Coll::kAlltoAll ? own : 0);
  }
  return expected;
}

void Driver::check(Call& c) {
  use_lane(*c.lane);
  CUstream stream = c.lane->current();
  size_t element = type_bytes(c.type);
  size_t in_bytes = in_count(c) * element;
  bool on_input = c.in_place || c.coll == Coll::kBcast;
  size_t out_bytes = out_count(c) * element;
  size_t offset = on_input ? c.in_offset : c.out_offset;
  const Buffer& target = on_input ? c.in : c.out;
  size_t span = std::max(out_bytes, c.in_place ? in_bytes : 0);
  Bytes out(span + offset + 2 * kGuard);
  accept_cuda(cuMemcpyDtoHAsync_v2(out.data(), target.base, out.size(), stream), "cuMemcpyDtoHAsync");
  Bytes in(in_bytes + c.in_offset + 2 * kGuard);
  accept_cuda(cuMemcpyDtoHAsync_v2(in.data(), c.in.base, in.size(), stream), "cuMemcpyDtoHAsync");
  if (!accept_cuda(cuStreamSynchronize(stream), "cuStreamSynchronize")) return;

  ++tally_.calls;
  size_t wrong = 0;
  std::string first;
  uint8_t* result = out.data() + kGuard + offset;
  if (c.in_place && c.coll == Coll::kReduceScatter) result += c.count * element * size_t(c.member.rank);
  if (writes(c)) {
    Expectation expected = expectation(c);
    bool moved = c.coll != Coll::kAllReduce && c.coll != Coll::kReduce && c.coll != Coll::kReduceScatter;
    if (moved) expected.magnitude.assign(out_count(c), 0);
    wrong += compare(expected, result, c.type, moved ? int(ncclSum) : c.op, c.member.ranks, out_count(c),
                     moved ? 1 : c.exact, &first);
    if (c.coll == Coll::kAllReduce) {
      digest_.add(result, out_bytes);
    }
  }
  auto guards = [&](const Bytes& image, size_t begin, size_t end, const char* what) {
    size_t bad = 0;
    auto count = [&](size_t from, size_t to) { bad += to - from - size_t(std::count(image.data() + from, image.data() + to, kPoison)); };
    count(0, begin);
    count(end, image.size());
    if (bad && first.empty()) first = std::string(what) + " guard bytes overwritten";
    wrong += bad;
  };
  guards(out, kGuard + offset, kGuard + offset + span, "output");
  if (!on_input) {
    guards(in, kGuard + c.in_offset, kGuard + c.in_offset + in_bytes, "input");
    // The image is what was copied there.
    if (std::memcmp(c.image->data() + kGuard + c.in_offset, in.data() + kGuard + c.in_offset, in_bytes) != 0) {
      if (first.empty()) first = "the input was changed";
      ++wrong;
    }
  }
  if (wrong) {
    tally_.wrong += wrong;
    failed_ = true;
    note("call " + std::to_string(c.payload.call) + " on rank " + std::to_string(c.member.rank) + ": " +
         std::to_string(wrong) + " wrong, " + first);
  }
}

// A non-blocking communicator answers InProgress; the program has to ask until it is done.
ncclResult_t Driver::settle(Member& member, ncclResult_t result) {
  while (result == ncclInProgress) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    ncclResult_t asked = call::ncclCommGetAsyncError(member.comm, &result);
    if (asked != ncclSuccess) return asked;
  }
  return result;
}

// Waits as a watchdog would: a communicator's error ends the wait, though the stream may still be busy.
ncclResult_t Driver::sync(Lane& lane) {
  use_lane(lane);
  auto started = std::chrono::steady_clock::now();
  auto last_asked = started;
  auto ask = [&lane] {
    ncclResult_t error = ncclSuccess;
    if (lane.comms.empty() || !lane.member().comm) return error;
    ncclResult_t asked = call::ncclCommGetAsyncError(lane.member().comm, &error);
    if (asked != ncclSuccess) return asked;
    return error == ncclInProgress ? ncclResult_t(ncclSuccess) : error;
  };
  for (CUstream stream : lane.streams) {
    for (;;) {
      CUresult query = cuStreamQuery(stream);
      if (query == CUDA_SUCCESS) break;
      if (query != CUDA_ERROR_NOT_READY) {
        accept_cuda(query, "cuStreamQuery");
        return ncclUnhandledCudaError;
      }
      auto now = std::chrono::steady_clock::now();
      if (now - last_asked > std::chrono::milliseconds(10)) {
        last_asked = now;
        if (ncclResult_t error = ask()) return error;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(now - started < std::chrono::milliseconds(2) ? 20 : 300));
    }
  }
  return ask();
}

void Driver::run_calls(std::vector<Call>& calls) {
  if (calls.empty()) return;
  std::vector<Call*> live;
  for (Call& c : calls) {
    if (c.member.comm) live.push_back(&c);
  }
  for (Call* c : live) prepare(*c);
  bool fused = live.size() > 1 && !in_group_;
  bool issued = true;
  if (fused) issued = accept(call::ncclGroupStart(), "ncclGroupStart");
  for (Call* c : live) {
    auto started = std::chrono::steady_clock::now();
    ncclResult_t result = issue(*c);
    auto took = std::chrono::steady_clock::now() - started;
    // Whoever says so must not have waited for its peers.
    if (result == ncclInProgress && took > std::chrono::milliseconds(1000)) {
      failed_ = true;
      note("a call that is in progress blocked its caller");
    }
    if (!in_group_ && !fused) result = settle(c->member, result);
    if (in_group_ && result == ncclInProgress) result = ncclSuccess;
    issued = accept(result, "collective") && issued;
  }
  if (fused) {
    ncclResult_t result = call::ncclGroupEnd();
    // Every communicator of the group is asked, in progress or not.
    bool later = result == ncclInProgress;
    for (Call* c : live) {
      ncclResult_t state = settle(c->member, later ? ncclResult_t(ncclInProgress) : result);
      if (result == ncclSuccess || result == ncclInProgress) result = state;
    }
    issued = accept(result, "ncclGroupEnd") && issued;
  }
  for (Call* c : live) pending_.push_back(*c);
  if (!in_group_ && !held_) finish_pending();
  (void)issued;
}

void Driver::finish_pending() {
  bool clean = true;
  for (Lane& lane : lanes_) {
    ncclResult_t result = sync(lane);
    if (result != ncclSuccess) {
      if (!met_) accept(result, "asynchronous error");
      clean = false;
    }
  }
  for (Call& c : pending_) {
    // After an error the buffers may still be in use and hold nothing of worth.
    if (clean && !failed_ && !met_) check(c);
    if (clean) {
      give_back(c);
    } else {
      abandoned_.push_back(c);
    }
  }
  pending_.clear();
}

void Driver::reclaim() {
  for (Lane& lane : lanes_) {
    if (!abandoned_.empty() && !wait_idle(lane, 5000)) return;
  }
  for (Call& c : abandoned_) give_back(c);
  abandoned_.clear();
}

}  // namespace worker
