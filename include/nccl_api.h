/* The part of NCCL's public API that twoshot names: types, constants and prototypes, NCCL 2.20 to 2.32.
 *
 * Written for this project from the facts of the ABI. Every NCCL enumeration is an open `int` here, because a caller may
 * hand in a value of a newer NCCL and that must not be undefined behaviour in Rust or C++. A `since` remark names the
 * first release that has a field or function; no remark means 2.20 or older.
 *
 * Needs no CUDA header. Do not include it together with NVIDIA's nccl.h. */
#ifndef TWOSHOT_NCCL_API_H
#define TWOSHOT_NCCL_API_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The newest release described here; a stock library may be older or newer. */
#define NCCL_VERSION(major, minor, patch) ((major) * 10000 + (minor) * 100 + (patch))
#define NCCL_VERSION_CODE NCCL_VERSION(2, 32, 3)

/* CUDA runtime handles: the same opaque pointers as the driver's CUstream and CUevent. */
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;

typedef struct ncclComm *ncclComm_t;
typedef struct ncclWindow_vidmem *ncclWindow_t; /* since 2.27 */

#define NCCL_UNIQUE_ID_BYTES 128
typedef struct ncclUniqueId {
  char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId; /* passed by value: on the stack (x86-64), by hidden reference (aarch64) */

typedef int ncclResult_t;
#define ncclSuccess 0
#define ncclUnhandledCudaError 1
#define ncclSystemError 2
#define ncclInternalError 3
#define ncclInvalidArgument 4
#define ncclInvalidUsage 5
#define ncclRemoteError 6
#define ncclInProgress 7
#define ncclTimeout 8 /* since 2.30 */

typedef int ncclDataType_t;
#define ncclInt8 0
#define ncclUint8 1
#define ncclInt32 2
#define ncclUint32 3
#define ncclInt64 4
#define ncclUint64 5
#define ncclFloat16 6
#define ncclFloat32 7
#define ncclFloat64 8
#define ncclBfloat16 9
#define ncclFloat8e4m3 10 /* since 2.24 */
#define ncclFloat8e5m2 11 /* since 2.24 */
#define ncclNumTypes 12

/* Values from ncclNumOps up are made by ncclRedOpCreatePreMulSum and mean something in one communicator only. */
typedef int ncclRedOp_t;
#define ncclSum 0
#define ncclProd 1
#define ncclMax 2
#define ncclMin 3
#define ncclAvg 4
#define ncclNumOps 5

/* Signals that a rank waits for: how many, from whom; signal and context have to be 0. */
typedef struct {
  int opCnt;
  int peer;
  int sigIdx;
  int ctx;
} ncclWaitSignalDesc_t;

typedef int ncclScalarResidence_t;
#define ncclScalarDevice 0
#define ncclScalarHostImmediate 1

/* Communicator configuration. The caller states how much of it he knows: `size` is his sizeof, `version` his NCCL's
 * version code. Fields beyond `size` do not exist in his memory and must not be read. An int field that the caller left
 * alone holds NCCL_CONFIG_UNDEF_INT, a pointer field NULL. */
#define NCCL_CONFIG_UNDEF_INT INT_MIN
#define NCCL_CONFIG_UNDEF_PTR NULL
#define NCCL_API_MAGIC 0xcafebeefu
#define NCCL_SPLIT_NOCOLOR (-1)

typedef struct ncclConfig {
  size_t size;
  unsigned int magic;
  unsigned int version;
  int blocking;
  int cgaClusterSize;
  int minCTAs;
  int maxCTAs;
  const char *netName;
  int splitShare;
  int trafficClass;        /* since 2.26 */
  const char *commName;    /* since 2.27, as the next four */
  int collnetEnable;
  int CTAPolicy;
  int shrinkShare;
  int nvlsCTAs;
  int nChannelsPerNetPeer; /* since 2.28 */
  int nvlinkCentricSched;  /* since 2.28 */
  int graphUsageMode;      /* since 2.29 */
  int numRmaCtx;           /* since 2.29 */
  int maxP2pPeers;         /* since 2.30.3 */
  int graphStreamOrdering; /* since 2.30.7 */
  int launchOrderImplicit; /* since 2.31, as all that follow; 2.31's header was not available, 2.32.3's was */
  int numRmaSig;
  int rmaEagerInit;
  int hostCftMode;
  int nvlsHostMode;
} ncclConfig_t;

#define NCCL_CONFIG_INITIALIZER                                                                                        \
  {                                                                                                                    \
    sizeof(ncclConfig_t), NCCL_API_MAGIC, NCCL_VERSION_CODE, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,             \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT,                    \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,                    \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,                    \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,                    \
        NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,                    \
        NCCL_CONFIG_UNDEF_INT                                                                                          \
  }

/* CTAPolicy bits. Either bit is the caller's wish about how collectives use the GPU. */
#define NCCL_CTA_POLICY_DEFAULT 0x00
#define NCCL_CTA_POLICY_EFFICIENCY 0x01
#define NCCL_CTA_POLICY_ZERO 0x02

/* nvlsHostMode bits: what the caller forbids. */
#define ncclNvlsHostModeEnable 0
#define ncclNvlsHostModeDisableTransport 1
#define ncclNvlsHostModeDisableSymmetricMultimem 2
#define ncclNvlsHostModeDisable INT_MAX

#define NCCL_SHRINK_DEFAULT 0x00
#define NCCL_SHRINK_ABORT 0x01
#define NCCL_REVOKE_DEFAULT 0x00
#define NCCL_SUSPEND_MEM 0x01

#define NCCL_WIN_DEFAULT 0x00
#define NCCL_WIN_COLL_SYMMETRIC 0x01

/* Configuration of one collective call, since 2.32. The same rule of `size` holds. */
typedef struct ncclConfigExt {
  struct ncclConfigExt *next;
  struct {
    int vendorId;
    int optionId;
  } key;
  union {
    int i;
    const char *s;
    void *raw;
  } val;
} ncclConfigExt_t;

typedef struct ncclCollConfig {
  size_t size;
  unsigned int magic;
  unsigned int version;
  ncclConfigExt_t *ext;
  int minCTAs;
  int maxCTAs;
  int nvlsCTAs;
  int cgaClusterSize;
  const char *algSelection;
  int forceAlgSelection; /* 1 unless the caller says otherwise: a selection that cannot be met is an error */
  int CTAPolicy;
  uint64_t userProfilerTag;
  cudaEvent_t launchCompletionEvent;
} ncclCollConfig_t;

/* Each function exists under its own name and, with a `p` before it, as the entry for tools that sit between. */
#define NCCL_FUNCTION(type, name, ...)                                                                                 \
  type name(__VA_ARGS__);                                                                                              \
  type p##name(__VA_ARGS__)

/* Library and errors */
NCCL_FUNCTION(ncclResult_t, ncclGetVersion, int *version);
NCCL_FUNCTION(ncclResult_t, ncclGetUniqueId, ncclUniqueId *id);
NCCL_FUNCTION(const char *, ncclGetErrorString, ncclResult_t result);
NCCL_FUNCTION(const char *, ncclGetLastError, ncclComm_t comm);
NCCL_FUNCTION(ncclResult_t, ncclMemAlloc, void **address, size_t size);
NCCL_FUNCTION(ncclResult_t, ncclMemFree, void *address);

/* Life of a communicator */
NCCL_FUNCTION(ncclResult_t, ncclCommInitRank, ncclComm_t *comm, int ranks, ncclUniqueId id, int rank);
NCCL_FUNCTION(ncclResult_t, ncclCommInitRankConfig, ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
              ncclConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclCommInitRankScalable, ncclComm_t *comm, int ranks, int rank, int id_count,
              ncclUniqueId *ids, ncclConfig_t *config); /* since 2.23 */
NCCL_FUNCTION(ncclResult_t, ncclCommInitAll, ncclComm_t *comms, int count, const int *devices);
NCCL_FUNCTION(ncclResult_t, ncclCommSplit, ncclComm_t comm, int color, int key, ncclComm_t *child,
              ncclConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclCommShrink, ncclComm_t comm, int *excluded, int excluded_count, ncclComm_t *child,
              ncclConfig_t *config, int flags); /* since 2.27 */
NCCL_FUNCTION(ncclResult_t, ncclCommGetUniqueId, ncclComm_t comm, ncclUniqueId *id); /* since 2.29 */
NCCL_FUNCTION(ncclResult_t, ncclCommGrow, ncclComm_t comm, int ranks, const ncclUniqueId *id, int rank,
              ncclComm_t *child, ncclConfig_t *config);                              /* since 2.29 */
NCCL_FUNCTION(ncclResult_t, ncclCommFinalize, ncclComm_t comm);
NCCL_FUNCTION(ncclResult_t, ncclCommDestroy, ncclComm_t comm);
NCCL_FUNCTION(ncclResult_t, ncclCommAbort, ncclComm_t comm);
NCCL_FUNCTION(ncclResult_t, ncclCommRevoke, ncclComm_t comm, int flags);  /* since 2.28.7 */
NCCL_FUNCTION(ncclResult_t, ncclCommSuspend, ncclComm_t comm, int flags); /* since 2.29.7 */
NCCL_FUNCTION(ncclResult_t, ncclCommResume, ncclComm_t comm);             /* since 2.29.7 */

/* Facts of a communicator */
NCCL_FUNCTION(ncclResult_t, ncclCommGetAsyncError, ncclComm_t comm, ncclResult_t *error);
NCCL_FUNCTION(ncclResult_t, ncclCommCount, const ncclComm_t comm, int *count);
NCCL_FUNCTION(ncclResult_t, ncclCommCuDevice, const ncclComm_t comm, int *device);
NCCL_FUNCTION(ncclResult_t, ncclCommUserRank, const ncclComm_t comm, int *rank);

/* Registration */
NCCL_FUNCTION(ncclResult_t, ncclCommRegister, const ncclComm_t comm, void *address, size_t size, void **handle);
NCCL_FUNCTION(ncclResult_t, ncclCommDeregister, const ncclComm_t comm, void *handle);
NCCL_FUNCTION(ncclResult_t, ncclCommWindowRegister, ncclComm_t comm, void *address, size_t size, ncclWindow_t *window,
              int flags);                                                                       /* since 2.27 */
NCCL_FUNCTION(ncclResult_t, ncclCommWindowDeregister, ncclComm_t comm, ncclWindow_t window);    /* since 2.27 */

/* Reduction operators */
NCCL_FUNCTION(ncclResult_t, ncclRedOpCreatePreMulSum, ncclRedOp_t *op, void *scalar, ncclDataType_t type,
              ncclScalarResidence_t residence, ncclComm_t comm);
NCCL_FUNCTION(ncclResult_t, ncclRedOpDestroy, ncclRedOp_t op, ncclComm_t comm);

/* Collectives and point to point */
NCCL_FUNCTION(ncclResult_t, ncclAllReduce, const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op,
              ncclComm_t comm, cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclReduce, const void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op,
              int root, ncclComm_t comm, cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclBcast, void *buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
              cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclBroadcast, const void *in, void *out, size_t count, ncclDataType_t type, int root,
              ncclComm_t comm, cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclReduceScatter, const void *in, void *out, size_t out_count, ncclDataType_t type,
              ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclAllGather, const void *in, void *out, size_t in_count, ncclDataType_t type,
              ncclComm_t comm, cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclAlltoAll, const void *in, void *out, size_t count, ncclDataType_t type, ncclComm_t comm,
              cudaStream_t stream); /* since 2.28 */
NCCL_FUNCTION(ncclResult_t, ncclGather, const void *in, void *out, size_t count, ncclDataType_t type, int root,
              ncclComm_t comm, cudaStream_t stream); /* since 2.28 */
NCCL_FUNCTION(ncclResult_t, ncclScatter, const void *in, void *out, size_t count, ncclDataType_t type, int root,
              ncclComm_t comm, cudaStream_t stream); /* since 2.28 */
NCCL_FUNCTION(ncclResult_t, ncclPutSignal, const void *in, size_t count, ncclDataType_t type, int peer,
              ncclWindow_t window, size_t offset, int signal, int context, unsigned int flags, ncclComm_t comm,
              cudaStream_t stream); /* since 2.29, as the next two */
NCCL_FUNCTION(ncclResult_t, ncclSignal, int peer, int signal, int context, unsigned int flags, ncclComm_t comm,
              cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclWaitSignal, int count, ncclWaitSignalDesc_t *waits, ncclComm_t comm,
              cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclSend, const void *in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
              cudaStream_t stream);
NCCL_FUNCTION(ncclResult_t, ncclRecv, void *out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
              cudaStream_t stream);

/* The same collectives with a configuration for the one call, since 2.32 */
NCCL_FUNCTION(ncclResult_t, ncclAllReduceConfig, const void *in, void *out, size_t count, ncclDataType_t type,
              ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclReduceConfig, const void *in, void *out, size_t count, ncclDataType_t type,
              ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclBroadcastConfig, const void *in, void *out, size_t count, ncclDataType_t type, int root,
              ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclReduceScatterConfig, const void *in, void *out, size_t out_count, ncclDataType_t type,
              ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclAllGatherConfig, const void *in, void *out, size_t in_count, ncclDataType_t type,
              ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclAlltoAllConfig, const void *in, void *out, size_t count, ncclDataType_t type,
              ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclGatherConfig, const void *in, void *out, size_t count, ncclDataType_t type, int root,
              ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);
NCCL_FUNCTION(ncclResult_t, ncclScatterConfig, const void *in, void *out, size_t count, ncclDataType_t type, int root,
              ncclComm_t comm, cudaStream_t stream, const ncclCollConfig_t *config);

/* Groups */
NCCL_FUNCTION(ncclResult_t, ncclGroupStart, void);
NCCL_FUNCTION(ncclResult_t, ncclGroupEnd, void);
NCCL_FUNCTION(ncclResult_t, ncclGroupSimulateEnd, void *sim_info); /* since 2.22 */

#ifdef __cplusplus
}
#endif

#endif
