// The tables of a plugin, called through one shape for every version, as NCCL's compatibility layers do. Touches nothing
// but the tables.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "nccl_net_abi.h"

namespace driver {

struct Properties {
  std::string name;
  const char* pci_path = nullptr;
  uint64_t guid = 0;
  int pointers = 0;
  int speed = 0;
  int max_receives = 0;
  int max_comms = 0;
  int register_global = 0;
  int device_type = 0;
  size_t max_p2p = 0;  // 0: the version does not say
  size_t max_coll = 0;
  int virtual_devices = 0;
};

// The point-to-point table. Every call returns NCCL's code.
class Net {
 public:
  // Throws when the library has no table of this version.
  Net(const std::string& library, int version);
  int init();
  int devices(int* count) const;
  int properties(int device, Properties* out) const;
  int listen(int device, void* handle, void** listener) const;
  int connect(int device, void* handle, void** send) const;
  int accept(void* listener, void** recv) const;
  int reg(void* comm, void* address, size_t size, int type, void** mr) const;
  int dereg(void* comm, void* mr) const;
  int isend(void* send, void* address, size_t size, int tag, void* mr, void** request) const;
  int irecv(void* recv, std::vector<void*> addresses, std::vector<size_t> sizes, std::vector<int> tags,
            std::vector<void*> mrs, void** request) const;
  int iflush(void* recv, void* address, int size, void* mr, void** request) const;
  int test(void* request, int* done, int* sizes) const;
  int close_send(void* send) const;
  int close_recv(void* recv) const;
  int close_listen(void* listener) const;
  int finalize() const;

 private:
  const void* table_ = nullptr;
  int version_ = 0;
  void* context_ = nullptr;
};

struct Piece {
  void* address;
  size_t size;
};

// The collective table.
class CollNet {
 public:
  CollNet(const std::string& library, int version);
  int init();
  int devices(int* count) const;
  int properties(int device, Properties* out) const;
  int listen(int device, void* handle, void** listener) const;
  int connect(std::vector<void*> handles, int rank, void* listener, void** coll) const;
  int reduce_support(int type, int op, int* supported) const;
  int reg(void* coll, void* address, size_t size, int type, void** mr) const;
  int dereg(void* coll, void* mr) const;
  int iallreduce(void* coll, void* in, void* out, size_t count, int type, int op, void** request) const;
  int iallgather(void* coll, void* in, Piece out, size_t per_rank, size_t offset, size_t bytes, void** request) const;
  int ireducescatter(void* coll, Piece in, void* out, size_t per_rank, size_t offset, size_t bytes, int type, int op,
                     void** request) const;
  int test(void* request, int* done, int* size) const;
  int close_coll(void* coll) const;
  int close_listen(void* listener) const;
  int finalize() const;

 private:
  const void* table_ = nullptr;
  int version_ = 0;
  void* context_ = nullptr;
  void* mr_ = nullptr;
};

}  // namespace driver
