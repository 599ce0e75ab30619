/* A library that uses NCCL, as an extension module of a program does. */
#include "nccl_api.h"

int user_all_reduce(void) { return ncclAllReduce(0, 0, 7, ncclFloat32, ncclSum, 0, 0); }

int user_init(void) {
  ncclComm_t comm;
  ncclUniqueId id = {{0}};
  return ncclCommInitRank(&comm, 1, id, 0);
}
