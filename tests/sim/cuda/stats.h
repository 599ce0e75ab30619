// The process's counters, in a file that the harness reads: a table of named
// 64-bit slots, `stats.<pid>` in the session directory. Before the session is
// open the table lives in memory, so that nothing is created before cuInit.
#pragma once

#include <cstdint>

namespace twoshot::sim::stats {

constexpr unsigned kSlots = 1024;
constexpr unsigned kNameBytes = 56;

enum Live : unsigned {
    kAllocations, kImports, kMappings, kMappedBytes, kReservations, kReservedBytes, kFds,
    kMulticastObjects, kMulticastImports, kMulticastBindings,
    kStreams, kEvents, kModules, kDeviceAllocations, kDeviceBytes, kHostAllocations, kContexts,
    kUserObjects, kGraphs, kGraphExecs, kNvmlInits,
    kRepeatedModules,
    kLiveCount
};

// Things that are only ever counted up.
enum Total : unsigned { kFabricOrphans, kLazyLoads, kCallsAfterExit, kLaunches, kGraphLaunches, kTotalCount };

unsigned slot(const char* name);              // index of a named slot, made if absent
void bump(unsigned index, int64_t by);
void live(Live what, int64_t by);             // moves `live.*`, and `total.*` when it goes up
void set_live(Live what, uint64_t value);
void total(Total what, int64_t by = 1);
void open_file(const char* path);             // moves the table into the file

}  // namespace twoshot::sim::stats
