// The commands that make collective calls: plain, random, patterns, captured. The calls themselves are in calls.cc.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "nccl_calls.h"
#include "worker.h"

namespace worker {

// `counts=a,b,..`: one call for each. `slices=K`: the same payload in K calls. `mixed`: every rank places its buffers
// by its own lot.
void Driver::collective(const Statement& s, Coll coll) {
  std::vector<Statement> rounds;
  for (const std::string& count : split_list(s.text("counts", s.text("count", "1000")), ',')) {
    Statement one = s;
    one.args["count"] = count;
    size_t whole = size_t(one.number("count", 0));
    size_t slices = size_t(s.number("slices", 1));
    for (size_t i = 0; i < slices; ++i) {
      size_t first = whole * i / slices;
      one.args["first"] = std::to_string(first);
      one.args["count"] = std::to_string(whole * (i + 1) / slices - first);
      rounds.push_back(one);
    }
  }
  long reps = s.number("reps", 1);
  for (size_t i = 0; i < rounds.size() * size_t(reps) && !failed_ && !met_; ++i) {
    std::vector<Call> calls;
    uint64_t number = calls_made_++;
    for (Lane* lane : concerned(s)) {
      Statement mine = rounds[i % rounds.size()];
      if (s.has("mixed")) place_by_lot(mine, *lane, number);
      Call c = plan(mine, *lane, number);
      if (coll == Coll::kAllReduce) c.coll = coll;
      calls.push_back(c);
    }
    run_calls(calls);
  }
}

void Driver::place_by_lot(Statement& s, const Lane& lane, uint64_t number) {
  place(s, Random(uint64_t(s.number("seed", 1)), number, 1000 + uint64_t(lane.rank)));
}

// In place for one rank in three, off by up to 16 elements for every other buffer.
void Driver::place(Statement& s, Random own) {
  s.args["inplace"] = std::to_string(own.below(3) == 0);
  s.args["offset"] = std::to_string(own.below(2) ? own.below(17) : 0);
  s.args["out_offset"] = std::to_string(own.below(2) ? own.below(17) : 0);
}

// The same count, type and operation on all ranks; offset and placement differ.
void Driver::random(const Statement& s) {
  uint64_t seed = uint64_t(s.number("seed", 1));
  long calls = s.number("calls", 100);
  size_t most = size_t(s.number("max", 100000));
  std::vector<std::string> types = split_list(s.text("dtypes", "f32,f16,bf16"), ',');
  std::vector<std::string> ops = split_list(s.text("ops", "sum"), ',');
  bool delays = s.number("delays", 0) != 0;
  long streams = s.number("streams", 1);
  long comms = s.number("comms", 1);
  for (long i = 0; i < calls && !failed_ && !met_; ++i) {
    uint64_t number = calls_made_++;
    Random common(seed, number);
    Statement one;
    one.args["dtype"] = types[common.below(types.size())];
    one.args["op"] = ops[common.below(ops.size())];
    // Small counts as often as large ones: uniform in the logarithm, with exact small numbers.
    size_t bits = 1;
    while ((size_t(1) << bits) < most) ++bits;
    size_t count = 1 + common.below(std::min(most, size_t(1) << (1 + common.below(bits))));
    one.args["count"] = std::to_string(count);
    one.args["seed"] = std::to_string(seed);
    long comm = comms > 1 ? long(common.below(uint64_t(comms))) : 0;
    std::vector<Call> planned;
    for (Lane* lane : concerned(s)) {
      Random own(seed, number, 1000 + uint64_t(lane->rank));
      Statement mine = one;
      mine.args["inplace"] = std::to_string(own.below(3) == 0);
      mine.args["offset"] = std::to_string(own.below(2) ? own.below(17) : 0);
      mine.args["out_offset"] = std::to_string(own.below(2) ? own.below(17) : 0);
      while (long(lane->streams.size()) < streams) {
        use_lane(*lane);
        CUstream made = nullptr;
        accept_cuda(cuStreamCreate(&made, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
        lane->streams.push_back(made);
      }
      if (streams > 1) lane->stream = own.below(uint64_t(streams));
      // Any of the communicators the lane has; ranks outside it sit the call out.
      if (comms > 1) lane->comm = size_t(comm);
      if (delays) std::this_thread::sleep_for(std::chrono::microseconds(own.below(4) ? 0 : own.below(3000)));
      planned.push_back(plan(mine, *lane, number));
    }
    run_calls(planned);
  }
}

// Every bit pattern in either half of a word, on each of a few ranks, against several values of the others.
void Driver::patterns(const Statement& s) {
  std::string dtype = s.text("dtype", "bf16");
  int type = type_by_name(dtype);
  size_t count = type == ncclFloat32 ? size_t(s.number("count", 4096)) : 2 * 65536;
  std::vector<uint32_t> fillers = {0x0000, 0x8000, 0xfffa, 0x3c00, 0x7f7f};
  if (type == ncclFloat32) fillers = {0x00000000, 0x80000000, 0xfffafffa, 0x3f800000, 0x7f7fffff};
  for (int half = 0; half < 2; ++half) {
    for (size_t f = 0; f < fillers.size() && !failed_; ++f) {
      uint64_t number = calls_made_++;
      std::vector<Call> calls;
      for (Lane* lane : concerned(s)) {
        Call c = plan(s, *lane, number);
        c.coll = Coll::kAllReduce;
        c.op = ncclSum;
        c.count = count;
        c.payload.kind = Payload::kPattern;
        c.payload.phase = uint64_t(half) + 2 * f;
        c.payload.filler = fillers[f];
        c.payload.carrier = int(number) % std::max(1, c.member.ranks);
        calls.push_back(c);
      }
      run_calls(calls);
    }
  }
}

void Driver::capture(const Statement& s) {
  std::string name = s.text("mode", "thread");
  CUstreamCaptureMode mode = name == "global"    ? CU_STREAM_CAPTURE_MODE_GLOBAL
                             : name == "relaxed" ? CU_STREAM_CAPTURE_MODE_RELAXED
                                                 : CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
  Graph graph;
  std::vector<Lane*> lanes = concerned(s);
  std::vector<std::string> counts = split_list(s.text("counts", s.text("count", "1000")), ',');
  std::vector<std::vector<Call>> rounds;
  for (const std::string& count : counts) {
    uint64_t number = calls_made_++;
    rounds.emplace_back();
    Statement one = s;
    one.args["count"] = count;
    for (Lane* lane : lanes) {
      Statement mine = one;
      if (s.has("mixed")) place_by_lot(mine, *lane, number);
      rounds.back().push_back(plan(mine, *lane, number));
      prepare(rounds.back().back());
    }
  }
  for (Lane* lane : lanes) accept(sync(*lane), "before capture");
  for (Lane* lane : lanes) {
    use_lane(*lane);
    if (!accept_cuda(cuStreamBeginCapture_v2(lane->current(), mode), "cuStreamBeginCapture")) return;
  }
  // `streams=K`: the capture forks into K streams, which take turns, and joins.
  size_t branches = size_t(s.number("streams", 1));
  std::vector<CUevent> events;
  auto edge = [&](CUstream from, CUstream to) {
    CUevent event = nullptr;
    accept_cuda(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    accept_cuda(cuEventRecord(event, from), "cuEventRecord");
    accept_cuda(cuStreamWaitEvent(to, event, 0), "cuStreamWaitEvent");
    events.push_back(event);
  };
  size_t origin = lanes.empty() ? 0 : lanes[0]->stream;
  if (branches > 1) {
    for (Lane* lane : lanes) {
      while (lane->streams.size() < branches) {
        CUstream made = nullptr;
        accept_cuda(cuStreamCreate(&made, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
        lane->streams.push_back(made);
      }
      for (size_t i = 0; i < branches; ++i) {
        if (i != lane->stream) edge(lane->current(), lane->streams[i]);
      }
    }
  }
  size_t turn = 0;
  // `grouped`: all of them in one group.
  bool grouped = s.number("grouped", 0) != 0;
  if (grouped) accept(call::ncclGroupStart(), "ncclGroupStart");
  auto end = [&](std::vector<Call>& round) {
    ncclResult_t result = call::ncclGroupEnd();
    for (Call& c : round) result = settle(c.member, result);
    accept(result, "ncclGroupEnd");
  };
  for (auto& round : rounds) {
    if (branches > 1) {
      for (Lane* lane : lanes) lane->stream = (origin + turn) % branches;
      ++turn;
    }
    if (round.size() > 1) accept(call::ncclGroupStart(), "ncclGroupStart");
    for (Call& c : round) {
      ncclResult_t result = issue(c);
      if (round.size() == 1 && !grouped) result = settle(c.member, result);
      if (result == ncclInProgress) result = ncclSuccess;
      accept(result, "captured collective");
    }
    if (round.size() > 1) end(round);
  }
  if (grouped && !rounds.empty()) end(rounds.back());
  for (Lane* lane : lanes) {
    lane->stream = origin;
    for (size_t i = 0; branches > 1 && i < branches; ++i) {
      if (i != origin) edge(lane->streams[i], lane->current());
    }
  }
  for (CUevent event : events) accept_cuda(cuEventDestroy_v2(event), "cuEventDestroy");
  // All of them before the first instantiation, which a thread that captures may not make.
  std::vector<CUgraph> made;
  for (Lane* lane : lanes) {
    use_lane(*lane);
    if (!accept_cuda(cuStreamEndCapture(lane->current(), &made.emplace_back()), "cuStreamEndCapture")) return;
  }
  for (size_t i = 0; i < lanes.size(); ++i) {
    use_lane(*lanes[i]);
    CUgraphExec exec = nullptr;
    accept_cuda(cuGraphInstantiateWithFlags(&exec, made[i], 0), "cuGraphInstantiate");
    accept_cuda(cuGraphDestroy(made[i]), "cuGraphDestroy");
    graph.execs.push_back(exec);
  }
  for (auto& round : rounds) {
    for (Call& c : round) graph.calls.push_back(c);
  }
  graphs_.push_back(graph);
}

void Driver::replay(const Statement& s) {
  if (graphs_.empty()) throw std::runtime_error("replay without capture");
  Graph& graph = graphs_.at(size_t(s.number("graph", long(graphs_.size()) - 1)));
  long times = s.number("n", 1);
  for (long i = 0; i < times && !failed_ && !met_; ++i) {
    for (Call& c : graph.calls) {
      c.payload.call += 1000003;  // fresh numbers for every replay, the same on all ranks
      refresh(c);
    }
    size_t at = 0;
    for (Lane* lane : concerned(s)) {
      use_lane(*lane);
      accept_cuda(cuGraphLaunch(graph.execs.at(at++), lane->current()), "cuGraphLaunch");
    }
    bool clean = true;
    for (Lane* lane : concerned(s)) clean = accept(sync(*lane), "replay") && clean;
    if (!clean || met_) return;
    for (Call& c : graph.calls) check(c);
  }
}

// `chain n=K streams=S`: an AllReduce from one buffer into another and a broadcast back, in turn, each on a stream that
// every rank picks for itself. Each works on what the one before it left, and no event is between them: the order of the
// communicator alone makes the result right. `captured`: all of it in one graph, whose branches are the streams.
// `grouped`: each in a group of its own. `puts`: instead of a broadcast each rank puts what it has into the next one's
// buffer, and waits for the previous one's on yet another stream. `special`: the legacy default stream and the per-thread one are among them.
void Driver::chain(const Statement& s) {
  long steps = s.number("n", 20);
  size_t streams = size_t(s.number("streams", 3));
  size_t count = size_t(s.number("count", 500));
  bool captured = s.number("captured", 0) != 0;
  bool grouped = s.number("grouped", 0) != 0;
  uint64_t number = calls_made_++;
  Payload payload;
  payload.seed = uint64_t(s.number("seed", 1));
  payload.call = number;
  std::vector<Lane*> lanes = concerned(s);
  if (lanes.size() != 1) throw std::runtime_error("chain is for one lane a thread");
  Lane& lane = *lanes[0];
  use_lane(lane);
  while (lane.streams.size() < streams) {
    CUstream made = nullptr;
    accept_cuda(cuStreamCreate(&made, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    lane.streams.push_back(made);
  }
  std::vector<CUstream> over(lane.streams.begin(), lane.streams.begin() + long(streams));
  for (uintptr_t handle : {0, 1, 2}) {
    if (s.number("special", 0)) over.push_back(reinterpret_cast<CUstream>(handle));
  }
  Member member = lane.member();
  size_t bytes = count * sizeof(uint64_t);
  Buffer from = take(lane, bytes, false);
  Buffer to = take(lane, bytes, false);
  bool puts = s.number("puts", 0) != 0;
  int next = (member.rank + 1) % member.ranks;
  int previous = (member.rank + member.ranks - 1) % member.ranks;
  ncclWindow_t window = nullptr;
  if (puts) {
    void* address = reinterpret_cast<void*>(uintptr_t(from.base));
    accept(call::ncclCommWindowRegister(member.comm, address, from.capacity, &window, NCCL_WIN_COLL_SYMMETRIC),
           "ncclCommWindowRegister");
  }
  Bytes own = make_input(payload, ncclUint64, member.rank, 0, count);
  Bytes poison(bytes, 0xa5);
  accept_cuda(cuMemcpyHtoDAsync_v2(from.base, own.data(), bytes, lane.streams[0]), "cuMemcpyHtoDAsync");
  accept_cuda(cuMemcpyHtoDAsync_v2(to.base, poison.data(), bytes, lane.streams[0]), "cuMemcpyHtoDAsync");
  accept_cuda(cuStreamSynchronize(lane.streams[0]), "cuStreamSynchronize");
  std::vector<CUevent> events;
  auto edge = [&](CUstream before, CUstream after) {
    CUevent event = nullptr;
    accept_cuda(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    accept_cuda(cuEventRecord(event, before), "cuEventRecord");
    accept_cuda(cuStreamWaitEvent(after, event, 0), "cuStreamWaitEvent");
    events.push_back(event);
  };
  if (captured) {
    accept_cuda(cuStreamBeginCapture_v2(lane.streams[0], CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "cuStreamBeginCapture");
    for (size_t i = 1; i < streams; ++i) edge(lane.streams[0], lane.streams[i]);
  }
  Random lot(payload.seed, number, 1000 + uint64_t(lane.rank));
  auto pointer = [](const Buffer& buffer) { return reinterpret_cast<void*>(uintptr_t(buffer.base)); };
  for (long i = 0; i < steps && !failed_; ++i) {
    CUstream stream = over[lot.below(over.size())];
    if (!captured && lot.below(3) == 0) std::this_thread::sleep_for(std::chrono::microseconds(lot.below(2000)));
    if (grouped) accept(call::ncclGroupStart(), "ncclGroupStart");
    ncclResult_t result = ncclSuccess;
    if (i % 2 && puts) {
      ncclWaitSignalDesc_t wait = {1, previous, 0, 0};
      accept(call::ncclPutSignal(pointer(to), count, ncclUint64, next, window, 0, 0, 0, 0, member.comm, stream), "put");
      result = call::ncclWaitSignal(1, &wait, member.comm, over[lot.below(over.size())]);
    } else {
      result =
          i % 2 == 0
              ? call::ncclAllReduce(pointer(from), pointer(to), count, ncclUint64, ncclSum, member.comm, stream)
              : call::ncclBroadcast(pointer(to), pointer(from), count, ncclUint64, int(i) % member.ranks, member.comm, stream);
    }
    if (!grouped) result = settle(member, result);
    if (grouped && result == ncclInProgress) result = ncclSuccess;
    accept(result, "collective");
    if (grouped) accept(settle(member, call::ncclGroupEnd()), "ncclGroupEnd");
  }
  CUgraphExec exec = nullptr;
  if (captured) {
    for (size_t i = 1; i < streams; ++i) edge(lane.streams[i], lane.streams[0]);
    CUgraph graph = nullptr;
    accept_cuda(cuStreamEndCapture(lane.streams[0], &graph), "cuStreamEndCapture");
    accept_cuda(cuGraphInstantiateWithFlags(&exec, graph, 0), "cuGraphInstantiate");
    accept_cuda(cuGraphDestroy(graph), "cuGraphDestroy");
    accept_cuda(cuGraphLaunch(exec, lane.streams[0]), "cuGraphLaunch");
  }
  for (CUevent event : events) accept_cuda(cuEventDestroy_v2(event), "cuEventDestroy");
  if (!accept(sync(lane), "sync")) return;
  for (size_t i = streams; i < over.size(); ++i) accept_cuda(cuStreamSynchronize(over[i]), "cuStreamSynchronize");
  if (exec) accept_cuda(cuGraphExecDestroy(exec), "cuGraphExecDestroy");
  if (window) accept(call::ncclCommWindowDeregister(member.comm, window), "ncclCommWindowDeregister");
  // Every sum after the first multiplies by the number of ranks.
  Expectation expected = reduce_reference(payload, ncclUint64, ncclSum, member.ranks, 0, count);
  uint64_t factor = 1;
  for (long i = 2; i < steps; i += 2) factor *= uint64_t(member.ranks);
  for (size_t i = 0; i < count; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, expected.bits.data() + 8 * i, 8);
    value *= factor;
    std::memcpy(expected.bits.data() + 8 * i, &value, 8);
  }
  Bytes got(bytes);
  // The last step's target.
  const Buffer& last = steps % 2 ? to : from;
  accept_cuda(cuMemcpyDtoHAsync_v2(got.data(), last.base, bytes, lane.streams[0]), "cuMemcpyDtoHAsync");
  if (!accept_cuda(cuStreamSynchronize(lane.streams[0]), "cuStreamSynchronize")) return;
  std::string first;
  size_t wrong = compare(expected, got.data(), ncclUint64, ncclSum, member.ranks, count, 1, &first);
  tally_.calls += uint64_t(steps);
  tally_.wrong += wrong;
  if (wrong) {
    failed_ = true;
    note("chain on rank " + std::to_string(member.rank) + ": " + std::to_string(wrong) + " wrong, " + first);
  }
  lane.pool.push_back(from);
  lane.pool.push_back(to);
}

// `launch graph=G stream=S`: queues a graph and goes on; what it computes is not looked at.
void Driver::launch(const Statement& s) {
  Graph& graph = graphs_.at(size_t(s.number("graph", 0)));
  size_t at = 0;
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    CUstream stream = lane->streams.at(size_t(s.number("stream", 0)));
    accept_cuda(cuGraphLaunch(graph.execs.at(at++), stream), "cuGraphLaunch");
  }
}

}  // namespace worker
