// An object that a program opens when it has communicators already: its calls of NCCL go through slots of its own.
#include "nccl_api.h"

extern "C" __attribute__((visibility("default"))) ncclResult_t sim_late_create(ncclRedOp_t* op, void* scalar,
                                                                                ncclDataType_t type,
                                                                                ncclScalarResidence_t residence,
                                                                                ncclComm_t comm) {
  return ncclRedOpCreatePreMulSum(op, scalar, type, residence, comm);
}
