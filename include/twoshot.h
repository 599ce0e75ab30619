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

#ifdef __cplusplus
}
#endif

#endif
