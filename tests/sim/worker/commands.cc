// Everything of the script that is no collective: life of communicators, errors, barriers, facts. See worker.h.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>
#include <utility>

#include "nccl_calls.h"
#include "worker.h"

namespace worker {
namespace {

void publish(const std::string& path, const void* data, size_t bytes) {
  std::string temporary = path + ".tmp" + std::to_string(getpid());
  FILE* file = fopen(temporary.c_str(), "wb");
  if (!file || fwrite(data, 1, bytes, file) != bytes || fclose(file) != 0 ||
      rename(temporary.c_str(), path.c_str()) != 0) {
    throw std::runtime_error("cannot write " + path);
  }
}

bool read_whole(const std::string& path, void* data, size_t bytes) {
  FILE* file = fopen(path.c_str(), "rb");
  if (!file) return false;
  bool whole = fread(data, 1, bytes, file) == bytes;
  fclose(file);
  return whole;
}

void wait_for(const std::string& path, void* data, size_t bytes, int timeout_s) {
  auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(timeout_s);
  while (!read_whole(path, data, bytes)) {
    if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("no " + path + " in time");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

void Driver::close() {
  for (Lane& lane : lanes_) {
    for (const Member& member : lane.comms) {
      if (member.comm) return;
    }
  }
  if (tally_.errors || !pending_.empty() || !abandoned_.empty() || !graphs_.empty()) return;
  for (Lane& lane : lanes_) {
    cuCtxSetCurrent(lane.context);
    for (const Buffer& buffer : lane.pool) {
      if (buffer.from_nccl) {
        call::ncclMemFree(reinterpret_cast<void*>(uintptr_t(buffer.base)));
      } else {
        cuMemFree_v2(buffer.base);
      }
    }
    lane.pool.clear();
    for (CUstream stream : lane.streams) cuStreamDestroy_v2(stream);
    lane.streams.clear();
    cuDevicePrimaryCtxRelease_v2(lane.device);
  }
}

void Driver::run(const std::vector<Statement>& program) {
  for (const Statement& s : program) statement(s);
}

void Driver::statement(const Statement& s) {
  if (s.name == "repeat") {
    long times = s.number("n", 1);
    auto started = std::chrono::steady_clock::now();
    // `since=start`: `seconds` count from the program's start, and what went wrong before does not matter.
    bool whole = s.text("since", "") == "start";
    if (whole) started = started_;
    for (long i = 0; i < times && (whole || tally_.errors + tally_.wrong == 0) && another_round(s, started); ++i) {
      run(s.body);
    }
    return;
  }
  if (s.name == "expect_error") {
    expecting_ = true;
    expected_ = s.number("code", -1);
    return;
  }
  auto started = std::chrono::steady_clock::now();
  uint64_t calls = tally_.calls;
  uint64_t wrong = tally_.wrong;
  notes_.clear();
  digest_ = Digest();
  failed_ = met_ = false;
  uint64_t before[2] = {};
  uint64_t after[2] = {};
  try {
    bool counted = s.has("path") && paths(&before[0], &before[1]);
    if (!dispatch(s)) throw std::runtime_error("unknown command");
    // `path=routed`, `path=stock`: its AllReduce calls all went there.
    if (s.has("path") && !concerned(s).empty() && !failed_) {
      size_t wanted = s.text("path", "") == "stock" ? 1 : 0;
      counted = counted && paths(&after[0], &after[1]);
      bool there = counted && after[wanted] > before[wanted] && after[1 - wanted] == before[1 - wanted];
      if (!there) {
        failed_ = true;
        note("not all calls went by " + s.text("path", "") + ": " + std::to_string(after[0] - before[0]) + " routed, " +
             std::to_string(after[1] - before[1]) + " stock");
      }
    }
  } catch (const std::exception& error) {
    failed_ = true;
    note(s.name + ": " + error.what());
  }
  if (expecting_ && !met_ && !failed_ && !concerned(s).empty()) {
    failed_ = true;
    note("the expected error did not come");
  }
  expecting_ = false;
  if (failed_) ++tally_.errors;
  double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
  char tail[160];
  snprintf(tail, sizeof tail, ",\"ok\":%s,\"calls\":%llu,\"wrong\":%llu,\"ms\":%.2f", failed_ ? "false" : "true",
           (unsigned long long)(tally_.calls - calls), (unsigned long long)(tally_.wrong - wrong), ms);
  std::string line = line_head(s) + tail;
  if (digest_.any()) line += ",\"digest\":" + std::to_string(digest_.value());
  if (!notes_.empty()) line += ",\"note\":\"" + json_escape(notes_) + "\"";
  print_line(line + "}");
}

std::string Driver::line_head(const Statement& s) {
  return "{\"cmd\":\"" + json_escape(s.name) + "\",\"rank\":" + std::to_string(lanes_[0].rank);
}

void Driver::note(const std::string& text) {
  if (notes_.size() < 2000) notes_ += (notes_.empty() ? "" : "; ") + text;
}

bool Driver::accept(ncclResult_t result, const char* what) {
  if (result == ncclSuccess) return true;
  std::string text = std::string(what) + " gave " + std::to_string(result);
  text += std::string(" (") + call::ncclGetErrorString(result) + ")";
  if (expecting_ && (expected_ == -1 || expected_ == result)) {
    if (!met_) note("expected: " + text);
    met_ = true;
    return false;
  }
  failed_ = true;
  note(text);
  return false;
}

bool Driver::accept_cuda(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return true;
  failed_ = true;
  note(std::string(what) + " gave CUDA error " + std::to_string(result));
  return false;
}

bool Driver::dispatch(const Statement& s) {
  const std::string& n = s.name;
  if (n == "allreduce") {
    collective(s, Coll::kAllReduce);
  } else if (n == "collective") {
    collective(s, Coll::kBroadcast);
  } else if (n == "random") {
    random(s);
  } else if (n == "patterns") {
    patterns(s);
  } else if (n == "capture") {
    capture(s);
  } else if (n == "replay") {
    replay(s);
  } else if (n == "chain") {
    chain(s);
  } else if (n == "drop_graphs") {
    graphs_dropped_ |= !graphs_.empty();
    for (Graph& graph : graphs_) {
      for (CUgraphExec exec : graph.execs) accept_cuda(cuGraphExecDestroy(exec), "cuGraphExecDestroy");
      for (Call& c : graph.calls) give_back(c);
    }
    graphs_.clear();
  } else if (n == "extend") {
    if (!concerned(s).empty()) open_extension(s.number("frozen", 0) != 0);
  } else if (n == "init") {
    init(s);
  } else if (n == "init_all") {
    init_all(s);
  } else if (n == "split") {
    split(s);
  } else if (n == "shrink") {
    shrink(s);
  } else if (n == "grow") {
    grow(s);
  } else if (n == "suspend" || n == "resume") {
    for (Lane* lane : concerned(s)) {
      ncclComm_t comm = lane->member().comm;
      accept(n == "suspend" ? call::ncclCommSuspend(comm, NCCL_SUSPEND_MEM) : call::ncclCommResume(comm), n.c_str());
    }
  } else if (n == "destroy" || n == "abort" || n == "finalize" || n == "revoke") {
    // What a graph keeps is let go on a thread of the driver, in its own time: an end that comes before finds it kept.
    if (std::exchange(graphs_dropped_, false)) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    end_comm(s);
  } else if (n == "async_error") {
    async_error(s);
  } else if (n == "barrier") {
    barrier(s);
  } else if (n == "meminfo") {
    meminfo(s);
  } else if (n == "process") {
    process(s);
  } else if (n == "describe") {
    for (Lane* lane : concerned(s)) note(description(lane->member().comm));
  } else if (n == "facts") {
    facts(s);
  } else if (n == "group_start" || n == "group_end") {
    group(s, n == "group_start");
  } else if (n == "hidden_group_start" || n == "hidden_group_end") {
    hidden_group(s, n == "hidden_group_start");
  } else if (n == "begin_capture" || n == "end_capture") {
    foreign_capture(s, n == "begin_capture");
  } else if (n == "use") {
    for (Lane* lane : concerned(s)) lane->comm = size_t(s.number("comm", 0));
  } else if (n == "stream") {
    for (Lane* lane : concerned(s)) {
      use_lane(*lane);
      size_t index = size_t(s.number("i", 0));
      while (lane->streams.size() <= index) {
        CUstream made = nullptr;
        if (!accept_cuda(cuStreamCreate(&made, CU_STREAM_NON_BLOCKING), "cuStreamCreate")) return true;
        lane->streams.push_back(made);
      }
      lane->stream = index;
    }
  } else if (n == "drop_stream") {
    for (Lane* lane : concerned(s)) {
      use_lane(*lane);
      accept_cuda(cuStreamDestroy_v2(lane->streams.back()), "cuStreamDestroy");
      lane->streams.pop_back();
      lane->stream = 0;
    }
  } else if (n == "reset_device") {
    for (Lane* lane : concerned(s)) {
      release(*lane);
      if (accept_cuda(cuDevicePrimaryCtxReset_v2(lane->device), "cuDevicePrimaryCtxReset")) lane->open();
    }
  } else if (n == "sync") {
    for (Lane* lane : concerned(s)) accept(sync(*lane), "sync");
  } else if (n == "release") {
    for (Lane* lane : concerned(s)) release(*lane);
  } else if (n == "sleep") {
    if (!concerned(s).empty()) std::this_thread::sleep_for(std::chrono::milliseconds(s.number("ms", 100)));
  } else if (n == "hold") {
    held_ = true;
  } else if (n == "flush") {
    held_ = false;
    finish_pending();
  } else if (n == "abort_in") {
    abort_in(s);
  } else if (n == "forget" || n == "join") {
    for (std::thread& thread : aborting_) thread.join();
    aborting_.clear();
    if (n == "join") return true;
    // The communicator was aborted by another thread.
    for (Lane* lane : concerned(s)) drop_member(*lane);
    reclaim();
  } else if (n == "fork") {
    fork_child(s);
  } else if (n == "launch") {
    launch(s);
  } else if (n == "quit") {
    if (!concerned(s).empty()) ::exit(int(s.number("code", 0)));
  } else if (n == "raw") {
    raw(s);
  } else if (n == "operations") {
    operations(s);
  } else if (n == "drop") {
    drop(s);
  } else if (n == "kill_self") {
    if (!concerned(s).empty()) kill(getpid(), SIGKILL);
  } else if (n == "exit") {
    if (!concerned(s).empty()) _exit(int(s.number("code", 0)));
  } else {
    return false;
  }
  return true;
}

// Everything of this rank that is not a communicator, so that what is still held is not the program's.
void Driver::release(Lane& lane) {
  use_lane(lane);
  for (Buffer& buffer : lane.pool) {
    if (buffer.from_nccl) {
      accept(call::ncclMemFree(reinterpret_cast<void*>(buffer.base)), "ncclMemFree");
    } else {
      accept_cuda(cuMemFree_v2(buffer.base), "cuMemFree");
    }
  }
  lane.pool.clear();
  for (CUstream stream : lane.streams) accept_cuda(cuStreamDestroy_v2(stream), "cuStreamDestroy");
  lane.streams.clear();
  accept_cuda(cuDevicePrimaryCtxRelease_v2(lane.device), "cuDevicePrimaryCtxRelease");
}

void Driver::init(const Statement& s) {
  std::vector<Lane*> lanes = concerned(s);
  std::string path = options_.id + (inits_ ? "." + std::to_string(inits_) : "");
  ++inits_;
  ncclUniqueId id;
  bool root = false;
  for (Lane* lane : lanes) root = root || lane->rank == 0;
  if (root) {
    if (!accept(call::ncclGetUniqueId(&id), "ncclGetUniqueId")) return;
    publish(path, &id, sizeof id);
  } else {
    wait_for(path, &id, sizeof id, options_.timeout_s);
  }
  long blocking = s.number("blocking", options_.blocking);
  int ranks = int(s.number("ranks", options_.ranks));
  bool configured = blocking >= 0 || s.has("max_ctas") || s.has("min_ctas") || s.has("scalable");
  bool fused = lanes.size() > 1;
  // Stock NCCL may write to them until the initialisation is complete.
  auto& comms = *new std::vector<ncclComm_t>(lanes.size(), nullptr);
  ncclResult_t result = ncclSuccess;
  if (fused) accept(call::ncclGroupStart(), "ncclGroupStart");
  for (size_t i = 0; i < lanes.size(); ++i) {
    use_lane(*lanes[i]);
    if (s.text("by", "") == "extension") {
      result = extension().init(&comms[i], ranks, id, lanes[i]->rank);
    } else if (!configured) {
      result = call::ncclCommInitRank(&comms[i], ranks, id, lanes[i]->rank);
    } else {
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      if (blocking >= 0) config.blocking = int(blocking);
      config.minCTAs = int(s.number("min_ctas", NCCL_CONFIG_UNDEF_INT));
      config.maxCTAs = int(s.number("max_ctas", NCCL_CONFIG_UNDEF_INT));
      // The fields that every release since 2.20 has.
      config.size = offsetof(ncclConfig_t, trafficClass);
      config.version = NCCL_VERSION(2, 20, 3);
      result = s.has("scalable")
                   ? call::ncclCommInitRankScalable(&comms[i], ranks, lanes[i]->rank, 1, &id, &config)
                   : call::ncclCommInitRankConfig(&comms[i], ranks, id, lanes[i]->rank, &config);
    }
    if (result != ncclSuccess && result != ncclInProgress) accept(result, "ncclCommInitRank");
  }
  if (fused) result = call::ncclGroupEnd();
  bool later = result == ncclInProgress;
  for (size_t i = 0; i < lanes.size(); ++i) {
    Member member = {comms[i], lanes[i]->rank, ranks};
    // Each may be in progress.
    ncclResult_t state = later ? ncclResult_t(ncclInProgress) : result;
    if (s.number("wait", 1)) state = settle(member, state);
    if (result == ncclSuccess || result == ncclInProgress) result = state;
    lanes[i]->comms.push_back(member);
    lanes[i]->comm = lanes[i]->comms.size() - 1;
  }
  if (s.number("wait", 1)) accept(result, "initialisation");
}

void Driver::init_all(const Statement& s) {
  std::vector<Lane*> lanes = concerned(s);
  std::vector<ncclComm_t> comms(lanes.size(), nullptr);
  std::vector<int> devices;
  for (Lane* lane : lanes) devices.push_back(lane->device);
  if (!accept(call::ncclCommInitAll(comms.data(), int(lanes.size()), devices.data()), "ncclCommInitAll")) return;
  for (size_t i = 0; i < lanes.size(); ++i) {
    lanes[i]->comms.push_back({comms[i], int(i), int(lanes.size())});
    lanes[i]->comm = lanes[i]->comms.size() - 1;
  }
}

// A child of one that does not block is there once its parent is no longer in progress; the call itself says success.
ncclResult_t Driver::settled_parent(Member& parent, ncclResult_t result) {
  return settle(parent, result == ncclSuccess ? ncclResult_t(ncclInProgress) : result);
}

// The child becomes current. `mod=2`: color is rank modulo 2; `div=2`: rank divided by 2; `none=3`: rank 3
// gets no color, `none=all`: no rank; `reverse`: keys count down; `max_ctas=N`: asked for by a configuration.
void Driver::split(const Statement& s) {
  std::vector<Lane*> lanes = concerned(s);
  std::vector<ncclComm_t> children(lanes.size(), nullptr);
  ncclResult_t result = ncclSuccess;
  bool fused = lanes.size() > 1;
  if (fused) accept(call::ncclGroupStart(), "ncclGroupStart");
  for (size_t i = 0; i < lanes.size(); ++i) {
    Member& parent = lanes[i]->member();
    use_lane(*lanes[i]);
    int color = int(s.number("color", 0));
    if (s.has("mod")) color = parent.rank % int(s.number("mod", 1));
    if (s.has("xor")) color = std::min(parent.rank, parent.rank ^ int(s.number("xor", 0)));   // pairs
    if (s.has("div")) color = parent.rank / int(s.number("div", 1));
    if (s.text("none", "") == "all" || (s.has("none") && atoi(s.text("none", "").c_str()) == parent.rank)) {
      color = NCCL_SPLIT_NOCOLOR;
    }
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.maxCTAs = int(s.number("max_ctas", NCCL_CONFIG_UNDEF_INT));
    // As in `init`.
    config.size = offsetof(ncclConfig_t, trafficClass);
    config.version = NCCL_VERSION(2, 20, 3);
    int key = s.number("reverse", 0) ? parent.ranks - parent.rank : parent.rank;
    result = call::ncclCommSplit(parent.comm, color, key, &children[i], s.has("max_ctas") ? &config : nullptr);
    if (!fused) result = settled_parent(parent, result);
  }
  if (fused) {
    result = call::ncclGroupEnd();
    for (Lane* lane : lanes) result = settled_parent(lane->member(), result);
  }
  if (!accept(result, "ncclCommSplit")) return;
  for (size_t i = 0; i < lanes.size(); ++i) {
    Member child;
    child.comm = children[i];
    if (child.comm) {
      ncclResult_t state = ncclInProgress;
      accept(settle(child, state), "split communicator");
      accept(call::ncclCommUserRank(child.comm, &child.rank), "ncclCommUserRank");
      accept(call::ncclCommCount(child.comm, &child.ranks), "ncclCommCount");
    }
    lanes[i]->comms.push_back(child);
    lanes[i]->comm = lanes[i]->comms.size() - 1;
  }
}

void Driver::shrink(const Statement& s) {
  std::vector<int> excluded;
  for (const std::string& part : split_list(s.text("exclude", ""), ',')) excluded.push_back(atoi(part.c_str()));
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    Member& parent = lane->member();
    bool out = false;
    for (int rank : excluded) out = out || rank == parent.rank;
    Member child;
    if (!out) {
      int flags = s.number("abort", 0) ? NCCL_SHRINK_ABORT : NCCL_SHRINK_DEFAULT;
      ncclResult_t result =
          call::ncclCommShrink(parent.comm, excluded.data(), int(excluded.size()), &child.comm, nullptr, flags);
      // A parent that lost a rank stays as it is.
      if (flags == NCCL_SHRINK_DEFAULT) result = settled_parent(parent, result);
      if (!accept(settle(child, result), "ncclCommShrink")) return;
      accept(call::ncclCommUserRank(child.comm, &child.rank), "ncclCommUserRank");
      accept(call::ncclCommCount(child.comm, &child.ranks), "ncclCommCount");
    }
    lane->comms.push_back(child);
    lane->comm = lane->comms.size() - 1;
  }
}

// `ranks=N`: the current communicator and ranks that have none become one of N.
void Driver::grow(const Statement& s) {
  std::string path = options_.id + ".grow" + std::to_string(inits_++);
  int ranks = int(s.number("ranks", options_.ranks));
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    ncclUniqueId id;
    Member child;
    ncclResult_t result = ncclSuccess;
    if (lane->comms.empty()) {
      wait_for(path, &id, sizeof id, options_.timeout_s);
      result = call::ncclCommGrow(nullptr, ranks, &id, lane->rank, &child.comm, nullptr);
    } else {
      Member& parent = lane->member();
      bool root = parent.rank == 0;
      if (root) {
        if (!accept(call::ncclCommGetUniqueId(parent.comm, &id), "ncclCommGetUniqueId")) return;
        publish(path, &id, sizeof id);
      }
      result = settled_parent(parent, call::ncclCommGrow(parent.comm, ranks, root ? &id : nullptr, -1, &child.comm, nullptr));
    }
    if (!accept(settle(child, result), "ncclCommGrow")) return;
    accept(call::ncclCommUserRank(child.comm, &child.rank), "ncclCommUserRank");
    accept(call::ncclCommCount(child.comm, &child.ranks), "ncclCommCount");
    lane->comms.push_back(child);
    lane->comm = lane->comms.size() - 1;
  }
}

// Another thread aborts, or with `how=revoke` revokes, the communicator after a while, as a watchdog does.
void Driver::abort_in(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    ncclComm_t comm = lane->member().comm;
    CUcontext context = lane->context;
    long ms = s.number("ms", 200);
    int rank = lane->rank;
    bool revokes = s.text("how", "abort") == "revoke";
    aborting_.emplace_back([comm, context, ms, rank, revokes] {
      cuCtxSetCurrent(context);
      std::this_thread::sleep_for(std::chrono::milliseconds(ms));
      auto started = std::chrono::steady_clock::now();
      ncclResult_t result = revokes ? call::ncclCommRevoke(comm, NCCL_REVOKE_DEFAULT) : call::ncclCommAbort(comm);
      double took = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
      print_line("{\"cmd\":\"aborted\",\"rank\":" + std::to_string(rank) + ",\"result\":" + std::to_string(result) +
                 ",\"ms\":" + std::to_string(took) + "}");
    });
  }
}

// A child that goes on using the parent's communicator, which no library can make useful, and none may crash on.
void Driver::fork_child(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    Call c = plan(s, *lane, calls_made_++);
    prepare(c);
    accept(sync(*lane), "before fork");
    pid_t child = fork();
    if (child == 0) {
      int version = 0;
      ncclResult_t state = ncclSuccess;
      int bad = call::ncclGetVersion(&version) != ncclSuccess || version == 0;
      call::ncclCommGetAsyncError(c.member.comm, &state);
      issue(c);
      call::ncclAllReduce(nullptr, nullptr, 1, ncclFloat32, ncclSum, nullptr, nullptr);
      print_line("{\"cmd\":\"child\",\"pid\":" + std::to_string(getpid()) + counters() + "}");
      _exit(bad);
    }
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
      failed_ = true;
      note("the forked child ended with status " + std::to_string(status));
    }
    give_back(c);
  }
}

void Driver::drop_member(Lane& lane) {
  gone_ = lane.member().comm;
  lane.comms.erase(lane.comms.begin() + long(lane.comm));
  lane.comm = lane.comms.empty() ? 0 : lane.comms.size() - 1;
}

void Driver::end_comm(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    if (lane->comms.empty()) throw std::runtime_error("no communicator");
    Member& member = lane->member();
    ncclResult_t result = ncclSuccess;
    if (s.name == "finalize") {
      result = settle(member, call::ncclCommFinalize(member.comm));
    } else if (s.name == "revoke") {
      result = call::ncclCommRevoke(member.comm, NCCL_REVOKE_DEFAULT);
    } else if (member.comm) {
      result = s.name == "abort" ? call::ncclCommAbort(member.comm) : call::ncclCommDestroy(member.comm);
    }
    accept(result, s.name.c_str());
    if ((s.name == "destroy" || s.name == "abort") && !s.number("keep", 0)) drop_member(*lane);
  }
  if (s.name == "destroy" || s.name == "abort") reclaim();
}

// `repeat n=N seconds=S`: as many rounds as fit. The first rank says whether there is another one, so that all make
// the same number.
bool Driver::another_round(const Statement& s, std::chrono::steady_clock::time_point started) {
  long seconds = s.number("seconds", 0);
  if (seconds == 0) return true;
  std::string path = options_.id + ".loop" + std::to_string(loops_++);
  char more = std::chrono::steady_clock::now() - started < std::chrono::seconds(seconds);
  if (lanes_[0].rank == 0) {
    publish(path, &more, 1);
  } else {
    wait_for(path, &more, 1, options_.timeout_s);
  }
  return more != 0;
}

// Asks until the communicator reports `expect`, for `within` milliseconds.
void Driver::async_error(const Statement& s) {
  long expect = s.number("expect", ncclSuccess);
  auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(s.number("within", 0));
  for (Lane* lane : concerned(s)) {
    for (;;) {
      ncclResult_t state = ncclSuccess;
      auto asked = std::chrono::steady_clock::now();
      ncclResult_t result = call::ncclCommGetAsyncError(lane->member().comm, &state);
      auto took = std::chrono::steady_clock::now() - asked;
      if (!accept(result, "ncclCommGetAsyncError")) return;
      if (took > std::chrono::milliseconds(s.number("each", 1000))) {
        failed_ = true;
        note("ncclCommGetAsyncError blocked");
      }
      if (state == expect || (expect == -1 && state != ncclSuccess && state != ncclInProgress)) break;
      if (std::chrono::steady_clock::now() >= deadline) {
        failed_ = true;
        note("state is " + std::to_string(state) + ", expected " + std::to_string(expect));
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
}

// Over files beside the id, so that it does not depend on what is tested. `ranks=N` when fewer take part.
void Driver::barrier(const Statement& s) {
  int number = barriers_++;
  std::string stem = options_.id + ".barrier" + std::to_string(number) + ".";
  char mark = 1;
  for (Lane* lane : concerned(s)) publish(stem + std::to_string(lane->rank), &mark, 1);
  if (concerned(s).empty()) return;
  for (int r = 0; r < options_.ranks; ++r) {
    if (s.concerns(r)) wait_for(stem + std::to_string(r), &mark, 1, options_.timeout_s);
  }
}

// `expect=same`: as much free memory as the last time.
void Driver::meminfo(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    size_t free_bytes = 0;
    size_t total = 0;
    if (!accept_cuda(cuMemGetInfo_v2(&free_bytes, &total), "cuMemGetInfo")) return;
    note("free " + std::to_string(free_bytes) + " of " + std::to_string(total));
    if (s.text("expect", "") == "same" && free_bytes != free_seen_) {
      failed_ = true;
      note("it was " + std::to_string(free_seen_));
    }
    free_seen_ = free_bytes;
  }
}

// What the process holds of the system: descriptors, threads, mappings, addresses. `expect=same`: no more than the last
// time, but for `slack` mappings, which malloc moves, and `vm_slack` bytes of addresses, which are compared where given.
void Driver::process(const Statement& s) {
  if (concerned(s).empty()) return;
  auto count = [](const char* path) { return std::distance(std::filesystem::directory_iterator(path), {}); };
  bool same = s.text("expect", "") == "same";
  long fds = count("/proc/self/fd");
  long threads = count("/proc/self/task");
  // A thread that was joined is still listed until the kernel has taken it away, a moment later.
  for (int waits = 0; same && threads > held_threads_ && waits < 1000; ++waits) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    threads = count("/proc/self/task");
  }
  std::ifstream file("/proc/self/maps");
  long maps = std::count(std::istreambuf_iterator<char>(file), {}, '\n');
  long vm_kb = 0;
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmSize:", 0) == 0) vm_kb = atol(line.c_str() + 7);
  }
  note("fds " + std::to_string(fds) + ", threads " + std::to_string(threads) + ", maps " + std::to_string(maps) +
       ", vm " + std::to_string(vm_kb) + " kB");
  bool more = fds > held_fds_ || threads > held_threads_ || maps > held_maps_ + s.number("slack", 0) ||
              (s.has("vm_slack") && vm_kb > held_vm_kb_ + s.number("vm_slack", 0) / 1024);
  if (same && more) {
    failed_ = true;
    note("it was " + std::to_string(held_fds_) + ", " + std::to_string(held_threads_) + ", " +
         std::to_string(held_maps_) + ", " + std::to_string(held_vm_kb_));
  }
  held_fds_ = fds;
  held_threads_ = threads;
  held_maps_ = maps;
  held_vm_kb_ = vm_kb;
}

// What the communicator says of itself must be what the worker made.
void Driver::facts(const Statement& s) {
  for (Lane* lane : concerned(s)) {
    Member& member = lane->member();
    if (!member.comm) continue;
    int rank = -1;
    int ranks = -1;
    int device = -1;
    int version = 0;
    accept(call::ncclCommUserRank(member.comm, &rank), "ncclCommUserRank");
    accept(call::ncclCommCount(member.comm, &ranks), "ncclCommCount");
    accept(call::ncclCommCuDevice(member.comm, &device), "ncclCommCuDevice");
    accept(call::ncclGetVersion(&version), "ncclGetVersion");
    note("rank " + std::to_string(rank) + " of " + std::to_string(ranks) + ", device " + std::to_string(device) +
         ", version " + std::to_string(version));
    if (rank != member.rank || ranks != member.ranks || device != lane->device) failed_ = true;
  }
}

void Driver::group(const Statement& s, bool start) {
  if (concerned(s).empty()) return;
  if (start) {
    in_group_ += accept(call::ncclGroupStart(), "ncclGroupStart");
    return;
  }
  if (in_group_ > 0) --in_group_;
  ncclResult_t result = call::ncclGroupEnd();
  if (in_group_ > 0) {
    accept(result, "ncclGroupEnd");
    return;
  }
  // Every communicator of the group is asked, in progress or not.
  bool later = result == ncclInProgress;
  for (Call& c : pending_) {
    ncclResult_t state = later ? ncclResult_t(ncclInProgress) : result;
    state = settle(c.member, state);
    if (result == ncclSuccess || result == ncclInProgress) result = state;
  }
  accept(result, "ncclGroupEnd");
  finish_pending();
}

// A group by NCCL's other names for its functions, which a program finds by itself.
void Driver::hidden_group(const Statement& s, bool start) {
  if (concerned(s).empty()) return;
  using Function = ncclResult_t (*)();
  auto function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, start ? "pncclGroupStart" : "pncclGroupEnd"));
  if (!function) throw std::runtime_error("NCCL has no such function");
  in_group_ += start ? 1 : -1;
  if (accept(function(), "a group by its other name") && in_group_ == 0) finish_pending();
}

// `begin_capture mode=M`: a capture that has nothing to do with any communicator, until `end_capture`.
void Driver::foreign_capture(const Statement& s, bool begin) {
  std::string name = s.text("mode", "global");
  CUstreamCaptureMode mode = name == "global" ? CU_STREAM_CAPTURE_MODE_GLOBAL : CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
  for (Lane* lane : concerned(s)) {
    use_lane(*lane);
    if (begin) {
      accept_cuda(cuStreamBeginCapture_v2(lane->current(), mode), "cuStreamBeginCapture");
      continue;
    }
    CUgraph made = nullptr;
    if (accept_cuda(cuStreamEndCapture(lane->current(), &made), "cuStreamEndCapture")) {
      accept_cuda(cuGraphDestroy(made), "cuGraphDestroy");
    }
  }
}

}  // namespace worker
