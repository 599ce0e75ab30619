// What the processes of a session share besides allocations: identifiers, the
// memory in use on each GPU, and the switch's multicast slots. A file mapped by
// everyone, guarded by a mutex that survives the death of its holder; what a
// dead process held no longer counts.
#pragma once

#include "topology.h"

#include <cstdint>
#include <string>
#include <vector>

namespace twoshot::sim {

void shared_open();
uint64_t shared_next_id();
uint64_t shared_session_id();

const std::vector<int>& visible_gpus();      // indices on this host, in CUDA's order
GpuId visible_gpu(int ordinal);
int ordinal_of(GpuId id);                    // -1: not visible to this process

uint64_t gpu_bytes_used(GpuId id);
bool gpu_charge(GpuId id, uint64_t bytes);   // false: does not fit
void gpu_refund(GpuId id, uint64_t bytes);

bool multicast_claim(uint64_t id);           // a slot of this host's switch domain; false: none left
void multicast_join(uint64_t id);            // this process holds the object too
void multicast_leave(uint64_t id);           // the last one to leave frees the slot

bool process_lives(int pid);

}  // namespace twoshot::sim
