// Work put on streams that is no kernel: copies, fills, host functions.
#include "memory.h"
#include "streams.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

using namespace twoshot::sim;

// A copy's far end that the device must be able to reach.
static bool reachable(CUdeviceptr address, size_t bytes) { return bytes == 0 || device_range(address, bytes); }

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    SIM_ENTRY(0);
    if (!reachable(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, "memcpy", [=] { memcpy(reinterpret_cast<void*>(to), from, bytes); });
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    SIM_ENTRY(0);
    if (!reachable(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, "memcpy", [=] { memcpy(to, reinterpret_cast<void*>(from), bytes); });
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    SIM_ENTRY(0);
    if (!reachable(to, bytes) || !reachable(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, "memcpy", [=] { memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned int word, size_t words, CUstream stream) {
    SIM_ENTRY(0);
    if (to % 4 || !reachable(to, words * 4)) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, "memset", [=] { std::fill_n(reinterpret_cast<unsigned*>(to), words, word); });
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, CUstream stream) {
    SIM_ENTRY(0);
    if (!reachable(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, "memset", [=] { memset(reinterpret_cast<void*>(to), byte, bytes); });
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* user_data) {
    SIM_ENTRY(0);
    if (!function) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, "host", [=] {
        CallbackScope callback;
        function(user_data);
    });
}
