// Copies of rows, boxes and batches.
//
// Owns: their hooks. Promises: as copies.c; what a copy writes is marked from its first byte to its
// last, the gaps between its rows with it. Called by the program.
#include "copies.h"

// A copy of rows to the host: its rows lie packed in the log.
static uint8_t *row_of(const CUDA_MEMCPY2D *copy, size_t row) {
  uint64_t start = copy->target.type == MEMORY_HOST ? (uint64_t)(uintptr_t)copy->target.host
                                                    : copy->target.device;
  uint64_t pitch = copy->target.pitch ? copy->target.pitch : copy->width;
  return (uint8_t *)(uintptr_t)(start + (copy->target.y + row) * pitch + copy->target.x);
}

static CUdeviceptr source_of(const CUDA_MEMCPY2D *copy, size_t row) {
  return copy->source.device + (copy->source.y + row) * copy->source.pitch + copy->source.x;
}

static int is_read_2d(const CUDA_MEMCPY2D *copy) {
  if (!copy || !IS_PROTECTED()) return 0;
  int is_host = copy->target.type == MEMORY_HOST ||
                (copy->target.type == MEMORY_UNIFIED && !is_device_memory(copy->target.device));
  return is_host && copy->source.type != MEMORY_HOST &&
         (copy->source.type != MEMORY_UNIFIED || is_device_memory(copy->source.device));
}

static int answered_2d(const CUDA_MEMCPY2D *copy) {
  for (size_t row = 0; row < copy->height; row++)
    if (!reads_answer(row_of(copy, row), copy->width)) return 0;
  return 1;
}

static void wrote_2d(const CUDA_MEMCPY2D *copy, CUstream stream, int is_per_thread) {
  uint64_t bytes, start = copy ? written_2d(copy, &bytes) : 0;
  if (start) marks_wrote(start, bytes, stream, is_per_thread);
}

CUresult cuMemcpy2D_v2(const void *given) {
  const CUDA_MEMCPY2D *copy = given;
  int reads = is_read_2d(copy);
  if (reads) ANSWERED(REAL(cuMemcpy2D_v2, copy), answered_2d(copy));
  ENTERS(none, 0);
  CUresult result = REAL(cuMemcpy2D_v2, copy);
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return result;
  for (size_t row = 0; reads && row < copy->height; row++)
    reads_took(row_of(copy, row), copy->width);
  if (!reads) wrote_2d(copy, none, 0);
  return result;
}

CUresult cuMemcpy2D_v2_ptds(const void *given) {
  const CUDA_MEMCPY2D *copy = given;
  int reads = is_read_2d(copy);
  if (reads) ANSWERED(REAL(cuMemcpy2D_v2_ptds, copy), answered_2d(copy));
  ENTERS(none, 1);
  CUresult result = REAL(cuMemcpy2D_v2_ptds, copy);
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return result;
  for (size_t row = 0; reads && row < copy->height; row++)
    reads_took(row_of(copy, row), copy->width);
  if (!reads) wrote_2d(copy, none, 1);
  return result;
}

CUresult cuMemcpy2DUnaligned_v2(const void *given) {
  const CUDA_MEMCPY2D *copy = given;
  int reads = is_read_2d(copy);
  if (reads) ANSWERED(REAL(cuMemcpy2DUnaligned_v2, copy), answered_2d(copy));
  ENTERS(none, 0);
  CUresult result = REAL(cuMemcpy2DUnaligned_v2, copy);
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return result;
  for (size_t row = 0; reads && row < copy->height; row++)
    reads_took(row_of(copy, row), copy->width);
  if (!reads) wrote_2d(copy, none, 0);
  return result;
}

CUresult cuMemcpy2DUnaligned_v2_ptds(const void *given) {
  const CUDA_MEMCPY2D *copy = given;
  int reads = is_read_2d(copy);
  if (reads) ANSWERED(REAL(cuMemcpy2DUnaligned_v2_ptds, copy), answered_2d(copy));
  ENTERS(none, 1);
  CUresult result = REAL(cuMemcpy2DUnaligned_v2_ptds, copy);
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return result;
  for (size_t row = 0; reads && row < copy->height; row++)
    reads_took(row_of(copy, row), copy->width);
  if (!reads) wrote_2d(copy, none, 1);
  return result;
}

CUresult cuMemcpy2DAsync_v2(const void *given, CUstream stream) {
  const CUDA_MEMCPY2D *copy = given;
  int reads = is_read_2d(copy) && !is_capturing(stream, 0);
  if (reads)
    ANSWERED(settled(REAL(cuMemcpy2DAsync_v2, copy, stream), stream, 0), answered_2d(copy));
  ENTERS(stream, 0);
  CUresult result = REAL(cuMemcpy2DAsync_v2, copy, stream);
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return result;
  if (reads && copy->source.type == MEMORY_ARRAY) UNSEEN("a copy of an array");
  for (size_t row = 0; reads && row < copy->height; row++)
    reads_async(row_of(copy, row), source_of(copy, row), copy->width, stream, 0);
  if (!reads) wrote_2d(copy, stream, 0);
  return result;
}

CUresult cuMemcpy2DAsync_v2_ptsz(const void *given, CUstream stream) {
  const CUDA_MEMCPY2D *copy = given;
  int reads = is_read_2d(copy) && !is_capturing(stream, 1);
  if (reads)
    ANSWERED(settled(REAL(cuMemcpy2DAsync_v2_ptsz, copy, stream), stream, 1), answered_2d(copy));
  ENTERS(stream, 1);
  CUresult result = REAL(cuMemcpy2DAsync_v2_ptsz, copy, stream);
  if (!IS_PROTECTED() || result != CUDA_SUCCESS) return result;
  if (reads && copy->source.type == MEMORY_ARRAY) UNSEEN("a copy of an array");
  for (size_t row = 0; reads && row < copy->height; row++)
    reads_async(row_of(copy, row), source_of(copy, row), copy->width, stream, 1);
  if (!reads) wrote_2d(copy, stream, 1);
  return result;
}

static void wrote_3d(const CUDA_MEMCPY3D *copy, CUstream stream, int is_per_thread) {
  uint64_t bytes, start = copy ? written_3d(copy, &bytes) : 0;
  if (!copy || copy->target.type == MEMORY_ARRAY) return;
  if (!start || !is_device_memory(start)) {
    int is_from_host = copy->source.type == MEMORY_HOST ||
                       (copy->source.type == MEMORY_UNIFIED &&
                        !is_device_memory(copy->source.device));
    if (!is_from_host) UNSEEN("a copy of three dimensions");
    return;
  }
  marks_wrote(start, bytes, stream, is_per_thread);
}
#define WROTE_3D(copy, stream, per_thread, call)                                                \
  do {                                                                                          \
    ENTERS(stream, per_thread);                                                                 \
    CUresult result = call;                                                                     \
    if (IS_PROTECTED() && result == CUDA_SUCCESS) wrote_3d(copy, stream, per_thread);            \
    return result;                                                                              \
  } while (0)

CUresult cuMemcpy3D_v2(const void *given) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, none, 0, REAL(cuMemcpy3D_v2, copy));
}

CUresult cuMemcpy3D_v2_ptds(const void *given) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, none, 1, REAL(cuMemcpy3D_v2_ptds, copy));
}

CUresult cuMemcpy3DPeer(const void *given) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, none, 0, REAL(cuMemcpy3DPeer, copy));
}

CUresult cuMemcpy3DPeer_ptds(const void *given) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, none, 1, REAL(cuMemcpy3DPeer_ptds, copy));
}

CUresult cuMemcpy3DAsync_v2(const void *given, CUstream stream) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, stream, 0, REAL(cuMemcpy3DAsync_v2, copy, stream));
}

CUresult cuMemcpy3DAsync_v2_ptsz(const void *given, CUstream stream) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, stream, 1, REAL(cuMemcpy3DAsync_v2_ptsz, copy, stream));
}

CUresult cuMemcpy3DPeerAsync(const void *given, CUstream stream) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, stream, 0, REAL(cuMemcpy3DPeerAsync, copy, stream));
}

CUresult cuMemcpy3DPeerAsync_ptsz(const void *given, CUstream stream) {
  const CUDA_MEMCPY3D *copy = given;
  WROTE_3D(copy, stream, 1, REAL(cuMemcpy3DPeerAsync_ptsz, copy, stream));
}

static void wrote_batch(const CUdeviceptr *targets, const CUdeviceptr *sources, const size_t *bytes,
                        size_t count, CUstream stream, int is_per_thread) {
  for (size_t i = 0; i < count; i++) {
    if (is_read(targets[i], sources[i]))
      reads_async((void *)(uintptr_t)targets[i], sources[i], bytes[i], stream, is_per_thread);
    else marks_wrote(targets[i], bytes[i], stream, is_per_thread);
  }
}

static int answered_batch(const CUdeviceptr *targets, const CUdeviceptr *sources,
                          const size_t *bytes, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (is_read(targets[i], sources[i]) &&
        !reads_answer((void *)(uintptr_t)targets[i], bytes[i]))
      return 0;
  return 1;
}
#define BATCH(per_thread, call)                                                                 \
  do {                                                                                          \
    int is_ours = IS_PROTECTED() && !is_capturing(stream, per_thread);                          \
    if (is_ours)                                                                                \
      ANSWERED(settled(call, stream, per_thread),                                               \
               answered_batch(targets, sources, bytes, count));                                 \
    ENTERS(stream, per_thread);                                                                 \
    CUresult result = call;                                                                     \
    if (is_ours && result == CUDA_SUCCESS)                                                      \
      wrote_batch(targets, sources, bytes, count, stream, per_thread);                          \
    return result;                                                                              \
  } while (0)

CUresult cuMemcpyBatchAsync(CUdeviceptr *targets, CUdeviceptr *sources, size_t *bytes, size_t count,
                            void *attributes, size_t *indices, size_t attribute_count,
                            size_t *failed, CUstream stream) {
  BATCH(0,
        REAL(cuMemcpyBatchAsync, targets, sources, bytes, count, attributes, indices,
             attribute_count, failed, stream));
}

CUresult cuMemcpyBatchAsync_ptsz(CUdeviceptr *targets, CUdeviceptr *sources, size_t *bytes,
                                 size_t count, void *attributes, size_t *indices,
                                 size_t attribute_count, size_t *failed, CUstream stream) {
  BATCH(1,
        REAL(cuMemcpyBatchAsync_ptsz, targets, sources, bytes, count, attributes, indices,
             attribute_count, failed, stream));
}

CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *targets, CUdeviceptr *sources, size_t *bytes,
                               size_t count, void *attributes, size_t *indices,
                               size_t attribute_count, CUstream stream) {
  BATCH(0,
        REAL(cuMemcpyBatchAsync_v2, targets, sources, bytes, count, attributes, indices,
             attribute_count, stream));
}

CUresult cuMemcpyBatchAsync_v2_ptsz(CUdeviceptr *targets, CUdeviceptr *sources, size_t *bytes,
                                    size_t count, void *attributes, size_t *indices,
                                    size_t attribute_count, CUstream stream) {
  BATCH(1,
        REAL(cuMemcpyBatchAsync_v2_ptsz, targets, sources, bytes, count, attributes, indices,
             attribute_count, stream));
}

// What is unpacked on the GPU: where to is not looked at.
#define DECOMPRESSED(per_thread, call)                                                 \
  do {                                                                                 \
    ENTERS(stream, per_thread);                                                        \
    CUresult result = call;                                                            \
    if (IS_PROTECTED() && result == CUDA_SUCCESS) marks_all(stream, per_thread);       \
    return result;                                                                     \
  } while (0)

CUresult cuMemBatchDecompressAsync(void *operations, size_t count, unsigned int flags,
                                   size_t *failed, CUstream stream) {
  DECOMPRESSED(0, REAL(cuMemBatchDecompressAsync, operations, count, flags, failed, stream));
}

CUresult cuMemBatchDecompressAsync_ptsz(void *operations, size_t count, unsigned int flags,
                                        size_t *failed, CUstream stream) {
  DECOMPRESSED(1, REAL(cuMemBatchDecompressAsync_ptsz, operations, count, flags, failed, stream));
}

CUresult cuMemcpy3DBatchAsync(size_t count, void *operations, size_t *failed,
                              unsigned long long flags, CUstream stream) {
  if (IS_PROTECTED()) UNSEEN("a batch of copies of three dimensions");
  return REAL(cuMemcpy3DBatchAsync, count, operations, failed, flags, stream);
}

CUresult cuMemcpy3DBatchAsync_ptsz(size_t count, void *operations, size_t *failed,
                                   unsigned long long flags, CUstream stream) {
  if (IS_PROTECTED()) UNSEEN("a batch of copies of three dimensions");
  return REAL(cuMemcpy3DBatchAsync_ptsz, count, operations, failed, flags, stream);
}

CUresult cuMemcpy3DBatchAsync_v2(size_t count, void *operations, unsigned long long flags,
                                 CUstream stream) {
  if (IS_PROTECTED()) UNSEEN("a batch of copies of three dimensions");
  return REAL(cuMemcpy3DBatchAsync_v2, count, operations, flags, stream);
}

CUresult cuMemcpy3DBatchAsync_v2_ptsz(size_t count, void *operations, unsigned long long flags,
                                      CUstream stream) {
  if (IS_PROTECTED()) UNSEEN("a batch of copies of three dimensions");
  return REAL(cuMemcpy3DBatchAsync_v2_ptsz, count, operations, flags, stream);
}
