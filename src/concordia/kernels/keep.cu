// A kernel that calls the handler that it is linked with, and is never launched.
//
// Owns: nothing. Promises: the linker, which drops what no kernel reaches, keeps every function
// that the handler calls: without this the compiler's own routines (a 64-bit division) were
// dropped, and the call to one of them left pointing nowhere. GPU only. Called by nobody. Says
// nothing about registers or stack: the lint reads those of each function.
#include "call.h"

extern "C" __device__ void concordia_handler(Call* call, uint64_t lane);

extern "C" __global__ void concordia_keep(Call* call) { concordia_handler(call, threadIdx.x); }
