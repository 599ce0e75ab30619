// A small network plugin for tests of the simulated NCCL's loader: a network that may decline, and a collective network
// that really adds, over TCP through rank 0. It proves that the CollNet door works before a real plugin stands in it.
//
//   SIM_PLUGIN_DEVICES=n      devices that the network reports (default 1; 0 declines)
//   SIM_PLUGIN_INIT=code      result of the network's init
//   SIM_COLLNET_DEVICES=n     devices of the collective network (default 1)
//   SIM_COLLNET_RETRY=1       every other iallreduce says "try again"
//   SIM_COLLNET_CONNECT=code  result of connect
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "nccl_net_abi.h"
#include "numeric.h"

namespace {

ncclDebugLogger_t logger = nullptr;

int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

#define SAY(...) \
  if (logger) logger(NCCL_LOG_INFO, NCCL_INIT | NCCL_NET, __FILE__, __LINE__, __VA_ARGS__)

using Bytes = std::vector<uint8_t>;

// Blocking transfers that survive short counts.
bool write_full(int fd, const void* data, size_t bytes) {
  for (auto from = static_cast<const uint8_t*>(data); bytes > 0;) {
    ssize_t done = send(fd, from, bytes, MSG_NOSIGNAL);
    if (done <= 0) return false;
    from += done;
    bytes -= size_t(done);
  }
  return true;
}
bool read_full(int fd, void* data, size_t bytes) {
  for (auto to = static_cast<uint8_t*>(data); bytes > 0;) {
    ssize_t done = recv(fd, to, bytes, 0);
    if (done <= 0) return false;
    to += done;
    bytes -= size_t(done);
  }
  return true;
}

struct Listener {
  int fd;
};

struct Request {
  const void* in;
  void* out;
  size_t count;
  int type;
  int op;
  std::atomic<int> state{0};  // 1 done, 2 failed
};

// One thread works through the requests of a collective communicator in order.
struct Coll {
  int rank = 0;
  std::vector<int> peers;  // rank 0: all others in order; others: rank 0
  std::thread thread;
  std::mutex lock;
  std::condition_variable wake;
  std::deque<Request*> queue;
  bool closing = false;
  unsigned issued = 0;

  bool run(Request& r) {
    size_t bytes = r.count * simnccl::type_size(r.type);
    if (rank != 0) {
      return write_full(peers[0], r.in, bytes) && read_full(peers[0], r.out, bytes);
    }
    std::vector<Bytes> data(peers.size(), Bytes(bytes));
    std::vector<simnccl::Operand> operands = {{static_cast<const uint8_t*>(r.in), 1.0, 1}};
    for (size_t i = 0; i < peers.size(); ++i) {
      if (!read_full(peers[i], data[i].data(), bytes)) return false;
      operands.push_back({data[i].data(), 1.0, 1});
    }
    Bytes sum(bytes);
    if (!simnccl::reduce(r.type, r.op, operands, r.count, sum.data())) return false;
    std::memcpy(r.out, sum.data(), bytes);
    for (int peer : peers) {
      if (!write_full(peer, sum.data(), bytes)) return false;
    }
    return true;
  }

  void serve() {
    std::unique_lock<std::mutex> guard(lock);
    for (;;) {
      wake.wait(guard, [&] { return closing || !queue.empty(); });
      if (queue.empty()) return;
      Request* next = queue.front();
      queue.pop_front();
      guard.unlock();
      next->state = run(*next) ? 1 : 2;
      guard.lock();
    }
  }
};

ncclResult_t net_init(ncclDebugLogger_t log) {
  logger = log;
  SAY("SimTest: network init");
  return number("SIM_PLUGIN_INIT", ncclSuccess);
}
ncclResult_t net_init_v10(ncclDebugLogger_t log, ncclProfilerCallback_t) { return net_init(log); }
ncclResult_t net_init_v11(void** context, uint64_t, ncclNetCommConfig_v11_t*, ncclDebugLogger_t log,
                          ncclProfilerCallback_t) {
  *context = new int(1);
  return net_init(log);
}
ncclResult_t finalize(void* context) {
  delete static_cast<int*>(context);
  return ncclSuccess;
}
ncclResult_t net_devices(int* count) {
  *count = number("SIM_PLUGIN_DEVICES", 1);
  return ncclSuccess;
}
ncclResult_t coll_init(ncclDebugLogger_t log) {
  logger = log;
  return ncclSuccess;
}
ncclResult_t coll_init_v11(void** context, uint64_t, ncclDebugLogger_t log) {
  *context = new int(2);
  return coll_init(log);
}
ncclResult_t coll_devices(int* count) {
  *count = number("SIM_COLLNET_DEVICES", 1);
  return ncclSuccess;
}

char device_name[] = "simtest0";

template <class Properties>
ncclResult_t properties(int, Properties* out) {
  std::memset(out, 0, sizeof *out);
  out->name = device_name;
  out->ptrSupport = NCCL_PTR_HOST | NCCL_PTR_CUDA;
  out->speed = 100000;
  out->maxComms = 1024;
  out->maxRecvs = 1;
  if constexpr (!std::is_same_v<Properties, ncclNetProperties_v8_t>) {
    out->vProps.ndevs = 1;
    out->maxP2pBytes = out->maxCollBytes = 1 << 20;
  }
  return ncclSuccess;
}

ncclResult_t listen_on(int, void* handle, void** listener) {
  struct sockaddr_in at = {};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (const char* text = getenv("SIM_NCCL_ADDR")) inet_aton(text, &at.sin_addr);
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  socklen_t length = sizeof at;
  if (fd < 0 || bind(fd, reinterpret_cast<struct sockaddr*>(&at), sizeof at) != 0 || listen(fd, 128) != 0 ||
      getsockname(fd, reinterpret_cast<struct sockaddr*>(&at), &length) != 0) {
    return ncclSystemError;
  }
  std::memcpy(handle, &at, sizeof at);
  *listener = new Listener{fd};
  return ncclSuccess;
}
ncclResult_t listen_v11(void*, int device, void* handle, void** listener) {
  return listen_on(device, handle, listener);
}

ncclResult_t connect_all(void* handles[], int ranks, int rank, void* listener, void** out) {
  if (int code = number("SIM_COLLNET_CONNECT", 0)) return code;
  auto coll = std::make_unique<Coll>();
  coll->rank = rank;
  int one = 1;
  if (rank == 0) {
    coll->peers.assign(size_t(ranks) - 1, -1);
    for (int i = 1; i < ranks; ++i) {
      int fd = accept(static_cast<Listener*>(listener)->fd, nullptr, nullptr);
      int32_t who = 0;
      if (fd < 0 || !read_full(fd, &who, sizeof who) || who < 1 || who >= ranks) return ncclSystemError;
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      coll->peers[size_t(who) - 1] = fd;
    }
  } else {
    struct sockaddr_in to;
    std::memcpy(&to, handles[0], sizeof to);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int32_t who = rank;
    if (fd < 0 || connect(fd, reinterpret_cast<struct sockaddr*>(&to), sizeof to) != 0 ||
        !write_full(fd, &who, sizeof who)) {
      return ncclSystemError;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    coll->peers.push_back(fd);
  }
  coll->thread = std::thread([c = coll.get()] { c->serve(); });
  *out = coll.release();
  return ncclSuccess;
}

ncclResult_t reduce_support(ncclDataType_t type, ncclRedOp_t op, int* supported) {
  bool known = type == ncclFloat32 || type == ncclFloat16 || type == ncclBfloat16 || type == ncclInt32;
  *supported = known && op <= ncclMin;
  return ncclSuccess;
}
ncclResult_t reg(void*, void* address, size_t, int, void** mr) {
  *mr = address;
  return ncclSuccess;
}
ncclResult_t dereg(void*, void*) { return ncclSuccess; }

ncclResult_t iallreduce(void* handle, void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, void*,
                        void*, void** request) {
  auto* coll = static_cast<Coll*>(handle);
  *request = nullptr;
  if (number("SIM_COLLNET_RETRY", 0) && coll->issued++ % 2 == 0) return ncclSuccess;
  auto* made = new Request;
  made->in = in;
  made->out = out;
  made->count = count;
  made->type = type;
  made->op = op;
  std::lock_guard<std::mutex> guard(coll->lock);
  coll->queue.push_back(made);
  coll->wake.notify_one();
  *request = made;
  return ncclSuccess;
}
ncclResult_t iallreduce_v8(void* coll, void* in, void* out, int count, ncclDataType_t type, ncclRedOp_t op, void* in_mr,
                           void* out_mr, void** request) {
  return iallreduce(coll, in, out, size_t(count), type, op, in_mr, out_mr, request);
}
ncclResult_t iflush(void*, void*, int, void*, void** request) {
  *request = nullptr;
  return ncclSuccess;
}
ncclResult_t test(void* handle, int* done, int* size) {
  auto* request = static_cast<Request*>(handle);
  int state = request->state;
  *done = state != 0;
  if (!state) return ncclSuccess;
  if (size) *size = int(request->count * simnccl::type_size(request->type));
  delete request;
  return state == 1 ? ncclSuccess : ncclRemoteError;
}
ncclResult_t close_coll(void* handle) {
  auto* coll = static_cast<Coll*>(handle);
  {
    std::lock_guard<std::mutex> guard(coll->lock);
    coll->closing = true;
    coll->wake.notify_one();
  }
  for (int peer : coll->peers) shutdown(peer, SHUT_RDWR);
  coll->thread.join();
  for (int peer : coll->peers) close(peer);
  delete coll;
  return ncclSuccess;
}
ncclResult_t close_listen(void* handle) {
  auto* listener = static_cast<Listener*>(handle);
  close(listener->fd);
  delete listener;
  return ncclSuccess;
}

template <class Table, class Properties>
Table net_table() {
  Table table = {};
  table.name = "SimTest";
  table.devices = net_devices;
  table.getProperties = properties<Properties>;
  return table;
}

template <class Table, class Properties>
Table coll_table() {
  Table table = {};
  table.name = "SimTestColl";
  table.devices = coll_devices;
  table.getProperties = properties<Properties>;
  table.connect = connect_all;
  table.reduceSupport = reduce_support;
  table.regMr = reg;
  table.deregMr = dereg;
  table.iflush = iflush;
  table.test = test;
  table.closeColl = close_coll;
  table.closeListen = close_listen;
  return table;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

#define NET(version, properties, init_function, more)                       \
  EXPORTED ncclNet_v##version##_t ncclNetPlugin_v##version;                 \
  ncclNet_v##version##_t ncclNetPlugin_v##version = [] {                    \
    auto table = net_table<ncclNet_v##version##_t, properties>();           \
    table.init = init_function;                                             \
    more;                                                                   \
    return table;                                                           \
  }()

#define COLL(version, properties, init_function, listen_function, reduce_function, more)   \
  EXPORTED ncclCollNet_v##version##_t ncclCollNetPlugin_v##version;                        \
  ncclCollNet_v##version##_t ncclCollNetPlugin_v##version = [] {                           \
    auto table = coll_table<ncclCollNet_v##version##_t, properties>();                     \
    table.init = init_function;                                                            \
    table.listen = listen_function;                                                        \
    table.iallreduce = reduce_function;                                                    \
    more;                                                                                  \
    return table;                                                                          \
  }()

NET(8, ncclNetProperties_v8_t, net_init, (void)0);
NET(9, ncclNetProperties_v9_t, net_init, (void)0);
NET(10, ncclNetProperties_v10_t, net_init_v10, (void)0);
NET(11, ncclNetProperties_v11_t, net_init_v11, table.finalize = finalize);
NET(12, ncclNetProperties_v12_t, net_init_v11, table.finalize = finalize);
COLL(8, ncclNetProperties_v8_t, coll_init, listen_on, iallreduce_v8, (void)0);
COLL(9, ncclNetProperties_v9_t, coll_init, listen_on, iallreduce, (void)0);
COLL(10, ncclNetProperties_v10_t, coll_init, listen_on, iallreduce, (void)0);
COLL(11, ncclNetProperties_v11_t, coll_init_v11, listen_v11, iallreduce, table.finalize = finalize);
COLL(12, ncclNetProperties_v12_t, coll_init_v11, listen_v11, iallreduce, table.finalize = finalize);
