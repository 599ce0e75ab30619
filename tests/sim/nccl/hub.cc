// The hub of a communicator: one thread in the process that made the unique id. See wire.h.
//
// It never waits for one rank: input is read as it comes, output is queued for each rank and written when the kernel
// takes it. It ends when every rank has left. A rank that vanishes without goodbye is reported to all others.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "debug.h"
#include "numeric.h"
#include "wire.h"

namespace simnccl {
namespace {

constexpr uint64_t kIdMagic = 0x7369636c2d696431ull;

// Output that hubs of this process still owe. Never destroyed, as hub threads may outlive main().
std::atomic<int64_t>& owed() {
  static auto* bytes = new std::atomic<int64_t>(0);
  return *bytes;
}

struct Connection {
  int fd = -1;
  int rank = -1;
  bool own_process = false;  // the rank lives in the hub's process
  Bytes input;
  std::deque<std::shared_ptr<Bytes>> output;
  size_t written = 0;  // of the first output
};

struct Pending {
  Frame head;
  std::vector<uint32_t> members;
  std::map<uint32_t, Bytes> blobs;
  std::map<uint32_t, Frame> heads;
};

class Hub {
 public:
  Hub(int listener, uint64_t token) : listener_(listener), token_(token) {}

  void run() {
    while (!finished()) step();
    for (auto& connection : connections_) drop_output(connection);
    for (auto& connection : connections_) ::close(connection.fd);
    if (listener_ >= 0) ::close(listener_);
  }

 private:
  bool finished() const { return ranks_ > 0 && seen_ == ranks_ && connections_.empty(); }

  void step() {
    std::vector<struct pollfd> events;
    for (auto& connection : connections_) {
      events.push_back({connection.fd, short(POLLIN | (connection.output.empty() ? 0 : POLLOUT)), 0});
    }
    if (listener_ >= 0) events.push_back({listener_, POLLIN, 0});
    if (::poll(events.data(), nfds_t(events.size()), -1) < 0) return;
    size_t known = connections_.size();
    for (size_t i = 0; i < known; ++i) {
      if (events[i].revents & POLLOUT) flush(connections_[i]);
      if (events[i].revents & (POLLIN | POLLHUP | POLLERR)) take_in(connections_[i]);
    }
    if (listener_ >= 0 && events.back().revents & POLLIN) admit();
    connections_.erase(std::remove_if(connections_.begin(), connections_.end(),
                                      [](const Connection& connection) { return connection.fd < 0; }),
                       connections_.end());
  }

  void admit() {
    int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connections_.emplace_back();
    connections_.back().fd = fd;
  }

  void drop_output(Connection& connection) {
    for (auto& bytes : connection.output) owed() -= int64_t(bytes->size());
    connection.output.clear();
  }

  // `clean`: the rank said goodbye.
  void lose(Connection& connection, bool clean) {
    drop_output(connection);
    int fd = connection.fd;
    connection.fd = -1;
    if (connection.rank >= 0) announce(connection, clean);
    // The rank waits for this: what the others have to hear is on its way or counted as owed.
    ::close(fd);
  }

  void announce(Connection& connection, bool clean) {
    uint32_t rank = uint32_t(connection.rank);
    connection.rank = -1;
    gone_[rank] = true;
    if (!clean || connection.own_process) {
      // When a rank of this process leaves, the process may end, and the hub with it: that is no death.
      Frame word;
      word.kind = clean ? kClosing : kDead;
      word.rank = rank;
      for (auto& other : connections_) {
        if (other.fd >= 0 && other.rank >= 0) post(other, word, nullptr, 0);
      }
    }
    for (auto& entry : pending_) report_if_lost(entry.second);
  }

  void report_if_lost(const Pending& pending) {
    for (uint32_t member : pending.members) {
      if (!gone_[member] || pending.blobs.count(member)) continue;
      Frame dead;
      dead.kind = kDead;
      dead.rank = member;
      for (auto& entry : pending.blobs) {
        if (Connection* waiting = find(entry.first)) post(*waiting, dead, nullptr, 0);
      }
    }
  }

  Connection* find(uint32_t rank) {
    for (auto& connection : connections_) {
      if (connection.fd >= 0 && connection.rank == int(rank)) return &connection;
    }
    return nullptr;
  }

  void post(Connection& connection, Frame head, const void* data, size_t bytes) {
    auto message = std::make_shared<Bytes>(sizeof head + bytes);
    head.length = bytes;
    std::memcpy(message->data(), &head, sizeof head);
    if (bytes) std::memcpy(message->data() + sizeof head, data, bytes);
    post(connection, message);
  }

  void post(Connection& connection, const std::shared_ptr<Bytes>& message) {
    owed() += int64_t(message->size());
    connection.output.push_back(message);
    flush(connection);
  }

  void flush(Connection& connection) {
    while (connection.fd >= 0 && !connection.output.empty()) {
      Bytes& first = *connection.output.front();
      ssize_t done = ::send(connection.fd, first.data() + connection.written, first.size() - connection.written,
                            MSG_NOSIGNAL | MSG_DONTWAIT);
      if (done < 0) return;  // full, or broken: the reading side notices a broken connection
      connection.written += size_t(done);
      if (connection.written == first.size()) {
        owed() -= int64_t(first.size());
        connection.written = 0;
        connection.output.pop_front();
      }
    }
  }

  void take_in(Connection& connection) {
    uint8_t chunk[65536];
    bool open = true;
    for (;;) {
      ssize_t done = ::recv(connection.fd, chunk, sizeof chunk, MSG_DONTWAIT);
      if (done > 0) {
        connection.input.insert(connection.input.end(), chunk, chunk + done);
        if (connection.input.size() > (size_t(8) << 20)) break;
        continue;
      }
      if (done < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) break;
      open = false;
      break;
    }
    size_t used = 0;
    while (connection.fd >= 0 && connection.input.size() - used >= sizeof(Frame)) {
      Frame head;
      std::memcpy(&head, connection.input.data() + used, sizeof head);
      if (head.magic != Frame::kMagic) {
        lose(connection, false);
        return;
      }
      if (connection.input.size() - used - sizeof head < head.length) break;
      const uint8_t* payload = connection.input.data() + used + sizeof head;
      used += sizeof head + head.length;
      if (!handle(connection, head, payload)) return;
    }
    connection.input.erase(connection.input.begin(), connection.input.begin() + long(used));
    if (!open && connection.fd >= 0) lose(connection, false);
  }

  // False when the connection is gone.
  bool handle(Connection& connection, const Frame& head, const uint8_t* payload) {
    switch (head.kind) {
      case kHello:
        return greet(connection, head);
      case kBye:
        lose(connection, true);
        return false;
      case kMessage:
        if (Connection* peer = find(head.rank)) {
          Frame forward = head;
          forward.rank = uint32_t(connection.rank);
          post(*peer, forward, payload, head.length);
        }
        return true;
      case kPut:
        put(connection, head, payload);
        return true;
      default:
        lose(connection, false);
        return false;
    }
  }

  bool greet(Connection& connection, const Frame& head) {
    bool valid = head.token == token_ && head.members > 0 && head.rank < head.members &&
                 (ranks_ == 0 || head.members == ranks_) && !find(head.rank);
    if (!valid) {
      lose(connection, false);
      return false;
    }
    if (ranks_ == 0) gone_.assign(head.members, false);
    ranks_ = head.members;
    connection.rank = int(head.rank);
    connection.own_process = head.process == uint64_t(getpid());
    for (uint32_t rank = 0; rank < ranks_; ++rank) {
      if (!gone_[rank]) continue;  // someone died before this rank arrived
      Frame dead;
      dead.kind = kDead;
      dead.rank = rank;
      post(connection, dead, nullptr, 0);
    }
    if (++seen_ == ranks_) {
      ::close(listener_);
      listener_ = -1;
    }
    return true;
  }

  void put(Connection& connection, const Frame& head, const uint8_t* payload) {
    if (connection.rank < 0) return;
    std::vector<uint32_t> members(head.members);
    if (!members.empty()) std::memcpy(members.data(), payload, members.size() * sizeof(uint32_t));
    payload += members.size() * sizeof(uint32_t);
    size_t bytes = head.length - members.size() * sizeof(uint32_t);
    if (members.empty()) {
      for (uint32_t rank = 0; rank < ranks_; ++rank) members.push_back(rank);
    }
    auto key = std::make_pair(head.channel, head.sequence);
    Pending& pending = pending_[key];
    if (pending.members.empty()) {
      pending.head = head;
      pending.members = members;
    }
    uint32_t rank = uint32_t(connection.rank);
    bool agrees = pending.head.mode == head.mode && pending.head.type == head.type && pending.head.op == head.op &&
                  pending.members == members &&
                  (head.mode != kReduce || pending.blobs.empty() || pending.blobs.begin()->second.size() == bytes);
    pending.blobs[rank] = Bytes(payload, payload + bytes);
    pending.heads[rank] = head;
    if (!agrees) {
      Frame mismatch;
      mismatch.kind = kMismatch;
      for (uint32_t member : pending.members) {
        if (Connection* other = find(member)) post(*other, mismatch, nullptr, 0);
      }
      pending_.erase(key);
      return;
    }
    if (pending.blobs.size() == pending.members.size()) {
      answer(pending);
      pending_.erase(key);
    } else {
      report_if_lost(pending);
    }
  }

  void answer(const Pending& pending) {
    Frame head = pending.head;
    head.kind = kResult;
    head.members = uint32_t(pending.members.size());
    auto message = std::make_shared<Bytes>(sizeof head);
    if (head.mode == kReduce) {
      std::vector<Operand> operands;
      for (uint32_t member : pending.members) {
        const Frame& from = pending.heads.at(member);
        operands.push_back({pending.blobs.at(member).data(), from.scale, from.iscale});
      }
      size_t bytes = pending.blobs.begin()->second.size();
      message->resize(sizeof head + bytes);
      size_t element = type_size(head.type);
      if (element) reduce(head.type, head.op, operands, bytes / element, message->data() + sizeof head);
    } else {
      for (uint32_t member : pending.members) {
        uint64_t length = pending.blobs.at(member).size();
        auto raw = reinterpret_cast<const uint8_t*>(&length);
        message->insert(message->end(), raw, raw + sizeof length);
      }
      for (uint32_t member : pending.members) {
        const Bytes& blob = pending.blobs.at(member);
        message->insert(message->end(), blob.begin(), blob.end());
      }
    }
    head.length = message->size() - sizeof head;
    std::memcpy(message->data(), &head, sizeof head);
    for (uint32_t member : pending.members) {
      if (Connection* connection = find(member)) post(*connection, message);
    }
  }

  int listener_;
  uint64_t token_;
  uint32_t ranks_ = 0;
  uint32_t seen_ = 0;
  std::deque<Connection> connections_;
  std::vector<bool> gone_;
  std::map<std::pair<uint64_t, uint64_t>, Pending> pending_;
};

// NCCL_SOCKET_IFNAME: a list of prefixes, `=` for exact names, `^` to exclude.
uint32_t interface_address() {
  const char* wanted = getenv("NCCL_SOCKET_IFNAME");
  uint32_t result = htonl(INADDR_LOOPBACK);
  if (!wanted || !*wanted) return result;
  bool exclude = *wanted == '^';
  if (exclude) ++wanted;
  bool exact = *wanted == '=';
  if (exact) ++wanted;
  struct ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return result;
  for (struct ifaddrs* item = list; item; item = item->ifa_next) {
    if (!item->ifa_addr || item->ifa_addr->sa_family != AF_INET || !(item->ifa_flags & IFF_UP)) continue;
    bool match = false;
    std::string names = wanted;
    for (size_t start = 0; start <= names.size();) {
      size_t end = std::min(names.find(',', start), names.size());
      std::string name = names.substr(start, end - start);
      if (!name.empty() && (exact ? name == item->ifa_name : !strncmp(item->ifa_name, name.c_str(), name.size()))) {
        match = true;
      }
      start = end + 1;
    }
    if (match == exclude) continue;
    result = reinterpret_cast<struct sockaddr_in*>(item->ifa_addr)->sin_addr.s_addr;
    break;
  }
  freeifaddrs(list);
  return result;
}

}  // namespace

ncclResult_t start_hub(Address* address) {
  struct sockaddr_in at = {};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = interface_address();
  if (const char* text = getenv("SIM_NCCL_ADDR")) inet_aton(text, &at.sin_addr);
  int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return ncclSystemError;
  socklen_t length = sizeof at;
  if (::bind(fd, reinterpret_cast<struct sockaddr*>(&at), sizeof at) != 0 || ::listen(fd, 1024) != 0 ||
      ::getsockname(fd, reinterpret_cast<struct sockaddr*>(&at), &length) != 0) {
    SIM_WARN("bootstrap: cannot listen on %s: %s", inet_ntoa(at.sin_addr), strerror(errno));
    ::close(fd);
    return ncclSystemError;
  }
  std::memset(address, 0, sizeof *address);
  address->magic = kIdMagic;
  if (getrandom(&address->token, sizeof address->token, 0) != ssize_t(sizeof address->token)) {
    ::close(fd);
    return ncclSystemError;
  }
  address->ip = at.sin_addr.s_addr;
  address->port = at.sin_port;
  uint64_t token = address->token;
  std::thread([fd, token] { Hub(fd, token).run(); }).detach();
  return ncclSuccess;
}

void flush_hubs() {
  auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (owed().load() > 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace simnccl
