// Modules, functions, launches. The code of a module is never read: a function
// is the kernel of that name in the executor.
#include "context.h"
#include "exec.h"
#include "fatbin.h"
#include "handles.h"
#include "session.h"
#include "stats.h"
#include "streams.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace twoshot::sim {
namespace {

struct Function {
    CUcontext context;
    const Kernel* kernel;
    std::atomic<bool> loaded{false};
};

struct Module {
    CUcontext context;
    bool repeated = false;  // the context had one already
    std::mutex mutex;
    std::map<std::string, CUfunction> functions;
};

Handles<CUmodule, Module>& modules() {
    static auto* handles = new Handles<CUmodule, Module>(0x56);
    return *handles;
}
Handles<CUfunction, Function>& functions() {
    static auto* handles = new Handles<CUfunction, Function>(0x57);
    return *handles;
}

// A real driver follows the handle into freed memory.
CUresult gone(CUmodule handle) {
    if (modules().was(handle)) die("a module was used that is no longer loaded");
    return CUDA_ERROR_INVALID_HANDLE;
}

uint64_t number(const char* name) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 0) : 0;
}

int occupancy(const Kernel& kernel, unsigned threads) {
    unsigned warps = (threads + 31) / 32 * 32;
    unsigned by_threads = 2048 / warps, by_registers = 65536 / (unsigned(std::max(kernel.registers, 1)) * warps);
    unsigned blocks = std::min({by_threads, by_registers, 32u});
    // Kernels that push through a multicast address may need more of a multiprocessor than those that do not.
    static const unsigned unicast = unsigned(number("TWOSHOT_SIM_UNICAST_OCCUPANCY"));
    static const unsigned multicast = unsigned(number("TWOSHOT_SIM_MULTICAST_OCCUPANCY"));
    const char* wire = strrchr(kernel.name, '_');
    if (unicast && wire && !strcmp(wire, "_uc")) return int(unicast);
    if (multicast && wire && !strcmp(wire, "_mc")) return int(multicast);
    return int(blocks);
}

// The blocks that are free on a device, where it holds TWOSHOT_SIM_DEVICE_BLOCKS at once, whatever launches they are of.
std::atomic<int>* room_of(GpuId gpu) {
    static const int held = int(number("TWOSHOT_SIM_DEVICE_BLOCKS"));
    if (!held) return nullptr;
    static std::mutex mutex;
    static auto* rooms = new std::map<std::pair<int, int>, std::atomic<int>*>;
    std::lock_guard<std::mutex> lock(mutex);
    std::atomic<int>*& room = (*rooms)[{gpu.host, gpu.gpu}];
    if (!room) room = new std::atomic<int>(held);
    return room;
}

// How the executor is to run a launch of this process: in order, or in an order
// drawn from the seed, the rank and the launch's number.
Launch plan(const Kernel& kernel, GpuId gpu, unsigned grid, unsigned block) {
    static const uint64_t seed = number("TWOSHOT_SIM_SEED"), shuffle = number("TWOSHOT_SIM_SHUFFLE");
    static const uint64_t delay = number("TWOSHOT_SIM_DELAY_US"), cap = number("TWOSHOT_SIM_MAX_BLOCKS");
    static std::atomic<uint64_t> launches{0};
    Launch launch{};
    launch.grid = grid;
    launch.block = block;
    unsigned resident = unsigned(occupancy(kernel, block) * topology().gpu(gpu).sms);
    if (cap) resident = std::min(resident, unsigned(cap));
    launch.resident_blocks = std::max(resident, 1u);
    launch.room = room_of(gpu);
    launch.delay_us = unsigned(delay);
    if (shuffle) {
        uint64_t x = seed * 0x9E3779B97F4A7C15u + uint64_t(session().rank + 1) * 0xBF58476D1CE4E5B9u + ++launches;
        x ^= x >> 31;
        x *= 0x94D049BB133111EBu;
        launch.seed = (x ^ (x >> 29)) | 1;
    }
    return launch;
}

CUresult launch(CUfunction handle, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
                CUstream stream_handle, void** params, void** extra, bool cooperative, bool programmatic) {
    auto function = functions().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    std::shared_ptr<Stream> stream;
    if (CUresult r = find_stream(stream_handle, &stream)) return r;
    if (stream->context != function->context) return CUDA_ERROR_INVALID_HANDLE;
    const Kernel& kernel = *function->kernel;
    if (extra) die("cuLaunchKernel: `extra` is not simulated");
    if (!params || !params[0] || !grid[0] || !block[0]) return CUDA_ERROR_INVALID_VALUE;
    if (grid[1] != 1 || grid[2] != 1 || block[1] != 1 || block[2] != 1 || shared_bytes)
        die("cuLaunchKernel: only one-dimensional launches without dynamic shared memory are simulated");
    if (block[0] > unsigned(kernel.max_threads)) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    Launch how = plan(kernel, function->context->gpu, grid[0], block[0]);
    if (cooperative && grid[0] > how.resident_blocks) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    // A first launch loads the function, which may wait for the whole device.
    if (!function->loaded.exchange(true)) {
        stats::total(stats::kLazyLoads);
        call_waits();
    }
    std::vector<uint64_t> copy((kernel.param_bytes + 7) / 8);
    memcpy(copy.data(), params[0], kernel.param_bytes);
    stats::total(stats::kLaunches);
    static const bool told = number("TWOSHOT_SIM_LAUNCHES") != 0;
    if (told) {
        std::string line = std::string("launch ") + kernel.name + " grid " + std::to_string(grid[0]) + " block " +
                           std::to_string(block[0]) + (programmatic ? " programmatic" : "") + " words";
        for (uint64_t word : copy) line += " " + std::to_string(word);
        dprintf(2, "%s\n", line.c_str());
    }
    return put(stream_handle, "kernel", [&kernel, how, copy] { run(kernel, how, copy.data()); });
}

}  // namespace

void drop_modules(CUcontext context) {
    for (auto& [handle, module] : modules().all()) {
        if (module->context != context) continue;
        for (auto& entry : module->functions) functions().remove(entry.second);
        modules().remove(handle);
        stats::live(stats::kModules, -1);
        stats::live(stats::kRepeatedModules, -int64_t(module->repeated));
    }
}

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    SIM_ENTRY(kUnsafe);
    CUcontext context;
    if (CUresult r = current_context(&context)) return r;
    if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
    if (CUresult r = fatbin_fits(image, topology().gpu(context->gpu))) return r;
    call_waits();
    auto made = std::make_shared<Module>();
    made->context = context;
    for (auto& [handle, other] : modules().all()) made->repeated |= other->context == context;
    stats::live(stats::kRepeatedModules, made->repeated);
    *module = modules().add(std::move(made));
    stats::live(stats::kModules, 1);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule handle) {
    SIM_ENTRY(kUnsafe);
    call_waits();
    auto module = modules().remove(handle);
    if (!module) return gone(handle);
    for (auto& entry : module->functions) functions().remove(entry.second);
    stats::live(stats::kModules, -1);
    stats::live(stats::kRepeatedModules, -int(module->repeated));
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
    SIM_ENTRY(0);
    if (!function || !name) return CUDA_ERROR_INVALID_VALUE;
    auto module = modules().find(handle);
    if (!module) return gone(handle);
    const Kernel* kernel = find_kernel(name);
    if (!kernel) return CUDA_ERROR_NOT_FOUND;
    std::lock_guard<std::mutex> lock(module->mutex);
    CUfunction& known = module->functions[name];
    if (!known) {
        auto made = std::make_shared<Function>();
        made->context = module->context;
        made->kernel = kernel;
        known = functions().add(std::move(made));
    }
    *function = known;
    return CUDA_SUCCESS;
}

CUresult cuFuncLoad(CUfunction handle) {
    SIM_ENTRY(kUnsafe);
    auto function = functions().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (!function->loaded) call_waits();
    function->loaded = true;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
    SIM_ENTRY(0);
    auto function = functions().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (!value) return CUDA_ERROR_INVALID_VALUE;
    const Gpu& gpu = topology().gpu(function->context->gpu);
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->kernel->max_threads; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->kernel->registers; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = 0; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = gpu.cc_major * 10 + gpu.cc_minor; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int) {
    SIM_ENTRY(0);
    if (!functions().find(handle)) return CUDA_ERROR_INVALID_HANDLE;
    bool settable = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ||
                    attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    return settable ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int block_size, size_t) {
    SIM_ENTRY(0);
    auto function = functions().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (!blocks || block_size <= 0) return CUDA_ERROR_INVALID_VALUE;
    *blocks = block_size > function->kernel->max_threads ? 0 : occupancy(*function->kernel, unsigned(block_size));
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                        unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared_bytes,
                        CUstream stream, void** params, void** extra) {
    SIM_ENTRY(0);
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    return launch(function, grid, block, shared_bytes, stream, params, extra, false, false);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** params, void** extra) {
    SIM_ENTRY(0);
    if (!c || (c->numAttrs && !c->attrs)) return CUDA_ERROR_INVALID_VALUE;
    bool cooperative = false, programmatic = false;
    for (unsigned i = 0; i < c->numAttrs; i++) {
        const CUlaunchAttribute& a = c->attrs[i];
        switch (a.id) {
        case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:  // a hint: starting late is always right
            programmatic = a.value.programmaticStreamSerializationAllowed != 0;
            break;
        case CU_LAUNCH_ATTRIBUTE_IGNORE:
        case CU_LAUNCH_ATTRIBUTE_PRIORITY:
        case CU_LAUNCH_ATTRIBUTE_MEM_SYNC_DOMAIN:
        case CU_LAUNCH_ATTRIBUTE_NVLINK_UTIL_CENTRIC_SCHEDULING: break;
        case CU_LAUNCH_ATTRIBUTE_COOPERATIVE: cooperative = a.value.cooperative != 0; break;
        default: die("cuLaunchKernelEx: attribute %d is not simulated", a.id);
        }
    }
    const unsigned grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ}, block[3] = {c->blockDimX, c->blockDimY, c->blockDimZ};
    return launch(function, grid, block, c->sharedMemBytes, c->hStream, params, extra, cooperative, programmatic);
}
