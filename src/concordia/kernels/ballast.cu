// What the executor's launch must give to handlers that it was not linked with.
//
// Owns: one function that is never called, whose need of registers and stack is as large as the
// lint allows. Promises: the linker sees its address taken, counts it as a possible target of the
// executor's pointer call, and so gives every launch that much. GPU only. Called by nobody: CUDA
// has no other way to say "launch with this many registers". Does no work.
#include "call.h"

// of 64 bits each, with as many products under way: more than 128 registers hold
constexpr int kLive = 56;
constexpr int kFrameWords = 512 / 8;  // FRAME_BYTES_MAX of loader.py

extern "C" __device__ __noinline__ void concordia_ballast(Call* call, uint64_t lane) {
  uint64_t value[kLive];
  uint64_t frame[kFrameWords];
  volatile uint64_t* words = call->scratch;
#pragma unroll
  for (int i = 0; i < kLive; ++i) value[i] = words[i % 8] + lane;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = words[i % 8];
#pragma unroll
  for (int i = 0; i < kLive; ++i) value[i] *= frame[(value[(i + 1) % kLive] + lane) % kFrameWords];
#pragma unroll
  for (int i = 0; i < kLive; ++i) words[i % 8] = value[i];
}

extern "C" __device__ HandlerFunction const concordia_ballast_pointer = concordia_ballast;
