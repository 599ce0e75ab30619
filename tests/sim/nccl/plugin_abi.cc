// Adapters: one shape for every version of the plugin tables, as NCCL's own compatibility layers give it.
// Calls into plugins; keeps no state but the context that versions without one are given.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "debug.h"
#include "plugin.h"

namespace simnccl {
namespace {

ncclResult_t no_profiler(void**, int, void*, int64_t, void*) { return ncclSuccess; }

const void* symbol(void* library, const char* stem, int version) {
  return dlsym(library, (std::string(stem) + std::to_string(version)).c_str());
}

template <class T>
const T* as(const void* table) {
  return static_cast<const T*>(table);
}

// Every table begins with its name.
const char* name_of(const void* table) { return *static_cast<const char* const*>(table); }

}  // namespace

bool find_net(void* library, int newest, int oldest, NetApi* api) {
  for (int version = newest; version >= oldest; --version) {
    const void* table = symbol(library, "ncclNetPlugin_v", version);
    if (!table) continue;
    *api = {name_of(table), version, table};
    SIM_INFO("NET/Plugin: Loaded net plugin %s (v%d)", api->name, version);
    return true;
  }
  return false;
}

bool find_collnet(void* library, int newest, int oldest, CollNetApi* api) {
  for (int version = newest; version >= oldest; --version) {
    const void* table = symbol(library, "ncclCollNetPlugin_v", version);
    if (!table) continue;
    api->name = name_of(table);
    api->version = version;
    api->table = table;
    SIM_INFO("NET/Plugin: Loaded collnet plugin %s (v%d)", api->name, version);
    return true;
  }
  return false;
}

bool find_tuner(void* library, int newest, int oldest, TunerApi* api) {
  for (int version = newest; version >= oldest; --version) {
    const void* table = symbol(library, "ncclTunerPlugin_v", version);
    if (!table) continue;
    *api = {name_of(table), version, table};
    SIM_INFO("TUNER/Plugin: Using %s (v%d)", api->name, version);
    return true;
  }
  return false;
}

ncclResult_t NetApi::init(void** context, uint64_t comm_id, int traffic_class) const {
  ncclNetCommConfig_v11_t config = {traffic_class == NCCL_CONFIG_UNDEF_INT ? NCCL_NET_TRAFFIC_CLASS_UNDEF
                                                                           : traffic_class};
  switch (version) {
    case 8:
      return as<ncclNet_v8_t>(table)->init(plugin_log);
    case 9:
      return as<ncclNet_v9_t>(table)->init(plugin_log);
    case 10:
      return as<ncclNet_v10_t>(table)->init(plugin_log, no_profiler);
    case 11:
      return as<ncclNet_v11_t>(table)->init(context, comm_id, &config, plugin_log, no_profiler);
    case 12:
      return as<ncclNet_v12_t>(table)->init(context, comm_id, &config, plugin_log, no_profiler);
    default:
      return ncclInternalError;
  }
}

ncclResult_t NetApi::devices(int* count) const {
  switch (version) {
    case 8:
      return as<ncclNet_v8_t>(table)->devices(count);
    case 9:
      return as<ncclNet_v9_t>(table)->devices(count);
    case 10:
      return as<ncclNet_v10_t>(table)->devices(count);
    case 11:
      return as<ncclNet_v11_t>(table)->devices(count);
    case 12:
      return as<ncclNet_v12_t>(table)->devices(count);
    default:
      return ncclInternalError;
  }
}

ncclResult_t NetApi::properties(int device) const {
  // The oversized buffer shows a plugin that writes a newer structure than the version has.
  union {
    ncclNetProperties_v8_t v8;
    ncclNetProperties_v9_t v9;
    ncclNetProperties_v11_t v11;
    ncclNetProperties_v12_t v12;
  } out;
  std::memset(&out, 0, sizeof out);
  switch (version) {
    case 8:
      return as<ncclNet_v8_t>(table)->getProperties(device, &out.v8);
    case 9:
      return as<ncclNet_v9_t>(table)->getProperties(device, &out.v9);
    case 10:
      return as<ncclNet_v10_t>(table)->getProperties(device, &out.v9);
    case 11:
      return as<ncclNet_v11_t>(table)->getProperties(device, &out.v11);
    case 12:
      return as<ncclNet_v12_t>(table)->getProperties(device, &out.v12);
    default:
      return ncclInternalError;
  }
}

ncclResult_t NetApi::finalize(void* context) const {
  switch (version) {
    case 11:
      return as<ncclNet_v11_t>(table)->finalize(context);
    case 12:
      return as<ncclNet_v12_t>(table)->finalize(context);
    default:
      return ncclSuccess;
  }
}

// Calls a member that has the same signature in every version of the collective table.
#define COLLNET_CALL(member, ...)                                   \
  switch (version) {                                                \
    case 8:                                                         \
      return as<ncclCollNet_v8_t>(table)->member(__VA_ARGS__);      \
    case 9:                                                         \
    case 10:                                                        \
      return as<ncclCollNet_v9_t>(table)->member(__VA_ARGS__);      \
    case 11:                                                        \
      return as<ncclCollNet_v11_t>(table)->member(__VA_ARGS__);     \
    case 12:                                                        \
      return as<ncclCollNet_v12_t>(table)->member(__VA_ARGS__);     \
    default:                                                        \
      return ncclInternalError;                                     \
  }

ncclResult_t CollNetApi::init(void** context, uint64_t comm_id) const {
  switch (version) {
    case 8:
      return as<ncclCollNet_v8_t>(table)->init(plugin_log);
    case 9:
    case 10:
      return as<ncclCollNet_v9_t>(table)->init(plugin_log);
    case 11:
      return as<ncclCollNet_v11_t>(table)->init(context, comm_id, plugin_log);
    case 12:
      return as<ncclCollNet_v12_t>(table)->init(context, comm_id, plugin_log);
    default:
      return ncclInternalError;
  }
}

ncclResult_t CollNetApi::devices(int* count) const { COLLNET_CALL(devices, count) }

ncclResult_t CollNetApi::properties(int device, size_t* max_bytes, int* pointer_support) const {
  ncclResult_t status = ncclInternalError;
  *max_bytes = 0;
  if (version == 8) {
    ncclNetProperties_v8_t out = {};
    status = as<ncclCollNet_v8_t>(table)->getProperties(device, &out);
    *pointer_support = out.ptrSupport;
  } else if (version == 9 || version == 10) {
    ncclNetProperties_v9_t out = {};
    status = as<ncclCollNet_v9_t>(table)->getProperties(device, &out);
    *max_bytes = out.maxCollBytes;
    *pointer_support = out.ptrSupport;
  } else if (version == 11) {
    ncclNetProperties_v11_t out = {};
    status = as<ncclCollNet_v11_t>(table)->getProperties(device, &out);
    *max_bytes = out.maxCollBytes;
    *pointer_support = out.ptrSupport;
  } else if (version == 12) {
    ncclNetProperties_v12_t out = {};
    status = as<ncclCollNet_v12_t>(table)->getProperties(device, &out);
    *max_bytes = out.maxCollBytes;
    *pointer_support = out.ptrSupport;
  }
  return status;
}

ncclResult_t CollNetApi::listen(void* context, int device, void* handle, void** listener) const {
  switch (version) {
    case 8:
      return as<ncclCollNet_v8_t>(table)->listen(device, handle, listener);
    case 9:
    case 10:
      return as<ncclCollNet_v9_t>(table)->listen(device, handle, listener);
    case 11:
      return as<ncclCollNet_v11_t>(table)->listen(context, device, handle, listener);
    case 12:
      return as<ncclCollNet_v12_t>(table)->listen(context, device, handle, listener);
    default:
      return ncclInternalError;
  }
}

ncclResult_t CollNetApi::connect(void* handles[], int ranks, int rank, void* listener, void** coll) const {
  COLLNET_CALL(connect, handles, ranks, rank, listener, coll)
}
ncclResult_t CollNetApi::reduce_support(int type, int op, int* supported) const {
  COLLNET_CALL(reduceSupport, type, op, supported)
}
ncclResult_t CollNetApi::reg(void* coll, void* address, size_t size, int type, void** mr) const {
  COLLNET_CALL(regMr, coll, address, size, type, mr)
}
ncclResult_t CollNetApi::dereg(void* coll, void* mr) const { COLLNET_CALL(deregMr, coll, mr) }
ncclResult_t CollNetApi::iflush(void* coll, void* address, int size, void* mr, void** request) const {
  COLLNET_CALL(iflush, coll, address, size, mr, request)
}
ncclResult_t CollNetApi::test(void* request, int* done, int* size) const { COLLNET_CALL(test, request, done, size) }
ncclResult_t CollNetApi::close_coll(void* coll) const { COLLNET_CALL(closeColl, coll) }
ncclResult_t CollNetApi::close_listen(void* listener) const { COLLNET_CALL(closeListen, listener) }

ncclResult_t CollNetApi::iallreduce(void* coll, void* in, void* out, size_t count, int type, int op, void* in_mr,
                                    void* out_mr, void** request) const {
  if (version == 8) {
    return as<ncclCollNet_v8_t>(table)->iallreduce(coll, in, out, int(count), type, op, in_mr, out_mr, request);
  }
  COLLNET_CALL(iallreduce, coll, in, out, count, type, op, in_mr, out_mr, request)
}

ncclResult_t CollNetApi::finalize(void* context) const {
  switch (version) {
    case 11:
      return as<ncclCollNet_v11_t>(table)->finalize(context);
    case 12:
      return as<ncclCollNet_v12_t>(table)->finalize(context);
    default:
      return ncclSuccess;
  }
}

ncclResult_t TunerApi::init(void** context, const Comm& comm) const {
  size_t ranks = size_t(comm.ranks);
  ncclNvlDomainInfo_v5_t domains = {int(comm.nodes), comm.ranks / int(comm.nodes), comm.ranks / int(comm.nodes)};
  // The constants of NCCL's model are of no use here; the plugin may read and write them all the same.
  static thread_local ncclTunerConstants_v5_t constants;
  switch (version) {
    case 3:
      return as<ncclTuner_v3_t>(table)->init(ranks, comm.nodes, plugin_log, context);
    case 4:
      return as<ncclTuner_v4_t>(table)->init(ranks, comm.nodes, plugin_log, context);
    case 5:
      return as<ncclTuner_v5_t>(table)->init(context, comm.hash, ranks, comm.nodes, plugin_log, &domains, &constants);
    case 6:
      return as<ncclTuner_v6_t>(table)->init(context, comm.hash, ranks, comm.nodes, plugin_log, &domains, &constants);
    default:
      return ncclInternalError;
  }
}

ncclResult_t TunerApi::coll_info(void* context, int collective, size_t bytes, float* costs, int algorithms,
                                 int protocols, int* channels) const {
  // The table is contiguous; the pointer's type in the ABI says otherwise.
  auto** cost_table = reinterpret_cast<float**>(costs);
  switch (version) {
    case 3:
      return as<ncclTuner_v3_t>(table)->getCollInfo(context, collective, bytes, 1, cost_table, algorithms, protocols,
                                                    channels);
    case 4:
      return as<ncclTuner_v4_t>(table)->getCollInfo(context, collective, bytes, 1, cost_table, algorithms, protocols,
                                                    0, channels);
    case 5:
      return as<ncclTuner_v5_t>(table)->getCollInfo(context, collective, bytes, 1, cost_table, algorithms, protocols,
                                                    0, channels);
    case 6:
      return as<ncclTuner_v6_t>(table)->getCollInfo(context, collective, bytes, 1, cost_table, algorithms, protocols,
                                                    0, channels);
    default:
      return ncclInternalError;
  }
}

ncclResult_t TunerApi::finish(void* context) const {
  switch (version) {
    case 3:
      return as<ncclTuner_v3_t>(table)->destroy(context);
    case 4:
      return as<ncclTuner_v4_t>(table)->destroy(context);
    case 5:
      return as<ncclTuner_v5_t>(table)->finalize(context);
    case 6:
      return as<ncclTuner_v6_t>(table)->finalize(context);
    default:
      return ncclSuccess;
  }
}

}  // namespace simnccl
