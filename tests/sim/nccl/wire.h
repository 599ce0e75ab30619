// Frames between a rank and the hub of its communicator, and the two ends of that connection.
//
// The hub runs in the process that made the unique id. Every rank keeps one TCP connection to it. One primitive carries
// everything: a rank PUTs a blob under (channel, sequence); when all members have put theirs, each of them gets one
// RESULT, either all blobs or their reduction in rank order. Point-to-point data is forwarded in order for each pair.
#pragma once

#include <netinet/in.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "nccl_api.h"

namespace simnccl {

using Bytes = std::vector<uint8_t>;

enum Kind : uint16_t { kHello = 1, kPut, kResult, kMessage, kDead, kMismatch, kBye, kClosing };
enum Mode : uint16_t { kGather = 0, kReduce = 1 };

struct Frame {
  uint32_t magic = kMagic;
  uint16_t kind = 0;
  uint16_t mode = 0;
  uint32_t rank = 0;     // HELLO: own rank, MESSAGE: destination, then source, DEAD: who
  uint32_t members = 0;  // HELLO: ranks, PUT: ranks listed at the head of the payload, 0 for all
  int32_t type = 0;
  int32_t op = 0;
  uint64_t channel = 0;
  uint64_t sequence = 0;
  uint64_t length = 0;  // payload bytes behind the frame
  uint64_t token = 0;
  uint64_t process = 0;  // HELLO
  double scale = 1.0;
  int64_t iscale = 1;
  static constexpr uint32_t kMagic = 0x53494d4e;
};

// What a unique id holds. IPv4 is enough for loopback and for network namespaces.
struct Address {
  uint64_t magic;
  uint64_t token;
  uint32_t ip;  // network order
  uint16_t port;
  uint16_t reserved;
};

// Starts a hub in this process and tells where it listens.
ncclResult_t start_hub(Address* address);
// Blocks, for a bounded time, until everything that hubs of this process owe to live ranks is with the kernel.
void flush_hubs();

struct Result {
  std::vector<Bytes> blobs;  // one for each member, or the reduction alone
};

class Link {
 public:
  ~Link();
  // `stop` ends every wait of this link when it becomes true.
  ncclResult_t connect(const Address& address, int rank, int ranks, const std::atomic<bool>* stop);
  // One collective exchange. The caller serialises these.
  ncclResult_t exchange(Frame head, const std::vector<uint32_t>& members, const void* data, size_t bytes,
                        Result* result);
  // Messages of a pair keep their order within a lane: 0 for sends, 1 for signals.
  ncclResult_t send(int peer, const void* data, size_t bytes, uint64_t lane = 0);
  ncclResult_t receive(int peer, Bytes* data, uint64_t lane = 0);
  // Takes in what has already arrived, without waiting. The caller holds the same lock as for exchange().
  ncclResult_t drain();
  // Ends the waits of stream operations; control exchanges of a shrink still work.
  void revoke() { revoked_ = true; }
  // Wakes every wait; the link is dead afterwards. May be called from any thread.
  void shut();
  // Says goodbye and closes.
  void close();

 private:
  ncclResult_t write_all(const Frame& head, const std::vector<uint32_t>& members, const void* data, size_t bytes);
  // Reads one frame. `wait_ms` 0 asks only for what is there.
  ncclResult_t pump(int wait_ms, bool* got);
  bool stopped() const { return stop_ && stop_->load(); }

  int fd_ = -1;
  int ranks_ = 0;
  const std::atomic<bool>* stop_ = nullptr;
  std::atomic<bool> revoked_{false};
  std::mutex write_lock_;
  std::map<std::pair<uint64_t, uint64_t>, Result> results_;
  std::map<std::pair<uint64_t, uint32_t>, std::deque<Bytes>> messages_;  // by lane and peer
  std::vector<bool> dead_;
  bool any_dead_ = false;
  bool closing_ = false;  // the hub's process has left in good order and may end
  bool mismatch_ = false;
};

// Blocking transfers that survive signals and short counts.
bool write_full(int fd, const void* data, size_t bytes);
bool read_full(int fd, void* data, size_t bytes);

}  // namespace simnccl
