// See tables.h.
#include "tables.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>

namespace driver {
namespace {

const void* find(const std::string& library, const std::string& name) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  const void* table = dlsym(handle, name.c_str());
  if (!table) throw std::runtime_error(library + " has no " + name);
  return table;
}

void log(ncclDebugLogLevel, unsigned long, const char*, int, const char*, ...) {}
ncclResult_t profile(void**, int, void*, int64_t, void*) { return ncclSuccess; }

// The oversized zone behind the structure shows a plugin that writes a newer one.
template <class P>
struct Guarded {
  P value;
  uint8_t zone[64];
};

template <class P, class Call>
int ask(Call call, Properties* out) {
  Guarded<P> told;
  __builtin_memset(&told, 0x5a, sizeof told);
  int code = call(&told.value);
  for (uint8_t byte : told.zone) {
    if (byte != 0x5a) throw std::runtime_error("properties of a newer version were written");
  }
  if (code != ncclSuccess) return code;
  const P& p = told.value;
  out->name = p.name;
  out->pci_path = p.pciPath;
  out->guid = p.guid;
  out->pointers = p.ptrSupport;
  out->speed = p.speed;
  out->max_receives = p.maxRecvs;
  out->max_comms = p.maxComms;
  out->register_global = p.regIsGlobal;
  out->device_type = p.netDeviceType;
  if constexpr (!std::is_same_v<P, ncclNetProperties_v8_t>) {
    out->max_p2p = p.maxP2pBytes;
    out->max_coll = p.maxCollBytes;
    out->virtual_devices = p.vProps.ndevs;
  }
  return code;
}

}  // namespace

#define NET(v) static_cast<const ncclNet_v##v##_t*>(table_)
#define COLL(v) static_cast<const ncclCollNet_v##v##_t*>(table_)

// The same call in every version.
#define EACH(family, ...)              \
  switch (version_) {                  \
    case 8: return family(8)->__VA_ARGS__;   \
    case 9: return family(9)->__VA_ARGS__;   \
    case 10: return family(10)->__VA_ARGS__; \
    case 11: return family(11)->__VA_ARGS__; \
    default: return family(12)->__VA_ARGS__; \
  }

Net::Net(const std::string& library, int version)
    : table_(find(library, "ncclNetPlugin_v" + std::to_string(version))), version_(version) {}

int Net::init() {
  ncclNetCommConfig_v11_t config = {NCCL_NET_TRAFFIC_CLASS_UNDEF};
  switch (version_) {
    case 8: return NET(8)->init(log);
    case 9: return NET(9)->init(log);
    case 10: return NET(10)->init(log, profile);
    case 11: return NET(11)->init(&context_, 1, &config, log, profile);
    default: return NET(12)->init(&context_, 1, &config, log, profile);
  }
}
int Net::devices(int* count) const { EACH(NET, devices(count)) }

int Net::properties(int device, Properties* out) const {
  switch (version_) {
    case 8: return ask<ncclNetProperties_v8_t>([&](auto* p) { return NET(8)->getProperties(device, p); }, out);
    case 9: return ask<ncclNetProperties_v9_t>([&](auto* p) { return NET(9)->getProperties(device, p); }, out);
    case 10: return ask<ncclNetProperties_v10_t>([&](auto* p) { return NET(10)->getProperties(device, p); }, out);
    case 11: return ask<ncclNetProperties_v11_t>([&](auto* p) { return NET(11)->getProperties(device, p); }, out);
    default: return ask<ncclNetProperties_v12_t>([&](auto* p) { return NET(12)->getProperties(device, p); }, out);
  }
}

int Net::listen(int device, void* handle, void** listener) const {
  switch (version_) {
    case 8: return NET(8)->listen(device, handle, listener);
    case 9: return NET(9)->listen(device, handle, listener);
    case 10: return NET(10)->listen(device, handle, listener);
    case 11: return NET(11)->listen(context_, device, handle, listener);
    default: return NET(12)->listen(context_, device, handle, listener);
  }
}

int Net::connect(int device, void* handle, void** send) const {
  ncclNetCommConfig_v10_t config = {NCCL_NET_TRAFFIC_CLASS_UNDEF};
  ncclNetDeviceHandle_v8_t* none = nullptr;
  switch (version_) {
    case 8: return NET(8)->connect(device, handle, send, &none);
    case 9: return NET(9)->connect(device, handle, send, &none);
    case 10: return NET(10)->connect(device, &config, handle, send, &none);
    case 11: return NET(11)->connect(context_, device, handle, send, &none);
    default: return NET(12)->connect(context_, device, handle, send, nullptr);
  }
}

int Net::accept(void* listener, void** recv) const {
  ncclNetDeviceHandle_v8_t* none = nullptr;
  EACH(NET, accept(listener, recv, &none))
}
int Net::reg(void* comm, void* address, size_t size, int type, void** mr) const {
  EACH(NET, regMr(comm, address, size, type, mr))
}
int Net::dereg(void* comm, void* mr) const { EACH(NET, deregMr(comm, mr)) }

int Net::isend(void* send, void* address, size_t size, int tag, void* mr, void** request) const {
  switch (version_) {
    case 8: return NET(8)->isend(send, address, int(size), tag, mr, request);
    case 9: return NET(9)->isend(send, address, size, tag, mr, request);
    case 10: return NET(10)->isend(send, address, size, tag, mr, nullptr, request);
    case 11: return NET(11)->isend(send, address, size, tag, mr, nullptr, request);
    default: return NET(12)->isend(send, address, size, tag, mr, nullptr, request);
  }
}

int Net::irecv(void* recv, std::vector<void*> addresses, std::vector<size_t> sizes, std::vector<int> tags,
               std::vector<void*> mrs, void** request) const {
  int n = int(addresses.size());
  std::vector<int> small(sizes.begin(), sizes.end());
  std::vector<void*> profiles(addresses.size());
  // NCCL may say that it does not need to be told of the end; who does not know the word overwrites it.
  *request = reinterpret_cast<void*>(1);
  switch (version_) {
    case 8: return NET(8)->irecv(recv, n, addresses.data(), small.data(), tags.data(), mrs.data(), request);
    case 9: return NET(9)->irecv(recv, n, addresses.data(), sizes.data(), tags.data(), mrs.data(), request);
    case 10:
      return NET(10)->irecv(recv, n, addresses.data(), sizes.data(), tags.data(), mrs.data(), profiles.data(), request);
    case 11:
      return NET(11)->irecv(recv, n, addresses.data(), sizes.data(), tags.data(), mrs.data(), profiles.data(), request);
    default:
      return NET(12)->irecv(recv, n, addresses.data(), sizes.data(), tags.data(), mrs.data(), profiles.data(), request);
  }
}

int Net::iflush(void* recv, void* address, int size, void* mr, void** request) const {
  EACH(NET, iflush(recv, 1, &address, &size, &mr, request))
}
int Net::test(void* request, int* done, int* sizes) const { EACH(NET, test(request, done, sizes)) }
int Net::close_send(void* send) const { EACH(NET, closeSend(send)) }
int Net::close_recv(void* recv) const { EACH(NET, closeRecv(recv)) }
int Net::close_listen(void* listener) const { EACH(NET, closeListen(listener)) }
int Net::finalize() const {
  if (version_ == 11) return NET(11)->finalize(context_);
  if (version_ == 12) return NET(12)->finalize(context_);
  return ncclSuccess;
}

CollNet::CollNet(const std::string& library, int version)
    : table_(find(library, "ncclCollNetPlugin_v" + std::to_string(version))), version_(version) {}

int CollNet::init() {
  switch (version_) {
    case 8: return COLL(8)->init(log);
    case 9: return COLL(9)->init(log);
    case 10: return COLL(10)->init(log);
    case 11: return COLL(11)->init(&context_, 1, log);
    default: return COLL(12)->init(&context_, 1, log);
  }
}
int CollNet::devices(int* count) const { EACH(COLL, devices(count)) }

int CollNet::properties(int device, Properties* out) const {
  switch (version_) {
    case 8: return ask<ncclNetProperties_v8_t>([&](auto* p) { return COLL(8)->getProperties(device, p); }, out);
    case 9: return ask<ncclNetProperties_v9_t>([&](auto* p) { return COLL(9)->getProperties(device, p); }, out);
    case 10: return ask<ncclNetProperties_v10_t>([&](auto* p) { return COLL(10)->getProperties(device, p); }, out);
    case 11: return ask<ncclNetProperties_v11_t>([&](auto* p) { return COLL(11)->getProperties(device, p); }, out);
    default: return ask<ncclNetProperties_v12_t>([&](auto* p) { return COLL(12)->getProperties(device, p); }, out);
  }
}

int CollNet::listen(int device, void* handle, void** listener) const {
  switch (version_) {
    case 8: return COLL(8)->listen(device, handle, listener);
    case 9: return COLL(9)->listen(device, handle, listener);
    case 10: return COLL(10)->listen(device, handle, listener);
    case 11: return COLL(11)->listen(context_, device, handle, listener);
    default: return COLL(12)->listen(context_, device, handle, listener);
  }
}
int CollNet::connect(std::vector<void*> handles, int rank, void* listener, void** coll) const {
  EACH(COLL, connect(handles.data(), int(handles.size()), rank, listener, coll))
}
int CollNet::reduce_support(int type, int op, int* supported) const { EACH(COLL, reduceSupport(type, op, supported)) }
int CollNet::reg(void* coll, void* address, size_t size, int type, void** mr) const {
  EACH(COLL, regMr(coll, address, size, type, mr))
}
int CollNet::dereg(void* coll, void* mr) const { EACH(COLL, deregMr(coll, mr)) }

int CollNet::iallreduce(void* coll, void* in, void* out, size_t count, int type, int op, void** request) const {
  if (version_ == 8) return COLL(8)->iallreduce(coll, in, out, int(count), type, op, mr_, mr_, request);
  switch (version_) {
    case 9: return COLL(9)->iallreduce(coll, in, out, count, type, op, mr_, mr_, request);
    case 10: return COLL(10)->iallreduce(coll, in, out, count, type, op, mr_, mr_, request);
    case 11: return COLL(11)->iallreduce(coll, in, out, count, type, op, mr_, mr_, request);
    default: return COLL(12)->iallreduce(coll, in, out, count, type, op, mr_, mr_, request);
  }
}

int CollNet::iallgather(void* coll, void* in, Piece out, size_t per_rank, size_t offset, size_t bytes,
                        void** request) const {
  ncclNetSGE_v8_t old = {mr_, out.address, uint32_t(out.size)};
  ncclNetSGE_v9_t part = {mr_, out.address, out.size};
  switch (version_) {
    case 8: return COLL(8)->iallgather(coll, in, 1, &old, per_rank, offset, bytes, mr_, request);
    case 9: return COLL(9)->iallgather(coll, in, 1, &part, per_rank, offset, bytes, mr_, request);
    case 10: return COLL(10)->iallgather(coll, in, 1, &part, per_rank, offset, bytes, mr_, request);
    case 11: return COLL(11)->iallgather(coll, in, 1, &part, per_rank, offset, bytes, mr_, request);
    default: return COLL(12)->iallgather(coll, in, 1, &part, per_rank, offset, bytes, mr_, request);
  }
}

int CollNet::ireducescatter(void* coll, Piece in, void* out, size_t per_rank, size_t offset, size_t bytes, int type,
                            int op, void** request) const {
  ncclNetSGE_v8_t old = {mr_, in.address, uint32_t(in.size)};
  ncclNetSGE_v9_t part = {mr_, in.address, in.size};
  switch (version_) {
    case 8: return COLL(8)->ireducescatter(coll, 1, &old, out, per_rank, offset, bytes, type, op, mr_, request);
    case 9: return COLL(9)->ireducescatter(coll, 1, &part, out, per_rank, offset, bytes, type, op, mr_, request);
    case 10: return COLL(10)->ireducescatter(coll, 1, &part, out, per_rank, offset, bytes, type, op, mr_, request);
    case 11: return COLL(11)->ireducescatter(coll, 1, &part, out, per_rank, offset, bytes, type, op, mr_, request);
    default: return COLL(12)->ireducescatter(coll, 1, &part, out, per_rank, offset, bytes, type, op, mr_, request);
  }
}
int CollNet::test(void* request, int* done, int* size) const { EACH(COLL, test(request, done, size)) }
int CollNet::close_coll(void* coll) const { EACH(COLL, closeColl(coll)) }
int CollNet::close_listen(void* listener) const { EACH(COLL, closeListen(listener)) }
int CollNet::finalize() const {
  if (version_ == 11) return COLL(11)->finalize(context_);
  if (version_ == 12) return COLL(12)->finalize(context_);
  return ncclSuccess;
}

}  // namespace driver
