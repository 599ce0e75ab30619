/* NCCL's tuner plugin ABI, versions 3 to 6.
 *
 * Written for this project from the facts of the ABI. A tuner is looked for in NCCL_TUNER_PLUGIN's library, then in the
 * network plugin's, then in libnccl-tuner.so; it exports ncclTunerPlugin_v<N>. Newest version that a release asks for:
 *   2.20: v1, 2.21: v2 (not described)     2.22, 2.23: v3     2.24 to 2.27: v4     2.28, 2.29: v5     2.30 to 2.32: v6
 *
 * getCollInfo may lower entries of the cost table, an [algorithms][protocols] array of float times (microseconds) behind
 * `cost_table`, in which a negative entry means "not available". A result other than ncclSuccess leaves the choice to
 * NCCL. Enumerations are open ints. */
#ifndef TWOSHOT_NCCL_TUNER_ABI_H
#define TWOSHOT_NCCL_TUNER_ABI_H

#include <stddef.h>
#include <stdint.h>

#include "nccl_net_abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Which collective is asked about. */
typedef int ncclFunc_t;
#define ncclFuncBroadcast 0
#define ncclFuncReduce 1
#define ncclFuncAllGather 2
#define ncclFuncReduceScatter 3
#define ncclFuncAllReduce 4

/* Rows of the cost table; a caller's table may have fewer than NCCL_NUM_ALGORITHMS. PAT since 2.23. */
#define NCCL_ALGO_TREE 0
#define NCCL_ALGO_RING 1
#define NCCL_ALGO_COLLNET_DIRECT 2
#define NCCL_ALGO_COLLNET_CHAIN 3
#define NCCL_ALGO_NVLS 4
#define NCCL_ALGO_NVLS_TREE 5
#define NCCL_ALGO_PAT 6
#define NCCL_NUM_ALGORITHMS 7

/* Columns of the cost table. */
#define NCCL_PROTO_LL 0
#define NCCL_PROTO_LL128 1
#define NCCL_PROTO_SIMPLE 2
#define NCCL_NUM_PROTOCOLS 3

#define NCCL_ALGO_PROTO_IGNORE (-1.0f)

typedef struct {
  const char *name;
  ncclResult_t (*init)(size_t ranks, size_t nodes, ncclDebugLogger_t log, void **context);
  ncclResult_t (*getCollInfo)(void *context, ncclFunc_t collective, size_t bytes, int pipelined, float **cost_table,
                              int algorithms, int protocols, int *channels);
  ncclResult_t (*destroy)(void *context);
} ncclTuner_v3_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(size_t ranks, size_t nodes, ncclDebugLogger_t log, void **context);
  ncclResult_t (*getCollInfo)(void *context, ncclFunc_t collective, size_t bytes, int pipelined, float **cost_table,
                              int algorithms, int protocols, int registered, int *channels);
  ncclResult_t (*destroy)(void *context);
} ncclTuner_v4_t;

/* What NCCL knows about NVLink domains of the communicator. */
typedef struct {
  int nNvlDomains;
  int minRanksPerNvlDomain;
  int maxRanksPerNvlDomain;
} ncclNvlDomainInfo_v5_t;
typedef ncclNvlDomainInfo_v5_t ncclNvlDomainInfo_v6_t;

#define NCCL_NUM_HW_LINKS 3
#define NCCL_NUM_COMPCAPS 4
#define NCCL_NUM_TUNING_SCALES 3

/* The constants of NCCL's own cost model, in and out. */
typedef struct {
  double baseLatencies[NCCL_NUM_ALGORITHMS][NCCL_NUM_PROTOCOLS];
  double hwLatencies[NCCL_NUM_HW_LINKS][NCCL_NUM_ALGORITHMS][NCCL_NUM_PROTOCOLS];
  double llMaxBws[NCCL_NUM_COMPCAPS][NCCL_NUM_TUNING_SCALES];
  double perChMaxRingLL128Bws[NCCL_NUM_COMPCAPS][NCCL_NUM_TUNING_SCALES];
  double perChMaxTreeLL128Bws[NCCL_NUM_COMPCAPS][NCCL_NUM_TUNING_SCALES];
  double perChMaxTreeBws[NCCL_NUM_COMPCAPS][NCCL_NUM_TUNING_SCALES];
  double perChMaxNVLSTreeBws[NCCL_NUM_COMPCAPS][NCCL_NUM_TUNING_SCALES];
} ncclTunerConstants_v5_t;
typedef ncclTunerConstants_v5_t ncclTunerConstants_v6_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(void **context, uint64_t comm_id, size_t ranks, size_t nodes, ncclDebugLogger_t log,
                       ncclNvlDomainInfo_v5_t *domains, ncclTunerConstants_v5_t *constants);
  ncclResult_t (*getCollInfo)(void *context, ncclFunc_t collective, size_t bytes, int pipelined, float **cost_table,
                              int algorithms, int protocols, int registered, int *channels);
  ncclResult_t (*finalize)(void *context);
} ncclTuner_v5_t;

typedef struct {
  const char *name;
  ncclResult_t (*init)(void **context, uint64_t comm_id, size_t ranks, size_t nodes, ncclDebugLogger_t log,
                       ncclNvlDomainInfo_v6_t *domains, ncclTunerConstants_v6_t *constants);
  ncclResult_t (*getCollInfo)(void *context, ncclFunc_t collective, size_t bytes, int pipelined, float **cost_table,
                              int algorithms, int protocols, int registered, int *channels);
  ncclResult_t (*finalize)(void *context);
  ncclResult_t (*getChunkSize)(void *context, ncclFunc_t collective, size_t bytes, int algorithm, int protocol,
                               int channels, size_t *chunk_size); /* may be NULL */
} ncclTuner_v6_t;

#ifdef __cplusplus
}
#endif

#endif
