// What hardware the session pretends to have. Pure: text in, structure out.
//
//   driver 13000
//   gpu-defaults cc=9.0 sms=4 mem=256M granularity=2M mc-granularity=2M mc-recommended=512M multicast=1
//                fabric-handle=1 fd-handle=1
//   host 0 gpus=4 fabric=completed uuid=<32 hex> clique=1 imex=1 link=nvlink fabric-status=0 health=1
//   gpu 0:1 multicast=0          # one GPU that differs
//   pair 0:0 0:1 pcie            # one pair that differs
//   mc-slots 128                 # multicast objects per switch domain
//   mc-bind-timeout 0            # ms until a bind without all devices gives up; 0: never
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace twoshot::sim {

enum class Link { none, pcie, nvlink };

struct Gpu {
    int cc_major = 9, cc_minor = 0, sms = 4;
    uint64_t mem = 256u << 20, granularity = 2u << 20, mc_granularity = 2u << 20, mc_recommended = 512u << 20;
    bool multicast = true, fabric_handle = true, fd_handle = true;
};

struct Host {
    std::vector<Gpu> gpus;
    int fabric_state = 0;                    // NVML_GPU_FABRIC_STATE_*
    int fabric_status = 0, health = 1;
    std::array<uint8_t, 16> uuid{};
    uint32_t clique = 0;
    bool imex = false;
    Link link = Link::nvlink;
};

struct GpuId {
    int host, gpu;
    bool operator==(const GpuId& o) const { return host == o.host && gpu == o.gpu; }
    bool operator<(const GpuId& o) const { return host != o.host ? host < o.host : gpu < o.gpu; }
};

struct Topology {
    int driver = 13000, mc_slots = 128;
    long mc_bind_timeout_ms = 0;
    std::vector<Host> hosts;
    std::map<std::pair<GpuId, GpuId>, Link> pairs;

    Link link(GpuId a, GpuId b) const;
    bool same_fabric(int a, int b) const;    // both hosts can exchange fabric handles
    const Gpu& gpu(GpuId id) const { return hosts[id.host].gpus[id.gpu]; }
    std::string domain(int host) const;      // name of the switch domain the host is wired to
};

Topology parse_topology(const std::string& text);

// Identity of a simulated GPU, as CUDA and NVML both report it.
std::array<uint8_t, 16> gpu_uuid(GpuId id);
std::string pci_bus_id(int gpu, int domain_digits);
int gpu_of_bus_id(const char* text, int gpus);   // -1 when it names none

}  // namespace twoshot::sim
