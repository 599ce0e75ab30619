// Names: of errors, and of entries for cuGetProcAddress.
#include "sim.h"

#include <cstring>

namespace {

// Every exported entry, with the first version of CUDA that means it by its
// plain name; 0: always.
#define SIM_ENTRIES(ENTRY) \
    ENTRY(cuCtxGetCurrent, 0) ENTRY(cuCtxGetDevice, 0) ENTRY(cuCtxGetId, 12000) ENTRY(cuCtxPopCurrent_v2, 0) ENTRY(cuCtxPushCurrent_v2, 0) \
    ENTRY(cuCtxSetCurrent, 0) ENTRY(cuCtxSynchronize, 0) ENTRY(cuDeviceCanAccessPeer, 0) ENTRY(cuDeviceGet, 0) \
    ENTRY(cuDeviceGetAttribute, 0) ENTRY(cuDeviceGetByPCIBusId, 0) ENTRY(cuDeviceGetCount, 0) \
    ENTRY(cuDeviceGetName, 0) ENTRY(cuDeviceGetP2PAttribute, 0) ENTRY(cuDeviceGetPCIBusId, 0) \
    ENTRY(cuDeviceGetUuid_v2, 0) ENTRY(cuDevicePrimaryCtxGetState, 0) ENTRY(cuDevicePrimaryCtxRelease_v2, 0) \
    ENTRY(cuDevicePrimaryCtxReset_v2, 0) ENTRY(cuDevicePrimaryCtxRetain, 0) ENTRY(cuDeviceTotalMem_v2, 0) ENTRY(cuDriverGetVersion, 0) \
    ENTRY(cuEventCreate, 0) ENTRY(cuEventDestroy_v2, 0) ENTRY(cuEventElapsedTime, 0) \
    ENTRY(cuEventElapsedTime_v2, 12080) ENTRY(cuEventQuery, 0) ENTRY(cuEventRecord, 0) ENTRY(cuEventSynchronize, 0) \
    ENTRY(cuFuncGetAttribute, 0) ENTRY(cuFuncLoad, 0) ENTRY(cuFuncSetAttribute, 0) ENTRY(cuGetErrorName, 0) \
    ENTRY(cuGetErrorString, 0) ENTRY(cuGetProcAddress_v2, 0) ENTRY(cuGraphDestroy, 0) ENTRY(cuGraphExecDestroy, 0) \
    ENTRY(cuGraphGetNodes, 0) ENTRY(cuGraphInstantiateWithFlags, 0) ENTRY(cuGraphLaunch, 0) \
    ENTRY(cuGraphRetainUserObject, 0) ENTRY(cuInit, 0) ENTRY(cuLaunchHostFunc, 0) ENTRY(cuLaunchKernel, 0) \
    ENTRY(cuLaunchKernelEx, 0) ENTRY(cuMemAddressFree, 0) ENTRY(cuMemAddressReserve, 0) ENTRY(cuMemAlloc_v2, 0) \
    ENTRY(cuMemCreate, 0) ENTRY(cuMemExportToShareableHandle, 0) ENTRY(cuMemFreeHost, 0) ENTRY(cuMemFree_v2, 0) \
    ENTRY(cuMemGetAddressRange_v2, 0) ENTRY(cuMemGetAllocationGranularity, 0) \
    ENTRY(cuMemGetAllocationPropertiesFromHandle, 0) ENTRY(cuMemGetInfo_v2, 0) \
    ENTRY(cuMemHostAlloc, 0) ENTRY(cuMemHostGetDevicePointer_v2, 0) ENTRY(cuMemImportFromShareableHandle, 0) \
    ENTRY(cuMemMap, 0) ENTRY(cuMemRelease, 0) ENTRY(cuMemRetainAllocationHandle, 0) ENTRY(cuMemSetAccess, 0) \
    ENTRY(cuMemUnmap, 0) ENTRY(cuMemcpyDtoDAsync_v2, 0) ENTRY(cuMemcpyDtoD_v2, 0) ENTRY(cuMemcpyDtoHAsync_v2, 0) \
    ENTRY(cuMemcpyDtoH_v2, 0) ENTRY(cuMemcpyHtoDAsync_v2, 0) ENTRY(cuMemcpyHtoD_v2, 0) ENTRY(cuMemsetD32Async, 0) \
    ENTRY(cuMemsetD32_v2, 0) ENTRY(cuMemsetD8Async, 0) ENTRY(cuMemsetD8_v2, 0) ENTRY(cuModuleGetFunction, 0) \
    ENTRY(cuModuleLoadData, 0) ENTRY(cuModuleUnload, 0) ENTRY(cuMulticastAddDevice, 0) ENTRY(cuMulticastBindMem, 0) \
    ENTRY(cuMulticastCreate, 0) ENTRY(cuMulticastGetGranularity, 0) ENTRY(cuMulticastUnbind, 0) \
    ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor, 0) ENTRY(cuPointerGetAttribute, 0) \
    ENTRY(cuStreamBeginCapture_v2, 10010) ENTRY(cuStreamCreate, 0) ENTRY(cuStreamCreateWithPriority, 0) \
    ENTRY(cuStreamDestroy_v2, 0) ENTRY(cuStreamEndCapture, 0) ENTRY(cuStreamGetCaptureInfo_v2, 11030) \
    ENTRY(cuStreamGetCaptureInfo_v3, 12030) ENTRY(cuStreamGetCtx, 0) ENTRY(cuStreamGetId, 12000) ENTRY(cuStreamIsCapturing, 0) \
    ENTRY(cuStreamQuery, 0) ENTRY(cuStreamSynchronize, 0) ENTRY(cuStreamUpdateCaptureDependencies, 11030) \
    ENTRY(cuStreamUpdateCaptureDependencies_v2, 12030) ENTRY(cuStreamWaitEvent, 0) \
    ENTRY(cuThreadExchangeStreamCaptureMode, 0) ENTRY(cuUserObjectCreate, 0) ENTRY(cuUserObjectRelease, 0)

struct Symbol {
    const char* name;
    int since;
    void* function;
};
#define AS_SYMBOL(name, since) {#name, since, reinterpret_cast<void*>(&name)},
const Symbol symbols[] = {SIM_ENTRIES(AS_SYMBOL)};

#define SIM_ERRORS(NAME) \
    NAME(CUDA_SUCCESS) NAME(CUDA_ERROR_INVALID_VALUE) NAME(CUDA_ERROR_OUT_OF_MEMORY) NAME(CUDA_ERROR_NOT_INITIALIZED) \
    NAME(CUDA_ERROR_DEINITIALIZED) NAME(CUDA_ERROR_STUB_LIBRARY) NAME(CUDA_ERROR_DEVICE_UNAVAILABLE) \
    NAME(CUDA_ERROR_NO_DEVICE) NAME(CUDA_ERROR_INVALID_DEVICE) NAME(CUDA_ERROR_INVALID_IMAGE) \
    NAME(CUDA_ERROR_INVALID_CONTEXT) NAME(CUDA_ERROR_MAP_FAILED) NAME(CUDA_ERROR_UNMAP_FAILED) \
    NAME(CUDA_ERROR_ALREADY_MAPPED) NAME(CUDA_ERROR_NO_BINARY_FOR_GPU) NAME(CUDA_ERROR_NOT_MAPPED) \
    NAME(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED) NAME(CUDA_ERROR_INVALID_PTX) NAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION) \
    NAME(CUDA_ERROR_OPERATING_SYSTEM) NAME(CUDA_ERROR_INVALID_HANDLE) NAME(CUDA_ERROR_ILLEGAL_STATE) \
    NAME(CUDA_ERROR_NOT_FOUND) NAME(CUDA_ERROR_NOT_READY) NAME(CUDA_ERROR_ILLEGAL_ADDRESS) \
    NAME(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES) NAME(CUDA_ERROR_LAUNCH_TIMEOUT) NAME(CUDA_ERROR_CONTEXT_IS_DESTROYED) \
    NAME(CUDA_ERROR_MISALIGNED_ADDRESS) NAME(CUDA_ERROR_LAUNCH_FAILED) NAME(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE) \
    NAME(CUDA_ERROR_NOT_PERMITTED) NAME(CUDA_ERROR_NOT_SUPPORTED) NAME(CUDA_ERROR_SYSTEM_NOT_READY) \
    NAME(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH) NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) \
    NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED) NAME(CUDA_ERROR_STREAM_CAPTURE_MERGE) \
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED) NAME(CUDA_ERROR_STREAM_CAPTURE_UNJOINED) \
    NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION) NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) \
    NAME(CUDA_ERROR_CAPTURED_EVENT) NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD) NAME(CUDA_ERROR_TIMEOUT) \
    NAME(CUDA_ERROR_EXTERNAL_DEVICE) NAME(CUDA_ERROR_UNKNOWN)

const char* error_name(CUresult error) {
    switch (error) {
#define AS_CASE(name) \
    case name: return #name;
        SIM_ERRORS(AS_CASE)
    default: return nullptr;
    }
}

// True when `full` is `plain` or `plain_v<digit>`.
bool version_of(const char* full, const char* plain) {
    size_t length = strlen(plain);
    if (strncmp(full, plain, length) != 0) return false;
    const char* rest = full + length;
    return *rest == 0 || (rest[0] == '_' && rest[1] == 'v' && rest[2] >= '0' && rest[2] <= '9' && rest[3] == 0);
}

}  // namespace

CUresult cuGetErrorName(CUresult error, const char** text) {
    SIM_ENTRY(twoshot::sim::kNoInit | twoshot::sim::kInCallback);
    if (!text) return CUDA_ERROR_INVALID_VALUE;
    *text = error_name(error);
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    SIM_ENTRY(twoshot::sim::kNoInit | twoshot::sim::kInCallback);
    if (!text) return CUDA_ERROR_INVALID_VALUE;
    *text = error_name(error);
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetProcAddress_v2(const char* symbol, void** function, int cuda_version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* status) {
    SIM_ENTRY(twoshot::sim::kNoInit);
    if (!symbol || !function || (flags & ~3ull)) return CUDA_ERROR_INVALID_VALUE;
    const Symbol* best = nullptr;
    bool too_new = false;
    for (const Symbol& s : symbols) {
        if (!version_of(s.name, symbol)) continue;
        if (s.since > cuda_version) too_new = true;
        else if (!best || strcmp(s.name, best->name) > 0) best = &s;
    }
    *function = best ? best->function : nullptr;
    if (status)
        *status = best      ? CU_GET_PROC_ADDRESS_SUCCESS
                  : too_new ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                            : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return best ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
