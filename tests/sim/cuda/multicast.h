// Multicast objects: the state that the processes of one object share, and the
// addresses mapped from them here.
#pragma once

#include "memory.h"

#include <pthread.h>

namespace twoshot::sim {

constexpr int kMulticastDevices = 256, kMulticastBindings = 4096;

struct MulticastBinding {
    uint64_t serial;                 // 0: free; otherwise unique in the object
    GpuId gpu;
    uint64_t offset, size;           // in the object
    uint64_t memory_id, memory_offset;
};

// The file's data area. Guarded by its own mutex, which survives its holder.
struct MulticastShared {
    pthread_mutex_t mutex;
    uint32_t expected, added;
    std::atomic<uint64_t> serial;    // moves with every bind and unbind
    GpuId devices[kMulticastDevices];
    MulticastBinding bindings[kMulticastBindings];
};

MulticastShared* multicast_open(int fd);
void multicast_close(Allocation* allocation);          // unmaps the state; bindings of this process are undone

// An address range of a multicast object, so that stores find it and ordinary
// accesses are reported.
void multicast_watch(uint64_t address, uint64_t bytes, MulticastShared* object);
void multicast_allow(uint64_t address, bool write);
void multicast_unwatch(uint64_t address);

struct MulticastLock {
    explicit MulticastLock(MulticastShared* shared);
    ~MulticastLock();
    MulticastShared* shared;
};

}  // namespace twoshot::sim
