// Copies as the driver's interface describes them, and what their hooks have in common.
//
// Owns: the structures of copies, and the order of what a hook does around the driver's call.
// Promises: what is written is marked after the call; what is read is logged after it, or, in a
// program that is brought forward, answered from the log once what came before it is done. Included
// by copies.c, copies_pitched.c, fills.c, graphs.c and saver.c. It holds nothing.
#pragma once
#include "protect.h"

enum { MEMORY_HOST = 1, MEMORY_DEVICE = 2, MEMORY_ARRAY = 3, MEMORY_UNIFIED = 4 };

typedef struct {
  size_t x, y;
  int type;
  void *host;
  CUdeviceptr device;
  void *array;
  size_t pitch;
} CopyEnd2D;
typedef struct {
  CopyEnd2D source, target;
  size_t width, height;
} CUDA_MEMCPY2D;

typedef struct {
  size_t x, y, z, level;
  int type;
  void *host;
  CUdeviceptr device;
  void *array;
  void *context;  // of peer copies; else reserved
  size_t pitch, height;
} CopyEnd3D;
typedef struct {
  CopyEnd3D source, target;
  size_t width, height, depth;
} CUDA_MEMCPY3D;
_Static_assert(sizeof(CUDA_MEMCPY2D) == 128, "as the driver has it");
_Static_assert(sizeof(CUDA_MEMCPY3D) == 200, "as the driver has it");

// Where on the device a copy writes: 0 where it does not.
static inline uint64_t written_2d(const CUDA_MEMCPY2D *copy, uint64_t *bytes) {
  const CopyEnd2D *end = &copy->target;
  if (end->type != MEMORY_DEVICE && end->type != MEMORY_UNIFIED) return 0;
  uint64_t pitch = end->pitch ? end->pitch : copy->width;
  *bytes = copy->height ? (copy->height - 1) * pitch + copy->width : 0;
  return end->device + end->y * pitch + end->x;
}

static inline uint64_t written_3d(const CUDA_MEMCPY3D *copy, uint64_t *bytes) {
  const CopyEnd3D *end = &copy->target;
  if (end->type != MEMORY_DEVICE && end->type != MEMORY_UNIFIED) return 0;
  uint64_t pitch = end->pitch ? end->pitch : copy->width;
  uint64_t rows = end->height ? end->height : copy->height;
  if (!copy->height || !copy->depth) {
    *bytes = 0;
    return end->device;
  }
  *bytes = ((copy->depth - 1) * rows + copy->height - 1) * pitch + copy->width;
  return end->device + (end->z * rows + end->y) * pitch + end->x;
}

#define WROTE(address, bytes, stream, per_thread, call)                              \
  do {                                                                               \
    ENTERS(stream, per_thread);                                                      \
    CUresult result = call;                                                          \
    if (IS_PROTECTED() && result == CUDA_SUCCESS)                                    \
      marks_wrote(address, bytes, stream, per_thread);                               \
    return result;                                                                   \
  } while (0)

// A read of a program that is brought forward: after `before`, which sees to it that what the
// program gave before is done (it may still read the target), it is answered, unless another thread
// has come to the end of the log meanwhile.
#define ANSWERED(before, answer)                                                     \
  do {                                                                               \
    if (!IS_FORWARD()) break;                                                        \
    CUresult early = before;                                                         \
    if (early != CUDA_SUCCESS || (answer)) return early;                             \
  } while (0)

// The driver's own copy is made and waited for: it knows what comes before it, in any stream.
static inline CUresult settled(CUresult result, CUstream stream, int is_per_thread) {
  return result == CUDA_SUCCESS ? reads_settled(stream, is_per_thread) : result;
}

// A copy to the host that is over when it returns. The driver knows best what comes before it.
#define READ(target, bytes, call)                                                    \
  do {                                                                               \
    ANSWERED(call, reads_answer(target, bytes));                                     \
    CUresult result = call;                                                          \
    if (IS_PROTECTED() && result == CUDA_SUCCESS) reads_took(target, bytes);         \
    return result;                                                                   \
  } while (0)

// And one that is over when its stream has come to it.
#define READ_LATER(target, source, bytes, stream, per_thread, call)                  \
  do {                                                                               \
    int is_ours = IS_PROTECTED() && !is_capturing(stream, per_thread);               \
    if (is_ours)                                                                     \
      ANSWERED(settled(call, stream, per_thread), reads_answer(target, bytes));      \
    CUresult result = call;                                                          \
    if (is_ours && result == CUDA_SUCCESS)                                           \
      reads_async(target, source, bytes, stream, per_thread);                        \
    return result;                                                                   \
  } while (0)

#define UNSEEN(what) protect_lose("%s to the host is in use: what it reads is not logged", what)

#define none ((CUstream)NULL)

// Of a unified copy: whether it reads the device for the host.
static inline int is_read(CUdeviceptr target, CUdeviceptr source) {
  return IS_PROTECTED() && !is_device_memory(target) && is_device_memory(source);
}
