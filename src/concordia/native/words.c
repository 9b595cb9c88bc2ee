// Words that a stream writes, and copies of forms that are newer than this.
//
// Owns: the hooks of stream memory operations and of copies with attributes. Promises: a word that
// is written is marked; a batch of operations marks everything; a copy whose form is not known is
// passed on as it is (six words, as the calling convention has them) and ends protection when it is
// used: it may read, and be read, anywhere. Called by the program.
#include "copies.h"

CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr address, uint32_t value,
                              unsigned int flags) {
  WROTE(address, 4, stream, 0,
        REAL(cuStreamWriteValue32, stream, address, value, flags));
}

CUresult cuStreamWriteValue32_ptsz(CUstream stream, CUdeviceptr address, uint32_t value,
                                   unsigned int flags) {
  WROTE(address, 4, stream, 1,
        REAL(cuStreamWriteValue32_ptsz, stream, address, value, flags));
}

CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                 unsigned int flags) {
  WROTE(address, 4, stream, 0,
        REAL(cuStreamWriteValue32_v2, stream, address, value, flags));
}

CUresult cuStreamWriteValue32_v2_ptsz(CUstream stream, CUdeviceptr address, uint32_t value,
                                      unsigned int flags) {
  WROTE(address, 4, stream, 1,
        REAL(cuStreamWriteValue32_v2_ptsz, stream, address, value, flags));
}

CUresult cuStreamWriteValue64(CUstream stream, CUdeviceptr address, uint64_t value,
                              unsigned int flags) {
  WROTE(address, 8, stream, 0,
        REAL(cuStreamWriteValue64, stream, address, value, flags));
}

CUresult cuStreamWriteValue64_ptsz(CUstream stream, CUdeviceptr address, uint64_t value,
                                   unsigned int flags) {
  WROTE(address, 8, stream, 1,
        REAL(cuStreamWriteValue64_ptsz, stream, address, value, flags));
}

CUresult cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr address, uint64_t value,
                                 unsigned int flags) {
  WROTE(address, 8, stream, 0,
        REAL(cuStreamWriteValue64_v2, stream, address, value, flags));
}

CUresult cuStreamWriteValue64_v2_ptsz(CUstream stream, CUdeviceptr address, uint64_t value,
                                      unsigned int flags) {
  WROTE(address, 8, stream, 1,
        REAL(cuStreamWriteValue64_v2_ptsz, stream, address, value, flags));
}

#define WROTE_ANYTHING(per_thread, call)                                           \
  do {                                                                             \
    ENTERS(stream, per_thread);                                                    \
    CUresult result = call;                                                        \
    if (result == CUDA_SUCCESS) marks_all(stream, per_thread);                     \
    return result;                                                                 \
  } while (0)

CUresult cuStreamBatchMemOp(CUstream stream, unsigned int count, void *operations,
                            unsigned int flags) {
  WROTE_ANYTHING(0, REAL(cuStreamBatchMemOp, stream, count, operations, flags));
}

CUresult cuStreamBatchMemOp_ptsz(CUstream stream, unsigned int count, void *operations,
                                 unsigned int flags) {
  WROTE_ANYTHING(1, REAL(cuStreamBatchMemOp_ptsz, stream, count, operations, flags));
}

CUresult cuStreamBatchMemOp_v2(CUstream stream, unsigned int count, void *operations,
                               unsigned int flags) {
  WROTE_ANYTHING(0, REAL(cuStreamBatchMemOp_v2, stream, count, operations, flags));
}

CUresult cuStreamBatchMemOp_v2_ptsz(CUstream stream, unsigned int count, void *operations,
                                    unsigned int flags) {
  WROTE_ANYTHING(1, REAL(cuStreamBatchMemOp_v2_ptsz, stream, count, operations, flags));
}

CUresult cuMemcpyWithAttributesAsync(uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                     uint64_t e, uint64_t f) {
  if (IS_PROTECTED()) UNSEEN("a copy with attributes");
  return REAL(cuMemcpyWithAttributesAsync, a, b, c, d, e, f);
}

CUresult cuMemcpyWithAttributesAsync_ptsz(uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                          uint64_t e, uint64_t f) {
  if (IS_PROTECTED()) UNSEEN("a copy with attributes");
  return REAL(cuMemcpyWithAttributesAsync_ptsz, a, b, c, d, e, f);
}

CUresult cuMemcpy3DWithAttributesAsync(uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                       uint64_t e, uint64_t f) {
  if (IS_PROTECTED()) UNSEEN("a copy with attributes");
  return REAL(cuMemcpy3DWithAttributesAsync, a, b, c, d, e, f);
}

CUresult cuMemcpy3DWithAttributesAsync_ptsz(uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                            uint64_t e, uint64_t f) {
  if (IS_PROTECTED()) UNSEEN("a copy with attributes");
  return REAL(cuMemcpy3DWithAttributesAsync_ptsz, a, b, c, d, e, f);
}
