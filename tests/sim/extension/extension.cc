// A library that uses NCCL and is loaded while the program runs, as an extension module is. Its call slots are bound at
// once and on pages that are read-only afterwards.
#include "nccl_api.h"

#define SHOWN extern "C" __attribute__((visibility("default")))

SHOWN ncclResult_t extension_init(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  return ncclCommInitRank(comm, ranks, id, rank);
}

SHOWN ncclResult_t extension_all_reduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                        ncclComm_t comm, cudaStream_t stream) {
  return ncclAllReduce(in, out, count, type, op, comm, stream);
}
