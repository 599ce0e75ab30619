// The software NVML: what the topology says of the host's GPUs. Unlike CUDA it
// sees all of them, whatever CUDA_VISIBLE_DEVICES says. Compiled together with
// the driver's session, topology, faults and statistics.
#pragma GCC visibility push(default)
#include "nvml_abi.h"
#pragma GCC visibility pop

#include "faults.h"
#include "session.h"
#include "stats.h"
#include "topology.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>

using namespace twoshot::sim;

namespace {

std::atomic<int> users{0};

// A device handle is 0x7000 + index: no pointer, and nothing else's handle.
constexpr uintptr_t kHandles = 0x7000;

const Host& host() { return topology().hosts[session().host]; }

nvmlDevice_t handle_of(int gpu) { return reinterpret_cast<nvmlDevice_t>(kHandles + uintptr_t(gpu)); }

bool gpu_of(nvmlDevice_t device, int* gpu) {
    uintptr_t value = reinterpret_cast<uintptr_t>(device);
    if (value < kHandles || value - kHandles >= host().gpus.size()) return false;
    *gpu = int(value - kHandles);
    return true;
}

std::string uuid_text(int gpu) {
    auto u = gpu_uuid({session().host, gpu});
    char text[48];
    int at = snprintf(text, sizeof text, "GPU-");
    for (int i = 0; i < 16; i++)
        at += snprintf(text + at, sizeof text - size_t(at), i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", u[i]);
    return text;
}

nvmlReturn_t copy_text(const std::string& from, char* to, unsigned length) {
    if (!to) return NVML_ERROR_INVALID_ARGUMENT;
    if (length <= from.size()) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(to, from.c_str());
    return NVML_SUCCESS;
}

nvmlReturn_t enter(const char* name, unsigned slot, bool wants_init) {
    stats::bump(slot, 1);
    if (faults::any())
        if (int code = faults::apply(name)) return code;
    return wants_init && users == 0 ? NVML_ERROR_UNINITIALIZED : NVML_SUCCESS;
}

#define NVML_ENTRY(wants_init)                                                                 \
    do {                                                                                       \
        static const unsigned slot_ = stats::slot((std::string("call.") + __func__).c_str());  \
        if (nvmlReturn_t refused_ = enter(__func__, slot_, (wants_init))) return refused_;     \
    } while (0)

}  // namespace

nvmlReturn_t nvmlInit_v2(void) {
    NVML_ENTRY(false);
    stats::open_file(session().path(("nvml-stats." + std::to_string(getpid())).c_str()).c_str());
    (void)host();
    users++;
    stats::live(stats::kNvmlInits, 1);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlShutdown(void) {
    NVML_ENTRY(true);
    users--;
    stats::live(stats::kNvmlInits, -1);
    return NVML_SUCCESS;
}

const char* nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
    case NVML_SUCCESS: return "Success";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char* version, unsigned int length) {
    NVML_ENTRY(true);
    return copy_text("580.00.sim", version, length);
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int* count) {
    NVML_ENTRY(true);
    if (!count) return NVML_ERROR_INVALID_ARGUMENT;
    *count = unsigned(host().gpus.size());
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t* device) {
    NVML_ENTRY(true);
    if (!device || index >= host().gpus.size()) return NVML_ERROR_INVALID_ARGUMENT;
    *device = handle_of(int(index));
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char* bus_id, nvmlDevice_t* device) {
    NVML_ENTRY(true);
    if (!bus_id || !device) return NVML_ERROR_INVALID_ARGUMENT;
    int gpu = gpu_of_bus_id(bus_id, int(host().gpus.size()));
    if (gpu < 0) return NVML_ERROR_NOT_FOUND;
    *device = handle_of(gpu);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* device) {
    NVML_ENTRY(true);
    if (!uuid || !device) return NVML_ERROR_INVALID_ARGUMENT;
    for (size_t i = 0; i < host().gpus.size(); i++) {
        if (uuid_text(int(i)) != uuid) continue;
        *device = handle_of(int(i));
        return NVML_SUCCESS;
    }
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char* name, unsigned int length) {
    NVML_ENTRY(true);
    int gpu;
    if (!gpu_of(device, &gpu)) return NVML_ERROR_INVALID_ARGUMENT;
    return copy_text("twoshot simulated GPU", name, length);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char* uuid, unsigned int length) {
    NVML_ENTRY(true);
    int gpu;
    if (!gpu_of(device, &gpu)) return NVML_ERROR_INVALID_ARGUMENT;
    return copy_text(uuid_text(gpu), uuid, length);
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t* pci) {
    NVML_ENTRY(true);
    int gpu;
    if (!pci || !gpu_of(device, &gpu)) return NVML_ERROR_INVALID_ARGUMENT;
    memset(pci, 0, sizeof *pci);
    strcpy(pci->busIdLegacy, pci_bus_id(gpu, 4).c_str());
    strcpy(pci->busId, pci_bus_id(gpu, 8).c_str());
    pci->bus = unsigned(0x10 + gpu);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t from, nvmlDevice_t to, nvmlGpuP2PCapsIndex_t index,
                                    nvmlGpuP2PStatus_t* status) {
    NVML_ENTRY(true);
    int a, b;
    if (!status || !gpu_of(from, &a) || !gpu_of(to, &b) || a == b) return NVML_ERROR_INVALID_ARGUMENT;
    Link link = topology().link({session().host, a}, {session().host, b});
    bool good;
    switch (index) {
    case NVML_P2P_CAPS_INDEX_READ:
    case NVML_P2P_CAPS_INDEX_WRITE: good = link != Link::none; break;
    case NVML_P2P_CAPS_INDEX_NVLINK:
    case NVML_P2P_CAPS_INDEX_ATOMICS: good = link == Link::nvlink; break;
    case NVML_P2P_CAPS_INDEX_PROP: good = link == Link::pcie; break;
    default: return NVML_ERROR_INVALID_ARGUMENT;
    }
    *status = good ? NVML_P2P_STATUS_OK : NVML_P2P_STATUS_NOT_SUPPORTED;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned int link, nvmlEnableState_t* active) {
    NVML_ENTRY(true);
    int gpu;
    if (!active || !gpu_of(device, &gpu) || link >= NVML_NVLINK_MAX_LINKS) return NVML_ERROR_INVALID_ARGUMENT;
    bool any = host().fabric_state == NVML_GPU_FABRIC_STATE_COMPLETED && host().link == Link::nvlink;
    for (int other = 0; other < int(host().gpus.size()); other++)
        any = any || (other != gpu && topology().link({session().host, gpu}, {session().host, other}) == Link::nvlink);
    if (!any) return NVML_ERROR_NOT_SUPPORTED;
    *active = NVML_FEATURE_ENABLED;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, nvmlGpuFabricInfo_t* info) {
    NVML_ENTRY(true);
    int gpu;
    if (!info || !gpu_of(device, &gpu)) return NVML_ERROR_INVALID_ARGUMENT;
    memcpy(info->clusterUuid, host().uuid.data(), NVML_GPU_FABRIC_UUID_LEN);
    info->status = host().fabric_status;
    info->cliqueId = host().clique;
    info->state = nvmlGpuFabricState_t(host().fabric_state);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, void* info) {
    NVML_ENTRY(true);
    int gpu;
    if (!info || !gpu_of(device, &gpu)) return NVML_ERROR_INVALID_ARGUMENT;
    unsigned version;
    memcpy(&version, info, sizeof version);
    if (version != TWOSHOT_NVML_FABRIC_INFO_V2 && version != TWOSHOT_NVML_FABRIC_INFO_V3)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    nvmlGpuFabricInfo_v3_t full{};
    full.version = version;
    memcpy(full.clusterUuid, host().uuid.data(), NVML_GPU_FABRIC_UUID_LEN);
    full.status = host().fabric_status;
    full.cliqueId = host().clique;
    full.state = nvmlGpuFabricState_t(host().fabric_state);
    full.healthMask = NVML_GPU_FABRIC_HEALTH_MASK_DEGRADED_BW_FALSE;
    full.healthSummary = static_cast<unsigned char>(host().health);
    // The two versions agree up to where version 2 ends.
    memcpy(info, &full, version == TWOSHOT_NVML_FABRIC_INFO_V3 ? sizeof full : sizeof(nvmlGpuFabricInfo_v2_t));
    return NVML_SUCCESS;
}
