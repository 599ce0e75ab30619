// Programs about messages that go straight into registered memory.
#include <dlfcn.h>

#include <functional>

#include "program.h"

namespace driver {

Traffic traffic(const Options& o) {
  void* library = dlopen(o.library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  check(library != nullptr, "the library is not loaded");
  auto ask = reinterpret_cast<int (*)(uint64_t*)>(dlsym(library, "twoshot_network_counters"));
  check(ask != nullptr && ask(nullptr) != 0, "twoshot_network_counters");
  Traffic told;
  ok(ask(&told.straight), "twoshot_network_counters");
  dlclose(library);
  return told;
}

namespace {

// One large memory in which messages lie side by side, each with a guard behind it, all registered by one or several
// registrations.
struct Arena {
  Memory memory;
  std::vector<void*> mrs;
  size_t each;

  Arena(const Net& net, void* comm, size_t slots, size_t each, Kind kind, bool apart)
      : memory(slots * (each + kGuard), kind), each(each) {
    for (size_t i = 0; i < (apart ? slots : 1); ++i) {
      void* mr = nullptr;
      ok(net.reg(comm, apart ? at(i) : memory.data(), apart ? each : memory.size(), memory.type(), &mr), "regMr");
      check(mr != nullptr, "no registration");
      mrs.push_back(mr);
    }
  }
  uint8_t* at(size_t i) { return memory.data() + i * (each + kGuard); }
  void* mr(size_t i) const { return mrs[i % mrs.size()]; }
  void release(const Net& net, void* comm) {
    for (void* mr : mrs) ok(net.dereg(comm, mr), "deregMr");
    mrs.clear();
  }
};

struct Round {
  const Options& o;
  const Net& net;
  Ring& ring;
  std::string name;
  std::mt19937 shared, own;
  uint64_t number = 0;

  Round(const Options& o, const Net& net, Ring& ring, std::string name)
      : o(o), net(net), ring(ring), name(std::move(name)), shared(o.seed), own(o.seed * 977 + unsigned(o.rank)) {}

  // Messages of random sizes from `out` to the neighbour's `in`, in groups, in any order, and what lies around them. Half
  // of the rounds: of one size, one by one, as the steps of a channel.
  void operator()(Arena& out, Arena& in) {
    int previous = (o.rank + o.ranks - 1) % o.ranks;
    size_t slots = in.memory.size() / (in.each + kGuard);
    memset(in.memory.data(), kPoison, in.memory.size());
    std::vector<size_t> sizes;
    std::vector<Flight> flights;
    std::vector<std::pair<size_t, int>> order;
    std::vector<std::function<void()>> receives;
    size_t steps = shared() % 2 ? shared() % in.each + 1 : 0;
    for (size_t first = 0; first < slots;) {
      size_t group = std::min<size_t>(steps || shared() % 3 ? 1 : shared() % 8 + 1, slots - first);
      Flight flight = {nullptr, {}, true};
      std::vector<void*> addresses, mrs;
      std::vector<size_t> rooms;
      std::vector<int> tags;
      for (size_t i = first; i < first + group; ++i) {
        sizes.push_back(steps ? steps : shared() % 9 ? shared() % (in.each + 1) : 0);
        for (size_t b = 0; b < sizes[i]; ++b) out.at(i)[b] = content(o.rank, number + i, b);
        flight.buffers.push_back(i);
        addresses.push_back(in.at(i));
        rooms.push_back(sizes[i] + own() % (in.each - sizes[i] + 1));
        tags.push_back(int(i * 3));
        mrs.push_back(in.mr(i));
        order.emplace_back(i, tags.back());
      }
      std::shuffle(order.end() - long(group), order.end(), own);
      receives.push_back([=, this, &flights]() mutable {
        for (auto until = soon(); !flight.request; in_time(until, "irecv")) {
          ok(net.irecv(ring.recv, addresses, rooms, tags, mrs, &flight.request), "irecv");
        }
        flights.push_back(flight);
      });
      first += group;
    }
    auto receive = [&] {
      for (auto& each : receives) each();
    };
    // Messages of one size all wait for their buffers, and so can go together.
    if (!steps) receive();
    for (auto& [i, tag] : order) {
      Flight flight = {nullptr, {i}, false};
      for (auto until = soon(); !flight.request; in_time(until, "isend")) {
        ok(net.isend(ring.send, out.at(i), sizes[i], tag, out.mr(i), &flight.request), "isend");
      }
      flights.push_back(flight);
    }
    if (steps) {
      barrier(o, name + ".sent." + std::to_string(number));
      receive();
    }
    wait_all(net, flights, own, [&](const Flight& flight, const int* got) {
      if (!flight.receive) {
        memset(out.at(flight.buffers[0]), 0xee, sizes[flight.buffers[0]]);
        return;
      }
      for (size_t i = 0; i < flight.buffers.size(); ++i) {
        size_t at = flight.buffers[i];
        check(size_t(got[i]) == sizes[at], "the size of a receive");
        for (size_t b = 0; b < sizes[at]; ++b) {
          check(in.at(at)[b] == content(previous, number + at, b), "byte " + std::to_string(b) + " of a message");
        }
      }
    });
    for (size_t i = 0; i < slots; ++i) {
      for (size_t b = sizes[i]; b < in.each + kGuard; ++b) check(in.at(i)[b] == kPoison, "a byte behind a message");
    }
    in.memory.untouched_beyond(in.memory.size());
    number += slots;
  }

  // Rounds until one goes straight as a whole: memory that was just registered may not be mapped yet.
  void until_straight(Arena& out, Arena& in) {
    for (auto until = soon();; in_time(until, "a straight way")) {
      Traffic before = traffic(o);
      (*this)(out, in);
      Traffic after = traffic(o);
      bool straight = after.straight > before.straight && after.window == before.window;
      // All ranks go on together, or none.
      std::string question = name + ".straight." + std::to_string(number) + ".";
      publish(o, question + std::to_string(o.rank), {uint8_t(straight)});
      for (int r = 0; r < o.ranks; ++r) straight = await(o, question + std::to_string(r), 1)[0] && straight;
      if (straight) return;
    }
  }
};

}  // namespace

void direct(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "direct");
  Round round(o, net, ring, "direct");
  {
    bool mapped = o.memory == "mapped";
    Kind kind = mapped ? Kind::mapped : Kind::plain;
    // Sources need no registration that anybody can write to.
    Arena out(net, ring.send, 20, 70000, o.rank % 2 ? Kind::plain : Kind::mapped, false);
    Arena in(net, ring.recv, 20, 70000, kind, false), apart(net, ring.recv, 20, 70000, kind, true);
    Arena large(net, ring.recv, 2, 9 << 20, kind, false), source(net, ring.send, 2, 9 << 20, Kind::plain, false);
    for (Arena* each : {&in, &apart, &in}) {
      if (mapped) round.until_straight(out, *each);
      else round(out, *each);
    }
    round(source, large);
    Traffic told = traffic(o);
    if (mapped) {
      check(told.straight >= 30 && told.straight_bytes > 100000, "hardly anything went straight");
    } else {
      check(told.straight == 0 && told.window >= 30, "something went straight into memory that cannot be shared");
    }
    barrier(o, "sent");
    in.release(net, ring.recv);
    apart.release(net, ring.recv);
    large.release(net, ring.recv);
    // A registration that ended has no straight way any more, and is none that breaks anything.
    if (o.ranks > 1) {
      void* stale = nullptr;
      ok(net.reg(ring.recv, in.memory.data(), in.memory.size(), NCCL_PTR_CUDA, &stale), "regMr");
      ok(net.dereg(ring.recv, stale), "deregMr");
      ok(net.dereg(ring.recv, stale), "deregMr");
      in.mrs = {stale};
      round(out, in);
    }
  }
  barrier(o, "over");
  close_ring(net, ring);
  ok(net.finalize(), "finalize");
}

void again(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "again");
  Round round(o, net, ring, "again");
  {
    Arena out(net, ring.send, 6, 5000, Kind::plain, false);
    Arena in(net, ring.recv, 6, 5000, Kind::mapped, false);
    for (int i = 0; i < 4; ++i) {
      round.until_straight(out, in);
      in.release(net, ring.recv);
      // The same address, and nothing of what was there before: a message into the old memory would be lost.
      in.memory.replace();
      void* mr = nullptr;
      ok(net.reg(ring.recv, in.memory.data(), in.memory.size(), NCCL_PTR_CUDA, &mr), "regMr");
      in.mrs = {mr};
      round(out, in);
    }
    round.until_straight(out, in);
    in.release(net, ring.recv);
    out.release(net, ring.send);
  }
  close_ring(net, ring);
  ok(net.finalize(), "finalize");
}

void vanish(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  for (int r = 0; r < 3; ++r) {
    std::string name = "vanish" + std::to_string(r);
    Ring ring = connect_ring(o, net, name);
    Arena out(net, ring.send, 1, 24 << 20, Kind::plain, false), little(net, ring.send, 2, 100, Kind::plain, false);
    {
      Round round(o, net, ring, name);
      Arena in(net, ring.recv, 1, 24 << 20, Kind::mapped, false), small(net, ring.recv, 2, 100, Kind::mapped, false);
      // What was registered before it is mapped then, too.
      round.until_straight(little, small);
      void *receive = nullptr, *send = nullptr;
      ok(net.irecv(ring.recv, {in.at(0)}, {in.each}, {1}, {in.mr(0)}, &receive), "irecv");
      barrier(o, name + ".waiting");
      Traffic before = traffic(o);
      int done = 0, code = net.isend(ring.send, out.at(0), out.each, 1, out.mr(0), &send);
      auto until = soon();
      while (code == ncclSuccess && !done && traffic(o).straight == before.straight) {
        code = net.test(send, &done, nullptr);
        in_time(until, "a copy");
      }
      check(code == ncclSuccess || code == ncclRemoteError, "code " + std::to_string(code));
      // As an abort ends things: registrations, the receiving end, and the memory at once, copies or not.
      in.release(net, ring.recv);
      small.release(net, ring.recv);
      ok(net.close_recv(ring.recv), "closeRecv");
    }
    ok(net.close_send(ring.send), "closeSend");
  }
  barrier(o, "over");
  // What went by name is let go of at the next occasion.
  uint8_t handle[NCCL_NET_HANDLE_MAXSIZE];
  void* listener = nullptr;
  ok(net.listen(0, handle, &listener), "listen");
  ok(net.close_listen(listener), "closeListen");
  ok(net.finalize(), "finalize");
}

void little(const Options& o) {
  Net net(o.library, o.version);
  ok(net.init(), "init");
  Ring ring = connect_ring(o, net, "little");
  Round round(o, net, ring, "little");
  {
    Arena out(net, ring.send, 8, 3000, Kind::plain, false);
    for (int i = 0; i < 3; ++i) {
      Arena in(net, ring.recv, 8, 3000, Kind::mapped, false), more(net, ring.recv, 8, 3000, Kind::mapped, true);
      for (int k = 0; k < 4; ++k) round(out, k % 2 ? in : more);
      // The next ones may lie at the same addresses.
      in.release(net, ring.recv);
      more.release(net, ring.recv);
    }
  }
  barrier(o, "over");
  close_ring(net, ring);
  ok(net.finalize(), "finalize");
  // NCCL 2.22 to 2.26 close the library with their last communicator, and nobody knows when its threads have ended.
  void* library = dlopen(o.library.c_str(), RTLD_NOW);
  check(library && dlclose(library) == 0 && dlclose(library) == 0, "closing the library");
  check(dlopen(o.library.c_str(), RTLD_NOW | RTLD_NOLOAD) != nullptr, "the library went under its threads");
}

}  // namespace driver
