// Reads a topology and asks everything of it that the simulated driver asks. 0: it was one; 1: it was refused.
#include "topology.h"

#include <stdexcept>
#include <string>

extern "C" int fuzz_topology(const char* text, size_t bytes) {
    using namespace twoshot::sim;
    try {
        Topology t = parse_topology(std::string(text, bytes));
        for (int a = 0; a < int(t.hosts.size()); a++) {
            t.domain(a);
            for (int b = 0; b < int(t.hosts.size()); b++) t.same_fabric(a, b);
            for (int x = 0; x < int(t.hosts[a].gpus.size()); x++) t.link(GpuId{a, x}, GpuId{a, 0});
        }
        return 0;
    } catch (const std::runtime_error&) {
        return 1;
    }
}
