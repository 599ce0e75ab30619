#include "context.h"

#include "shared.h"
#include "stats.h"
#include "streams.h"

#include <atomic>
#include <cstdlib>

namespace twoshot::sim {
namespace {

std::mutex& table_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

// No two contexts of a process have had the same.
std::atomic<uint64_t> next_id{1};

// One primary context a device, made once and never freed: a stale handle must
// be told from a live one.
std::vector<CUcontext>& table() {
    static auto* contexts = [] {
        auto* v = new std::vector<CUcontext>;
        for (size_t i = 0; i < visible_gpus().size(); i++) {
            auto* c = new CUctx_st;
            c->ordinal = int(i);
            c->id = next_id++;
            c->gpu = visible_gpu(int(i));
            v->push_back(c);
        }
        return v;
    }();
    return *contexts;
}

bool known(CUcontext context) {
    for (CUcontext c : table())
        if (c == context) return true;
    return false;
}

thread_local std::vector<CUcontext> stack;

}  // namespace

bool context_alive(CUcontext context) {
    std::lock_guard<std::mutex> lock(table_mutex());
    return context && context->retained > 0;
}

CUresult current_context(CUcontext* context) {
    CUcontext top = stack.empty() ? nullptr : stack.back();
    if (!top) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context_alive(top)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    *context = top;
    return CUDA_SUCCESS;
}

void call_waits() {
    static const bool waits = getenv("TWOSHOT_SIM_CALLS_WAIT") != nullptr;
    if (!waits) return;
    for (CUcontext context : table()) drain(context);
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    SIM_ENTRY(0);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    if (device < 0 || size_t(device) >= table().size()) return CUDA_ERROR_INVALID_DEVICE;
    std::lock_guard<std::mutex> lock(table_mutex());
    table()[device]->retained++;
    stats::live(stats::kContexts, 1);
    *context = table()[device];
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    SIM_ENTRY(0);
    if (device < 0 || size_t(device) >= table().size()) return CUDA_ERROR_INVALID_DEVICE;
    CUcontext context = table()[device];
    std::shared_ptr<Stream> legacy;
    {
        std::lock_guard<std::mutex> lock(table_mutex());
        if (context->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
        stats::live(stats::kContexts, -1);
        if (--context->retained > 0) return CUDA_SUCCESS;
        std::lock_guard<std::mutex> inner(context->mutex);
        legacy = std::move(context->legacy);
        context->legacy = nullptr;
    }
    // What the program left in the context stays counted as live: it is a leak.
    if (legacy) {
        legacy->wait_idle();
        legacy->close();
    }
    return CUDA_SUCCESS;
}

// Everything of the context is gone, whoever holds a reference; its address comes again.
CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
    SIM_ENTRY(0);
    if (device < 0 || size_t(device) >= table().size()) return CUDA_ERROR_INVALID_DEVICE;
    CUcontext context = table()[device];
    drain(context);
    std::shared_ptr<Stream> legacy;
    {
        std::lock_guard<std::mutex> lock(table_mutex());
        stats::live(stats::kContexts, -context->retained);
        context->retained = 0;
        context->id = next_id++;
        std::lock_guard<std::mutex> inner(context->mutex);
        legacy = std::move(context->legacy);
        context->legacy = nullptr;
    }
    if (legacy) legacy->close();
    drop_modules(context);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
    SIM_ENTRY(0);
    if (!flags || !active) return CUDA_ERROR_INVALID_VALUE;
    if (device < 0 || size_t(device) >= table().size()) return CUDA_ERROR_INVALID_DEVICE;
    std::lock_guard<std::mutex> lock(table_mutex());
    *flags = 0;
    *active = table()[device]->retained > 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    SIM_ENTRY(0);
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    *context = stack.empty() ? nullptr : stack.back();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    SIM_ENTRY(0);
    if (context && !known(context)) return CUDA_ERROR_INVALID_CONTEXT;
    if (context && !context_alive(context)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (!stack.empty()) stack.pop_back();
    if (context) stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    SIM_ENTRY(0);
    if (!context || !known(context)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context_alive(context)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    SIM_ENTRY(0);
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id) {
    SIM_ENTRY(0);
    if (!id) return CUDA_ERROR_INVALID_VALUE;
    if (!context && !stack.empty()) context = stack.back();
    if (!context || !known(context)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context_alive(context)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    std::lock_guard<std::mutex> lock(table_mutex());
    *id = context->id;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    SIM_ENTRY(0);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    *device = context->ordinal;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
    SIM_ENTRY(kUnsafe);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    drain(context);
    return CUDA_SUCCESS;
}
