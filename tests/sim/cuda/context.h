// Primary contexts and the thread's stack of current ones.
#pragma once

#include "sim.h"
#include "topology.h"

#include <memory>
#include <mutex>
#include <vector>

namespace twoshot::sim {
class Stream;
}

struct CUctx_st {
    int ordinal;
    twoshot::sim::GpuId gpu;
    uint64_t id = 0;                                         // another after a reset, as `retained`
    int retained = 0;                                        // guarded by the context table's mutex
    std::mutex mutex;
    std::shared_ptr<twoshot::sim::Stream> legacy;            // guarded by `mutex`
    std::vector<std::weak_ptr<twoshot::sim::Stream>> streams;  // every live stream, guarded by `mutex`
};

namespace twoshot::sim {

// The thread's current context if it is alive; otherwise the error to return.
CUresult current_context(CUcontext* context);
bool context_alive(CUcontext context);

// What the real driver may do in a call that frees memory or loads code: waits for all work of every device of this
// process, where `TWOSHOT_SIM_CALLS_WAIT` says so.
void call_waits();

// What was loaded into a context that is gone (module.cc).
void drop_modules(CUcontext context);

}  // namespace twoshot::sim
