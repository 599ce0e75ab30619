// The project's kernels under this driver: all ranks share their windows and
// reduce, eagerly and by replaying a graph.
#include "selftest.h"

#include "args.h"

#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

static uint32_t code_header[] = {0xBA55ED50, 0x00100001, 32, 0, 2, 32, 0, 0, 0, 0, 0, 90};

namespace {

struct Domain {
    Args a;
    CUmemGenericAllocationHandle own, object = 0;
    std::vector<CUmemGenericAllocationHandle> peers;
    CUdeviceptr windows = 0, multicast = 0;

    void open(bool with_multicast) {
        CUmemAllocationProp prop = pinned(CU_MEM_HANDLE_TYPE_FABRIC);
        CUmemFabricHandle name;
        OK(cuMemCreate(&own, kUnit, &prop, 0));
        OK(cuMemExportToShareableHandle(&name, own, CU_MEM_HANDLE_TYPE_FABRIC, 0));
        size_t all = kUnit * size_t(a.ranks);
        OK(cuMemAddressReserve(&windows, all, 0, 0, 0));
        CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
        OK(cuMemMap(windows + kUnit * size_t(a.rank), kUnit, 0, own, 0));
        OK(cuMemSetAccess(windows + kUnit * size_t(a.rank), kUnit, &access, 1));
        OK(cuMemsetD8_v2(windows + kUnit * size_t(a.rank), 0, TWOSHOT_HEADER_BYTES));
        OK(cuMemsetD32_v2(windows + kUnit * size_t(a.rank) + TWOSHOT_HEADER_BYTES, 0xFFFAFFFA,
                         (kUnit - TWOSHOT_HEADER_BYTES) / 4));
        publish("window." + std::to_string(a.rank), &name, sizeof name);
        for (int r = 0; r < a.ranks; r++) {
            if (r == a.rank) continue;
            CUmemGenericAllocationHandle peer;
            obtain("window." + std::to_string(r), &name, sizeof name);
            OK(cuMemImportFromShareableHandle(&peer, &name, CU_MEM_HANDLE_TYPE_FABRIC));
            OK(cuMemMap(windows + kUnit * size_t(r), kUnit, 0, peer, 0));
            peers.push_back(peer);
        }
        OK(cuMemSetAccess(windows, all, &access, 1));
        if (with_multicast) open_multicast();
        barrier(a, "open");
    }

    void open_multicast() {
        CUmemFabricHandle name;
        if (a.rank == 0) {
            CUmulticastObjectProp prop = {};
            prop.numDevices = unsigned(a.ranks);
            prop.size = kUnit;
            prop.handleTypes = CU_MEM_HANDLE_TYPE_FABRIC;
            OK(cuMulticastCreate(&object, &prop));
            OK(cuMemExportToShareableHandle(&name, object, CU_MEM_HANDLE_TYPE_FABRIC, 0));
            publish("object", &name, sizeof name);
        } else {
            obtain("object", &name, sizeof name);
            OK(cuMemImportFromShareableHandle(&object, &name, CU_MEM_HANDLE_TYPE_FABRIC));
        }
        OK(cuMulticastAddDevice(object, 0));
        OK(cuMulticastBindMem(object, 0, own, 0, kUnit, 0));
        multicast = map(object, kUnit);
    }

    void close() {
        barrier(a, "used");
        if (multicast) {
            unmap(multicast, kUnit);
            OK(cuMulticastUnbind(object, 0, 0, kUnit));
            OK(cuMemRelease(object));
        }
        OK(cuMemUnmap(windows, kUnit * size_t(a.ranks)));
        OK(cuMemAddressFree(windows, kUnit * size_t(a.ranks)));
        for (auto peer : peers) OK(cuMemRelease(peer));
        barrier(a, "closed");
        OK(cuMemRelease(own));
    }
};

}  // namespace

// Option: the kernel's name.
static void allreduce(const Args& a) {
    start();
    bool with_multicast = a.option.find("_mc") != std::string::npos;
    constexpr size_t kCount = 1000;
    Domain domain{a, 0, 0, {}, 0, 0};
    domain.open(with_multicast);
    CUmodule module;
    CUfunction function;
    CUstream stream;
    CUdeviceptr in, out;
    void* control;
    OK(cuModuleLoadData(&module, code_header));
    OK(cuModuleGetFunction(&function, module, a.option.c_str()));
    OK(cuFuncLoad(function));
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuMemAlloc_v2(&in, kCount * 4));
    OK(cuMemAlloc_v2(&out, kCount * 4));
    OK(cuMemHostAlloc(&control, sizeof(TwoshotControl), CU_MEMHOSTALLOC_DEVICEMAP));
    memset(control, 0, sizeof(TwoshotControl));
    float* values = reinterpret_cast<float*>(in);
    for (size_t i = 0; i < kCount; i++) values[i] = float(a.rank + 1) * float(i);

    TwoshotArgs args = {};
    args.in = in;
    args.out = out;
    args.count = kCount;
    args.windows = domain.windows;
    args.window_stride = kUnit;
    args.multicast = domain.multicast;
    args.control = uint64_t(control);
    args.stage_bytes = (kUnit - TWOSHOT_HEADER_BYTES) / 3 / 128 * 128;
    args.timeout_ns = 30ull * 1000000000;
    args.rank = uint32_t(a.rank);
    args.ranks = uint32_t(a.ranks);
    void* params[] = {&args};
    CUlaunchAttribute overlap = {};
    overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    overlap.value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig config = {};
    config.gridDimX = 2;
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
    config.blockDimX = 64;
    config.hStream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;

    float ranks_sum = float(a.ranks * (a.ranks + 1) / 2);
    auto check = [&] {
        OK(cuStreamSynchronize(stream));
        TRUE(static_cast<TwoshotControl*>(control)->fault == 0);
        const float* sum = reinterpret_cast<const float*>(out);
        for (size_t i = 0; i < kCount; i++) TRUE(sum[i] == ranks_sum * float(i));
    };
    for (int call = 0; call < 4; call++) {
        OK(cuMemsetD8Async(out, 0, kCount * 4, stream));
        OK(cuLaunchKernelEx(&config, function, params, nullptr));
        check();
    }
    CUgraph graph;
    CUgraphExec exec;
    OK(cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL));
    OK(cuMemsetD8Async(out, 0, kCount * 4, stream));
    OK(cuLaunchKernelEx(&config, function, params, nullptr));
    OK(cuLaunchKernelEx(&config, function, params, nullptr));
    OK(cuStreamEndCapture(stream, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    for (int call = 0; call < 3; call++) {
        OK(cuGraphLaunch(exec, stream));
        check();
    }
    OK(cuGraphExecDestroy(exec));
    OK(cuGraphDestroy(graph));
    OK(cuStreamDestroy_v2(stream));
    OK(cuModuleUnload(module));
    OK(cuMemFree_v2(in));
    OK(cuMemFree_v2(out));
    OK(cuMemFreeHost(control));
    domain.close();
    stop();
}

const Scenario kernel_scenarios[] = {{"allreduce", allreduce}, {nullptr, nullptr}};
