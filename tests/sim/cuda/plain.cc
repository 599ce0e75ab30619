// Memory that is not shared: cuMemAlloc, pinned host memory, queries about
// pointers, synchronous copies.
#include "context.h"
#include "memory.h"
#include "session.h"
#include "shared.h"
#include "stats.h"
#include "streams.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

namespace twoshot::sim {
namespace {

struct Block {
    uint64_t bytes;
    bool host;
    int ordinal;
};

std::map<uint64_t, Block>& blocks() {
    static auto* map = new std::map<uint64_t, Block>;
    return *map;
}
std::mutex& blocks_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

constexpr size_t kPoisoned = 1 << 20;

void* take(size_t bytes, bool host, int ordinal) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    memset(at, 0xA5, std::min(bytes, kPoisoned));       // fresh memory holds no zeroes to rely on
    std::lock_guard<std::mutex> lock(blocks_mutex());
    blocks()[uint64_t(at)] = {bytes, host, ordinal};
    return at;
}

// Removes the block that begins at `address`; false when there is none of that kind.
bool give(uint64_t address, bool host, Block* block) {
    std::lock_guard<std::mutex> lock(blocks_mutex());
    auto at = blocks().find(address);
    if (at == blocks().end() || at->second.host != host) return false;
    *block = at->second;
    blocks().erase(at);
    return true;
}

uint64_t rounded(uint64_t bytes) { return (bytes + 511) / 512 * 512; }

}  // namespace

bool plain_range(uint64_t address, uint64_t* base, uint64_t* bytes, bool* host, int* ordinal) {
    std::lock_guard<std::mutex> lock(blocks_mutex());
    auto after = blocks().upper_bound(address);
    if (after == blocks().begin()) return false;
    --after;
    if (address - after->first >= after->second.bytes) return false;
    *base = after->first;
    *bytes = after->second.bytes;
    *host = after->second.host;
    *ordinal = after->second.ordinal;
    return true;
}

// Everything a synchronous call has to wait for before it may touch memory.
static CUresult settle(CUdeviceptr a, CUdeviceptr b, size_t bytes) {
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (CUresult r = legacy_refuses(context, true)) return r;
    if (bytes && (!device_range(a, bytes) || (b && !device_range(b, bytes)))) return CUDA_ERROR_INVALID_VALUE;
    drain_blocking(context);
    return CUDA_SUCCESS;
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!address || !bytes) return CUDA_ERROR_INVALID_VALUE;
    if (!gpu_charge(context->gpu, rounded(bytes))) return CUDA_ERROR_OUT_OF_MEMORY;
    void* at = take(bytes, false, context->ordinal);
    if (!at) {
        gpu_refund(context->gpu, rounded(bytes));
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    stats::live(stats::kDeviceAllocations, 1);
    stats::live(stats::kDeviceBytes, int64_t(rounded(bytes)));
    *address = uint64_t(at);
    return CUDA_SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    SIM_ENTRY(kUnsafe);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!address) return CUDA_SUCCESS;
    drain(context);                                     // the driver waits for the device too
    Block block;
    if (!give(address, false, &block)) return CUDA_ERROR_INVALID_VALUE;
    munmap(reinterpret_cast<void*>(address), block.bytes);
    gpu_refund(visible_gpu(block.ordinal), rounded(block.bytes));
    stats::live(stats::kDeviceAllocations, -1);
    stats::live(stats::kDeviceBytes, -int64_t(rounded(block.bytes)));
    return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
    SIM_ENTRY(kUnsafe);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!address || !bytes || (flags & ~7u)) return CUDA_ERROR_INVALID_VALUE;
    void* at = take(bytes, true, context->ordinal);
    if (!at) return CUDA_ERROR_OUT_OF_MEMORY;
    stats::live(stats::kHostAllocations, 1);
    *address = at;
    return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* address) {
    SIM_ENTRY(kUnsafe);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    drain(context);
    Block block;
    if (!give(uint64_t(address), true, &block)) return CUDA_ERROR_INVALID_VALUE;
    munmap(address, block.bytes);
    stats::live(stats::kHostAllocations, -1);
    return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned int flags) {
    SIM_ENTRY(0);
    uint64_t base, bytes;
    bool is_host;
    int ordinal;
    if (!device || flags) return CUDA_ERROR_INVALID_VALUE;
    if (!plain_range(uint64_t(host), &base, &bytes, &is_host, &ordinal) || !is_host) return CUDA_ERROR_INVALID_VALUE;
    *device = uint64_t(host);
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    SIM_ENTRY(0);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!free_bytes || !total_bytes) return CUDA_ERROR_INVALID_VALUE;
    *total_bytes = topology().gpu(context->gpu).mem;
    *free_bytes = *total_bytes - gpu_bytes_used(context->gpu);
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
    SIM_ENTRY(0);
    uint64_t at, size;
    bool host;
    int ordinal;
    if (!plain_range(address, &at, &size, &host, &ordinal)) {
        std::lock_guard<std::mutex> lock(memory_mutex());
        const Mapping* m = find_mapping(address);
        if (!m) return CUDA_ERROR_NOT_FOUND;
        at = m->address;
        size = m->size;
    }
    if (base) *base = at;
    if (bytes) *bytes = size;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
    SIM_ENTRY(0);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    uint64_t base, bytes, types = 0;
    bool host = false, vmm = false;
    int ordinal = 0;
    if (!plain_range(address, &base, &bytes, &host, &ordinal)) {
        std::lock_guard<std::mutex> lock(memory_mutex());
        const Mapping* m = find_mapping(address);
        if (!m) return CUDA_ERROR_INVALID_VALUE;
        base = m->address;
        bytes = m->size;
        vmm = true;
        types = m->allocation->trailer->handle_types;
        ordinal = std::max(ordinal_of(m->allocation->trailer->where), 0);
    }
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: {
        CUcontext context = nullptr;
        if (!vmm) (void)current_context(&context);
        *static_cast<CUcontext*>(value) = context;
        break;
    }
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *static_cast<unsigned*>(value) = host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *static_cast<CUdeviceptr*>(value) = address; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (!host) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<uint64_t*>(value) = address;
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *static_cast<uint64_t*>(value) = base; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *static_cast<int*>(value) = 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(value) = ordinal; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *static_cast<uint64_t*>(value) = base; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *static_cast<size_t*>(value) = bytes; break;
    case CU_POINTER_ATTRIBUTE_MAPPED: *static_cast<int*>(value) = 1; break;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: *static_cast<uint64_t*>(value) = types; break;
    default: die("cuPointerGetAttribute: attribute %d is not simulated", attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    if (CUresult r = settle(to, 0, bytes)) return r;
    memcpy(reinterpret_cast<void*>(to), from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    if (CUresult r = settle(from, 0, bytes)) return r;
    memcpy(to, reinterpret_cast<void*>(from), bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    if (CUresult r = settle(to, from, bytes)) return r;
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned int word, size_t words) {
    SIM_ENTRY(kUnsafe);
    if (to % 4) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = settle(to, 0, words * 4)) return r;
    std::fill_n(reinterpret_cast<unsigned*>(to), words, word);
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char byte, size_t bytes) {
    SIM_ENTRY(kUnsafe);
    if (CUresult r = settle(to, 0, bytes)) return r;
    memset(reinterpret_cast<void*>(to), byte, bytes);
    return CUDA_SUCCESS;
}
