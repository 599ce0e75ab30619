// Every NCCL function that the worker uses, called the way the chosen program style calls it.
//
// Linked style: a plain call of the symbol, hence one jump slot for each function. Opened style (`--nccl PATH`):
// dlopen and dlsym for every function, as wrappers of scripting languages do.
#pragma once

#include "nccl_api.h"

namespace worker {

// The library of the opened style; null in the linked style. Set once, before the first call.
void open_nccl(const char* path);
void* opened_library();
// The address of `name` in the opened library; null in the linked style. Ends the program when the library lacks it.
void* opened_function(const char* name);

}  // namespace worker

// Newer than the oldest release that the worker runs with.
#pragma weak ncclCommShrink
#pragma weak ncclAlltoAll
#pragma weak ncclGather
#pragma weak ncclScatter
#pragma weak ncclCommRevoke
#pragma weak ncclCommInitRankScalable
#pragma weak ncclCommGetUniqueId
#pragma weak ncclCommGrow
#pragma weak ncclCommSuspend
#pragma weak ncclCommResume
#pragma weak ncclAllReduceConfig
#pragma weak ncclCommWindowRegister
#pragma weak ncclCommWindowDeregister
#pragma weak ncclPutSignal
#pragma weak ncclSignal
#pragma weak ncclWaitSignal

namespace call {

#define WORKER_CALL(name, parameters, arguments)                                                        \
  inline ncclResult_t name parameters {                                                                 \
    static void* const opened = worker::opened_function(#name);                                         \
    return opened ? reinterpret_cast<decltype(&::name)>(opened) arguments : ::name arguments;           \
  }

WORKER_CALL(ncclGetVersion, (int* version), (version))
WORKER_CALL(ncclGetUniqueId, (ncclUniqueId* id), (id))
WORKER_CALL(ncclCommInitRank, (ncclComm_t* comm, int ranks, ncclUniqueId id, int rank), (comm, ranks, id, rank))
WORKER_CALL(ncclCommInitRankConfig, (ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t* config),
            (comm, ranks, id, rank, config))
WORKER_CALL(ncclCommInitRankScalable,
            (ncclComm_t* comm, int ranks, int rank, int id_count, ncclUniqueId* ids, ncclConfig_t* config),
            (comm, ranks, rank, id_count, ids, config))
WORKER_CALL(ncclCommGetUniqueId, (ncclComm_t comm, ncclUniqueId* id), (comm, id))
WORKER_CALL(ncclCommGrow,
            (ncclComm_t comm, int ranks, const ncclUniqueId* id, int rank, ncclComm_t* child, ncclConfig_t* config),
            (comm, ranks, id, rank, child, config))
WORKER_CALL(ncclCommSuspend, (ncclComm_t comm, int flags), (comm, flags))
WORKER_CALL(ncclCommResume, (ncclComm_t comm), (comm))
WORKER_CALL(ncclCommInitAll, (ncclComm_t* comms, int count, const int* devices), (comms, count, devices))
WORKER_CALL(ncclCommSplit, (ncclComm_t comm, int color, int key, ncclComm_t* child, ncclConfig_t* config),
            (comm, color, key, child, config))
WORKER_CALL(ncclCommShrink,
            (ncclComm_t comm, int* excluded, int count, ncclComm_t* child, ncclConfig_t* config, int flags),
            (comm, excluded, count, child, config, flags))
WORKER_CALL(ncclCommFinalize, (ncclComm_t comm), (comm))
WORKER_CALL(ncclCommDestroy, (ncclComm_t comm), (comm))
WORKER_CALL(ncclCommAbort, (ncclComm_t comm), (comm))
WORKER_CALL(ncclCommRevoke, (ncclComm_t comm, int flags), (comm, flags))
WORKER_CALL(ncclCommGetAsyncError, (ncclComm_t comm, ncclResult_t* error), (comm, error))
WORKER_CALL(ncclCommCount, (ncclComm_t comm, int* count), (comm, count))
WORKER_CALL(ncclCommCuDevice, (ncclComm_t comm, int* device), (comm, device))
WORKER_CALL(ncclCommUserRank, (ncclComm_t comm, int* rank), (comm, rank))
WORKER_CALL(ncclCommRegister, (ncclComm_t comm, void* address, size_t size, void** handle),
            (comm, address, size, handle))
WORKER_CALL(ncclCommDeregister, (ncclComm_t comm, void* handle), (comm, handle))
WORKER_CALL(ncclCommWindowRegister, (ncclComm_t comm, void* address, size_t size, ncclWindow_t* window, int flags),
            (comm, address, size, window, flags))
WORKER_CALL(ncclCommWindowDeregister, (ncclComm_t comm, ncclWindow_t window), (comm, window))
WORKER_CALL(ncclPutSignal,
            (const void* in, size_t count, ncclDataType_t type, int peer, ncclWindow_t window, size_t offset, int signal,
             int context, unsigned int flags, ncclComm_t comm, cudaStream_t stream),
            (in, count, type, peer, window, offset, signal, context, flags, comm, stream))
WORKER_CALL(ncclSignal,
            (int peer, int signal, int context, unsigned int flags, ncclComm_t comm, cudaStream_t stream),
            (peer, signal, context, flags, comm, stream))
WORKER_CALL(ncclWaitSignal, (int count, ncclWaitSignalDesc_t* waits, ncclComm_t comm, cudaStream_t stream),
            (count, waits, comm, stream))
WORKER_CALL(ncclMemAlloc, (void** address, size_t size), (address, size))
WORKER_CALL(ncclMemFree, (void* address), (address))
WORKER_CALL(ncclGroupStart, (), ())
WORKER_CALL(ncclGroupEnd, (), ())
WORKER_CALL(ncclRedOpCreatePreMulSum,
            (ncclRedOp_t* op, void* scalar, ncclDataType_t type, ncclScalarResidence_t residence, ncclComm_t comm),
            (op, scalar, type, residence, comm))
WORKER_CALL(pncclRedOpCreatePreMulSum,
            (ncclRedOp_t* op, void* scalar, ncclDataType_t type, ncclScalarResidence_t residence, ncclComm_t comm),
            (op, scalar, type, residence, comm))
WORKER_CALL(ncclRedOpDestroy, (ncclRedOp_t op, ncclComm_t comm), (op, comm))
WORKER_CALL(ncclAllReduce,
            (const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
             cudaStream_t stream),
            (in, out, count, type, op, comm, stream))
WORKER_CALL(ncclAllReduceConfig,
            (const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
             cudaStream_t stream, const ncclCollConfig_t* config),
            (in, out, count, type, op, comm, stream, config))
WORKER_CALL(ncclReduce,
            (const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, int root, ncclComm_t comm,
             cudaStream_t stream),
            (in, out, count, type, op, root, comm, stream))
WORKER_CALL(ncclBcast,
            (void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream),
            (buffer, count, type, root, comm, stream))
WORKER_CALL(ncclBroadcast,
            (const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
             cudaStream_t stream),
            (in, out, count, type, root, comm, stream))
WORKER_CALL(ncclReduceScatter,
            (const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
             cudaStream_t stream),
            (in, out, count, type, op, comm, stream))
WORKER_CALL(ncclAllGather,
            (const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream),
            (in, out, count, type, comm, stream))
WORKER_CALL(ncclAlltoAll,
            (const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream),
            (in, out, count, type, comm, stream))
WORKER_CALL(ncclGather,
            (const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
             cudaStream_t stream),
            (in, out, count, type, root, comm, stream))
WORKER_CALL(ncclScatter,
            (const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
             cudaStream_t stream),
            (in, out, count, type, root, comm, stream))
WORKER_CALL(ncclSend,
            (const void* in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream),
            (in, count, type, peer, comm, stream))
WORKER_CALL(ncclRecv,
            (void* out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream),
            (out, count, type, peer, comm, stream))

#undef WORKER_CALL

inline const char* ncclGetErrorString(ncclResult_t result) {
  static void* const opened = worker::opened_function("ncclGetErrorString");
  return opened ? reinterpret_cast<decltype(&::ncclGetErrorString)>(opened)(result) : ::ncclGetErrorString(result);
}

}  // namespace call
