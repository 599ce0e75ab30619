/* A small NCCL for the tests of src/intercept: every function that all releases have, doing next to nothing.
 *
 * FAKE_VERSION tells copies apart. As the real one does, it loads NCCL_NET_PLUGIN while it makes a communicator, exports
 * weak functions with a strong second name, and calls some of its own public functions through slots. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "nccl_net_abi.h"

#ifndef FAKE_VERSION
#define FAKE_VERSION 22809
#endif

#define EXPORT(name) __attribute__((visibility("default"), weak)) ncclResult_t name
#define ALIAS(name) __attribute__((visibility("default"), alias(#name)))

/* Calls of a function by the program, and by this library itself. */
static int reductions, nested, inside;

static void log_line(ncclDebugLogLevel level, unsigned long subsystems, const char *file, int line, const char *format,
                     ...) {
  (void)level, (void)subsystems, (void)file, (void)line, (void)format;
}

static void load_plugin(void) {
  const char *path = getenv("NCCL_NET_PLUGIN");
  int count = -1;
  if (!path) return;
  void *plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!plugin) {
    printf("plugin error %s\n", dlerror());
    return;
  }
  ncclNet_v10_t *table = dlsym(plugin, "ncclNetPlugin_v10");
  int code = table ? table->init(log_line, NULL) : -1;
  if (code == ncclSuccess) code = table->devices(&count);
  printf("plugin %s result %d devices %d\n", table ? table->name : "without a table", code, count);
}

EXPORT(ncclGetVersion)(int *version) { return *version = FAKE_VERSION, ncclSuccess; }
EXPORT(ncclGroupStart)(void) { return nested += inside, ncclSuccess; }
EXPORT(ncclGroupEnd)(void) { return ncclSuccess; }
EXPORT(ncclCommInitRank)(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
  (void)ranks, (void)id, (void)rank;
  load_plugin();
  inside = 1;
  ncclGroupStart();
  ncclGroupEnd();
  inside = 0;
  return *comm = malloc(1), ncclSuccess;
}
EXPORT(ncclAllReduce)(const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                      cudaStream_t stream) {
  (void)in, (void)out, (void)type, (void)op, (void)comm, (void)stream;
  ++reductions;
  return count == 7 ? ncclSuccess : ncclInvalidArgument;
}
ALIAS(ncclAllReduce)
ncclResult_t pncclAllReduce(const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                            ncclComm_t comm, cudaStream_t stream);

/* What happened in this copy; not part of NCCL. */
__attribute__((visibility("default"))) void fake_report(void) {
  printf("fake %d reductions %d nested %d\n", FAKE_VERSION, reductions, nested);
}

/* The rest has to exist. */
EXPORT(ncclCommCount)(const ncclComm_t comm, int *count) { return (void)comm, *count = 1, ncclSuccess; }
EXPORT(ncclCommUserRank)(const ncclComm_t comm, int *rank) { return (void)comm, *rank = 0, ncclSuccess; }
EXPORT(ncclCommCuDevice)(const ncclComm_t comm, int *device) { return (void)comm, *device = 0, ncclSuccess; }
EXPORT(ncclCommGetAsyncError)(ncclComm_t comm, ncclResult_t *error) { return (void)comm, *error = 0, ncclSuccess; }
EXPORT(ncclCommDestroy)(ncclComm_t comm) { return free(comm), ncclSuccess; }
EXPORT(ncclCommAbort)(ncclComm_t comm) { return free(comm), ncclSuccess; }
EXPORT(ncclCommFinalize)(ncclComm_t comm) { return (void)comm, ncclSuccess; }
EXPORT(ncclGetUniqueId)(ncclUniqueId *id) { return id->internal[0] = 1, ncclSuccess; }
__attribute__((visibility("default"))) const char *ncclGetErrorString(ncclResult_t code) {
  return code ? "failed" : "no error";
}
__attribute__((visibility("default"))) const char *ncclGetLastError(ncclComm_t comm) { return (void)comm, ""; }

#define REFUSE(name, ...)                                          \
  __attribute__((visibility("default"))) ncclResult_t name(__VA_ARGS__) { \
    return ncclInternalError;                                      \
  }
#pragma GCC diagnostic ignored "-Wunused-parameter"
#define CALL ncclComm_t comm, cudaStream_t stream
REFUSE(ncclCommInitRankConfig, ncclComm_t *comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config)
REFUSE(ncclCommInitAll, ncclComm_t *comms, int count, const int *devices)
REFUSE(ncclCommSplit, ncclComm_t comm, int color, int key, ncclComm_t *child, ncclConfig_t *config)
REFUSE(ncclRedOpCreatePreMulSum, ncclRedOp_t *op, void *scalar, ncclDataType_t type, ncclScalarResidence_t residence,
       ncclComm_t comm)
REFUSE(ncclRedOpDestroy, ncclRedOp_t op, ncclComm_t comm)
REFUSE(ncclReduce, const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op, int root, CALL)
REFUSE(ncclBcast, void *buffer, size_t count, ncclDataType_t type, int root, CALL)
REFUSE(ncclBroadcast, const void *in, void *out, size_t count, ncclDataType_t type, int root, CALL)
REFUSE(ncclReduceScatter, const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op, CALL)
REFUSE(ncclAllGather, const void *in, void *out, size_t count, ncclDataType_t type, CALL)
REFUSE(ncclSend, const void *in, size_t count, ncclDataType_t type, int peer, CALL)
REFUSE(ncclRecv, void *out, size_t count, ncclDataType_t type, int peer, CALL)
