/* NCCL's network plugin ABI, versions 8 to 12, point to point (`ncclNet`) and collective (`ncclCollNet`).
 *
 * Written for this project from the facts of the ABI. A plugin exports one table per version under the symbols
 * ncclNetPlugin_v<N> and ncclCollNetPlugin_v<N>; NCCL takes the highest version that it knows and finds:
 *   2.20 to 2.23: v8     2.24, 2.25: v9     2.26, 2.27: v10     2.28, 2.29: v11     2.30 to 2.32: v12
 * Members of a table that NCCL may find NULL carry the remark "may be NULL". A version that did not change a type is a
 * typedef of the version before it.
 *
 * Enumerations are open ints. Every type of nccl_api.h keeps its meaning. */
#ifndef TWOSHOT_NCCL_NET_ABI_H
#define TWOSHOT_NCCL_NET_ABI_H

#include <stddef.h>
#include <stdint.h>

#include "nccl_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* NCCL's log: level and subsystem decide whether the printf-style line appears. */
typedef int ncclDebugLogLevel;
#define NCCL_LOG_NONE 0
#define NCCL_LOG_VERSION 1
#define NCCL_LOG_WARN 2
#define NCCL_LOG_INFO 3
#define NCCL_LOG_ABORT 4
#define NCCL_LOG_TRACE 5

#define NCCL_INIT 0x1ul
#define NCCL_COLL 0x2ul
#define NCCL_NET 0x10ul
#define NCCL_TUNING 0x40ul

typedef void (*ncclDebugLogger_t)(ncclDebugLogLevel level, unsigned long subsystems, const char *file, int line,
                                  const char *format, ...);

/* Lets a plugin report events to NCCL's profiler; since v10. */
typedef ncclResult_t (*ncclProfilerCallback_t)(void **event, int type, void *parent, int64_t plugin, void *data);

/* A handle made by listen travels to the peer through NCCL, which copies this many bytes. */
#define NCCL_NET_HANDLE_MAXSIZE 128
/* Requests that NCCL keeps in flight on one communicator object. */
#define NCCL_NET_MAX_REQUESTS 32

/* Kinds of memory, bits of `ptrSupport` and values of regMr's `type`. */
#define NCCL_PTR_HOST 0x1
#define NCCL_PTR_CUDA 0x2
#define NCCL_PTR_DMABUF 0x4

/* Work of the network that runs on the GPU; a plain network is HOST. */
typedef int ncclNetDeviceType;
#define NCCL_NET_DEVICE_HOST 0
#define NCCL_NET_DEVICE_UNPACK 1
#define NCCL_NET_DEVICE_INVALID_VERSION 0

typedef struct {
  ncclNetDeviceType netDeviceType;
  int netDeviceVersion;
  void *handle;
  size_t size;
  int needsProxyProgress;
} ncclNetDeviceHandle_v8_t;
typedef ncclNetDeviceHandle_v8_t ncclNetDeviceHandle_v9_t;
typedef ncclNetDeviceHandle_v8_t ncclNetDeviceHandle_v10_t;
typedef ncclNetDeviceHandle_v8_t ncclNetDeviceHandle_v11_t;
typedef ncclNetDeviceHandle_v8_t ncclNetDeviceHandle_v12_t;

/* ---- v8 ---- */

typedef struct {
  char *name;
  char *pciPath; /* the device's folder below /sys, NULL for none */
  uint64_t guid; /* one value per chip: functions of one card share it */
  int ptrSupport;
  int regIsGlobal; /* a registration holds for all connections */
  int speed;       /* Mbit/s */
  int port;
  float latency; /* microseconds */
  int maxComms;
  int maxRecvs; /* receives that one irecv may group */
  ncclNetDeviceType netDeviceType;
  int netDeviceVersion;
} ncclNetProperties_v8_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(ncclDebugLogger_t log);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v8_t *properties);
  ncclResult_t (*listen)(int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(int device, void *handle, void **send_comm, ncclNetDeviceHandle_v8_t **device_handle);
  ncclResult_t (*accept)(void *listen_comm, void **recv_comm, ncclNetDeviceHandle_v8_t **device_handle);
  ncclResult_t (*regMr)(void *comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *comm, void *address, size_t size, int type, uint64_t offset, int fd, void **mr);
  ncclResult_t (*deregMr)(void *comm, void *mr);
  ncclResult_t (*isend)(void *send_comm, void *address, int size, int tag, void *mr, void **request);
  ncclResult_t (*irecv)(void *recv_comm, int n, void **addresses, int *sizes, int *tags, void **mrs, void **request);
  ncclResult_t (*iflush)(void *recv_comm, int n, void **addresses, int *sizes, void **mrs, void **request);
  ncclResult_t (*test)(void *request, int *done, int *sizes);
  ncclResult_t (*closeSend)(void *send_comm);
  ncclResult_t (*closeRecv)(void *recv_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*getDeviceMr)(void *comm, void *mr, void **device_mr);     /* may be NULL */
  ncclResult_t (*irecvConsumed)(void *recv_comm, int n, void *request);    /* may be NULL */
} ncclNet_v8_t;

typedef struct {
  void *mhandle;
  void *address;
  uint32_t size;
} ncclNetSGE_v8_t;

/* `devices` with zero devices lets every later member be NULL. */
typedef struct {
  const char *name;
  ncclResult_t (*init)(ncclDebugLogger_t log);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v8_t *properties);
  ncclResult_t (*listen)(int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(void *handles[], int ranks, int rank, void *listen_comm, void **coll_comm);
  ncclResult_t (*reduceSupport)(ncclDataType_t type, ncclRedOp_t op, int *supported);
  ncclResult_t (*regMr)(void *coll_comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *coll_comm, void *address, size_t size, int type, uint64_t offset, int fd,
                              void **mr);
  ncclResult_t (*deregMr)(void *coll_comm, void *mr);
  ncclResult_t (*iallreduce)(void *coll_comm, void *in, void *out, int count, ncclDataType_t type, ncclRedOp_t op,
                             void *in_mr, void *out_mr, void **request);
  ncclResult_t (*iallgather)(void *coll_comm, void *in, int part_count, ncclNetSGE_v8_t *out_parts,
                             size_t bytes_per_rank, size_t window_offset, size_t window_bytes, void *in_mr,
                             void **request);
  ncclResult_t (*ireducescatter)(void *coll_comm, int part_count, ncclNetSGE_v8_t *in_parts, void *out,
                                 size_t bytes_per_rank, size_t window_offset, size_t window_bytes, ncclDataType_t type,
                                 ncclRedOp_t op, void *out_mr, void **request);
  ncclResult_t (*iflush)(void *coll_comm, void *address, int size, void *mr, void **request);
  ncclResult_t (*test)(void *request, int *done, int *size);
  ncclResult_t (*closeColl)(void *coll_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
} ncclCollNet_v8_t;

/* ---- v9: sizes are size_t, virtual devices ---- */

#define NCCL_NET_MAX_DEVS_PER_NIC_V9 4
typedef struct {
  int ndevs;
  int devs[NCCL_NET_MAX_DEVS_PER_NIC_V9];
} ncclNetVDeviceProps_v9_t;

typedef struct {
  char *name;
  char *pciPath;
  uint64_t guid;
  int ptrSupport;
  int regIsGlobal;
  int forceFlush;
  int speed;
  int port;
  float latency;
  int maxComms;
  int maxRecvs;
  ncclNetDeviceType netDeviceType;
  int netDeviceVersion;
  ncclNetVDeviceProps_v9_t vProps;
  size_t maxP2pBytes;
  size_t maxCollBytes; /* the largest slice that iallreduce is given */
} ncclNetProperties_v9_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(ncclDebugLogger_t log);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v9_t *properties);
  ncclResult_t (*listen)(int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(int device, void *handle, void **send_comm, ncclNetDeviceHandle_v9_t **device_handle);
  ncclResult_t (*accept)(void *listen_comm, void **recv_comm, ncclNetDeviceHandle_v9_t **device_handle);
  ncclResult_t (*regMr)(void *comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *comm, void *address, size_t size, int type, uint64_t offset, int fd, void **mr);
  ncclResult_t (*deregMr)(void *comm, void *mr);
  ncclResult_t (*isend)(void *send_comm, void *address, size_t size, int tag, void *mr, void **request);
  ncclResult_t (*irecv)(void *recv_comm, int n, void **addresses, size_t *sizes, int *tags, void **mrs,
                        void **request);
  ncclResult_t (*iflush)(void *recv_comm, int n, void **addresses, int *sizes, void **mrs, void **request);
  ncclResult_t (*test)(void *request, int *done, int *sizes);
  ncclResult_t (*closeSend)(void *send_comm);
  ncclResult_t (*closeRecv)(void *recv_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*getDeviceMr)(void *comm, void *mr, void **device_mr);                 /* may be NULL */
  ncclResult_t (*irecvConsumed)(void *recv_comm, int n, void *request);                /* may be NULL */
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v9_t *properties);      /* may be NULL */
} ncclNet_v9_t;

typedef struct {
  void *mhandle;
  void *address;
  size_t size;
} ncclNetSGE_v9_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(ncclDebugLogger_t log);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v9_t *properties);
  ncclResult_t (*listen)(int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(void *handles[], int ranks, int rank, void *listen_comm, void **coll_comm);
  ncclResult_t (*reduceSupport)(ncclDataType_t type, ncclRedOp_t op, int *supported);
  ncclResult_t (*regMr)(void *coll_comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *coll_comm, void *address, size_t size, int type, uint64_t offset, int fd,
                              void **mr);
  ncclResult_t (*deregMr)(void *coll_comm, void *mr);
  ncclResult_t (*iallreduce)(void *coll_comm, void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                             void *in_mr, void *out_mr, void **request);
  ncclResult_t (*iallgather)(void *coll_comm, void *in, int part_count, ncclNetSGE_v9_t *out_parts,
                             size_t bytes_per_rank, size_t window_offset, size_t window_bytes, void *in_mr,
                             void **request);
  ncclResult_t (*ireducescatter)(void *coll_comm, int part_count, ncclNetSGE_v9_t *in_parts, void *out,
                                 size_t bytes_per_rank, size_t window_offset, size_t window_bytes, ncclDataType_t type,
                                 ncclRedOp_t op, void *out_mr, void **request);
  ncclResult_t (*iflush)(void *coll_comm, void *address, int size, void *mr, void **request);
  ncclResult_t (*test)(void *request, int *done, int *size);
  ncclResult_t (*closeColl)(void *coll_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v9_t *properties); /* may be NULL */
} ncclCollNet_v9_t;

/* ---- v10: profiler handles, traffic class at connect; the collective table did not change ---- */

typedef ncclNetVDeviceProps_v9_t ncclNetVDeviceProps_v10_t;
typedef ncclNetProperties_v9_t ncclNetProperties_v10_t;
typedef ncclNetSGE_v9_t ncclNetSGE_v10_t;
typedef ncclCollNet_v9_t ncclCollNet_v10_t;

#define NCCL_NET_TRAFFIC_CLASS_UNDEF (-1)
typedef struct {
  int trafficClass;
} ncclNetCommConfig_v10_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(ncclDebugLogger_t log, ncclProfilerCallback_t profiler);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v10_t *properties);
  ncclResult_t (*listen)(int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(int device, ncclNetCommConfig_v10_t *config, void *handle, void **send_comm,
                          ncclNetDeviceHandle_v10_t **device_handle);
  ncclResult_t (*accept)(void *listen_comm, void **recv_comm, ncclNetDeviceHandle_v10_t **device_handle);
  ncclResult_t (*regMr)(void *comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *comm, void *address, size_t size, int type, uint64_t offset, int fd, void **mr);
  ncclResult_t (*deregMr)(void *comm, void *mr);
  ncclResult_t (*isend)(void *send_comm, void *address, size_t size, int tag, void *mr, void *profile,
                        void **request);
  ncclResult_t (*irecv)(void *recv_comm, int n, void **addresses, size_t *sizes, int *tags, void **mrs,
                        void **profiles, void **request);
  ncclResult_t (*iflush)(void *recv_comm, int n, void **addresses, int *sizes, void **mrs, void **request);
  ncclResult_t (*test)(void *request, int *done, int *sizes);
  ncclResult_t (*closeSend)(void *send_comm);
  ncclResult_t (*closeRecv)(void *recv_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*getDeviceMr)(void *comm, void *mr, void **device_mr);                  /* may be NULL */
  ncclResult_t (*irecvConsumed)(void *recv_comm, int n, void *request);                 /* may be NULL */
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v10_t *properties);      /* may be NULL */
} ncclNet_v10_t;

/* ---- v11: one context per communicator: init runs for each, finalize ends it ---- */

typedef ncclNetVDeviceProps_v9_t ncclNetVDeviceProps_v11_t;
typedef ncclNetCommConfig_v10_t ncclNetCommConfig_v11_t;
typedef ncclNetSGE_v9_t ncclNetSGE_v11_t;

typedef struct {
  char *name;
  char *pciPath;
  uint64_t guid;
  int ptrSupport;
  int regIsGlobal;
  int forceFlush;
  int speed;
  int port;
  float latency;
  int maxComms;
  int maxRecvs;
  ncclNetDeviceType netDeviceType;
  int netDeviceVersion;
  ncclNetVDeviceProps_v11_t vProps;
  size_t maxP2pBytes;
  size_t maxCollBytes;
  int maxMultiRequestSize;
} ncclNetProperties_v11_t;

typedef struct {
  int32_t maxConcurrentPeers;
  int32_t minConcurrentPeers;
  int32_t maxFlowsPerPeer;
  int32_t minFlowsPerPeer;
} ncclNetCommAttr_v11_t;

typedef struct {
  ncclNetCommAttr_v11_t sendCommAttr;
  ncclNetCommAttr_v11_t recvCommAttr;
  uint32_t op;
  uint32_t algo;
  uint32_t proto;
} ncclNetAttr_v11_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(void **context, uint64_t comm_id, ncclNetCommConfig_v11_t *config, ncclDebugLogger_t log,
                       ncclProfilerCallback_t profiler);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v11_t *properties);
  ncclResult_t (*listen)(void *context, int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(void *context, int device, void *handle, void **send_comm,
                          ncclNetDeviceHandle_v11_t **device_handle);
  ncclResult_t (*accept)(void *listen_comm, void **recv_comm, ncclNetDeviceHandle_v11_t **device_handle);
  ncclResult_t (*regMr)(void *comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *comm, void *address, size_t size, int type, uint64_t offset, int fd, void **mr);
  ncclResult_t (*deregMr)(void *comm, void *mr);
  ncclResult_t (*isend)(void *send_comm, void *address, size_t size, int tag, void *mr, void *profile,
                        void **request);
  ncclResult_t (*irecv)(void *recv_comm, int n, void **addresses, size_t *sizes, int *tags, void **mrs,
                        void **profiles, void **request);
  ncclResult_t (*iflush)(void *recv_comm, int n, void **addresses, int *sizes, void **mrs, void **request);
  ncclResult_t (*test)(void *request, int *done, int *sizes);
  ncclResult_t (*closeSend)(void *send_comm);
  ncclResult_t (*closeRecv)(void *recv_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*getDeviceMr)(void *comm, void *mr, void **device_mr);                  /* may be NULL */
  ncclResult_t (*irecvConsumed)(void *recv_comm, int n, void *request);                 /* may be NULL */
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v11_t *properties);      /* may be NULL */
  ncclResult_t (*finalize)(void *context);
  ncclResult_t (*setNetAttr)(void *context, ncclNetAttr_v11_t *attributes);             /* may be NULL */
} ncclNet_v11_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(void **context, uint64_t comm_id, ncclDebugLogger_t log);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v11_t *properties);
  ncclResult_t (*listen)(void *context, int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(void *handles[], int ranks, int rank, void *listen_comm, void **coll_comm);
  ncclResult_t (*reduceSupport)(ncclDataType_t type, ncclRedOp_t op, int *supported);
  ncclResult_t (*regMr)(void *coll_comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *coll_comm, void *address, size_t size, int type, uint64_t offset, int fd,
                              void **mr);
  ncclResult_t (*deregMr)(void *coll_comm, void *mr);
  ncclResult_t (*iallreduce)(void *coll_comm, void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                             void *in_mr, void *out_mr, void **request);
  ncclResult_t (*iallgather)(void *coll_comm, void *in, int part_count, ncclNetSGE_v11_t *out_parts,
                             size_t bytes_per_rank, size_t window_offset, size_t window_bytes, void *in_mr,
                             void **request);
  ncclResult_t (*ireducescatter)(void *coll_comm, int part_count, ncclNetSGE_v11_t *in_parts, void *out,
                                 size_t bytes_per_rank, size_t window_offset, size_t window_bytes, ncclDataType_t type,
                                 ncclRedOp_t op, void *out_mr, void **request);
  ncclResult_t (*iflush)(void *coll_comm, void *address, int size, void *mr, void **request);
  ncclResult_t (*test)(void *request, int *done, int *size);
  ncclResult_t (*closeColl)(void *coll_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v11_t *properties); /* may be NULL */
  ncclResult_t (*finalize)(void *context);
} ncclCollNet_v11_t;

/* ---- v12: more devices in a virtual one, rails and planes ---- */

#define NCCL_NET_MAX_DEVS_PER_NIC_V12 8
typedef struct {
  int ndevs;
  int devs[NCCL_NET_MAX_DEVS_PER_NIC_V12];
} ncclNetVDeviceProps_v12_t;

typedef ncclNetCommConfig_v10_t ncclNetCommConfig_v12_t;
typedef ncclNetCommAttr_v11_t ncclNetCommAttr_v12_t;
typedef ncclNetAttr_v11_t ncclNetAttr_v12_t;
typedef ncclNetSGE_v9_t ncclNetSGE_v12_t;

#define NCCL_NET_ID_UNDEF (-1)
typedef struct {
  char *name;
  char *pciPath;
  uint64_t guid;
  int ptrSupport;
  int regIsGlobal;
  int forceFlush;
  int speed;
  int port;
  float latency;
  int maxComms;
  int maxRecvs;
  ncclNetDeviceType netDeviceType;
  int netDeviceVersion;
  ncclNetVDeviceProps_v12_t vProps;
  size_t maxP2pBytes;
  size_t maxCollBytes;
  int maxMultiRequestSize;
  int16_t railId;
  int16_t planeId;
} ncclNetProperties_v12_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(void **context, uint64_t comm_id, ncclNetCommConfig_v12_t *config, ncclDebugLogger_t log,
                       ncclProfilerCallback_t profiler);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v12_t *properties);
  ncclResult_t (*listen)(void *context, int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(void *context, int device, void *handle, void **send_comm,
                          ncclNetDeviceHandle_v12_t **device_handle);
  ncclResult_t (*accept)(void *listen_comm, void **recv_comm, ncclNetDeviceHandle_v12_t **device_handle);
  ncclResult_t (*regMr)(void *comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *comm, void *address, size_t size, int type, uint64_t offset, int fd, void **mr);
  ncclResult_t (*deregMr)(void *comm, void *mr);
  ncclResult_t (*isend)(void *send_comm, void *address, size_t size, int tag, void *mr, void *profile,
                        void **request);
  ncclResult_t (*irecv)(void *recv_comm, int n, void **addresses, size_t *sizes, int *tags, void **mrs,
                        void **profiles, void **request);
  ncclResult_t (*iflush)(void *recv_comm, int n, void **addresses, int *sizes, void **mrs, void **request);
  ncclResult_t (*test)(void *request, int *done, int *sizes);
  ncclResult_t (*closeSend)(void *send_comm);
  ncclResult_t (*closeRecv)(void *recv_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*getDeviceMr)(void *comm, void *mr, void **device_mr);                  /* may be NULL */
  ncclResult_t (*irecvConsumed)(void *recv_comm, int n, void *request);                 /* may be NULL */
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v12_t *properties);      /* may be NULL */
  ncclResult_t (*finalize)(void *context);
  ncclResult_t (*setNetAttr)(void *context, ncclNetAttr_v12_t *attributes);             /* may be NULL */
} ncclNet_v12_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(void **context, uint64_t comm_id, ncclDebugLogger_t log);
  ncclResult_t (*devices)(int *count);
  ncclResult_t (*getProperties)(int device, ncclNetProperties_v12_t *properties);
  ncclResult_t (*listen)(void *context, int device, void *handle, void **listen_comm);
  ncclResult_t (*connect)(void *handles[], int ranks, int rank, void *listen_comm, void **coll_comm);
  ncclResult_t (*reduceSupport)(ncclDataType_t type, ncclRedOp_t op, int *supported);
  ncclResult_t (*regMr)(void *coll_comm, void *address, size_t size, int type, void **mr);
  ncclResult_t (*regMrDmaBuf)(void *coll_comm, void *address, size_t size, int type, uint64_t offset, int fd,
                              void **mr);
  ncclResult_t (*deregMr)(void *coll_comm, void *mr);
  ncclResult_t (*iallreduce)(void *coll_comm, void *in, void *out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                             void *in_mr, void *out_mr, void **request);
  ncclResult_t (*iallgather)(void *coll_comm, void *in, int part_count, ncclNetSGE_v12_t *out_parts,
                             size_t bytes_per_rank, size_t window_offset, size_t window_bytes, void *in_mr,
                             void **request);
  ncclResult_t (*ireducescatter)(void *coll_comm, int part_count, ncclNetSGE_v12_t *in_parts, void *out,
                                 size_t bytes_per_rank, size_t window_offset, size_t window_bytes, ncclDataType_t type,
                                 ncclRedOp_t op, void *out_mr, void **request);
  ncclResult_t (*iflush)(void *coll_comm, void *address, int size, void *mr, void **request);
  ncclResult_t (*test)(void *request, int *done, int *size);
  ncclResult_t (*closeColl)(void *coll_comm);
  ncclResult_t (*closeListen)(void *listen_comm);
  ncclResult_t (*makeVDevice)(int *device, ncclNetVDeviceProps_v12_t *properties); /* may be NULL */
  ncclResult_t (*finalize)(void *context);
} ncclCollNet_v12_t;

#ifdef __cplusplus
}
#endif

#endif
