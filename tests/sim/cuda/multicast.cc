// Multicast objects: creation, devices, bindings. Many processes take part in
// one object; what they share lies in its file.
#include "context.h"
#include "multicast.h"

#include "session.h"
#include "shared.h"
#include "stats.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace twoshot::sim {
namespace {

struct LocalBinding {
    Allocation *object, *memory;
    uint64_t serial;
};

// Bindings made by this process. Guarded by memory_mutex.
std::vector<LocalBinding>& local_bindings() {
    static auto* all = new std::vector<LocalBinding>;
    return *all;
}

size_t state_bytes() { return (sizeof(MulticastShared) + kPage - 1) / kPage * kPage; }

// Takes the binding out of the object and lets go of its memory.
void undo(const LocalBinding& binding) {
    {
        MulticastLock lock(binding.object->multicast);
        for (MulticastBinding& b : binding.object->multicast->bindings)
            if (b.serial == binding.serial) b = {};
        binding.object->multicast->serial++;
    }
    binding.memory->mappings--;
    drop_if_unused(binding.memory);
    stats::live(stats::kMulticastBindings, -1);
}

bool added(MulticastShared* object, GpuId gpu) {
    return std::find(object->devices, object->devices + object->added, gpu) != object->devices + object->added;
}

CUresult check_prop(const CUmulticastObjectProp* prop) {
    if (!prop || prop->numDevices == 0 || prop->flags || !prop->size) return CUDA_ERROR_INVALID_VALUE;
    if (prop->numDevices > kMulticastDevices) die("multicast objects of more than %d devices", kMulticastDevices);
    for (size_t i = 0; i < visible_gpus().size(); i++)
        if (!topology().gpu(visible_gpu(int(i))).multicast) return CUDA_ERROR_NOT_SUPPORTED;
    return CUDA_SUCCESS;
}

// Waits, as the driver does, until every device of the object was added.
CUresult wait_for_devices(MulticastShared* object) {
    long waited_ms = 0, limit = topology().mc_bind_timeout_ms;
    for (;;) {
        {
            MulticastLock lock(object);
            if (object->added == object->expected) return CUDA_SUCCESS;
        }
        if (limit && waited_ms++ >= limit) return CUDA_ERROR_TIMEOUT;
        usleep(1000);
    }
}

}  // namespace

MulticastLock::MulticastLock(MulticastShared* s) : shared(s) {
    if (pthread_mutex_lock(&shared->mutex) == EOWNERDEAD) pthread_mutex_consistent(&shared->mutex);
}
MulticastLock::~MulticastLock() { pthread_mutex_unlock(&shared->mutex); }

MulticastShared* multicast_open(int fd) {
    void* at = mmap(nullptr, state_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("cannot map a multicast object");
    return static_cast<MulticastShared*>(at);
}

void multicast_close(Allocation* allocation) {
    auto& all = local_bindings();
    for (size_t i = 0; i < all.size();) {
        if (all[i].object != allocation) {
            i++;
            continue;
        }
        LocalBinding gone = all[i];
        all.erase(all.begin() + long(i));
        undo(gone);
    }
    munmap(allocation->multicast, state_bytes());
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuMulticastGetGranularity(size_t* bytes, const CUmulticastObjectProp* prop,
                                   CUmulticastGranularity_flags option) {
    SIM_ENTRY(0);
    if (!bytes || option < 0 || option > CU_MULTICAST_GRANULARITY_RECOMMENDED) return CUDA_ERROR_INVALID_VALUE;
    if (!prop || prop->numDevices == 0 || prop->flags) return CUDA_ERROR_INVALID_VALUE;
    const Gpu& gpu = topology().gpu(visible_gpu(0));
    if (!gpu.multicast) return CUDA_ERROR_NOT_SUPPORTED;
    *bytes = option == CU_MULTICAST_GRANULARITY_MINIMUM ? gpu.mc_granularity : gpu.mc_recommended;
    return CUDA_SUCCESS;
}

CUresult cuMulticastCreate(CUmemGenericAllocationHandle* handle, const CUmulticastObjectProp* prop) {
    SIM_ENTRY(kUnsafe);
    if (!handle) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = check_prop(prop)) return r;
    GpuId here = visible_gpu(0);
    if (prop->size % topology().gpu(here).mc_granularity) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = check_handle_types(prop->handleTypes, here)) return r;
    int state = topology().hosts[here.host].fabric_state;
    if (state == 1 || state == 2) return CUDA_ERROR_SYSTEM_NOT_READY;   // the fabric manager is not done yet
    uint64_t id = shared_next_id();
    if (!multicast_claim(id)) return CUDA_ERROR_OUT_OF_MEMORY;
    int fd = make_file(Kind::multicast, id, state_bytes(), prop->size, here, uint32_t(prop->handleTypes));
    if (fd < 0) {
        multicast_leave(id);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    MulticastShared* object = multicast_open(fd);
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&object->mutex, &attr);
    pthread_mutexattr_destroy(&attr);
    object->expected = prop->numDevices;
    munmap(object, state_bytes());
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = adopt_file(fd, true, false);
    if (!a) die("a fresh multicast object was not recognised");
    *handle = a->handle;
    return CUDA_SUCCESS;
}

CUresult cuMulticastAddDevice(CUmemGenericAllocationHandle handle, CUdevice device) {
    SIM_ENTRY(kUnsafe);
    if (device < 0 || size_t(device) >= visible_gpus().size()) return CUDA_ERROR_INVALID_DEVICE;
    GpuId gpu = visible_gpu(device);
    if (!topology().gpu(gpu).multicast) return CUDA_ERROR_NOT_SUPPORTED;
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = find_allocation(handle);
    if (!a || a->kind != Kind::multicast) return CUDA_ERROR_INVALID_VALUE;
    MulticastLock state(a->multicast);
    MulticastShared* object = a->multicast;
    if (object->added == object->expected || added(object, gpu)) return CUDA_ERROR_INVALID_VALUE;
    for (uint32_t i = 0; i < object->added; i++)
        if (topology().link(gpu, object->devices[i]) != Link::nvlink) return CUDA_ERROR_NOT_SUPPORTED;
    object->devices[object->added++] = gpu;
    return CUDA_SUCCESS;
}

CUresult cuMulticastBindMem(CUmemGenericAllocationHandle handle, size_t offset, CUmemGenericAllocationHandle memory,
                            size_t memory_offset, size_t bytes, unsigned long long flags) {
    SIM_ENTRY(kUnsafe);
    MulticastShared* object;
    {
        std::lock_guard<std::mutex> lock(memory_mutex());
        Allocation *a = find_allocation(handle), *m = find_allocation(memory);
        if (flags || !a || !m || a->kind != Kind::multicast || m->kind != Kind::memory) return CUDA_ERROR_INVALID_VALUE;
        object = a->multicast;
    }
    if (CUresult r = wait_for_devices(object)) return r;
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation *a = find_allocation(handle), *m = find_allocation(memory);
    if (!a || !m) return CUDA_ERROR_INVALID_VALUE;
    GpuId gpu = m->trailer->where;
    uint64_t unit = topology().gpu(gpu).mc_granularity;
    if (!bytes || offset % unit || memory_offset % unit || bytes % unit) return CUDA_ERROR_INVALID_VALUE;
    if (offset + bytes > a->trailer->size || memory_offset + bytes > m->trailer->size) return CUDA_ERROR_INVALID_VALUE;
    if (ordinal_of(gpu) < 0) return CUDA_ERROR_INVALID_DEVICE;          // one binds one's own memory
    MulticastLock state(object);
    if (!added(object, gpu)) return CUDA_ERROR_INVALID_DEVICE;
    // What others can see through a shareable object must be shareable itself.
    if (a->trailer->handle_types && !m->trailer->handle_types) return CUDA_ERROR_INVALID_VALUE;
    MulticastBinding* open = nullptr;
    for (MulticastBinding& b : object->bindings) {
        if (!b.serial) open = open ? open : &b;
        else if (b.gpu == gpu && b.offset < offset + bytes && offset < b.offset + b.size) return CUDA_ERROR_INVALID_VALUE;
    }
    if (!open) die("more than %d bindings of one multicast object", kMulticastBindings);
    uint64_t serial = ++object->serial;
    *open = {serial, gpu, offset, bytes, m->trailer->id, memory_offset};
    m->mappings++;
    local_bindings().push_back({a, m, serial});
    stats::live(stats::kMulticastBindings, 1);
    return CUDA_SUCCESS;
}

CUresult cuMulticastUnbind(CUmemGenericAllocationHandle handle, CUdevice device, size_t offset, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    call_waits();
    if (device < 0 || size_t(device) >= visible_gpus().size()) return CUDA_ERROR_INVALID_DEVICE;
    GpuId gpu = visible_gpu(device);
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = find_allocation(handle);
    if (!a || a->kind != Kind::multicast) return CUDA_ERROR_INVALID_VALUE;
    uint64_t serial = 0;
    {
        MulticastLock state(a->multicast);
        for (const MulticastBinding& b : a->multicast->bindings)
            if (b.serial && b.gpu == gpu && b.offset == offset && b.size == bytes) serial = b.serial;
    }
    auto& all = local_bindings();
    for (size_t i = 0; i < all.size(); i++) {
        if (!serial || all[i].serial != serial || all[i].object->trailer->id != a->trailer->id) continue;
        LocalBinding gone = all[i];
        all.erase(all.begin() + long(i));
        undo(gone);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}
