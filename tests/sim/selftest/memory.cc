// Memory: sharing between processes, what is refused, reference counts.
#include "selftest.h"

#include <unistd.h>

#include <cstring>

static uint32_t& word(CUdeviceptr at, size_t index) { return reinterpret_cast<uint32_t*>(at)[index]; }

// Rank 0 owns, everyone maps; each rank writes its own word and sees the others'.
static void share(const Args& a) {
    start();
    bool fabric = a.option == "fabric";
    int type = fabric ? CU_MEM_HANDLE_TYPE_FABRIC : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemGenericAllocationHandle handle;
    CUmemFabricHandle name;
    int fd = -1;
    if (a.rank == 0) {
        CUmemAllocationProp prop = pinned(type);
        OK(cuMemCreate(&handle, kUnit, &prop, 0));
        if (fabric) {
            OK(cuMemExportToShareableHandle(&name, handle, type, 0));
            publish("name", &name, sizeof name);
        } else {
            OK(cuMemExportToShareableHandle(&fd, handle, type, 0));
            send_fd("fd", fd, a.ranks - 1);
            close(fd);
        }
    } else if (fabric) {
        obtain("name", &name, sizeof name);
        OK(cuMemImportFromShareableHandle(&handle, &name, type));
    } else {
        fd = receive_fd("fd");
        OK(cuMemImportFromShareableHandle(&handle, reinterpret_cast<void*>(intptr_t(fd)), type));
        close(fd);
    }
    CUdeviceptr at = map(handle, kUnit);
    TRUE(word(at, 100) == 0xA5A5A5A5 || a.ranks > 100);
    word(at, size_t(a.rank)) = 1000u + uint32_t(a.rank);
    barrier(a, "written");
    for (int r = 0; r < a.ranks; r++) TRUE(word(at, size_t(r)) == 1000u + uint32_t(r));
    barrier(a, "read");
    if (a.rank != 0) OK(cuMemRelease(handle));
    unmap(at, kUnit);
    barrier(a, "gone");
    if (a.rank == 0) OK(cuMemRelease(handle));
    barrier(a, "freed");
    // The name died with the owner's last reference.
    if (fabric) EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemImportFromShareableHandle(&handle, &name, type));
    stop();
}

// A descriptor keeps the memory when every handle to it is gone.
static void descriptor_keeps(const Args&) {
    start();
    CUmemAllocationProp prop = pinned(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    CUmemGenericAllocationHandle handle;
    int fd;
    OK(cuMemCreate(&handle, kUnit, &prop, 0));
    CUdeviceptr at = map(handle, kUnit);
    word(at, 5) = 77;
    OK(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    OK(cuMemRelease(handle));
    TRUE(word(at, 5) == 77);                             // the mapping holds it too
    CUmemGenericAllocationHandle again;
    OK(cuMemRetainAllocationHandle(&again, reinterpret_cast<void*>(at + 64)));
    TRUE(again == handle);
    OK(cuMemRelease(again));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemRelease(again));
    unmap(at, kUnit);
    OK(cuMemImportFromShareableHandle(&again, reinterpret_cast<void*>(intptr_t(fd)), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    at = map(again, kUnit);
    TRUE(word(at, 5) == 77);
    unmap(at, kUnit);
    OK(cuMemRelease(again));
    close(fd);
    stop();
}

static void refusals(const Args&) {
    CUmemGenericAllocationHandle handle, other;
    CUmemAllocationProp prop = pinned(0);
    EXPECT(CUDA_ERROR_NOT_INITIALIZED, cuMemCreate(&handle, kUnit, &prop, 0));
    start();
    int fd = -1;
    void* standard_input = nullptr;                      // a descriptor that is no allocation
    CUmemFabricHandle name = {};
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemCreate(&handle, kUnit + 4096, &prop, 0));
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_FABRIC;
    EXPECT(CUDA_ERROR_NOT_PERMITTED, cuMemCreate(&handle, kUnit, &prop, 0));   // no IMEX on this host
    prop = pinned(0, 7);
    EXPECT(CUDA_ERROR_INVALID_DEVICE, cuMemCreate(&handle, kUnit, &prop, 0));
    prop = pinned(0);
    EXPECT(CUDA_ERROR_OUT_OF_MEMORY, cuMemCreate(&handle, size_t(1) << 40, &prop, 0));
    OK(cuMemCreate(&handle, kUnit, &prop, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE,
           cuMemImportFromShareableHandle(&other, standard_input, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    EXPECT(CUDA_ERROR_NOT_PERMITTED, cuMemImportFromShareableHandle(&other, &name, CU_MEM_HANDLE_TYPE_FABRIC));

    CUdeviceptr at, far;
    CUmemAccessDesc near = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemAccessDesc unlinked = {{CU_MEM_LOCATION_TYPE_DEVICE, 1}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemAddressReserve(&at, 4096, 0, 0, 0));
    OK(cuMemAddressReserve(&at, 4 * kUnit, 64 * kUnit, 0, 0));
    TRUE(at % (64 * kUnit) == 0);
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemMap(at + 4 * kUnit, kUnit, 0, handle, 0));   // outside
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemMap(at, 2 * kUnit, 0, handle, 0));           // longer than the memory
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemSetAccess(at, kUnit, &near, 1));             // nothing mapped
    OK(cuMemMap(at + kUnit, kUnit, 0, handle, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemMap(at + kUnit, kUnit, 0, handle, 0));       // occupied
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemsetD32_v2(at + kUnit, 1, 4));                // no access yet
    EXPECT(CUDA_ERROR_INVALID_DEVICE, cuMemSetAccess(at + kUnit, kUnit, &unlinked, 1));
    OK(cuMemSetAccess(at + kUnit, kUnit, &near, 1));
    OK(cuMemsetD32_v2(at + kUnit, 1, 4));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemsetD32_v2(at, 1, 4));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemAddressFree(at, 4 * kUnit));                 // still mapped
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemUnmap(at, 2 * kUnit));                       // not exactly mappings
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemAddressFree(at, kUnit));
    OK(cuMemUnmap(at + kUnit, kUnit));
    OK(cuMemAddressFree(at, 4 * kUnit));
    OK(cuMemRelease(handle));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(at));
    OK(cuMemAlloc_v2(&far, 100));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(far + 4));
    OK(cuMemFree_v2(far));
    stop();
    EXPECT(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuMemAlloc_v2(&far, 100));
}

// A fabric handle on a host of another cluster is refused.
static void foreign_fabric(const Args& a) {
    start();
    CUmemFabricHandle name;
    CUmemGenericAllocationHandle handle;
    if (a.rank == 0) {
        CUmemAllocationProp prop = pinned(CU_MEM_HANDLE_TYPE_FABRIC);
        OK(cuMemCreate(&handle, kUnit, &prop, 0));
        OK(cuMemExportToShareableHandle(&name, handle, CU_MEM_HANDLE_TYPE_FABRIC, 0));
        publish("name", &name, sizeof name);
        barrier(a, "tried");
        OK(cuMemRelease(handle));
    } else {
        obtain("name", &name, sizeof name);
        EXPECT(CUDA_ERROR_INVALID_HANDLE, cuMemImportFromShareableHandle(&handle, &name, CU_MEM_HANDLE_TYPE_FABRIC));
        barrier(a, "tried");
    }
    stop();
}

// Two processes on one GPU see each other's use of its memory.
static void capacity(const Args& a) {
    start();
    size_t before, after, total;
    OK(cuMemGetInfo_v2(&before, &total));
    barrier(a, "seen");
    CUdeviceptr at;
    OK(cuMemAlloc_v2(&at, total / 4));
    barrier(a, "taken");
    OK(cuMemGetInfo_v2(&after, &total));
    TRUE(before - after == size_t(a.ranks) * (total / 4));
    barrier(a, "measured");
    OK(cuMemFree_v2(at));
    barrier(a, "freed");
    OK(cuMemGetInfo_v2(&after, &total));
    TRUE(before == after);
    stop();
}

static void create(const Args&) {
    start();
    CUmemAllocationProp prop = pinned(0);
    for (int i = 0; i < 3; i++) {
        CUmemGenericAllocationHandle handle;
        int code = cuMemCreate(&handle, kUnit, &prop, 0);
        printf("%d\n", code);
        fflush(stdout);
        if (code == 0) OK(cuMemRelease(handle));
    }
    stop();
}

static void leak(const Args&) {
    start();
    CUmemAllocationProp prop = pinned(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    CUmemGenericAllocationHandle handle;
    int fd;
    OK(cuMemCreate(&handle, kUnit, &prop, 0));
    OK(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    map(handle, kUnit);
}

static void nvml(const Args& a) {
    nvmlDevice_t first, second;
    nvmlGpuP2PStatus_t status;
    nvmlGpuFabricInfo_v3_t info = {};
    nvmlPciInfo_t pci;
    char text[64];
    EXPECT(NVML_ERROR_UNINITIALIZED, nvmlDeviceGetHandleByIndex_v2(0, &first));
    OK(nvmlInit_v2());
    OK(nvmlDeviceGetHandleByIndex_v2(0, &first));
    OK(nvmlDeviceGetPciInfo_v3(first, &pci));
    OK(nvmlDeviceGetHandleByPciBusId_v2(pci.busId, &second));
    TRUE(first == second);
    OK(nvmlDeviceGetUUID(first, text, sizeof text));
    OK(nvmlDeviceGetHandleByUUID(text, &second));
    TRUE(first == second);
    OK(nvmlDeviceGetHandleByIndex_v2(1, &second));
    OK(nvmlDeviceGetP2PStatus(first, second, NVML_P2P_CAPS_INDEX_NVLINK, &status));
    TRUE(status == (a.option == "nvlink" ? NVML_P2P_STATUS_OK : NVML_P2P_STATUS_NOT_SUPPORTED));
    info.version = 5;
    EXPECT(NVML_ERROR_ARGUMENT_VERSION_MISMATCH, nvmlDeviceGetGpuFabricInfoV(first, &info));
    info.version = TWOSHOT_NVML_FABRIC_INFO_V3;
    OK(nvmlDeviceGetGpuFabricInfoV(first, &info));
    TRUE(info.state == NVML_GPU_FABRIC_STATE_COMPLETED && info.cliqueId == 1);
    OK(nvmlShutdown());
}

const Scenario memory_scenarios[] = {
    {"share", share}, {"descriptor-keeps", descriptor_keeps}, {"refusals", refusals},
    {"foreign-fabric", foreign_fabric}, {"capacity", capacity}, {"create", create},
    {"leak", leak}, {"nvml", nvml}, {nullptr, nullptr},
};
