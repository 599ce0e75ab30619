// The gate of every exported entry, and the process's start and end.
#include "capture.h"
#include "faults.h"
#include "memory.h"
#include "session.h"
#include "shared.h"
#include "sim.h"
#include "stats.h"
#include "topology.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>

namespace twoshot::sim {
namespace {

std::atomic<bool> ready{false};
std::atomic<bool> exiting{false};
thread_local int callback_depth = 0;

// Runs before every handler and destructor that was registered before cuInit:
// whoever calls after it calls a driver that is already gone.
void at_exit() {
    refresh_fd_count();
    exiting = true;
}

}  // namespace

Entry::Entry(const char* name, unsigned flags) : name_(name), flags_(flags) {
    slot_ = stats::slot((std::string("call.") + name).c_str());
    own_slot_ = faults::filtered() ? stats::slot((std::string("own.") + name).c_str()) : slot_;
}

CUresult Entry::enter(const void* caller) {
    stats::bump(slot_, 1);
    bool concerned = faults::concerns(caller);
    if (faults::filtered() && concerned) stats::bump(own_slot_, 1);
    if (exiting.load(std::memory_order_relaxed)) {
        stats::total(stats::kCallsAfterExit);
        return CUDA_ERROR_DEINITIALIZED;
    }
    if (concerned && faults::any())
        if (int code = faults::apply(name_)) return code;
    if (callback_depth && !(flags_ & kInCallback)) return CUDA_ERROR_NOT_PERMITTED;
    if (flags_ & kNoInit) return CUDA_SUCCESS;
    if (!initialised()) return CUDA_ERROR_NOT_INITIALIZED;
    if (int code = faults::sticky()) return code;
    if (flags_ & kUnsafe) return capture_refuses_unsafe_call();
    return CUDA_SUCCESS;
}

bool in_callback() { return callback_depth != 0; }
CallbackScope::CallbackScope() { callback_depth++; }
CallbackScope::~CallbackScope() { callback_depth--; }
bool initialised() { return ready.load(std::memory_order_acquire); }

}  // namespace twoshot::sim

using namespace twoshot::sim;

CUresult cuInit(unsigned int flags) {
    SIM_ENTRY(kNoInit);
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (visible_gpus().empty()) return CUDA_ERROR_NO_DEVICE;
    static std::once_flag once;
    std::call_once(once, [] {
        stats::open_file(session().path(("stats." + std::to_string(getpid())).c_str()).c_str());
        shared_open();
        std::atexit(at_exit);
        ready = true;
    });
    return CUDA_SUCCESS;
}

// For the other simulated libraries: count a call and apply the fault rules.
extern "C" __attribute__((visibility("default"))) int twoshot_sim_enter(const char* name) {
    static auto* mutex = new std::mutex;
    static auto* slots = new std::unordered_map<std::string, unsigned>;
    unsigned slot;
    {
        std::lock_guard<std::mutex> lock(*mutex);
        auto [at, fresh] = slots->try_emplace(name, 0u);
        if (fresh) at->second = stats::slot((std::string("call.") + name).c_str());
        slot = at->second;
    }
    stats::bump(slot, 1);
    return faults::any() && !faults::filtered() ? faults::apply(name) : 0;
}
