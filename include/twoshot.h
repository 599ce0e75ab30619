/* twoshot's own functions, exported by libtwoshot.so beside NCCL's. None of them is needed to use the library. */
#ifndef TWOSHOT_H
#define TWOSHOT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the library, such as "0.1.0". Never fails; the text lives as long as the program. */
const char *twoshot_version(void);

/* How many AllReduce calls of this process ran in twoshot's kernels, and how many were left to stock NCCL, up to now
 * and over all communicators. Either pointer may be null. Returns 0. */
int twoshot_counters(uint64_t *routed, uint64_t *stock);

/* What senders of the official door's network (TWOSHOT_MODE=collnet) have done in this process, into five numbers:
 * messages sent straight into registered memory, their bytes, messages sent through windows, their bytes, and memories
 * that have no straight way. Returns 0, or ncclInvalidArgument. */
int twoshot_network_counters(uint64_t *five);

/* Where the time of this process's requests of the official door's collective network went, into four numbers: how many
 * there were, and nanoseconds of queueing them, of one or more being under way, and of none being under way between them.
 * Returns 0, or ncclInvalidArgument. */
int twoshot_collnet_times(uint64_t *four);

/* What a communicator's ranks agreed on. */
struct twoshot_communicator {
  uint32_t size;      /* set by the caller: sizeof(struct twoshot_communicator) */
  uint32_t state;     /* 0 not set up yet, 1 on, 2 off (stock NCCL), 3 lost; what follows is 0 unless it is on */
  uint32_t ranks;
  uint32_t hosts;
  uint32_t arch;      /* lowest compute capability, 90 for 9.0 */
  uint32_t nccl;      /* minor release of stock NCCL, 228 for 2.28; 0 where the ranks have different ones */
  uint32_t multicast; /* 1 where all ranks have it */
  uint32_t blocks;    /* most thread blocks of a launch */
  uint64_t oneshot_bytes; /* largest payload of one-shot, of two-shot; above it and bulk_bytes calls are stock NCCL's */
  uint64_t twoshot_bytes;
  uint64_t switch_bytes; /* smallest payload above one-shot's whose sum the switch makes, 2^64 - 1 where it makes none */
  uint64_t bulk_bytes;   /* largest payload above two-shot's that goes through the ring, 0 where none does */
};

/* Describes a communicator (an ncclComm_t). Fields beyond the caller's size are left out. Returns 0, or
 * ncclInvalidArgument. */
int twoshot_describe(void *comm, struct twoshot_communicator *out);

#ifdef __cplusplus
}
#endif

#endif
