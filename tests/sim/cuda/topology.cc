#include "topology.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace twoshot::sim {
namespace {

// Most GPUs of a host, and hosts: a number beyond it is a typing error.
constexpr int kMost = 1024;

[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw std::runtime_error(text);
}

int number_of(const std::string& text, int most) {
    char* end = nullptr;
    long value = strtol(text.c_str(), &end, 10);
    if (text.empty() || *end || value < 0 || value > most) refuse("topology: `%s` is no number up to %d", text.c_str(), most);
    return int(value);
}

uint64_t bytes_of(const std::string& text) {
    char* end = nullptr;
    uint64_t value = strtoull(text.c_str(), &end, 10);
    switch (*end) {
    case 'K': return value << 10;
    case 'M': return value << 20;
    case 'G': return value << 30;
    case 0: return value;
    }
    refuse("topology: `%s` is no size", text.c_str());
}

Link link_of(const std::string& text) {
    if (text == "nvlink") return Link::nvlink;
    if (text == "pcie") return Link::pcie;
    if (text == "none") return Link::none;
    refuse("topology: `%s` is no link", text.c_str());
}

int fabric_state_of(const std::string& text) {
    const char* names[] = {"not-supported", "not-started", "in-progress", "completed"};
    for (int i = 0; i < 4; i++)
        if (text == names[i]) return i;
    refuse("topology: `%s` is no fabric state", text.c_str());
}

GpuId id_of(const std::string& text) {
    GpuId id{-1, -1};
    if (sscanf(text.c_str(), "%d:%d", &id.host, &id.gpu) != 2) refuse("topology: `%s` is no host:gpu", text.c_str());
    return id;
}

std::pair<std::string, std::string> split(const std::string& word) {
    size_t at = word.find('=');
    if (at == std::string::npos) refuse("topology: `%s` is no key=value", word.c_str());
    return {word.substr(0, at), word.substr(at + 1)};
}

void set_gpu(Gpu& gpu, const std::string& word) {
    auto [key, value] = split(word);
    if (key == "cc") {
        if (sscanf(value.c_str(), "%d.%d", &gpu.cc_major, &gpu.cc_minor) != 2) refuse("topology: cc=%s", value.c_str());
    } else if (key == "sms") gpu.sms = atoi(value.c_str());
    else if (key == "mem") gpu.mem = bytes_of(value);
    else if (key == "granularity") gpu.granularity = bytes_of(value);
    else if (key == "mc-granularity") gpu.mc_granularity = bytes_of(value);
    else if (key == "mc-recommended") gpu.mc_recommended = bytes_of(value);
    else if (key == "multicast") gpu.multicast = value == "1";
    else if (key == "fabric-handle") gpu.fabric_handle = value == "1";
    else if (key == "fd-handle") gpu.fd_handle = value == "1";
    else refuse("topology: unknown key `%s` of a gpu", key.c_str());
}

void set_host(Host& host, const Gpu& defaults, const std::string& word) {
    auto [key, value] = split(word);
    if (key == "gpus") host.gpus.assign(size_t(number_of(value, kMost)), defaults);
    else if (key == "fabric") host.fabric_state = fabric_state_of(value);
    else if (key == "fabric-status") host.fabric_status = atoi(value.c_str());
    else if (key == "health") host.health = atoi(value.c_str());
    else if (key == "clique") host.clique = uint32_t(strtoul(value.c_str(), nullptr, 10));
    else if (key == "imex") host.imex = value == "1";
    else if (key == "link") host.link = link_of(value);
    else if (key == "uuid") {
        if (value.size() != 32) refuse("topology: uuid=%s is not 32 hex digits", value.c_str());
        for (int i = 0; i < 16; i++) host.uuid[i] = uint8_t(strtoul(value.substr(2 * i, 2).c_str(), nullptr, 16));
    } else refuse("topology: unknown key `%s` of a host", key.c_str());
}

}  // namespace

Topology parse_topology(const std::string& text) {
    Topology t;
    Gpu defaults;
    std::istringstream lines(text);
    std::string line;
    while (std::getline(lines, line)) {
        line = line.substr(0, line.find('#'));
        std::istringstream words(line);
        std::string kind, word;
        if (!(words >> kind)) continue;
        auto next = [&] {
            if (!(words >> word)) refuse("topology: `%s` ends early", line.c_str());
            return word;
        };
        if (kind == "driver") t.driver = atoi(next().c_str());
        else if (kind == "mc-slots") t.mc_slots = atoi(next().c_str());
        else if (kind == "mc-bind-timeout") t.mc_bind_timeout_ms = atol(next().c_str());
        else if (kind == "gpu-defaults") while (words >> word) set_gpu(defaults, word);
        else if (kind == "host") {
            size_t index = size_t(number_of(next(), kMost));
            if (index != t.hosts.size()) refuse("topology: hosts must be listed in order, `%s`", line.c_str());
            t.hosts.emplace_back();
            while (words >> word) set_host(t.hosts.back(), defaults, word);
        } else if (kind == "gpu") {
            GpuId id = id_of(next());
            if (id.host < 0 || size_t(id.host) >= t.hosts.size() || id.gpu < 0 ||
                size_t(id.gpu) >= t.hosts[id.host].gpus.size())
                refuse("topology: no such gpu in `%s`", line.c_str());
            while (words >> word) set_gpu(t.hosts[id.host].gpus[id.gpu], word);
        } else if (kind == "pair") {
            GpuId a = id_of(next()), b = id_of(next());
            Link link = link_of(next());
            t.pairs[{a, b}] = t.pairs[{b, a}] = link;
        } else refuse("topology: unknown line `%s`", line.c_str());
    }
    return t;
}

Link Topology::link(GpuId a, GpuId b) const {
    if (a == b) return Link::nvlink;
    auto at = pairs.find({a, b});
    if (at != pairs.end()) return at->second;
    if (a.host == b.host) return hosts[a.host].link;
    return same_fabric(a.host, b.host) ? Link::nvlink : Link::none;
}

bool Topology::same_fabric(int a, int b) const {
    const Host &x = hosts[a], &y = hosts[b];
    const std::array<uint8_t, 16> zero{};
    return x.fabric_state == 3 && y.fabric_state == 3 && x.imex && y.imex && x.uuid == y.uuid && x.clique == y.clique &&
           (x.uuid != zero || a == b);
}

std::string Topology::domain(int host) const {
    const Host& h = hosts[host];
    if (!same_fabric(host, host) || h.uuid == std::array<uint8_t, 16>{}) return "host" + std::to_string(host);
    char text[48];
    for (int i = 0; i < 16; i++) snprintf(text + 2 * i, 3, "%02x", h.uuid[i]);
    snprintf(text + 32, sizeof text - 32, ".%u", h.clique);
    return text;
}

std::array<uint8_t, 16> gpu_uuid(GpuId id) {
    std::array<uint8_t, 16> u{'t', 'w', 'o', 's', 'h', 'o', 't', '-', 's', 'i', 'm', 0, 0, 0, 0, 0};
    u[12] = uint8_t(id.host >> 8);
    u[13] = uint8_t(id.host);
    u[15] = uint8_t(id.gpu);
    return u;
}

// The same on every host, as it is in a row of equal machines.
std::string pci_bus_id(int gpu, int domain_digits) {
    char text[32];
    snprintf(text, sizeof text, "%0*x:%02x:00.0", domain_digits, 0, 0x10 + gpu);
    return text;
}

int gpu_of_bus_id(const char* text, int gpus) {
    unsigned domain = 0, bus = 0, device = 0, function = 0;
    if (sscanf(text, "%x:%x:%x.%x", &domain, &bus, &device, &function) < 3) return -1;
    int gpu = int(bus) - 0x10;
    return domain == 0 && device == 0 && function == 0 && gpu >= 0 && gpu < gpus ? gpu : -1;
}

}  // namespace twoshot::sim
