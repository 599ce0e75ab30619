/* A program that uses NCCL and prints what it sees. Its arguments are steps, run in order:
 *   init              make a communicator (which loads the plugin)      [linked]
 *   call              ncclAllReduce, called                             [linked]
 *   pointer           ncclAllReduce, through a pointer                  [linked, -DPOINTER]
 *   missing           ncclGroupSimulateEnd                              [linked]
 *   report            what the NCCL of this program saw                 [linked]
 *   slots             where all slots lead
 *   open FILE         open a library, keep it as the current one
 *   user NAME         call `int NAME(void)` of the current library
 *   version           ncclGetVersion of the current library
 * Steps marked [linked] exist when it is built with -DLINKED. */
#define _GNU_SOURCE
#include "slots.h"

#include "nccl_api.h"

#ifdef LINKED
void fake_report(void);

static int linked(const char *step) {
  ncclComm_t comm = 0;
  ncclUniqueId id = {{0}};
  if (!strcmp(step, "init")) return printf("init %d\n", ncclCommInitRank(&comm, 1, id, 0));
  if (!strcmp(step, "call")) return printf("call %d\n", ncclAllReduce(0, 0, 7, ncclFloat32, ncclSum, 0, 0));
  if (!strcmp(step, "missing")) {
    ncclResult_t (*missing)(void *) = (ncclResult_t(*)(void *))dlsym(RTLD_DEFAULT, "ncclGroupSimulateEnd");
    return missing ? printf("missing %d\n", missing(0)) : printf("missing none\n");
  }
#ifdef POINTER /* makes the compiler load the address, so the word for it is one of data */
  if (!strcmp(step, "pointer")) {
    static ncclResult_t (*volatile pointer)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t,
                                            cudaStream_t);
    pointer = ncclAllReduce;
    return printf("pointer %d\n", pointer(0, 0, 7, ncclFloat32, ncclSum, 0, 0));
  }
#endif
  if (!strcmp(step, "report")) return fake_report(), 1;
  return 0;
}
#else
static int linked(const char *step) { return (void)step, 0; }
#endif

int main(int count, char **steps) {
  void *current = NULL;
  setvbuf(stdout, NULL, _IONBF, 0);
  for (int i = 1; i < count; ++i) {
    if (linked(steps[i])) continue;
    if (!strcmp(steps[i], "slots")) {
      print_slots();
    } else if (!strcmp(steps[i], "open") && i + 1 < count) {
      current = dlopen(steps[++i], RTLD_LAZY | RTLD_LOCAL);
      if (!current) return printf("open error %s\n", dlerror()), 1;
    } else if (!strcmp(steps[i], "user") && i + 1 < count) {
      int (*function)(void) = (int (*)(void))dlsym(current, steps[++i]);
      printf("%s %d\n", steps[i], function ? function() : -1);
    } else if (!strcmp(steps[i], "version")) {
      int (*function)(int *) = (int (*)(int *))dlsym(current, "ncclGetVersion"), version = 0;
      int code = function ? function(&version) : -1;
      printf("version %d %d\n", code, version);
    } else {
      return printf("no step %s\n", steps[i]), 2;
    }
  }
  return 0;
}
