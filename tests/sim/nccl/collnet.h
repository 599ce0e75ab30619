// AllReduce through a CollNet plugin, driven with the calls and in the order that NCCL uses.
#pragma once

#include "comm.h"

namespace simnccl {

// This rank's vote: a plugin with devices, and the user allows it.
bool collnet_possible(const Comm& comm);
// Connects if all ranks voted for it and the communicator spans several nodes. The caller holds comm.exec.
ncclResult_t collnet_attach(Comm& comm);
bool collnet_takes(Comm& comm, int type, int op, size_t count);
ncclResult_t collnet_allreduce(Comm& comm, const void* in, void* out, size_t count, int type, int op);
void collnet_detach(Comm& comm);

}  // namespace simnccl
