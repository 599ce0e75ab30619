// Multicast objects between processes.
#include "selftest.h"

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <vector>

extern "C" void twoshot_sim_multimem_store(uint64_t va, const uint32_t words[4]);

static CUmulticastObjectProp object_of(int devices, int handle_types) {
    CUmulticastObjectProp prop = {};
    prop.numDevices = unsigned(devices);
    prop.size = kUnit;
    prop.handleTypes = unsigned(handle_types);
    return prop;
}

// Every rank stores its line; every rank's own memory then holds all lines.
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
    barrier(a, "read");
    unmap(all, kUnit);
    if (a.rank % 2) OK(cuMulticastUnbind(object, 0, 0, kUnit));   // the others leave it to the release
    OK(cuMemRelease(object));
    unmap(own, kUnit);
    OK(cuMemRelease(memory));
    stop();
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
    {"survivor", survivor},
    {"unsupported", unsupported}, {"bind-alone", bind_alone}, {nullptr, nullptr},
};
