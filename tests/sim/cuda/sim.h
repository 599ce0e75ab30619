// Common ground of the software driver: the ABI with visible symbols, and the
// gate that every exported entry passes. May touch nothing but its own state.
#pragma once

#pragma GCC visibility push(default)
#include "cuda_abi.h"
#pragma GCC visibility pop

#include <cstdint>

namespace twoshot::sim {

enum : unsigned {
    kNoInit = 1,         // works before cuInit
    kUnsafe = 2,         // refused while a capture forbids it (CUDA calls these "potentially unsafe")
    kInCallback = 4,     // allowed inside host functions
};

// One per exported entry: counts the call, applies the fault rules, and refuses
// what the driver would refuse whatever the arguments.
class Entry {
public:
    Entry(const char* name, unsigned flags);
    CUresult enter(const void* caller);  // an address in the code that calls

private:
    const char* name_;
    unsigned flags_;
    unsigned slot_;
    unsigned own_slot_;
};

// Set while a thread runs a host function or a user object's destructor.
bool in_callback();
struct CallbackScope {
    CallbackScope();
    ~CallbackScope();
};

bool initialised();

}  // namespace twoshot::sim

#define SIM_ENTRY(flags)                                              \
    do {                                                              \
        static twoshot::sim::Entry entry_(__func__, (flags));         \
        if (CUresult refused_ = entry_.enter(__builtin_return_address(0))) return refused_;      \
    } while (0)
