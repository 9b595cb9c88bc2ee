// Copies: what they write is marked, what they read is logged.
//
// Owns: the hooks of copies of one range. Promises: the driver gets each call as it is, except that
// a resumed program that is being brought forward gets what it once read from the log; a copy to
// the device marks exactly what it writes; a form of reading that is not logged ends the protection
// when it is used. Called by the program.
#include "copies.h"

CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t bytes) {
  WROTE(target, bytes, none, 0, REAL(cuMemcpyHtoD_v2, target, source, bytes));
}

CUresult cuMemcpyHtoD_v2_ptds(CUdeviceptr target, const void *source, size_t bytes) {
  WROTE(target, bytes, none, 1, REAL(cuMemcpyHtoD_v2_ptds, target, source, bytes));
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  WROTE(target, bytes, none, 0, REAL(cuMemcpyDtoD_v2, target, source, bytes));
}

CUresult cuMemcpyDtoD_v2_ptds(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  WROTE(target, bytes, none, 1, REAL(cuMemcpyDtoD_v2_ptds, target, source, bytes));
}

CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t bytes) {
  READ(target, bytes, REAL(cuMemcpyDtoH_v2, target, source, bytes));
}

CUresult cuMemcpyDtoH_v2_ptds(void *target, CUdeviceptr source, size_t bytes) {
  READ(target, bytes, REAL(cuMemcpyDtoH_v2_ptds, target, source, bytes));
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes,
                              CUstream stream) {
  WROTE(target, bytes, stream, 0, REAL(cuMemcpyHtoDAsync_v2, target, source, bytes, stream));
}

CUresult cuMemcpyHtoDAsync_v2_ptsz(CUdeviceptr target, const void *source, size_t bytes,
                                   CUstream stream) {
  WROTE(target, bytes, stream, 1, REAL(cuMemcpyHtoDAsync_v2_ptsz, target, source, bytes, stream));
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes,
                              CUstream stream) {
  WROTE(target, bytes, stream, 0, REAL(cuMemcpyDtoDAsync_v2, target, source, bytes, stream));
}

CUresult cuMemcpyDtoDAsync_v2_ptsz(CUdeviceptr target, CUdeviceptr source, size_t bytes,
                                   CUstream stream) {
  WROTE(target, bytes, stream, 1, REAL(cuMemcpyDtoDAsync_v2_ptsz, target, source, bytes, stream));
}

CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t bytes, CUstream stream) {
  READ_LATER(target, source, bytes, stream, 0,
             REAL(cuMemcpyDtoHAsync_v2, target, source, bytes, stream));
}

CUresult cuMemcpyDtoHAsync_v2_ptsz(void *target, CUdeviceptr source, size_t bytes,
                                   CUstream stream) {
  READ_LATER(target, source, bytes, stream, 1,
             REAL(cuMemcpyDtoHAsync_v2_ptsz, target, source, bytes, stream));
}

CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  if (is_read(target, source))
    READ((void *)(uintptr_t)target, bytes, REAL(cuMemcpy, target, source, bytes));
  WROTE(target, bytes, none, 0, REAL(cuMemcpy, target, source, bytes));
}

CUresult cuMemcpy_ptds(CUdeviceptr target, CUdeviceptr source, size_t bytes) {
  if (is_read(target, source))
    READ((void *)(uintptr_t)target, bytes, REAL(cuMemcpy_ptds, target, source, bytes));
  WROTE(target, bytes, none, 1, REAL(cuMemcpy_ptds, target, source, bytes));
}

CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
  if (is_read(target, source))
    READ_LATER((void *)(uintptr_t)target, source, bytes, stream, 0,
               REAL(cuMemcpyAsync, target, source, bytes, stream));
  WROTE(target, bytes, stream, 0, REAL(cuMemcpyAsync, target, source, bytes, stream));
}

CUresult cuMemcpyAsync_ptsz(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
  if (is_read(target, source))
    READ_LATER((void *)(uintptr_t)target, source, bytes, stream, 1,
               REAL(cuMemcpyAsync_ptsz, target, source, bytes, stream));
  WROTE(target, bytes, stream, 1, REAL(cuMemcpyAsync_ptsz, target, source, bytes, stream));
}

CUresult cuMemcpyPeer(CUdeviceptr target, CUcontext target_context, CUdeviceptr source,
                      CUcontext source_context, size_t bytes) {
  WROTE(target, bytes, none, 0,
        REAL(cuMemcpyPeer, target, target_context, source, source_context, bytes));
}

CUresult cuMemcpyPeer_ptds(CUdeviceptr target, CUcontext target_context, CUdeviceptr source,
                           CUcontext source_context, size_t bytes) {
  WROTE(target, bytes, none, 1,
        REAL(cuMemcpyPeer_ptds, target, target_context, source, source_context, bytes));
}

CUresult cuMemcpyPeerAsync(CUdeviceptr target, CUcontext target_context, CUdeviceptr source,
                           CUcontext source_context, size_t bytes, CUstream stream) {
  WROTE(target, bytes, stream, 0,
        REAL(cuMemcpyPeerAsync, target, target_context, source, source_context, bytes, stream));
}

CUresult cuMemcpyPeerAsync_ptsz(CUdeviceptr target, CUcontext target_context, CUdeviceptr source,
                                CUcontext source_context, size_t bytes, CUstream stream) {
  WROTE(target, bytes, stream, 1,
        REAL(cuMemcpyPeerAsync_ptsz, target, target_context, source, source_context, bytes,
             stream));
}

CUresult cuMemcpyAtoD_v2(CUdeviceptr target, void *source, size_t offset, size_t bytes) {
  WROTE(target, bytes, none, 0, REAL(cuMemcpyAtoD_v2, target, source, offset, bytes));
}

CUresult cuMemcpyAtoD_v2_ptds(CUdeviceptr target, void *source, size_t offset, size_t bytes) {
  WROTE(target, bytes, none, 1, REAL(cuMemcpyAtoD_v2_ptds, target, source, offset, bytes));
}

CUresult cuMemcpyAtoH_v2(void *target, void *source, size_t offset, size_t bytes) {
  READ(target, bytes, REAL(cuMemcpyAtoH_v2, target, source, offset, bytes));
}

CUresult cuMemcpyAtoH_v2_ptds(void *target, void *source, size_t offset, size_t bytes) {
  READ(target, bytes, REAL(cuMemcpyAtoH_v2_ptds, target, source, offset, bytes));
}

CUresult cuMemcpyAtoHAsync_v2(void *target, void *source, size_t offset, size_t bytes,
                              CUstream stream) {
  if (IS_PROTECTED()) UNSEEN("a copy of an array");
  return REAL(cuMemcpyAtoHAsync_v2, target, source, offset, bytes, stream);
}

CUresult cuMemcpyAtoHAsync_v2_ptsz(void *target, void *source, size_t offset, size_t bytes,
                                   CUstream stream) {
  if (IS_PROTECTED()) UNSEEN("a copy of an array");
  return REAL(cuMemcpyAtoHAsync_v2_ptsz, target, source, offset, bytes, stream);
}
