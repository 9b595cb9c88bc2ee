// Fills of device memory.
//
// Owns: the hooks of every fill. Promises: the driver gets each call as it is; what it writes is
// marked. Called by the program.
#include "copies.h"

CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t count) {
  WROTE(target, count, none, 0, REAL(cuMemsetD8_v2, target, value, count));
}

CUresult cuMemsetD8_v2_ptds(CUdeviceptr target, unsigned char value, size_t count) {
  WROTE(target, count, none, 1, REAL(cuMemsetD8_v2_ptds, target, value, count));
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t count, CUstream stream) {
  WROTE(target, count, stream, 0, REAL(cuMemsetD8Async, target, value, count, stream));
}

CUresult cuMemsetD8Async_ptsz(CUdeviceptr target, unsigned char value, size_t count,
                              CUstream stream) {
  WROTE(target, count, stream, 1, REAL(cuMemsetD8Async_ptsz, target, value, count, stream));
}

CUresult cuMemsetD16_v2(CUdeviceptr target, unsigned short value, size_t count) {
  WROTE(target, count * 2, none, 0, REAL(cuMemsetD16_v2, target, value, count));
}

CUresult cuMemsetD16_v2_ptds(CUdeviceptr target, unsigned short value, size_t count) {
  WROTE(target, count * 2, none, 1, REAL(cuMemsetD16_v2_ptds, target, value, count));
}

CUresult cuMemsetD16Async(CUdeviceptr target, unsigned short value, size_t count, CUstream stream) {
  WROTE(target, count * 2, stream, 0, REAL(cuMemsetD16Async, target, value, count, stream));
}

CUresult cuMemsetD16Async_ptsz(CUdeviceptr target, unsigned short value, size_t count,
                               CUstream stream) {
  WROTE(target, count * 2, stream, 1, REAL(cuMemsetD16Async_ptsz, target, value, count, stream));
}

CUresult cuMemsetD32_v2(CUdeviceptr target, unsigned int value, size_t count) {
  WROTE(target, count * 4, none, 0, REAL(cuMemsetD32_v2, target, value, count));
}

CUresult cuMemsetD32_v2_ptds(CUdeviceptr target, unsigned int value, size_t count) {
  WROTE(target, count * 4, none, 1, REAL(cuMemsetD32_v2_ptds, target, value, count));
}

CUresult cuMemsetD32Async(CUdeviceptr target, unsigned int value, size_t count, CUstream stream) {
  WROTE(target, count * 4, stream, 0, REAL(cuMemsetD32Async, target, value, count, stream));
}

CUresult cuMemsetD32Async_ptsz(CUdeviceptr target, unsigned int value, size_t count,
                               CUstream stream) {
  WROTE(target, count * 4, stream, 1, REAL(cuMemsetD32Async_ptsz, target, value, count, stream));
}

static uint64_t rows(size_t pitch, size_t width, size_t height) {
  return height ? (height - 1) * pitch + width : 0;
}

CUresult cuMemsetD2D8_v2(CUdeviceptr target, size_t pitch, unsigned char value, size_t width,
                         size_t height) {
  WROTE(target, rows(pitch, width, height), none, 0,
        REAL(cuMemsetD2D8_v2, target, pitch, value, width, height));
}

CUresult cuMemsetD2D8_v2_ptds(CUdeviceptr target, size_t pitch, unsigned char value, size_t width,
                              size_t height) {
  WROTE(target, rows(pitch, width, height), none, 1,
        REAL(cuMemsetD2D8_v2_ptds, target, pitch, value, width, height));
}

CUresult cuMemsetD2D8Async(CUdeviceptr target, size_t pitch, unsigned char value, size_t width,
                           size_t height, CUstream stream) {
  WROTE(target, rows(pitch, width, height), stream, 0,
        REAL(cuMemsetD2D8Async, target, pitch, value, width, height, stream));
}

CUresult cuMemsetD2D8Async_ptsz(CUdeviceptr target, size_t pitch, unsigned char value, size_t width,
                                size_t height, CUstream stream) {
  WROTE(target, rows(pitch, width, height), stream, 1,
        REAL(cuMemsetD2D8Async_ptsz, target, pitch, value, width, height, stream));
}

CUresult cuMemsetD2D16_v2(CUdeviceptr target, size_t pitch, unsigned short value, size_t width,
                          size_t height) {
  WROTE(target, rows(pitch, width * 2, height), none, 0,
        REAL(cuMemsetD2D16_v2, target, pitch, value, width, height));
}

CUresult cuMemsetD2D16_v2_ptds(CUdeviceptr target, size_t pitch, unsigned short value, size_t width,
                               size_t height) {
  WROTE(target, rows(pitch, width * 2, height), none, 1,
        REAL(cuMemsetD2D16_v2_ptds, target, pitch, value, width, height));
}

CUresult cuMemsetD2D16Async(CUdeviceptr target, size_t pitch, unsigned short value, size_t width,
                            size_t height, CUstream stream) {
  WROTE(target, rows(pitch, width * 2, height), stream, 0,
        REAL(cuMemsetD2D16Async, target, pitch, value, width, height, stream));
}

CUresult cuMemsetD2D16Async_ptsz(CUdeviceptr target, size_t pitch, unsigned short value,
                                 size_t width, size_t height, CUstream stream) {
  WROTE(target, rows(pitch, width * 2, height), stream, 1,
        REAL(cuMemsetD2D16Async_ptsz, target, pitch, value, width, height, stream));
}

CUresult cuMemsetD2D32_v2(CUdeviceptr target, size_t pitch, unsigned int value, size_t width,
                          size_t height) {
  WROTE(target, rows(pitch, width * 4, height), none, 0,
        REAL(cuMemsetD2D32_v2, target, pitch, value, width, height));
}

CUresult cuMemsetD2D32_v2_ptds(CUdeviceptr target, size_t pitch, unsigned int value, size_t width,
                               size_t height) {
  WROTE(target, rows(pitch, width * 4, height), none, 1,
        REAL(cuMemsetD2D32_v2_ptds, target, pitch, value, width, height));
}

CUresult cuMemsetD2D32Async(CUdeviceptr target, size_t pitch, unsigned int value, size_t width,
                            size_t height, CUstream stream) {
  WROTE(target, rows(pitch, width * 4, height), stream, 0,
        REAL(cuMemsetD2D32Async, target, pitch, value, width, height, stream));
}

CUresult cuMemsetD2D32Async_ptsz(CUdeviceptr target, size_t pitch, unsigned int value, size_t width,
                                 size_t height, CUstream stream) {
  WROTE(target, rows(pitch, width * 4, height), stream, 1,
        REAL(cuMemsetD2D32Async_ptsz, target, pitch, value, width, height, stream));
}
