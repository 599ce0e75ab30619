// Allocation objects: creation, reference counts, sharing between processes.
#include "context.h"
#include "memory.h"

#include "multicast.h"
#include "session.h"
#include "shared.h"
#include "stats.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

namespace twoshot::sim {
namespace {

// Bytes at the start of fresh memory that get a pattern: who relies on zeroed
// memory finds out.
constexpr size_t kPoisoned = 1 << 20;
constexpr int kPoison = 0xA5;

struct FabricName {
    uint64_t magic, session, id;
    uint8_t uuid[16];
    uint32_t clique;
    Kind kind;
};
static_assert(sizeof(FabricName) <= sizeof(CUmemFabricHandle), "fits");
constexpr uint64_t kFabricMagic = 0x6372626166746f77;

std::map<CUmemGenericAllocationHandle, Allocation*>& table() {
    static auto* map = new std::map<CUmemGenericAllocationHandle, Allocation*>;
    return *map;
}
std::set<int>& own_descriptors() {
    static auto* set = new std::set<int>;
    return *set;
}
// Handle values are never used twice, so that a stale one is found out.
CUmemGenericAllocationHandle next_handle = 0x1000;

bool fabric_ready(const Host& host) { return host.fabric_state == 3 && host.imex; }

}  // namespace

std::mutex& memory_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

std::string file_of(Kind kind, uint64_t id) {
    return session().path(((kind == Kind::memory ? "mem." : "mc.") + std::to_string(id)).c_str());
}

Allocation* find_allocation(CUmemGenericAllocationHandle handle) {
    auto at = table().find(handle);
    return at == table().end() || at->second->references == 0 ? nullptr : at->second;
}

int make_file(Kind kind, uint64_t id, size_t bytes, uint64_t size, GpuId where, uint32_t handle_types) {
    int fd = open(file_of(kind, id).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    struct stat st;
    Trailer trailer{};
    if (ftruncate(fd, off_t(bytes + kPage)) == 0 && fstat(fd, &st) == 0) {
        trailer.magic = kTrailerMagic;
        trailer.session = shared_session_id();
        trailer.id = id;
        trailer.size = size;
        trailer.inode = uint64_t(st.st_ino);
        trailer.kind = kind;
        trailer.where = where;
        trailer.handle_types = handle_types;
        trailer.owner_holds = 1;
        if (pwrite(fd, &trailer, sizeof trailer, off_t(bytes)) == ssize_t(sizeof trailer)) return fd;
    }
    close(fd);
    unlink(file_of(kind, id).c_str());
    return -1;
}

Allocation* adopt_file(int fd, bool created, bool by_fabric) {
    struct stat st;
    Trailer seen{};
    size_t data = 0;
    bool good = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size >= off_t(kPage);
    if (good) {
        data = size_t(st.st_size) - kPage;
        good = pread(fd, &seen, sizeof seen, off_t(data)) == ssize_t(sizeof seen) && seen.magic == kTrailerMagic &&
               seen.session == shared_session_id() && seen.inode == uint64_t(st.st_ino);
    }
    void* page = good ? mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off_t(data)) : MAP_FAILED;
    if (page == MAP_FAILED) {
        close(fd);
        return nullptr;
    }
    auto* a = new Allocation{};
    a->handle = next_handle++;
    a->kind = seen.kind;
    a->created = created;
    a->by_fabric = by_fabric;
    a->fd = fd;
    a->trailer = static_cast<Trailer*>(page);
    a->references = 1;
    if (a->kind == Kind::multicast) a->multicast = multicast_open(fd);
    if (by_fabric) a->trailer->fabric_importers++;
    own_descriptors().insert(fd);
    table()[a->handle] = a;
    bool memory = a->kind == Kind::memory;
    stats::live(created ? (memory ? stats::kAllocations : stats::kMulticastObjects)
                        : (memory ? stats::kImports : stats::kMulticastImports), 1);
    if (created && memory) stats::live(stats::kDeviceBytes, int64_t(seen.size));
    if (!memory && !created) multicast_join(seen.id);
    return a;
}

void drop_if_unused(Allocation* a) {
    if (a->references || a->mappings) return;
    Trailer* t = a->trailer;
    bool memory = a->kind == Kind::memory;
    if (a->created) {
        t->owner_holds = 0;
        unlink(file_of(a->kind, t->id).c_str());
        // Peers that came by the name write into memory that is gone now.
        if (memory && t->fabric_importers > 0) stats::total(stats::kFabricOrphans);
    }
    if (a->created && memory) {
        gpu_refund(t->where, t->size);
        stats::live(stats::kDeviceBytes, -int64_t(t->size));
    }
    if (a->by_fabric) t->fabric_importers--;
    if (!memory) {
        uint64_t id = t->id;
        multicast_close(a);
        bool other = std::any_of(table().begin(), table().end(), [&](const auto& entry) {
            return entry.second != a && entry.second->kind == Kind::multicast && entry.second->trailer->id == id;
        });
        if (!other) multicast_leave(id);
    }
    stats::live(a->created ? (memory ? stats::kAllocations : stats::kMulticastObjects)
                           : (memory ? stats::kImports : stats::kMulticastImports), -1);
    munmap(t, kPage);
    own_descriptors().erase(a->fd);
    close(a->fd);
    table().erase(a->handle);
    delete a;
}

CUresult check_handle_types(unsigned long long types, GpuId where) {
    const Gpu& gpu = topology().gpu(where);
    if (types & ~uint64_t(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | CU_MEM_HANDLE_TYPE_FABRIC))
        return CUDA_ERROR_INVALID_VALUE;
    if ((types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) && !gpu.fd_handle) return CUDA_ERROR_NOT_SUPPORTED;
    if (types & CU_MEM_HANDLE_TYPE_FABRIC) {
        if (!gpu.fabric_handle) return CUDA_ERROR_NOT_SUPPORTED;
        if (!fabric_ready(topology().hosts[where.host])) return CUDA_ERROR_NOT_PERMITTED;
    }
    return CUDA_SUCCESS;
}

// Counts the descriptors of allocations that the program itself holds open:
// exported or received ones, whichever way they came.
void refresh_fd_count() {
    if (!initialised()) return;
    DIR* dir = opendir("/proc/self/fd");
    if (!dir) return;
    uint64_t count = 0;
    std::string memory = session().path("mem."), multicast = session().path("mc.");
    std::lock_guard<std::mutex> lock(memory_mutex());
    while (dirent* entry = readdir(dir)) {
        char text[512];
        ssize_t length = readlinkat(dirfd(dir), entry->d_name, text, sizeof text - 1);
        if (length <= 0) continue;
        text[length] = 0;
        bool ours = !strncmp(text, memory.c_str(), memory.size()) || !strncmp(text, multicast.c_str(), multicast.size());
        if (ours && !own_descriptors().count(atoi(entry->d_name))) count++;
    }
    closedir(dir);
    stats::set_live(stats::kFds, count);
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

static CUresult device_of(const CUmemAllocationProp* prop, GpuId* where) {
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
    if (prop->location.id < 0 || size_t(prop->location.id) >= visible_gpus().size()) return CUDA_ERROR_INVALID_DEVICE;
    *where = visible_gpu(prop->location.id);
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags option) {
    SIM_ENTRY(0);
    GpuId where;
    if (!bytes || option < 0 || option > CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = device_of(prop, &where)) return r;
    *bytes = topology().gpu(where).granularity;
    return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* prop,
                     unsigned long long flags) {
    SIM_ENTRY(kUnsafe);
    GpuId where;
    if (!handle || flags) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = device_of(prop, &where)) return r;
    if (!bytes || bytes % topology().gpu(where).granularity) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = check_handle_types(unsigned(prop->requestedHandleTypes), where)) return r;
    if (!gpu_charge(where, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    int fd = make_file(Kind::memory, shared_next_id(), bytes, bytes, where, uint32_t(prop->requestedHandleTypes));
    if (fd >= 0) {
        size_t poisoned = std::min(bytes, kPoisoned);
        void* head = mmap(nullptr, poisoned, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (head != MAP_FAILED) {
            memset(head, kPoison, poisoned);
            munmap(head, poisoned);
        }
        std::lock_guard<std::mutex> lock(memory_mutex());
        if (Allocation* a = adopt_file(fd, true, false)) {
            *handle = a->handle;
            return CUDA_SUCCESS;
        }
    }
    gpu_refund(where, bytes);
    return CUDA_ERROR_OPERATING_SYSTEM;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    SIM_ENTRY(kUnsafe);
    call_waits();
    {
        std::lock_guard<std::mutex> lock(memory_mutex());
        Allocation* a = find_allocation(handle);
        if (!a) return CUDA_ERROR_INVALID_VALUE;
        a->references--;
        drop_if_unused(a);
    }
    refresh_fd_count();
    return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
    SIM_ENTRY(0);
    if (!handle) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex());
    const Mapping* m = find_mapping(uint64_t(address));
    if (!m) return CUDA_ERROR_INVALID_VALUE;
    m->allocation->references++;
    *handle = m->allocation->handle;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop, CUmemGenericAllocationHandle handle) {
    SIM_ENTRY(0);
    if (!prop) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = find_allocation(handle);
    if (!a || a->kind != Kind::memory) return CUDA_ERROR_INVALID_VALUE;
    *prop = {};
    prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop->requestedHandleTypes = CUmemAllocationHandleType(a->trailer->handle_types);
    // A peer's memory lies on a device that this process may not see.
    int ordinal = ordinal_of(a->trailer->where);
    prop->location.type = ordinal < 0 ? CU_MEM_LOCATION_TYPE_INVALID : CU_MEM_LOCATION_TYPE_DEVICE;
    prop->location.id = ordinal < 0 ? 0 : ordinal;
    return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
    SIM_ENTRY(kUnsafe);
    if (!shareable || flags) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = CUDA_SUCCESS;
    {
        std::lock_guard<std::mutex> lock(memory_mutex());
        Allocation* a = find_allocation(handle);
        if (!a) return CUDA_ERROR_INVALID_VALUE;
        if (!(a->trailer->handle_types & uint32_t(type))) return CUDA_ERROR_INVALID_VALUE;
        if (type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
            int fd = fcntl(a->fd, F_DUPFD_CLOEXEC, 3);
            if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
            memcpy(shareable, &fd, sizeof fd);
        } else if (type == CU_MEM_HANDLE_TYPE_FABRIC) {
            const Host& host = topology().hosts[session().host];
            FabricName name{kFabricMagic, shared_session_id(), a->trailer->id, {}, host.clique, a->kind};
            memcpy(name.uuid, host.uuid.data(), 16);
            memset(shareable, 0, sizeof(CUmemFabricHandle));
            memcpy(shareable, &name, sizeof name);
        } else {
            result = CUDA_ERROR_INVALID_VALUE;
        }
    }
    refresh_fd_count();
    return result;
}

static CUresult import_fabric(CUmemGenericAllocationHandle* handle, const void* blob) {
    const Host& host = topology().hosts[session().host];
    FabricName name;
    memcpy(&name, blob, sizeof name);
    if (!fabric_ready(host)) return CUDA_ERROR_NOT_PERMITTED;
    if (name.magic != kFabricMagic || name.session != shared_session_id()) return CUDA_ERROR_INVALID_VALUE;
    if (memcmp(name.uuid, host.uuid.data(), 16) || name.clique != host.clique) return CUDA_ERROR_INVALID_HANDLE;
    int fd = open(file_of(name.kind, name.id).c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = adopt_file(fd, false, true);
    if (!a) return CUDA_ERROR_INVALID_VALUE;
    if (!topology().same_fabric(a->trailer->where.host, session().host)) {
        a->references = 0;
        drop_if_unused(a);
        return CUDA_ERROR_INVALID_HANDLE;
    }
    *handle = a->handle;
    return CUDA_SUCCESS;
}

static CUresult import_descriptor(CUmemGenericAllocationHandle* handle, int given) {
    int fd = fcntl(given, F_DUPFD_CLOEXEC, 3);
    if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = adopt_file(fd, false, false);
    if (!a) return CUDA_ERROR_INVALID_VALUE;
    if (a->trailer->where.host != session().host) {   // descriptors do not cross hosts
        a->references = 0;
        drop_if_unused(a);
        return CUDA_ERROR_INVALID_VALUE;
    }
    *handle = a->handle;
    return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* os_handle,
                                        CUmemAllocationHandleType type) {
    SIM_ENTRY(kUnsafe);
    if (!handle) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    if (type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) result = import_descriptor(handle, int(intptr_t(os_handle)));
    else if (type == CU_MEM_HANDLE_TYPE_FABRIC && os_handle) result = import_fabric(handle, os_handle);
    refresh_fd_count();
    return result;
}
