// The worker: a plain NCCL program that follows a script and checks every result. It knows nothing of what it tests and
// uses the public NCCL API and the driver API alone, so it runs on real GPUs as well.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_abi.h"
#include "nccl_api.h"
#include "reference.h"

namespace worker {

struct Statement {
  std::string name;
  std::map<std::string, std::string> args;
  std::vector<Statement> body;  // of repeat

  bool has(const std::string& key) const { return args.count(key) != 0; }
  std::string text(const std::string& key, const std::string& otherwise) const;
  long number(const std::string& key, long otherwise) const;
  // `on=0,2`: is this rank concerned?
  bool concerns(int rank) const;
};

// Statements end with a newline or `;`, `#` begins a comment. Throws std::runtime_error with the reason.
std::vector<Statement> parse(const std::string& text);
std::vector<std::string> split_list(const std::string& text, char separator);

struct Options {
  int rank = 0;
  int ranks = 1;
  std::vector<int> devices;  // one for each lane
  std::string id;
  int lanes = 1;
  bool threads = false;  // lanes are threads, else one thread drives them all with groups
  // 0: additions in any order; 1: sums bit for bit; 2: every operation bit for bit; 3: sums as the switch may make them,
  // all else bit for bit
  int exact = 1;
  int blocking = -1;  // -1: ncclCommInitRank, else the config's field
  int timeout_s = 120;
};

struct Member {
  ncclComm_t comm = nullptr;
  int rank = 0;
  int ranks = 0;
};

struct Buffer {
  CUdeviceptr base = 0;
  size_t capacity = 0;
  bool from_nccl = false;
};

// One rank: its device, its streams, its communicators.
struct Lane {
  int rank = 0;  // in the world
  CUdevice device = 0;
  CUcontext context = nullptr;
  std::vector<CUstream> streams;
  size_t stream = 0;
  std::vector<Member> comms;
  size_t comm = 0;
  std::vector<Buffer> pool;

  // Retains the context, makes it current and the first stream in it.
  void open() {
    CUstream made = nullptr;
    CUresult result = cuDevicePrimaryCtxRetain(&context, device);
    if (result == CUDA_SUCCESS) result = cuCtxSetCurrent(context);
    if (result == CUDA_SUCCESS) result = cuStreamCreate(&made, CU_STREAM_NON_BLOCKING);
    if (result != CUDA_SUCCESS) throw std::runtime_error("device: CUDA error " + std::to_string(result));
    streams.push_back(made);
  }
  Member& member() { return comms.at(comm); }
  CUstream current() { return streams.at(stream); }
};

enum class Coll {
  kAllReduce,
  kReduce,
  kBroadcast,
  kBcast,
  kAllGather,
  kReduceScatter,
  kAlltoAll,
  kGather,
  kScatter,
  kSendRecv,  // to the next rank, from the previous one
  kSend,      // to `root`
  kRecv,      // from `root`
  kPut        // into the next rank's output, from the previous one
};

// One call on one lane, from the preparation of its buffers to the check of its result.
struct Call {
  Coll coll = Coll::kAllReduce;
  int type = 0;
  int op = 0;
  bool scaled = false;  // a pre-multiplied sum, with a factor of this rank's own
  bool on_device = false;  // its factor is read from device memory when it runs
  bool each_factor = false;  // every byte in turn
  std::string maker;  // who makes its operation: see make_operation
  uint64_t factor_call = 0;  // the number that factors are drawn from: with host factors the one it was first issued with
  Buffer factor;
  std::shared_ptr<uint64_t> factor_image;
  int exact = 1;  // as Options::exact
  bool configured = false;  // ncclAllReduceConfig
  bool extended = false;  // the extension makes it
  ncclWindow_t window = nullptr;  // over the output, for a put
  size_t count = 0;
  int root = 0;
  Payload payload;
  bool in_place = false;
  size_t in_offset = 0;  // bytes
  size_t out_offset = 0;
  bool nccl_memory = false;
  bool check_input = true;
  Lane* lane = nullptr;
  Member member;
  Buffer in, out;
  std::shared_ptr<Bytes> image;  // what is copied to the input; lives until the copy has been made
};

// Counts of one driver; added up at the end.
struct Tally {
  uint64_t calls = 0;
  uint64_t wrong = 0;   // wrong elements, guard bytes included
  uint64_t errors = 0;  // unexpected results
};

struct Graph {
  std::vector<CUgraphExec> execs;  // one for each lane
  std::vector<Call> calls;
};

// A thread with its lanes. Runs the script.
class Driver {
 public:
  Driver(const Options& options, std::vector<Lane> lanes) : options_(options), lanes_(std::move(lanes)) {}
  void run(const std::vector<Statement>& program);
  // Gives back what the program itself took, if it has destroyed its communicators.
  void close();
  const Tally& tally() const { return tally_; }

 private:
  void statement(const Statement& s);
  bool dispatch(const Statement& s);
  std::string line_head(const Statement& s);
  void note(const std::string& text);
  // Records a result; false when it is an error nobody expected.
  bool accept(ncclResult_t result, const char* what);
  bool accept_cuda(CUresult result, const char* what);

  // calls.cc
  std::vector<Lane*> concerned(const Statement& s);
  void use_lane(Lane& lane);
  Call plan(const Statement& s, Lane& lane, uint64_t call);
  void prepare(Call& call);
  void refresh(Call& call);
  ncclResult_t issue(Call& call);
  void check(Call& call);
  void give_back(Call& call);
  Buffer take(Lane& lane, size_t bytes, bool from_nccl);
  void run_calls(std::vector<Call>& calls);
  ncclResult_t settle(Member& member, ncclResult_t result);
  ncclResult_t settled_parent(Member& parent, ncclResult_t result);
  ncclResult_t sync(Lane& lane);
  void finish_pending();
  // Takes buffers of calls that failed back once nothing can write to them any more.
  void reclaim();

  void collective(const Statement& s, Coll coll);
  void place(Statement& s, Random own);
  void place_by_lot(Statement& s, const Lane& lane, uint64_t number);
  void random(const Statement& s);
  void patterns(const Statement& s);
  void capture(const Statement& s);
  void replay(const Statement& s);
  void chain(const Statement& s);
  void launch(const Statement& s);

  // commands.cc
  void init(const Statement& s);
  void init_all(const Statement& s);
  void split(const Statement& s);
  void shrink(const Statement& s);
  void grow(const Statement& s);
  void abort_in(const Statement& s);
  void fork_child(const Statement& s);
  void end_comm(const Statement& s);
  void async_error(const Statement& s);
  void barrier(const Statement& s);
  void meminfo(const Statement& s);
  void process(const Statement& s);
  void facts(const Statement& s);
  bool another_round(const Statement& s, std::chrono::steady_clock::time_point started);
  void group(const Statement& s, bool start);
  void hidden_group(const Statement& s, bool start);
  void foreign_capture(const Statement& s, bool begin);
  void drop_member(Lane& lane);

  // hostile.cc
  void raw(const Statement& s);
  void operations(const Statement& s);
  void drop(const Statement& s);
  ncclComm_t handle_by_name(const Statement& s, Lane& lane);
  bool wait_idle(Lane& lane, long ms);

  void release(Lane& lane);

  Options options_;
  std::vector<Lane> lanes_;
  Tally tally_;
  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  int in_group_ = 0;  // open groups of the script
  bool graphs_dropped_ = false;
  bool held_ = false;  // calls are issued, but not waited for
  std::vector<Call> pending_;
  std::vector<Call> abandoned_;
  ncclComm_t gone_ = nullptr;  // the last communicator that ended
  std::vector<Graph> graphs_;
  std::vector<std::thread> aborting_;
  uint64_t calls_made_ = 0;
  int inits_ = 0;
  int barriers_ = 0;
  int loops_ = 0;
  size_t free_seen_ = 0;
  long held_fds_ = 0, held_threads_ = 0, held_maps_ = 0, held_vm_kb_ = 0;
  Digest digest_;  // of the results of the running statement's AllReduce calls

  // State of the running statement.
  std::string notes_;
  bool failed_ = false;
  bool expecting_ = false;
  long expected_ = 0;  // -1: any error
  bool met_ = false;
};

// extension.cc: what a library that is loaded while the program runs does for it.
struct Extension {
  decltype(&ncclCommInitRank) init = nullptr;
  decltype(&ncclAllReduce) all_reduce = nullptr;
};
// `frozen`: the pages of its call slots can never be written again.
void open_extension(bool frozen);
const Extension& extension();

// main.cc
void print_line(const std::string& line);
std::string json_escape(const std::string& text);
std::string counters();
// AllReduce calls that the library under test took itself and left to NCCL, if it counts them.
bool paths(uint64_t* routed, uint64_t* stock);
// What it says of a communicator, if it says anything.
std::string description(ncclComm_t comm);

}  // namespace worker
