// A rank's end of the connection to its hub. See wire.h. Touches one socket and nothing of the driver.
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "debug.h"
#include "wire.h"

namespace simnccl {

bool write_full(int fd, const void* data, size_t bytes) {
  auto from = static_cast<const uint8_t*>(data);
  while (bytes > 0) {
    ssize_t done = ::send(fd, from, bytes, MSG_NOSIGNAL);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    from += done;
    bytes -= size_t(done);
  }
  return true;
}

bool read_full(int fd, void* data, size_t bytes) {
  auto to = static_cast<uint8_t*>(data);
  while (bytes > 0) {
    ssize_t done = ::recv(fd, to, bytes, 0);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    to += done;
    bytes -= size_t(done);
  }
  return true;
}

Link::~Link() { close(); }

ncclResult_t Link::connect(const Address& address, int rank, int ranks, const std::atomic<bool>* stop) {
  stop_ = stop;
  ranks_ = ranks;
  dead_.assign(size_t(ranks), false);
  struct sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = address.ip;
  to.sin_port = address.port;
  auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(env_number("SIM_NCCL_TIMEOUT_S", 120));
  for (int pause_ms = 1;; pause_ms = std::min(pause_ms * 2, 100)) {
    if (stopped()) return ncclInternalError;
    fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd_ < 0) return ncclSystemError;
    if (::connect(fd_, reinterpret_cast<struct sockaddr*>(&to), sizeof to) == 0) break;
    int error = errno;
    ::close(fd_);
    fd_ = -1;
    if (std::chrono::steady_clock::now() > deadline) {
      SIM_WARN("socketStartConnect: Connect to %s<%d> failed : %s", inet_ntoa(to.sin_addr), ntohs(address.port),
               strerror(error));
      return ncclSystemError;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
  }
  int one = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  Frame hello;
  hello.kind = kHello;
  hello.rank = uint32_t(rank);
  hello.members = uint32_t(ranks);
  hello.token = address.token;
  hello.process = uint64_t(getpid());
  return write_all(hello, {}, nullptr, 0);
}

ncclResult_t Link::write_all(const Frame& head, const std::vector<uint32_t>& members, const void* data, size_t bytes) {
  std::lock_guard<std::mutex> guard(write_lock_);
  if (fd_ < 0) return ncclInternalError;
  Frame frame = head;
  if (frame.kind == kPut) frame.members = uint32_t(members.size());
  size_t list = members.size() * sizeof(uint32_t);
  frame.length = list + bytes;
  bool sent = write_full(fd_, &frame, sizeof frame) && write_full(fd_, members.data(), list) &&
              write_full(fd_, data, bytes);
  return sent ? ncclSuccess : ncclRemoteError;
}

ncclResult_t Link::pump(int wait_ms, bool* got) {
  *got = false;
  struct pollfd event = {fd_, POLLIN, 0};
  int ready = ::poll(&event, 1, wait_ms);
  if (ready < 0) return errno == EINTR ? ncclSuccess : ncclSystemError;
  if (ready == 0) return ncclSuccess;
  Frame frame;
  if (!read_full(fd_, &frame, sizeof frame) || frame.magic != Frame::kMagic) return ncclRemoteError;
  Bytes payload(frame.length);
  if (!read_full(fd_, payload.data(), payload.size())) return ncclRemoteError;
  *got = true;
  switch (frame.kind) {
    case kResult: {
      Result& result = results_[{frame.channel, frame.sequence}];
      if (frame.mode == kReduce) {
        result.blobs.push_back(std::move(payload));
        break;
      }
      // A gather is a table of lengths followed by the blobs.
      size_t count = frame.members;
      std::vector<uint64_t> lengths(count);
      if (payload.size() < count * sizeof(uint64_t)) return ncclInternalError;
      std::memcpy(lengths.data(), payload.data(), count * sizeof(uint64_t));
      const uint8_t* from = payload.data() + count * sizeof(uint64_t);
      for (uint64_t length : lengths) {
        result.blobs.emplace_back(from, from + length);
        from += length;
      }
      break;
    }
    case kMessage:
      messages_[{frame.channel, frame.rank}].push_back(std::move(payload));
      break;
    case kDead:
      if (frame.rank < dead_.size()) dead_[frame.rank] = true;
      any_dead_ = true;
      break;
    case kMismatch:
      mismatch_ = true;
      break;
    case kClosing:
      closing_ = true;
      break;
    default:
      return ncclInternalError;
  }
  return ncclSuccess;
}

ncclResult_t Link::exchange(Frame head, const std::vector<uint32_t>& members, const void* data, size_t bytes,
                            Result* result) {
  head.kind = kPut;
  ncclResult_t status = write_all(head, members, data, bytes);
  if (status != ncclSuccess) return status;
  std::pair<uint64_t, uint64_t> key(head.channel, head.sequence);
  for (;;) {
    if (stopped() || (revoked_ && head.channel == 0)) return ncclInternalError;
    auto found = results_.find(key);
    if (found != results_.end()) {
      *result = std::move(found->second);
      results_.erase(found);
      return ncclSuccess;
    }
    // NCCL itself cannot tell: ranks that disagree hang. Found out here, unless a test wants just that.
    static const bool hang = getenv("SIM_NCCL_DISAGREE") != nullptr;
    if (mismatch_ && !hang) {
      SIM_WARN("ranks disagree about collective %lu of channel %lx", (unsigned long)head.sequence,
               (unsigned long)head.channel);
      return ncclInvalidUsage;
    }
    // A peer that died after it contributed does not spoil this exchange: the hub answers or reports, in order.
    bool lost = false;
    if (members.empty()) {
      lost = any_dead_;
    } else {
      for (uint32_t member : members) lost = lost || dead_[member];
    }
    if (lost) return ncclRemoteError;
    bool got = false;
    status = pump(100, &got);
    if (status != ncclSuccess) return status;
  }
}

ncclResult_t Link::send(int peer, const void* data, size_t bytes, uint64_t lane) {
  Frame head;
  head.kind = kMessage;
  head.channel = lane;
  head.rank = uint32_t(peer);
  return write_all(head, {}, data, bytes);
}

ncclResult_t Link::receive(int peer, Bytes* data, uint64_t lane) {
  for (;;) {
    if (stopped() || revoked_) return ncclInternalError;
    auto& queue = messages_[{lane, uint32_t(peer)}];
    if (!queue.empty()) {
      *data = std::move(queue.front());
      queue.pop_front();
      return ncclSuccess;
    }
    if (dead_[size_t(peer)]) return ncclRemoteError;
    bool got = false;
    ncclResult_t status = pump(100, &got);
    if (status != ncclSuccess) return status;
  }
}

ncclResult_t Link::drain() {
  for (bool got = true; got;) {
    if (fd_ < 0) return ncclSuccess;
    ncclResult_t status = pump(0, &got);
    if (status != ncclSuccess) return closing_ ? ncclResult_t(ncclSuccess) : status;
  }
  return any_dead_ ? ncclRemoteError : ncclSuccess;
}

void Link::shut() {
  if (fd_ >= 0) ::shutdown(fd_, SHUT_RDWR);
}

void Link::close() {
  std::lock_guard<std::mutex> guard(write_lock_);
  if (fd_ < 0) return;
  Frame bye;
  bye.kind = kBye;
  if (write_full(fd_, &bye, sizeof bye)) {
    // The hub may live in this process, which may end right after: it closes when it has taken note. Bounded, for a hub
    // that is stopped.
    uint8_t rest[4096];
    struct pollfd event = {fd_, POLLIN, 0};
    while (::poll(&event, 1, 2000) > 0 && ::recv(fd_, rest, sizeof rest, 0) > 0) {
    }
  }
  ::close(fd_);
  fd_ = -1;
}

}  // namespace simnccl
