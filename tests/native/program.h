// What the programs of the tests share, which know nothing of a shim: some of the driver's calls.
//
// Owns: short names of the driver's types, its calls that all of them make, and DO, which ends a
// program at the first call that fails. No header of the vendor is needed.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int R;
typedef uint64_t P;
typedef void *H;
R cuInit(unsigned), cuDevicePrimaryCtxRetain(H *, int), cuCtxSetCurrent(H), cuCtxSynchronize(void);
R cuModuleLoadData(H *, const void *), cuModuleGetFunction(H *, H, const char *);
R cuMemAlloc_v2(P *, size_t), cuStreamCreate(H *, unsigned);
R cuLaunchKernel(H, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, H, void **,
                 void **);

#define DO(call)                                                         \
  do {                                                                   \
    R result = call;                                                     \
    if (result) { fprintf(stderr, "%s: %d\n", #call, result); exit(1); } \
  } while (0)

// The context that all of them work in.
static inline void enter(H *context) {
  DO(cuInit(0));
  DO(cuDevicePrimaryCtxRetain(context, 0));
  DO(cuCtxSetCurrent(*context));
}
