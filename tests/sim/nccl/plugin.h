// Loading of network and tuner plugins in the manner of the NCCL release that SIM_NCCL_VERSION names.
#pragma once

#include "comm.h"
#include "nccl_net_abi.h"
#include "nccl_tuner_abi.h"

namespace simnccl {

// One shape for all versions of the collective table; the adapters are in plugin_abi.cc.
struct CollNetApi {
  const char* name = nullptr;
  int version = 0;
  const void* table = nullptr;
  ncclResult_t init(void** context, uint64_t comm_id) const;
  ncclResult_t devices(int* count) const;
  // The largest slice for iallreduce, 0 when the version does not say.
  ncclResult_t properties(int device, size_t* max_bytes, int* pointer_support) const;
  ncclResult_t listen(void* context, int device, void* handle, void** listener) const;
  ncclResult_t connect(void* handles[], int ranks, int rank, void* listener, void** coll) const;
  ncclResult_t reduce_support(int type, int op, int* supported) const;
  ncclResult_t reg(void* coll, void* address, size_t size, int type, void** mr) const;
  ncclResult_t dereg(void* coll, void* mr) const;
  ncclResult_t iallreduce(void* coll, void* in, void* out, size_t count, int type, int op, void* in_mr, void* out_mr,
                          void** request) const;
  ncclResult_t iflush(void* coll, void* address, int size, void* mr, void** request) const;
  ncclResult_t test(void* request, int* done, int* size) const;
  ncclResult_t close_coll(void* coll) const;
  ncclResult_t close_listen(void* listener) const;
  ncclResult_t finalize(void* context) const;
};

struct NetApi {
  const char* name = nullptr;
  int version = 0;
  const void* table = nullptr;
  ncclResult_t init(void** context, uint64_t comm_id, int traffic_class) const;
  ncclResult_t devices(int* count) const;
  ncclResult_t properties(int device) const;
  ncclResult_t finalize(void* context) const;
};

struct TunerApi {
  const char* name = nullptr;
  int version = 0;
  const void* table = nullptr;
  ncclResult_t init(void** context, const Comm& comm) const;
  ncclResult_t coll_info(void* context, int collective, size_t bytes, float* costs, int algorithms, int protocols,
                         int* channels) const;
  ncclResult_t finish(void* context) const;
};

// False when the library has no table of that version. `newest` is the newest version the release knows.
bool find_net(void* library, int newest, int oldest, NetApi* api);
bool find_collnet(void* library, int newest, int oldest, CollNetApi* api);
bool find_tuner(void* library, int newest, int oldest, TunerApi* api);

// What one communicator holds of the plugins.
struct PluginUse {
  int slot = -1;  // index of the external plugin, -1 for the internal socket network
  bool loader = false;  // opened the library, which releases before 2.26 remember
  void* net_context = nullptr;
  bool collnet = false;
  CollNetApi collnet_api;
  void* collnet_context = nullptr;
  bool tuner = false;
  void* tuner_context = nullptr;
};

ncclResult_t plugin_attach(Comm& comm);
ncclResult_t tuner_attach(Comm& comm);
// Asks the tuner, as NCCL does for each collective; true when CollNet comes out cheapest. `base` is without a tuner.
bool tuner_prefers_collnet(Comm& comm, int collective, size_t bytes, bool base);
void plugin_detach(Comm& comm);

}  // namespace simnccl
