// What the scenarios share: checks, and a way for processes of one session to
// meet. A scenario is run by `ranks` processes at once, each with its number.
#pragma once

#include "cuda_abi.h"
#include "nvml_abi.h"

#include <cstdio>
#include <cstdlib>
#include <string>

struct Args {
    int rank, ranks;
    std::string option;
};

struct Scenario {
    const char* name;
    void (*run)(const Args&);
};

// Ends the process unless the call gives this result.
#define EXPECT(result, call)                                                                             \
    do {                                                                                                 \
        int got_ = int(call);                                                                            \
        if (got_ != int(result)) {                                                                       \
            fprintf(stderr, "%s:%d: %s gave %d, not %d\n", __FILE__, __LINE__, #call, got_, int(result)); \
            exit(1);                                                                                     \
        }                                                                                                \
    } while (0)
#define OK(call) EXPECT(0, call)
#define TRUE(condition) EXPECT(1, (condition) ? 1 : 0)

constexpr size_t kUnit = 2u << 20;

void start();                                        // cuInit, context of device 0 made current
void stop();                                         // the context released
CUmemAllocationProp pinned(int handle_types, int device = 0);
CUdeviceptr map(CUmemGenericAllocationHandle handle, size_t bytes, size_t alignment = 0);
void unmap(CUdeviceptr at, size_t bytes);

// Between the processes: values by name, descriptors, a barrier.
void publish(const std::string& name, const void* bytes, size_t size);
void obtain(const std::string& name, void* bytes, size_t size);
void send_fd(const std::string& name, int fd, int times);
int receive_fd(const std::string& name);
void barrier(const Args& args, const char* name);

extern const Scenario memory_scenarios[], multicast_scenarios[], stream_scenarios[], kernel_scenarios[];
