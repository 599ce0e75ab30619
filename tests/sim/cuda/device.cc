// Devices: what the topology says of the GPUs this process may see.
#include "session.h"
#include "shared.h"
#include "sim.h"

#include <cstdio>
#include <cstring>

using namespace twoshot::sim;

static bool bad(CUdevice d) { return d < 0 || size_t(d) >= visible_gpus().size(); }

CUresult cuDriverGetVersion(int* version) {
    SIM_ENTRY(kNoInit | kInCallback);
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = topology().driver;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    SIM_ENTRY(0);
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    *count = int(visible_gpus().size());
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    SIM_ENTRY(0);
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (bad(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    SIM_ENTRY(0);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    if (bad(device)) return CUDA_ERROR_INVALID_DEVICE;
    GpuId id = visible_gpu(device);
    const Gpu& gpu = topology().gpu(id);
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: *value = 0x7fffffff; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = gpu.sms; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = gpu.cc_major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = gpu.cc_minor; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = 0x10 + id.gpu; break;
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID:
    case CU_DEVICE_ATTRIBUTE_INTEGRATED:
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS:
    case CU_DEVICE_ATTRIBUTE_HOST_NATIVE_ATOMIC_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: *value = gpu.fd_handle; break;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED: *value = gpu.fabric_handle; break;
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED: *value = gpu.multicast; break;
    default:
        dprintf(2, "twoshot-sim: cuDeviceGetAttribute: attribute %d is not simulated\n", attribute);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    SIM_ENTRY(0);
    if (!name || length <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (bad(device)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, size_t(length), "twoshot simulated GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    SIM_ENTRY(0);
    if (!uuid) return CUDA_ERROR_INVALID_VALUE;
    if (bad(device)) return CUDA_ERROR_INVALID_DEVICE;
    auto bytes = gpu_uuid(visible_gpu(device));
    memcpy(uuid->bytes, bytes.data(), 16);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    SIM_ENTRY(0);
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    if (bad(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = topology().gpu(visible_gpu(device)).mem;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char* bus_id, int length, CUdevice device) {
    SIM_ENTRY(0);
    if (!bus_id) return CUDA_ERROR_INVALID_VALUE;
    if (bad(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::string text = pci_bus_id(visible_gpu(device).gpu, 4);
    if (length <= int(text.size())) return CUDA_ERROR_INVALID_VALUE;
    strcpy(bus_id, text.c_str());
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* bus_id) {
    SIM_ENTRY(0);
    if (!device || !bus_id) return CUDA_ERROR_INVALID_VALUE;
    int host = session().host, gpu = gpu_of_bus_id(bus_id, int(topology().hosts[host].gpus.size()));
    int ordinal = gpu < 0 ? -1 : ordinal_of({host, gpu});
    if (ordinal < 0) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute attribute, CUdevice from, CUdevice to) {
    SIM_ENTRY(0);
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    if (bad(from) || bad(to) || from == to) return CUDA_ERROR_INVALID_DEVICE;
    Link link = topology().link(visible_gpu(from), visible_gpu(to));
    switch (attribute) {
    case CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK: *value = link == Link::nvlink ? 0 : 1; break;
    case CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED:
    case CU_DEVICE_P2P_ATTRIBUTE_CUDA_ARRAY_ACCESS_SUPPORTED: *value = link != Link::none; break;
    case CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED: *value = link == Link::nvlink; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
    SIM_ENTRY(0);
    if (!can) return CUDA_ERROR_INVALID_VALUE;
    if (bad(device) || bad(peer)) return CUDA_ERROR_INVALID_DEVICE;
    *can = device != peer && topology().link(visible_gpu(device), visible_gpu(peer)) != Link::none;
    return CUDA_SUCCESS;
}
