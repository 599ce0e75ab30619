// sim_plugin: one rank that calls a network plugin's tables as NCCL's proxy does, without an NCCL. What it does between
// calls (memory, order, retries, ends) is what NCCL may do, chosen at random.
//
//   sim_plugin --library FILE --version V --rank R --ranks N --dir DIRECTORY --seed S [--memory KIND] PROGRAM
//
// KIND is what the network's buffers are: `mapped` from exportable handles, `plain`, or `mixed` with those and host memory.
//
//   messages   a ring of connections: messages of random sizes in memory of random kinds, grouped receives, tags in any
//              order, requests tested in any order
//   flood      the sender is told to try again while the receiver waits, then everything arrives
//   close      both ends close with requests in flight
//   direct     messages until all go straight into registered memory
//   again      addresses are registered again, over other memory
//   little     a few small messages into memory that comes and goes
//   vanish     receivers end, and free their memory, while copies into it are under way
//   die        rank 1 is killed in mid-transfer; the others get an error
//   late       connect and accept say "try again" until the slowest rank has come
//   capture    messages move on one thread while another captures a graph
//   collect    a collective communicator: slices in flight, windows of AllGather and ReduceScatter
//   collclose  a collective communicator is closed with requests that wait for a rank
#include <signal.h>

#include <numeric>

#include "program.h"

namespace driver {
namespace {

void messages(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  int count = 0;
  ok(net.devices(&count), "devices");
  check(count > 0, "no device");
  for (int device = 0; device < count; ++device) {
    Properties p;
    ok(net.properties(device, &p), "getProperties");
    check(p.name == "twoshot" + std::to_string(device), "name " + p.name);
    check(p.pointers == (NCCL_PTR_HOST | NCCL_PTR_CUDA) && p.speed > 100000 && p.max_receives == 8, "properties");
    check(p.max_comms >= 1024 && p.device_type == NCCL_NET_DEVICE_HOST && p.register_global == 0, "properties");
    if (o.version > 8) check(p.max_p2p >= (1u << 30) && p.virtual_devices == 1, "sizes");
  }
  Properties p;
  check(net.properties(count, &p) != ncclSuccess, "a device too many");

  Ring ring = connect_ring(o, net, "messages");
  int previous = (o.rank + o.ranks - 1) % o.ranks;
  // Sizes and groups are the same at both ends; memory, order of sends inside a group and order of tests are not.
  std::mt19937 shared(o.seed), own(o.seed * 977 + unsigned(o.rank));
  uint64_t number = 0;
  for (int round = 0; round < 6; ++round) {
    std::vector<std::vector<size_t>> groups;
    for (int g = int(shared() % 9) + 1; g > 0; --g) {
      groups.emplace_back();
      for (int n = shared() % 3 ? 1 : int(shared() % 8) + 1; n > 0; --n) {
        size_t limit = shared() % 6 ? 5000 : 3u << 20;
        groups.back().push_back(shared() % 10 ? shared() % limit : 0);
      }
    }
    std::vector<Memory> out, in;
    std::vector<Flight> flights;
    std::vector<std::pair<size_t, int>> order;  // index in `out`, tag
    size_t first = 0;
    for (auto& group : groups) {
      std::vector<size_t> here(group.size());
      std::iota(here.begin(), here.end(), first);
      first += group.size();
      std::vector<int> tags;
      for (size_t i = 0; i < group.size(); ++i) {
        tags.push_back(int(1000 + i * 7));
        auto kind = [&] {
          if (o.memory != "mixed") return o.memory == "mapped" ? Kind::mapped : Kind::plain;
          return std::vector<Kind>{Kind::host, Kind::plain, Kind::mapped}[own() % 3];
        };
        out.emplace_back(group[i], kind());
        in.emplace_back(group[i] + own() % 100, kind());
        for (size_t b = 0; b < group[i]; ++b) out.back().data()[b] = content(o.rank, number + here[i], b);
        ok(net.reg(ring.send, out.back().data(), std::max<size_t>(group[i], 1), out.back().type(), &out.back().mr), "reg");
        ok(net.reg(ring.recv, in.back().data(), std::max<size_t>(group[i], 1), in.back().type(), &in.back().mr), "reg");
        check(out.back().mr && in.back().mr, "no registration");
      }
      std::vector<size_t> shuffled = here;
      std::shuffle(shuffled.begin(), shuffled.end(), own);
      for (size_t at : shuffled) order.emplace_back(at, tags[at - here[0]]);
      Flight flight = {nullptr, here, true};
      std::vector<void*> addresses, mrs;
      std::vector<size_t> sizes;
      for (size_t at : here) {
        addresses.push_back(in[at].data());
        sizes.push_back(in[at].size());
        mrs.push_back(in[at].mr);
      }
      for (auto until = soon(); !flight.request; in_time(until, "irecv")) {
        ok(net.irecv(ring.recv, addresses, sizes, tags, mrs, &flight.request), "irecv");
      }
      flights.push_back(flight);
    }
    for (auto& [at, tag] : order) {
      Flight flight = {nullptr, {at}, false};
      for (auto until = soon(); !flight.request; in_time(until, "isend")) {
        ok(net.isend(ring.send, out[at].data(), out[at].size(), tag, out[at].mr, &flight.request), "isend");
      }
      flights.push_back(flight);
    }
    size_t sent = 0, received = 0;
    std::vector<size_t> expected;
    for (auto& group : groups) expected.insert(expected.end(), group.begin(), group.end());
    wait_all(net, flights, own, [&](const Flight& flight, const int* sizes) {
      if (!flight.receive) {
        check(size_t(sizes[0]) == out[flight.buffers[0]].size(), "the size of a send");
        sent++;
        // Its memory is the program's again.
        memset(out[flight.buffers[0]].data(), 0xee, out[flight.buffers[0]].size());
        return;
      }
      for (size_t i = 0; i < flight.buffers.size(); ++i) {
        size_t at = flight.buffers[i];
        check(size_t(sizes[i]) == expected[at], "the size of a receive: " + std::to_string(sizes[i]) + " for " +
                                                     std::to_string(expected[at]));
        void* flush = &in;
        ok(net.iflush(ring.recv, in[at].data(), sizes[i], in[at].mr, &flush), "iflush");
        check(flush == nullptr, "a flush that has to be waited for");
        for (size_t b = 0; b < expected[at]; ++b) {
          check(in[at].data()[b] == content(previous, number + at, b), "byte " + std::to_string(b) + " of a message");
        }
        in[at].untouched_beyond(expected[at]);
        received++;
      }
    });
    check(sent == expected.size() && received == expected.size(), "messages were lost");
    for (Memory& memory : out) ok(net.dereg(ring.send, memory.mr), "deregMr");
    for (Memory& memory : in) ok(net.dereg(ring.recv, memory.mr), "deregMr");
    number += expected.size();
  }
  close_ring(net, ring);
  ok(net.finalize(), "finalize");
}

void flood(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "flood");
  Memory out(100000, false), in(100000, false);
  ok(net.reg(ring.send, out.data(), out.size(), NCCL_PTR_CUDA, &out.mr), "reg");
  ok(net.reg(ring.recv, in.data(), in.size(), NCCL_PTR_CUDA, &in.mr), "reg");
  for (size_t b = 0; b < out.size(); ++b) out.data()[b] = content(o.rank, 5, b);
  std::vector<Flight> sends, receives;
  for (;;) {
    void* request = nullptr;
    ok(net.isend(ring.send, out.data(), out.size(), 3, out.mr, &request), "isend");
    if (!request) break;
    sends.push_back({request, {}, false});
    check(sends.size() < 10000, "requests without end");
  }
  check(sends.size() >= NCCL_NET_MAX_REQUESTS, "fewer requests than NCCL may post");
  barrier(o, "flooded");
  size_t flooded = sends.size();
  std::mt19937 random(o.seed);
  for (size_t i = 0; i < flooded; ++i) {
    Flight flight = {nullptr, {}, true};
    for (auto until = soon(); !flight.request; in_time(until, "irecv")) {
      ok(net.irecv(ring.recv, {in.data()}, {in.size()}, {3}, {in.mr}, &flight.request), "irecv");
      int done = 0;
      if (!sends.empty()) {
        ok(net.test(sends[0].request, &done, nullptr), "test");
        if (done) sends.erase(sends.begin());
      }
    }
    receives.push_back(flight);
  }
  // Both directions have to move: the sends of this rank are its neighbour's receives.
  for (auto until = soon(); !sends.empty() || !receives.empty(); in_time(until, "the flood")) {
    for (auto* flights : {&sends, &receives}) {
      for (size_t i = 0; i < flights->size();) {
        int done = 0;
        ok(net.test((*flights)[i].request, &done, nullptr), "test");
        if (done) flights->erase(flights->begin() + long(i));
        else ++i;
      }
    }
  }
  for (size_t b = 0; b < in.size(); ++b) {
    check(in.data()[b] == content((o.rank + o.ranks - 1) % o.ranks, 5, b), "a byte");
  }
  in.untouched_beyond(in.size());
  close_ring(net, ring);
}

void close_in_flight(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  for (int round = 0; round < 4; ++round) {
    Ring ring = connect_ring(o, net, "close" + std::to_string(round));
    Kind kind = o.memory == "mapped" ? Kind::mapped : Kind::plain;
    Memory out(3 << 20, kind), in(3 << 20, kind);
    void* request = nullptr;
    ok(net.reg(ring.send, out.data(), out.size(), NCCL_PTR_CUDA, &out.mr), "reg");
    ok(net.reg(ring.recv, in.data(), in.size(), NCCL_PTR_CUDA, &in.mr), "reg");
    if (kind == Kind::mapped) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    // The neighbour may have closed its end already.
    auto or_gone = [](int code, const char* what) {
      if (code != ncclRemoteError) ok(code, what);
    };
    or_gone(net.irecv(ring.recv, {in.data()}, {in.size()}, {1}, {in.mr}, &request), "irecv");
    // Of another tag in half of the rounds: it never goes anywhere.
    request = nullptr;
    or_gone(net.isend(ring.send, out.data(), out.size(), round % 2, out.mr, &request), "isend");
    for (int i = 0; request && i < round * 5; ++i) {
      int done = 0;
      int code = net.test(request, &done, nullptr);
      if (code != ncclSuccess || done) break;  // the neighbour may be gone already
    }
    close_ring(net, ring);
  }
  // A listener that nobody calls, and one whose accept was tried.
  for (int tries = 0; tries < 2; ++tries) {
    uint8_t handle[NCCL_NET_HANDLE_MAXSIZE];
    void* listener = nullptr;
    void* recv = nullptr;
    ok(net.listen(0, handle, &listener), "listen");
    for (int i = 0; i < tries * 3; ++i) ok(net.accept(listener, &recv), "accept");
    check(!recv, "a connection from nowhere");
    ok(net.close_listen(listener), "closeListen");
  }
  barrier(o, "closed");
  ok(net.finalize(), "finalize");
}

void die(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "die");
  barrier(o, "connected");
  if (o.rank == 1) kill(getpid(), SIGKILL);
  Memory in(1 << 20, false);
  void* request = nullptr;
  ok(net.reg(ring.recv, in.data(), in.size(), NCCL_PTR_CUDA, &in.mr), "reg");
  bool behind = (o.rank + o.ranks - 1) % o.ranks == 1;
  if (behind) {
    int code = net.irecv(ring.recv, {in.data()}, {in.size()}, {1}, {in.mr}, &request);
    for (auto until = soon(); code == ncclSuccess; in_time(until, "an error")) {
      int done = 0;
      code = net.test(request, &done, nullptr);
      check(!done, "a message from a dead rank");
    }
    check(code == ncclRemoteError, "code " + std::to_string(code));
  }
  close_ring(net, ring);
}

void late(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "late", true);
  close_ring(net, ring);
}

void capture(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "capture");
  Memory out(70000, false), in(70000, false);
  ok(net.reg(ring.send, out.data(), out.size(), NCCL_PTR_CUDA, &out.mr), "reg");
  for (size_t b = 0; b < out.size(); ++b) out.data()[b] = content(o.rank, 6, b);
  CUstream stream = nullptr;
  CUgraph graph = nullptr;
  CUcontext context = nullptr;
  cuda(cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  cuda(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  cuda(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL), "cuStreamBeginCapture");
  std::string failure;
  std::thread progress([&] {
    try {
      cuda(cuCtxSetCurrent(context), "cuCtxSetCurrent");
      std::mt19937 random(o.seed);
      for (int round = 0; round < 5; ++round) {
        std::vector<Flight> flights = {{nullptr, {}, true}, {nullptr, {}, false}};
        ok(net.irecv(ring.recv, {in.data()}, {in.size()}, {1}, {out.mr}, &flights[0].request), "irecv");
        ok(net.isend(ring.send, out.data(), out.size(), 1, out.mr, &flights[1].request), "isend");
        wait_all(net, flights, random, [](const Flight&, const int*) {});
      }
    } catch (const std::exception& error) {
      failure = error.what();
    }
  });
  progress.join();
  check(failure.empty(), failure);
  cuda(cuStreamEndCapture(stream, &graph), "cuStreamEndCapture: a capture was broken by the network");
  cuda(cuGraphDestroy(graph), "cuGraphDestroy");
  cuda(cuStreamDestroy_v2(stream), "cuStreamDestroy");
  for (size_t b = 0; b < in.size(); ++b) {
    check(in.data()[b] == content((o.rank + o.ranks - 1) % o.ranks, 6, b), "a byte");
  }
  close_ring(net, ring);
}

void* connect_all(const Options& o, const CollNet& net, const std::string& name) {
  std::vector<uint8_t> mine(NCCL_NET_HANDLE_MAXSIZE);
  void* listener = nullptr;
  ok(net.listen(0, mine.data(), &listener), "listen");
  publish(o, name + "." + std::to_string(o.rank), mine);
  std::vector<std::vector<uint8_t>> all;
  std::vector<void*> handles;
  for (int r = 0; r < o.ranks; ++r) {
    all.push_back(await(o, name + "." + std::to_string(r), NCCL_NET_HANDLE_MAXSIZE));
    handles.push_back(all.back().data());
  }
  void* coll = nullptr;
  ok(net.connect(handles, o.rank, listener, &coll), "connect");
  ok(net.close_listen(listener), "closeListen");
  return coll;
}

// NCCL asks for a collective network where the network of the same library was initialised.
void begin(const Options& o, Net& net, CollNet& coll) {
  ok(net.init(), "init");
  ok(coll.init(), "init");
  int count = 0, own = 0;
  ok(coll.devices(&count), "devices");
  ok(net.devices(&own), "devices");
  check(count > 0 && count == own, "devices");
  Properties p, q;
  ok(coll.properties(0, &p), "getProperties");
  ok(net.properties(0, &q), "getProperties");
  check(p.name == q.name && (p.pointers & NCCL_PTR_CUDA), "one list of devices");
  if (o.version > 8) check(p.max_coll > 0 && p.max_coll <= (1ull << 40), "maxCollBytes");
}

void wait_coll(const CollNet& net, std::vector<std::pair<void*, size_t>>& flights, std::mt19937& random) {
  for (auto until = soon(); !flights.empty();) {
    size_t at = random() % flights.size();
    int done = 0, size = -1;
    ok(net.test(flights[at].first, &done, &size), "test");
    if (!done) {
      in_time(until, "a request");
      continue;
    }
    check(size_t(size) == flights[at].second, "the size of a request");
    flights.erase(flights.begin() + long(at));
  }
}

int32_t number_of(int rank, uint64_t call, size_t i) {
  int32_t value;
  uint8_t bytes[4] = {content(rank, call, i * 4), content(rank, call, i * 4 + 1), content(rank, call, i * 4 + 2), 0};
  memcpy(&value, bytes, sizeof value);
  return value;
}

void collect(const Options& o) {
  Net side(o.library, o.version);
  CollNet net(o.library, o.version);
  begin(o, side, net);
  void* coll = connect_all(o, net, "collect");
  std::mt19937 shared(o.seed), own(o.seed * 31 + unsigned(o.rank));
  uint64_t call = 0;
  {
    Memory host(100, true), device(100, false);
    ok(net.reg(coll, device.data(), 100, NCCL_PTR_CUDA, &device.mr), "regMr");
    check(device.mr != nullptr, "no registration");
    ok(net.dereg(coll, device.mr), "deregMr");
    check(net.reg(coll, host.data(), 100, NCCL_PTR_HOST, &host.mr) != ncclSuccess, "memory that no GPU can see");
  }
  // Slices in flight until there are no requests left.
  for (int round = 0; round < 3; ++round) {
    std::vector<Memory> in, out;
    std::vector<std::pair<void*, size_t>> flights;
    std::vector<size_t> counts;
    size_t most = round == 2 ? 400 : shared() % 40 + 1;
    for (size_t i = 0; i < most; ++i) {
      size_t count = shared() % 3 ? shared() % 900 + 1 : shared() % 40000 + 1;
      if (round == 2) count = shared() % 50 + 1;
      in.emplace_back(count * 4, false);
      out.emplace_back(count * 4, false);
      for (size_t e = 0; e < count; ++e) {
        int32_t value = number_of(o.rank, call + i, e);
        memcpy(in.back().data() + e * 4, &value, 4);
      }
      void* request = nullptr;
      for (auto until = soon(); !request; in_time(until, "iallreduce")) {
        ok(net.iallreduce(coll, in.back().data(), out.back().data(), count, ncclInt32, ncclSum, &request), "iallreduce");
        if (request) break;
        check(flights.size() >= NCCL_NET_MAX_REQUESTS, "fewer requests than NCCL may post");
        int done = 0;
        ok(net.test(flights[0].first, &done, nullptr), "test");
        if (done) flights.erase(flights.begin());
      }
      flights.emplace_back(request, count * 4);
      counts.push_back(count);
    }
    wait_coll(net, flights, own);
    for (size_t i = 0; i < counts.size(); ++i) {
      for (size_t e = 0; e < counts[i]; ++e) {
        int32_t sum = 0, got;
        for (int r = 0; r < o.ranks; ++r) sum += number_of(r, call + i, e);
        memcpy(&got, out[i].data() + e * 4, 4);
        check(got == sum, "element " + std::to_string(e) + " of a sum");
      }
      out[i].untouched_beyond(counts[i] * 4);
    }
    call += most;
  }
  // Windows of a gathered and of a scattered buffer.
  for (int round = 0; round < 12; ++round, ++call) {
    size_t elements = shared() % 30000 + 1, per_rank = elements * 4, total = per_rank * size_t(o.ranks);
    size_t from = shared() % (total / 4) * 4, to = from + 4 + shared() % (total - from) / 4 * 4;
    to = std::min(to, total);
    bool scatter = round % 2;
    // Without an element's alignment where nothing is added.
    if (!scatter && from > 0) from -= 3;
    size_t begin_own = std::max(from, per_rank * size_t(o.rank)), end_own = std::min(to, per_rank * size_t(o.rank + 1));
    size_t share = begin_own < end_own ? end_own - begin_own : 0;
    Memory window(to - from, false), mine(share, false);
    auto word = [&](int rank, size_t at) {
      int32_t value = number_of(rank, call, at / 4);
      return reinterpret_cast<uint8_t*>(&value)[at % 4];
    };
    std::vector<std::pair<void*, size_t>> flight(1, {nullptr, to - from});
    if (scatter) {
      for (size_t i = 0; i < to - from; ++i) window.data()[i] = word(o.rank, from + i);
      ok(net.ireducescatter(coll, {window.data(), to - from}, mine.data(), per_rank, from, to - from, ncclInt32, ncclSum,
                            &flight[0].first), "ireducescatter");
    } else {
      for (size_t i = 0; i < share; ++i) mine.data()[i] = word(o.rank, begin_own + i);
      ok(net.iallgather(coll, mine.data(), {window.data(), to - from}, per_rank, from, to - from, &flight[0].first),
         "iallgather");
    }
    check(flight[0].first != nullptr, "no request");
    wait_coll(net, flight, own);
    if (scatter) {
      for (size_t i = 0; i < share / 4; ++i) {
        int32_t sum = 0, got;
        for (int r = 0; r < o.ranks; ++r) sum += number_of(r, call, begin_own / 4 + i);
        memcpy(&got, mine.data() + i * 4, 4);
        check(got == sum, "element " + std::to_string(i) + " of a share");
      }
      mine.untouched_beyond(share);
    } else {
      for (size_t i = 0; i < to - from; ++i) {
        size_t at = from + i;
        check(window.data()[i] == word(int(at / per_rank), at), "byte " + std::to_string(i) + " of a window");
      }
      window.untouched_beyond(to - from);
    }
  }
  void* request = nullptr;
  Memory any(64, false);
  check(net.iallreduce(coll, any.data(), any.data(), 4, 99, ncclSum, &request) != ncclSuccess, "an unknown type");
  check(net.iallreduce(coll, any.data(), any.data(), 4, ncclInt32, 9, &request) != ncclSuccess, "an unknown operation");
  barrier(o, "collected");
  ok(net.close_coll(coll), "closeColl");
  ok(net.finalize(), "finalize");
}

void close_collective(const Options& o) {
  Net side(o.library, o.version);
  CollNet net(o.library, o.version);
  begin(o, side, net);
  for (int round = 0; round < 3; ++round) {
    void* coll = connect_all(o, net, "round" + std::to_string(round));
    Memory in(4096, false), out(4096, false);
    void* request = nullptr;
    // Rank 0 never comes: the others' kernels wait for it.
    if (o.rank != 0) {
      for (int i = 0; i < round + 1; ++i) {
        ok(net.iallreduce(coll, in.data(), out.data(), 1000, ncclFloat32, ncclSum, &request), "iallreduce");
      }
      int done = 0;
      ok(net.test(request, &done, nullptr), "test");
      check(!done, "a sum without rank 0");
    }
    auto started = std::chrono::steady_clock::now();
    ok(net.close_coll(coll), "closeColl");
    check(std::chrono::steady_clock::now() - started < std::chrono::seconds(5), "closing took too long");
  }
  barrier(o, "over");
  // A rank that does not come: an error, in time, and the listener need not be closed.
  std::vector<uint8_t> mine(NCCL_NET_HANDLE_MAXSIZE);
  void* listener = nullptr;
  void* coll = nullptr;
  ok(net.listen(0, mine.data(), &listener), "listen");
  check(net.connect({mine.data(), mine.data()}, 0, listener, &coll) != ncclSuccess && !coll, "a rank from nowhere");
  std::vector<uint8_t> foreign(NCCL_NET_HANDLE_MAXSIZE, 7);
  ok(net.listen(0, mine.data(), &listener), "listen");
  check(net.connect({foreign.data(), mine.data()}, 1, listener, &coll) != ncclSuccess && !coll, "a foreign handle");
  ok(net.close_listen(listener), "closeListen");
  barrier(o, "closed");
}

int run(const Options& o) {
  CUdevice device;
  CUcontext context;
  cuda(cuInit(0), "cuInit");
  cuda(cuDeviceGet(&device, 0), "cuDeviceGet");
  cuda(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  cuda(cuCtxSetCurrent(context), "cuCtxSetCurrent");
  if (o.program == "messages") messages(o);
  else if (o.program == "flood") flood(o);
  else if (o.program == "close") close_in_flight(o);
  else if (o.program == "die") die(o);
  else if (o.program == "late") late(o);
  else if (o.program == "direct") direct(o);
  else if (o.program == "again") again(o);
  else if (o.program == "vanish") vanish(o);
  else if (o.program == "little") little(o);
  else if (o.program == "capture") capture(o);
  else if (o.program == "collect") collect(o);
  else if (o.program == "collclose") close_collective(o);
  else throw std::runtime_error("unknown program " + o.program);
  cuda(cuDevicePrimaryCtxRelease_v2(device), "cuDevicePrimaryCtxRelease");
  return 0;
}

}  // namespace
}  // namespace driver

int main(int argc, char** argv) {
  driver::Options o;
  for (int i = 1; i < argc; ++i) {
    std::string key = argv[i];
    if (key.rfind("--", 0) != 0) {
      o.program = key;
      continue;
    }
    std::string value = i + 1 < argc ? argv[++i] : "";
    if (key == "--library") o.library = value;
    else if (key == "--version") o.version = atoi(value.c_str());
    else if (key == "--rank") o.rank = atoi(value.c_str());
    else if (key == "--ranks") o.ranks = atoi(value.c_str());
    else if (key == "--dir") o.dir = value;
    else if (key == "--memory") o.memory = value;
    else if (key == "--seed") o.seed = unsigned(atoi(value.c_str()));
    else return fprintf(stderr, "sim_plugin: unknown option %s\n", key.c_str()), 2;
  }
  try {
    int code = driver::run(o);
    printf("{\"rank\":%d,\"ok\":true}\n", o.rank);
    return code;
  } catch (const std::exception& error) {
    printf("{\"rank\":%d,\"ok\":false,\"error\":\"%s\"}\n", o.rank, error.what());
#ifdef __SANITIZE_ADDRESS__
    // What is open now nobody has closed: no leak of the library's.
    fflush(stdout);
    _exit(1);
#endif
    return 1;
  }
}
