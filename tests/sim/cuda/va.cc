// Address space: reservations, mappings, access rights.
#include "context.h"
#include "memory.h"

#include "multicast.h"
#include "session.h"
#include "shared.h"
#include "stats.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <vector>

namespace twoshot::sim {
namespace {

std::map<uint64_t, Mapping>& mappings() {
    static auto* map = new std::map<uint64_t, Mapping>;
    return *map;
}
std::map<uint64_t, uint64_t>& reservations() {
    static auto* map = new std::map<uint64_t, uint64_t>;
    return *map;
}

bool reserved(uint64_t address, uint64_t bytes) {
    auto after = reservations().upper_bound(address);
    if (after == reservations().begin()) return false;
    --after;
    return address - after->first <= after->second && bytes <= after->second - (address - after->first);
}

bool overlaps(uint64_t address, uint64_t bytes) {
    auto at = mappings().lower_bound(address);
    if (at != mappings().end() && at->first < address + bytes) return true;
    return at != mappings().begin() && (--at)->first + at->second.size > address;
}

// The whole mappings that together are exactly the range; empty otherwise.
std::vector<Mapping*> exactly(uint64_t address, uint64_t bytes) {
    std::vector<Mapping*> found;
    uint64_t at = address;
    while (at < address + bytes) {
        auto m = mappings().find(at);
        if (m == mappings().end()) return {};
        found.push_back(&m->second);
        at += m->second.size;
    }
    return at == address + bytes ? found : std::vector<Mapping*>{};
}

uint64_t page_unit() { return topology().gpu(visible_gpu(0)).granularity; }

int protection(const Mapping& m) {
    if (m.allocation->kind == Kind::multicast) return PROT_NONE;   // ordinary accesses must not pass
    if (m.access == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) return PROT_READ | PROT_WRITE;
    return m.access == CU_MEM_ACCESS_FLAGS_PROT_READ ? PROT_READ : PROT_NONE;
}

}  // namespace

const Mapping* find_mapping(uint64_t address) {
    auto after = mappings().upper_bound(address);
    if (after == mappings().begin()) return nullptr;
    --after;
    return address - after->first < after->second.size ? &after->second : nullptr;
}

size_t mapping_count() { return mappings().size(); }

bool device_range(uint64_t address, size_t bytes) {
    uint64_t base, size;
    bool host;
    int ordinal;
    if (plain_range(address, &base, &size, &host, &ordinal)) return bytes <= base + size - address;
    std::lock_guard<std::mutex> lock(memory_mutex());
    for (uint64_t at = address; at < address + bytes;) {
        const Mapping* m = find_mapping(at);
        if (!m || m->access == CU_MEM_ACCESS_FLAGS_PROT_NONE || m->allocation->kind == Kind::multicast) return false;
        at = m->address + m->size;
    }
    return true;
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t alignment, CUdeviceptr, unsigned long long flags) {
    SIM_ENTRY(kUnsafe);
    if (!address || !bytes || flags || bytes % page_unit() || (alignment & (alignment - 1)))
        return CUDA_ERROR_INVALID_VALUE;
    // `TWOSHOT_SIM_NULL_RESERVE=K`: the K-th reservation of this process succeeds with address 0, as seen in the field.
    static std::atomic<int> uses{0};
    static const char* const null_use = getenv("TWOSHOT_SIM_NULL_RESERVE");
    if (null_use && ++uses == atoi(null_use)) {
        *address = 0;
        return CUDA_SUCCESS;
    }
    size_t align = alignment > page_unit() ? alignment : page_unit();
    void* raw = mmap(nullptr, bytes + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t from = uint64_t(raw), base = (from + align - 1) / align * align;
    if (base > from) munmap(raw, base - from);
    uint64_t tail = from + bytes + align - (base + bytes);
    if (tail) munmap(reinterpret_cast<void*>(base + bytes), tail);
    std::lock_guard<std::mutex> lock(memory_mutex());
    reservations()[base] = bytes;
    stats::live(stats::kReservations, 1);
    stats::live(stats::kReservedBytes, int64_t(bytes));
    *address = base;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    call_waits();
    std::lock_guard<std::mutex> lock(memory_mutex());
    auto at = reservations().find(address);
    if (at == reservations().end() || at->second != bytes || overlaps(address, bytes)) return CUDA_ERROR_INVALID_VALUE;
    munmap(reinterpret_cast<void*>(address), bytes);
    reservations().erase(at);
    stats::live(stats::kReservations, -1);
    stats::live(stats::kReservedBytes, -int64_t(bytes));
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    SIM_ENTRY(kUnsafe);
    if (flags || !bytes || address % page_unit() || bytes % page_unit() || offset) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex());
    Allocation* a = find_allocation(handle);
    if (!a || bytes > a->trailer->size || !reserved(address, bytes) || overlaps(address, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t unit = a->kind == Kind::multicast ? topology().gpu(visible_gpu(0)).mc_granularity : 1;
    if (address % unit || bytes % unit) return CUDA_ERROR_INVALID_VALUE;
    void* at = reinterpret_cast<void*>(address);
    if (a->kind == Kind::memory) {
        if (mmap(at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, a->fd, 0) == MAP_FAILED) return CUDA_ERROR_MAP_FAILED;
    } else {
        multicast_watch(address, bytes, a->multicast);
    }
    mappings()[address] = {address, bytes, offset, a, CU_MEM_ACCESS_FLAGS_PROT_NONE};
    a->mappings++;
    stats::live(stats::kMappings, 1);
    stats::live(stats::kMappedBytes, int64_t(bytes));
    return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    call_waits();
    std::lock_guard<std::mutex> lock(memory_mutex());
    std::vector<Mapping*> whole = exactly(address, bytes);
    if (whole.empty()) return CUDA_ERROR_INVALID_VALUE;
    for (Mapping* m : whole) {
        Allocation* a = m->allocation;
        uint64_t at = m->address, size = m->size;
        if (a->kind == Kind::multicast) multicast_unwatch(at);
        void* fresh = mmap(reinterpret_cast<void*>(at), size, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        if (fresh == MAP_FAILED) return CUDA_ERROR_UNMAP_FAILED;
        mappings().erase(at);
        a->mappings--;
        drop_if_unused(a);
        stats::live(stats::kMappings, -1);
        stats::live(stats::kMappedBytes, -int64_t(size));
    }
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc* descs, size_t count) {
    SIM_ENTRY(kUnsafe);
    if (!descs || !count) return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory_mutex());
    std::vector<Mapping*> whole = exactly(address, bytes);
    if (whole.empty()) return CUDA_ERROR_INVALID_VALUE;
    int access = CU_MEM_ACCESS_FLAGS_PROT_NONE;
    for (size_t i = 0; i < count; i++) {
        if (descs[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
        int id = descs[i].location.id;
        if (id < 0 || size_t(id) >= visible_gpus().size()) return CUDA_ERROR_INVALID_DEVICE;
        for (Mapping* m : whole)
            if (m->allocation->kind == Kind::memory &&
                topology().link(visible_gpu(id), m->allocation->trailer->where) == Link::none)
                return CUDA_ERROR_INVALID_DEVICE;
        access |= descs[i].flags;
    }
    for (Mapping* m : whole) {
        m->access = access;
        int prot = protection(*m);
        if (m->allocation->kind == Kind::multicast)
            multicast_allow(m->address, access == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
        if (m->allocation->kind == Kind::memory && mprotect(reinterpret_cast<void*>(m->address), m->size, prot) != 0)
            return CUDA_ERROR_OPERATING_SYSTEM;
    }
    return CUDA_SUCCESS;
}
