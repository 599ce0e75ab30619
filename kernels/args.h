/* What the host and the kernels must agree on: the launch argument, the header of a window, the control
 * record, the memory layout's constants. Plain C: nvcc, the CPU executor and bindgen read this very file. */
#ifndef TWOSHOT_ARGS_H
#define TWOSHOT_ARGS_H

#include <stddef.h>
#include <stdint.h>

/* A window is one allocation: [header][stage 0][stage 1][stage 2], and behind them, where there is one, [ring]. */
#define TWOSHOT_LINE_BYTES 16      /* the unit of every transfer and poll */
#define TWOSHOT_HALF_BYTES 8       /* payload in a line of the types that kernels/wire.cuh escapes */
#define TWOSHOT_SLOT_LINES 8       /* slots and shards start on multiples of this many lines */
#define TWOSHOT_HEADER_BYTES 8192
#define TWOSHOT_STAGES 3
#define TWOSHOT_STAGE_ALIGN 128    /* stage_bytes is a multiple of it */
#define TWOSHOT_MAX_BLOCKS 256     /* one epoch replica per block */
#define TWOSHOT_MAX_THREADS 512
#define TWOSHOT_CHUNK_LINES 128    /* lines of a shard that a rank announces together (switch.cuh) */
#define TWOSHOT_LINE_FLAGS 4       /* arrival flags in a line: one word for each rank */

/* The ring (ring.cuh): [flags][slots], each by phase, peer and channel. */
#define TWOSHOT_BULK_THREADS 512   /* a warp polls, one signals, the others have these roles: */
#define TWOSHOT_BULK_SCATTERERS 4
#define TWOSHOT_BULK_REDUCERS 6
#define TWOSHOT_BULK_COLLECTORS 4
#define TWOSHOT_BULK_SCATTERERS_OF_TWO 6 /* between two ranks, where nobody collects */
#define TWOSHOT_BULK_REDUCERS_OF_TWO 8
#define TWOSHOT_BULK_MAX_RANKS 16  /* a poller has 16 lanes for each phase */
#define TWOSHOT_FLAG_BYTES 8
#define TWOSHOT_BLOCK_WORDS 96     /* words of shared memory that the warps of a block tell each other */

#define TWOSHOT_SENTINEL 0xFFFAFFFAu    /* a word that no publisher ever stores */
#define TWOSHOT_REPLACEMENT 0xFFFAFFFBu /* what it stores instead: NaN again, in f32, f16 and bf16 */

#define TWOSHOT_SPINS_PER_CHECK 1024 /* failed polls between two looks at the control record */

/* TwoshotControl.fault */
#define TWOSHOT_FAULT_NONE 0
#define TWOSHOT_FAULT_ABORTED 1
#define TWOSHOT_FAULT_DEADLINE 2
#define TWOSHOT_FAULT_OVERLAP 3

/* TwoshotControl.kernel and TwoshotControl.phase */
#define TWOSHOT_KERNEL_ONESHOT 1
#define TWOSHOT_KERNEL_TWOSHOT 2
#define TWOSHOT_KERNEL_SWITCH 3
#define TWOSHOT_KERNEL_BULK 4
#define TWOSHOT_PHASE_SCATTER 1
#define TWOSHOT_PHASE_BROADCAST 2

/* TwoshotArgs.op, as ncclRedOp_t; not read by the kernels that only sum */
#define TWOSHOT_OP_SUM 0
#define TWOSHOT_OP_PROD 1
#define TWOSHOT_OP_MAX 2
#define TWOSHOT_OP_MIN 3
#define TWOSHOT_OP_AVG 4

/* TwoshotArgs.type, as ncclDataType_t: those that a kernel tells apart */
#define TWOSHOT_TYPE_I8 0
#define TWOSHOT_TYPE_I32 2
#define TWOSHOT_TYPE_I64 4
#define TWOSHOT_TYPE_E5M2 11

/* The only parameter of every other kernel, passed by value. */
typedef struct TwoshotArgs {
  uint64_t in;            /* device address, element aligned */
  uint64_t out;           /* device address, element aligned; may equal in */
  uint64_t count;         /* elements; the same on every rank */
  uint64_t windows;       /* rank r's window is at windows + r * window_stride */
  uint64_t window_stride;
  uint64_t multicast;     /* the multicast window, or 0; only for multimem.st and multimem.ld_reduce */
  uint64_t control;       /* device address of this rank's TwoshotControl */
  uint64_t stage_bytes;
  uint64_t timeout_ns;    /* 0: no deadline */
  uint32_t rank;
  uint32_t ranks;
  uint32_t op;            /* TWOSHOT_OP_* */
  uint16_t type;          /* TWOSHOT_TYPE_* or another ncclDataType_t */
  uint16_t trigger;       /* 1: the next launch of the stream may become resident now; it waits for this one's end */
  uint32_t channels;      /* of the ring; the same on every rank, as are the two behind it */
  uint16_t ring_log2;     /* chunks of a channel that the ring holds, of every peer and phase, as a power of two, 4 at least */
  uint16_t chunk_log2;    /* lines of a chunk of the ring, as a power of two, at least 7 */
} TwoshotArgs;

/* The parameter of the kernels of scale.cuh, passed by value. */
typedef struct TwoshotScaleArgs {
  uint64_t in;             /* device address, element aligned */
  uint64_t out;            /* device address, element aligned; may equal in */
  uint64_t count;          /* elements */
  uint64_t head;           /* elements before both buffers are at a multiple of 16 bytes; count where they never are */
  uint64_t factor;         /* the factor in the elements' type, in the low bytes; not read where an address is given */
  uint64_t factor_address; /* device address of the factor, element aligned, or 0 */
  uint32_t type;           /* TWOSHOT_TYPE_* or another ncclDataType_t */
  uint32_t trigger;        /* not 0: the launch behind this one may become resident now */
} TwoshotScaleArgs;

/* What a launch begins with, in one load. */
typedef struct TwoshotEpoch {
  uint32_t number;   /* launches so far */
  uint32_t given_up; /* fault_claim, once it is claimed */
} TwoshotEpoch;

/* At the start of the own window; nobody else touches it. */
typedef struct TwoshotState {
  TwoshotEpoch epoch[TWOSHOT_MAX_BLOCKS]; /* one copy per block */
  uint32_t ticket;                    /* twice the launches so far, odd while one runs: detects overlap */
  uint32_t fault_claim;               /* epoch + 1 of the launch that claimed the fault record */
  uint64_t base[TWOSHOT_MAX_BLOCKS];  /* chunks that went through a channel of the ring, one copy per block */
} TwoshotState;

/* Host memory that the device can reach. The host writes abort, the device all the rest. */
typedef struct TwoshotControl {
  uint32_t abort;  /* not 0: leave */
  uint32_t fault;  /* TWOSHOT_FAULT_*, written last */
  uint32_t epoch;
  uint32_t kernel; /* TWOSHOT_KERNEL_* */
  uint32_t peer;   /* the first rank whose line is missing */
  uint32_t phase;  /* TWOSHOT_PHASE_*; a one-shot kernel has only the first */
  uint64_t line;   /* the missing line's index in its slot */
  uint64_t count;  /* elements of that call */
} TwoshotControl;

#ifdef __cplusplus
#define TWOSHOT_ASSERT(condition) static_assert(condition, #condition)
#else
#define TWOSHOT_ASSERT(condition) _Static_assert(condition, #condition)
#endif

TWOSHOT_ASSERT(sizeof(TwoshotArgs) == 96);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, in) == 0);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, out) == 8);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, count) == 16);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, windows) == 24);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, window_stride) == 32);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, multicast) == 40);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, control) == 48);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, stage_bytes) == 56);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, timeout_ns) == 64);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, rank) == 72);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, ranks) == 76);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, op) == 80);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, type) == 84);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, trigger) == 86);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, channels) == 88);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, ring_log2) == 92);
TWOSHOT_ASSERT(offsetof(TwoshotArgs, chunk_log2) == 94);

TWOSHOT_ASSERT(sizeof(TwoshotScaleArgs) == 56);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, in) == 0);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, out) == 8);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, count) == 16);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, head) == 24);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, factor) == 32);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, factor_address) == 40);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, type) == 48);
TWOSHOT_ASSERT(offsetof(TwoshotScaleArgs, trigger) == 52);

TWOSHOT_ASSERT(sizeof(TwoshotEpoch) == 8);
TWOSHOT_ASSERT(offsetof(TwoshotEpoch, number) == 0);
TWOSHOT_ASSERT(offsetof(TwoshotEpoch, given_up) == 4);

TWOSHOT_ASSERT(sizeof(TwoshotState) == 16 * TWOSHOT_MAX_BLOCKS + 8);
TWOSHOT_ASSERT(sizeof(TwoshotState) <= TWOSHOT_HEADER_BYTES);
TWOSHOT_ASSERT(offsetof(TwoshotState, ticket) == 8 * TWOSHOT_MAX_BLOCKS);
TWOSHOT_ASSERT(offsetof(TwoshotState, fault_claim) == 8 * TWOSHOT_MAX_BLOCKS + 4);
TWOSHOT_ASSERT(offsetof(TwoshotState, base) == 8 * TWOSHOT_MAX_BLOCKS + 8);

TWOSHOT_ASSERT(sizeof(TwoshotControl) == 40);
TWOSHOT_ASSERT(offsetof(TwoshotControl, abort) == 0);
TWOSHOT_ASSERT(offsetof(TwoshotControl, fault) == 4);
TWOSHOT_ASSERT(offsetof(TwoshotControl, epoch) == 8);
TWOSHOT_ASSERT(offsetof(TwoshotControl, kernel) == 12);
TWOSHOT_ASSERT(offsetof(TwoshotControl, peer) == 16);
TWOSHOT_ASSERT(offsetof(TwoshotControl, phase) == 20);
TWOSHOT_ASSERT(offsetof(TwoshotControl, line) == 24);
TWOSHOT_ASSERT(offsetof(TwoshotControl, count) == 32);

#endif
