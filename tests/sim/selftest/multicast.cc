// Multicast objects between processes.
#include "selftest.h"

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <vector>

extern "C" void twoshot_sim_multimem_store(uint64_t va, const uint32_t words[4]);
extern "C" unsigned twoshot_sim_multimem_load(uint64_t va, uint32_t words[][4], unsigned most);

static CUmulticastObjectProp object_of(int devices, int handle_types) {
    CUmulticastObjectProp prop = {};
    prop.numDevices = unsigned(devices);
    prop.size = kUnit;
    prop.handleTypes = unsigned(handle_types);
    return prop;
}

// Every rank stores its line; every rank's own memory then holds all lines. A load finds what each has in its own.
static void fanout(const Args& a) {
    start();
    bool fabric = a.option == "fabric";
    int type = fabric ? CU_MEM_HANDLE_TYPE_FABRIC : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemGenericAllocationHandle object, memory;
    CUmemFabricHandle name;
    int fd = -1;
    if (a.rank == 0) {
        CUmulticastObjectProp prop = object_of(a.ranks, type);
        OK(cuMulticastCreate(&object, &prop));
        if (fabric) {
            OK(cuMemExportToShareableHandle(&name, object, type, 0));
            publish("name", &name, sizeof name);
        } else {
            OK(cuMemExportToShareableHandle(&fd, object, type, 0));
            send_fd("fd", fd, a.ranks - 1);
            close(fd);
        }
    } else if (fabric) {
        obtain("name", &name, sizeof name);
        OK(cuMemImportFromShareableHandle(&object, &name, type));
    } else {
        fd = receive_fd("fd");
        OK(cuMemImportFromShareableHandle(&object, reinterpret_cast<void*>(intptr_t(fd)), type));
        close(fd);
    }
    if (a.rank == a.ranks - 1) usleep(50000);             // the others' binds wait for this one's device
    OK(cuMulticastAddDevice(object, 0));
    CUmemAllocationProp prop = pinned(0);
    OK(cuMemCreate(&memory, kUnit, &prop, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 0, memory, 0, kUnit, 0));   // not shareable
    OK(cuMemRelease(memory));
    prop = pinned(type);
    OK(cuMemCreate(&memory, kUnit, &prop, 0));
    OK(cuMulticastBindMem(object, 0, memory, 0, kUnit, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 0, memory, 0, kUnit, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastAddDevice(object, 0));
    CUdeviceptr own = map(memory, kUnit), all = map(object, kUnit);
    barrier(a, "bound");
    uint32_t line[4] = {uint32_t(a.rank), 1, 2, 3};
    twoshot_sim_multimem_store(all + 16 * size_t(a.rank), line);
    barrier(a, "stored");
    for (int r = 0; r < a.ranks; r++) {
        line[0] = uint32_t(r);
        OK(memcmp(reinterpret_cast<void*>(own + 16 * size_t(r)), line, 16));
    }
    uint32_t mine[4] = {uint32_t(a.rank), uint32_t(a.rank) + 1, 7, 7}, seen[256][4], sum[4] = {};
    memcpy(reinterpret_cast<void*>(own + 8192), mine, 16);
    barrier(a, "laid out");
    unsigned memories = twoshot_sim_multimem_load(all + 8192, seen, 256);
    EXPECT(a.ranks, int(memories));
    for (unsigned m = 0; m < memories; m++)
        for (int w = 0; w < 4; w++) sum[w] += seen[m][w];
    uint32_t n = uint32_t(a.ranks), expected[4] = {n * (n - 1) / 2, n * (n + 1) / 2, 7 * n, 7 * n};
    OK(memcmp(sum, expected, 16));
    barrier(a, "read");
    unmap(all, kUnit);
    if (a.rank % 2) OK(cuMulticastUnbind(object, 0, 0, kUnit));   // the others leave it to the release
    OK(cuMemRelease(object));
    unmap(own, kUnit);
    OK(cuMemRelease(memory));
    stop();
}

// One object of four units, mapped before anything is bound; memory comes and goes at its parts.
static void parts(const Args&) {
    start();
    CUmulticastObjectProp prop = object_of(1, 0);
    CUmemAllocationProp plain = pinned(0);
    CUmemGenericAllocationHandle object, memory[3];
    prop.size = 4 * kUnit + 1;
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastCreate(&object, &prop));
    prop.size = 4 * kUnit;
    OK(cuMulticastCreate(&object, &prop));
    OK(cuMulticastAddDevice(object, 0));
    CUdeviceptr all = map(object, 4 * kUnit), own[3];
    for (int i = 0; i < 3; i++) {
        OK(cuMemCreate(&memory[i], (i == 2 ? 2 : 1) * kUnit, &plain, 0));
        own[i] = map(memory[i], (i == 2 ? 2 : 1) * kUnit);
    }
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 4096, memory[0], 0, kUnit, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 0, memory[0], 0, 4096, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 0, memory[0], kUnit, kUnit, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 4 * kUnit, memory[0], 0, kUnit, 0));
    OK(cuMulticastBindMem(object, kUnit, memory[0], 0, kUnit, 0));
    // A range that is bound already, or reaches into one.
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, kUnit, memory[1], 0, kUnit, 0));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastBindMem(object, 0, memory[2], 0, 2 * kUnit, 0));
    OK(cuMulticastBindMem(object, 3 * kUnit, memory[1], 0, kUnit, 0));
    uint32_t lines[2][4] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
    twoshot_sim_multimem_store(all + kUnit + 32, lines[0]);
    twoshot_sim_multimem_store(all + 3 * kUnit + 32, lines[1]);
    for (int i = 0; i < 2; i++) OK(memcmp(reinterpret_cast<void*>(own[i] + 32), lines[i], 16));
    // What is unbound is a whole binding, no less and no more.
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastUnbind(object, 0, 0, kUnit));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastUnbind(object, 0, 0, 4 * kUnit));
    OK(cuMulticastUnbind(object, 0, kUnit, kUnit));
    EXPECT(CUDA_ERROR_INVALID_VALUE, cuMulticastUnbind(object, 0, kUnit, kUnit));
    // The place is free for other memory, also for more of it; the other part stays what it was.
    OK(cuMulticastBindMem(object, kUnit, memory[2], 0, 2 * kUnit, 0));
    twoshot_sim_multimem_store(all + 2 * kUnit, lines[1]);
    twoshot_sim_multimem_store(all + 3 * kUnit + 32, lines[0]);
    OK(memcmp(reinterpret_cast<void*>(own[2] + kUnit), lines[1], 16));
    OK(memcmp(reinterpret_cast<void*>(own[1] + 32), lines[0], 16));
    OK(memcmp(reinterpret_cast<void*>(own[0] + 32), lines[0], 16));
    OK(cuMulticastUnbind(object, 0, kUnit, 2 * kUnit));
    OK(cuMulticastUnbind(object, 0, 3 * kUnit, kUnit));
    unmap(all, 4 * kUnit);
    OK(cuMemRelease(object));
    for (int i = 0; i < 3; i++) {
        unmap(own[i], (i == 2 ? 2 : 1) * kUnit);
        OK(cuMemRelease(memory[i]));
    }
    stop();
}

// A store where nothing is bound is reported, though another part of the object is bound.
static void unbound_store(const Args&) {
    start();
    CUmemGenericAllocationHandle object, memory;
    CUmulticastObjectProp prop = object_of(1, 0);
    prop.size = 2 * kUnit;
    CUmemAllocationProp plain = pinned(0);
    OK(cuMulticastCreate(&object, &prop));
    OK(cuMulticastAddDevice(object, 0));
    OK(cuMemCreate(&memory, kUnit, &plain, 0));
    OK(cuMulticastBindMem(object, 0, memory, 0, kUnit, 0));
    CUdeviceptr all = map(object, 2 * kUnit);
    uint32_t line[4] = {};
    twoshot_sim_multimem_store(all, line);
    twoshot_sim_multimem_store(all + kUnit, line);
}

// So is a load.
static void unbound_load(const Args&) {
    start();
    CUmemGenericAllocationHandle object;
    CUmulticastObjectProp prop = object_of(1, 0);
    OK(cuMulticastCreate(&object, &prop));
    OK(cuMulticastAddDevice(object, 0));
    uint32_t seen[1][4];
    twoshot_sim_multimem_load(map(object, kUnit), seen, 1);
}

static void alone(CUdeviceptr* all) {
    start();
    CUmemGenericAllocationHandle object, memory;
    CUmulticastObjectProp prop = object_of(1, 0);
    CUmemAllocationProp plain = pinned(0);
    OK(cuMulticastCreate(&object, &prop));
    OK(cuMulticastAddDevice(object, 0));
    OK(cuMemCreate(&memory, kUnit, &plain, 0));
    OK(cuMulticastBindMem(object, 0, memory, 0, kUnit, 0));
    *all = map(object, kUnit);
}

static void ordinary_store(const Args&) {
    CUdeviceptr all;
    alone(&all);
    *reinterpret_cast<volatile uint32_t*>(all + 32) = 1;
}

static void ordinary_load(const Args&) {
    CUdeviceptr all;
    alone(&all);
    printf("%u\n", *reinterpret_cast<volatile uint32_t*>(all));
}

// Each rank of the domain takes objects until the switch is full.
static void slots(const Args& a) {
    start();
    int want = atoi(a.option.c_str());
    CUmulticastObjectProp prop = object_of(1, 0);
    std::vector<CUmemGenericAllocationHandle> held;
    CUmemGenericAllocationHandle one;
    for (int i = 0; i < want; i++) {
        OK(cuMulticastCreate(&one, &prop));
        held.push_back(one);
    }
    EXPECT(CUDA_ERROR_OUT_OF_MEMORY, cuMulticastCreate(&one, &prop));
    OK(cuMemRelease(held.back()));
    OK(cuMulticastCreate(&held.back(), &prop));
    for (auto handle : held) OK(cuMemRelease(handle));
    stop();
}

// What a dead process held in the switch is free again.
static void survivor(const Args& a) {
    start();
    CUmulticastObjectProp prop = object_of(1, 0);
    CUmemGenericAllocationHandle object;
    if (a.rank == 1) {
        OK(cuMulticastCreate(&object, &prop));
        EXPECT(CUDA_ERROR_OUT_OF_MEMORY, cuMulticastCreate(&object, &prop));
        barrier(a, "taken");
        kill(getpid(), SIGKILL);
    }
    barrier(a, "taken");
    while (cuMulticastCreate(&object, &prop) == CUDA_ERROR_OUT_OF_MEMORY) usleep(1000);
    OK(cuMemRelease(object));
    stop();
}

static void unsupported(const Args&) {
    start();
    CUmemGenericAllocationHandle object;
    CUmulticastObjectProp prop = object_of(2, 0);
    EXPECT(CUDA_ERROR_NOT_SUPPORTED, cuMulticastCreate(&object, &prop));
    stop();
}

static void bind_alone(const Args&) {
    start();
    CUmemGenericAllocationHandle object, memory;
    CUmulticastObjectProp prop = object_of(2, 0);
    CUmemAllocationProp plain = pinned(0);
    OK(cuMulticastCreate(&object, &prop));
    OK(cuMulticastAddDevice(object, 0));
    OK(cuMemCreate(&memory, kUnit, &plain, 0));
    EXPECT(CUDA_ERROR_TIMEOUT, cuMulticastBindMem(object, 0, memory, 0, kUnit, 0));
    OK(cuMemRelease(memory));
    OK(cuMemRelease(object));
    stop();
}

const Scenario multicast_scenarios[] = {
    {"fanout", fanout}, {"ordinary-store", ordinary_store}, {"ordinary-load", ordinary_load}, {"slots", slots},
    {"survivor", survivor}, {"parts", parts}, {"unbound-store", unbound_store}, {"unbound-load", unbound_load},
    {"unsupported", unsupported}, {"bind-alone", bind_alone}, {nullptr, nullptr},
};
