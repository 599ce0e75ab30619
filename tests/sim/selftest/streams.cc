// Streams, events, capture, graphs, modules.
#include "selftest.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

static std::atomic<bool> gate{false};
static std::atomic<int> calls{0}, refused{0};

static void wait_for_gate(void*) {
    while (!gate) usleep(200);
}
static void count_call(void*) { calls++; }
static void call_driver(void*) {
    size_t free_bytes, total;
    if (cuMemGetInfo_v2(&free_bytes, &total) == CUDA_ERROR_NOT_PERMITTED) refused++;
}

static void order(const Args&) {
    start();
    CUstream a, b, free_running;
    CUevent begin, end;
    CUdeviceptr at;
    uint32_t seen = 0;
    OK(cuMemAlloc_v2(&at, 64));
    OK(cuMemsetD32_v2(at, 0, 16));
    OK(cuStreamCreate(&a, CU_STREAM_DEFAULT));
    OK(cuStreamCreate(&b, CU_STREAM_DEFAULT));
    OK(cuStreamCreateWithPriority(&free_running, CU_STREAM_NON_BLOCKING, 0));
    OK(cuEventCreate(&begin, 0));
    OK(cuEventCreate(&end, 0));
    OK(cuEventQuery(begin));                             // never recorded: complete
    OK(cuLaunchHostFunc(a, wait_for_gate, nullptr));
    OK(cuEventRecord(begin, a));
    OK(cuMemsetD32Async(at, 1, 1, nullptr));             // the legacy stream waits for a
    OK(cuLaunchHostFunc(b, count_call, nullptr));        // b waits for the legacy stream
    OK(cuLaunchHostFunc(free_running, call_driver, nullptr));
    OK(cuStreamSynchronize(free_running));               // this one waits for nobody
    TRUE(refused == 1);
    EXPECT(CUDA_ERROR_NOT_READY, cuStreamQuery(a));
    EXPECT(CUDA_ERROR_NOT_READY, cuStreamQuery(nullptr));
    EXPECT(CUDA_ERROR_NOT_READY, cuEventQuery(begin));
    OK(cuStreamWaitEvent(free_running, begin, 0));
    OK(cuEventRecord(end, free_running));
    usleep(20000);
    TRUE(calls == 0 && *reinterpret_cast<uint32_t*>(at) == 0);
    gate = true;
    OK(cuEventSynchronize(end));
    OK(cuStreamSynchronize(b));
    TRUE(calls == 1);
    OK(cuMemcpyDtoH_v2(&seen, at, 4));
    TRUE(seen == 1);
    float milliseconds = -1;
    OK(cuEventElapsedTime(&milliseconds, begin, end));
    TRUE(milliseconds >= 0);
    std::thread other([] {                               // each thread has a default stream of its own
        start();
        OK(cuLaunchHostFunc(CU_STREAM_PER_THREAD, count_call, nullptr));
        OK(cuStreamSynchronize(CU_STREAM_PER_THREAD));
        stop();
    });
    other.join();
    TRUE(calls == 2);
    for (CUstream s : {a, b, free_running}) OK(cuStreamDestroy_v2(s));
    EXPECT(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(reinterpret_cast<CUstream>(uintptr_t(0x990000))));
    OK(cuEventDestroy_v2(begin));
    OK(cuEventDestroy_v2(end));
    OK(cuMemFree_v2(at));
    stop();
}

// A fork to a second stream and back, replayed; the user object lives as long
// as graph or executable.
static void replay(const Args&) {
    start();
    CUstream s, t;
    CUevent fork, join;
    CUdeviceptr at;
    CUgraph graph, during;
    CUgraphExec exec;
    CUuserObject object;
    CUstreamCaptureStatus status;
    const CUgraphNode* tips;
    const CUgraphEdgeData* edges;
    cuuint64_t id;
    size_t count;
    OK(cuMemAlloc_v2(&at, 64));
    OK(cuMemsetD32_v2(at, 0, 16));
    OK(cuStreamCreate(&s, CU_STREAM_NON_BLOCKING));
    OK(cuStreamCreate(&t, CU_STREAM_NON_BLOCKING));
    OK(cuEventCreate(&fork, CU_EVENT_DISABLE_TIMING));
    OK(cuEventCreate(&join, CU_EVENT_DISABLE_TIMING));
    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(cuMemsetD32Async(at, 7, 1, s));
    OK(cuEventRecord(fork, s));
    OK(cuStreamWaitEvent(t, fork, 0));
    OK(cuLaunchHostFunc(t, count_call, nullptr));
    OK(cuMemcpyDtoDAsync_v2(at + 4, at, 4, s));
    OK(cuStreamGetCaptureInfo_v3(t, &status, &id, &during, &tips, &edges, &count));
    TRUE(status == CU_STREAM_CAPTURE_STATUS_ACTIVE && count == 1 && id != 0);
    OK(cuEventRecord(join, t));
    OK(cuStreamWaitEvent(s, join, 0));
    OK(cuStreamGetCaptureInfo_v2(s, &status, &id, &during, &tips, &count));
    TRUE(count == 2);
    OK(cuUserObjectCreate(&object, nullptr, count_call, 1, CU_USER_OBJECT_NO_DESTRUCTOR_SYNC));
    OK(cuGraphRetainUserObject(during, object, 1, CU_GRAPH_USER_OBJECT_MOVE));
    OK(cuStreamEndCapture(s, &graph));
    TRUE(graph == during && *reinterpret_cast<uint32_t*>(at) == 0);    // recorded, not done
    OK(cuGraphGetNodes(graph, nullptr, &count));
    TRUE(count == 3);
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    for (int i = 1; i <= 3; i++) {
        OK(cuMemsetD32_v2(at, 0, 2));
        OK(cuGraphLaunch(exec, s));
        OK(cuStreamSynchronize(s));
        TRUE(calls == i && reinterpret_cast<uint32_t*>(at)[1] == 7);
    }
    usleep(20000);
    TRUE(calls == 3);
    OK(cuGraphExecDestroy(exec));
    for (int i = 0; i < 1000 && calls == 3; i++) usleep(1000);
    TRUE(calls == 4);                                    // the destructor
    usleep(20000);
    OK(cuEventDestroy_v2(fork));
    OK(cuEventDestroy_v2(join));
    OK(cuStreamDestroy_v2(s));
    OK(cuStreamDestroy_v2(t));
    OK(cuMemFree_v2(at));
    stop();
}

static void capture_errors(const Args&) {
    start();
    CUstream s, t;
    CUevent event;
    CUdeviceptr at;
    CUgraph graph;
    CUstreamCaptureStatus status;
    OK(cuStreamCreate(&s, CU_STREAM_DEFAULT));
    OK(cuStreamCreate(&t, CU_STREAM_NON_BLOCKING));
    OK(cuEventCreate(&event, 0));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamBeginCapture_v2(nullptr, 0));

    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    EXPECT(CUDA_ERROR_ILLEGAL_STATE, cuStreamBeginCapture_v2(s, 0));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuMemAlloc_v2(&at, 64));
    OK(cuStreamIsCapturing(s, &status));
    TRUE(status == CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuLaunchHostFunc(s, count_call, nullptr));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));
    TRUE(graph == nullptr);

    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_RELAXED));
    OK(cuMemAlloc_v2(&at, 64));                          // allowed in relaxed mode
    OK(cuMemFree_v2(at));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuStreamIsCapturing(nullptr, &status));
    OK(cuStreamIsCapturing(s, &status));
    TRUE(status == CU_STREAM_CAPTURE_STATUS_ACTIVE);     // asking spoils nothing
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamSynchronize(s));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));

    CUgraphExec exec;
    OK(cuStreamBeginCapture_v2(t, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    OK(cuStreamEndCapture(t, &graph));
    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuGraphInstantiateWithFlags(&exec, graph, 0));    // as on an H100
    OK(cuGraphDestroy(graph));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));

    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuLaunchHostFunc(nullptr, count_call, nullptr));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));

    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    CUstreamCaptureMode relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
    OK(cuThreadExchangeStreamCaptureMode(&relaxed));
    TRUE(relaxed == CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuMemAlloc_v2(&at, 64));                          // this thread asked for it
    OK(cuThreadExchangeStreamCaptureMode(&relaxed));
    std::thread other([&] {
        start();
        CUdeviceptr mine;
        OK(cuMemAlloc_v2(&mine, 64));                    // another thread is not concerned
        OK(cuMemFree_v2(mine));
        CUgraph none;
        EXPECT(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, cuStreamEndCapture(s, &none));
        stop();
    });
    other.join();
    OK(cuEventRecord(event, s));
    OK(cuStreamWaitEvent(t, event, 0));
    OK(cuLaunchHostFunc(t, count_call, nullptr));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, cuStreamEndCapture(s, &graph));
    OK(cuStreamIsCapturing(t, &status));
    TRUE(status == CU_STREAM_CAPTURE_STATUS_NONE);
    OK(cuMemFree_v2(at));

    OK(cuEventRecord(event, t));
    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, cuStreamWaitEvent(s, event, 0));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));

    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_RELAXED));
    OK(cuEventRecord(event, s));
    EXPECT(CUDA_ERROR_CAPTURED_EVENT, cuEventQuery(event));
    EXPECT(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &graph));
    TRUE(calls == 0);
    OK(cuEventDestroy_v2(event));
    OK(cuStreamDestroy_v2(s));
    OK(cuStreamDestroy_v2(t));
    stop();
}

static void modules(const Args&) {
    start();
    struct {
        uint32_t magic;
        uint16_t version, header;
        uint64_t bytes;
        uint16_t kind, unknown;
        uint32_t head;
        uint64_t payload;
        uint32_t compressed, unknown2;
        uint16_t minor, major;
        uint32_t arch;
    } image = {0xBA55ED50, 1, 16, 32, 2, 0, 32, 0, 0, 0, 0, 0, 80};
    static_assert(sizeof image == 48, "no padding");
    CUmodule module;
    CUfunction function;
    char garbage[64] = "no fat binary";
    int value;
    EXPECT(CUDA_ERROR_INVALID_IMAGE, cuModuleLoadData(&module, garbage));
    EXPECT(CUDA_ERROR_NO_BINARY_FOR_GPU, cuModuleLoadData(&module, &image));
    image.arch = 90;
    OK(cuModuleLoadData(&module, &image));
    EXPECT(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&function, module, "nobody"));
    OK(cuModuleGetFunction(&function, module, "twoshot_oneshot_f32_2_uc"));
    OK(cuFuncLoad(function));
    OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function));
    TRUE(value == 512);
    OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&value, function, 512, 0));
    TRUE(value >= 1);
    OK(cuModuleUnload(module));
    EXPECT(CUDA_ERROR_INVALID_HANDLE, cuFuncLoad(function));

    void* entry = nullptr;
    int status;
    OK(cuGetProcAddress_v2("cuMemAlloc", &entry, 12000, 0, &status));
    TRUE(entry == dlsym(RTLD_DEFAULT, "cuMemAlloc_v2"));
    OK(cuGetProcAddress_v2("cuStreamGetCaptureInfo", &entry, 12000, 0, &status));
    TRUE(entry == dlsym(RTLD_DEFAULT, "cuStreamGetCaptureInfo_v2"));
    OK(cuGetProcAddress_v2("cuStreamGetCaptureInfo", &entry, 13000, 0, &status));
    TRUE(entry == dlsym(RTLD_DEFAULT, "cuStreamGetCaptureInfo_v3"));
    EXPECT(CUDA_ERROR_NOT_FOUND, cuGetProcAddress_v2("cuNoSuchThing", &entry, 13000, 0, &status));
    TRUE(status == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    stop();
}

// A handler registered before cuInit runs when the driver is gone already.
static void after_exit(const Args&) {
    atexit([] {
        int version;
        EXPECT(CUDA_ERROR_DEINITIALIZED, cuDriverGetVersion(&version));
        puts("refused");
    });
    start();
    stop();
}

static void symbol(const Args& a) { printf("%s\n", dlsym(RTLD_DEFAULT, a.option.c_str()) ? "present" : "absent"); }

const Scenario stream_scenarios[] = {
    {"order", order}, {"replay", replay}, {"capture-errors", capture_errors},
    {"modules", modules}, {"after-exit", after_exit}, {"symbol", symbol}, {nullptr, nullptr},
};
