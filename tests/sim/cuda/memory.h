// Allocations and mappings of this process.
//
// An allocation is a file of the session directory: the data, then a trailer
// page that says what it is. The creator's last reference unlinks it, so that a
// fabric handle, which is a name, dies with it, while a descriptor or a mapping
// of it lives on. A multicast object is such a file too, with its shared state
// in the place of data.
#pragma once

#include "sim.h"
#include "topology.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

namespace twoshot::sim {

constexpr uint64_t kTrailerMagic = 0x314d494753544f57;
constexpr size_t kPage = 65536;              // the largest that a kernel for 64-bit Arm has: files are mapped from there

enum class Kind : uint32_t { memory = 0, multicast = 1 };

// The last page of the file.
struct Trailer {
    uint64_t magic, session, id, size, inode;
    Kind kind;
    GpuId where;                            // memory: its GPU; multicast: the creator's host
    uint32_t handle_types;
    std::atomic<int> owner_holds;           // 1 until the creator let go of it
    std::atomic<int> fabric_importers;
};
static_assert(sizeof(Trailer) <= kPage, "one page");

struct MulticastShared;

struct Allocation {
    CUmemGenericAllocationHandle handle;
    Kind kind;
    bool created;                           // here, not imported
    bool by_fabric;
    int fd;                                 // the simulator's own
    Trailer* trailer;
    MulticastShared* multicast;             // null for memory
    int references;                         // cuMemCreate, import, retain
    int mappings;                           // mappings, and bindings to multicast objects
};

struct Mapping {
    uint64_t address, size, offset;
    Allocation* allocation;
    int access;                             // CU_MEM_ACCESS_FLAGS_*
};

// One mutex for allocations, reservations and mappings of the process.
std::mutex& memory_mutex();

// The following want memory_mutex held.
Allocation* find_allocation(CUmemGenericAllocationHandle handle);   // null: unknown or without references
Allocation* adopt_file(int fd, bool created, bool by_fabric);       // takes the descriptor; null: not an allocation
void drop_if_unused(Allocation* allocation);
const Mapping* find_mapping(uint64_t address);
size_t mapping_count();

// Makes a file of `bytes` data and a trailer; -1 when the system refuses.
int make_file(Kind kind, uint64_t id, size_t bytes, uint64_t size, GpuId where, uint32_t handle_types);
std::string file_of(Kind kind, uint64_t id);

// 0 when these handle types may be asked for on this GPU, else the error.
CUresult check_handle_types(unsigned long long types, GpuId where);

// True when the device may read and write all of the range.
bool device_range(uint64_t address, size_t bytes);
bool plain_range(uint64_t address, uint64_t* base, uint64_t* bytes, bool* host, int* ordinal);

void refresh_fd_count();

}  // namespace twoshot::sim
