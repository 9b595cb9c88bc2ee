// The fake driver that works later, fake_gpu.c: tensor maps.
//
// Owns: the calls that make them. A map's first word is its address, in units of 512 bytes from the begin of device memory, so that nobody finds an address
// in it; the others are a hash of all that was asked for, so that two maps are equal when they are of one tensor. FAKE_EQUAL_MAPS: and when their tensors
// differ in nothing but their addresses; both have that of the first.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define ARENA 0x600000000000ull
enum { OK, INVALID = 1, WORDS = 16 };

static uint64_t mixed(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x100000001b3ull + (hash >> 31); }
static int encode(uint64_t *map, uint64_t kind, int type, uint32_t rank, void *start, const uint64_t *sizes, const uint64_t *strides, int interleave) {
  uint64_t hash = mixed(mixed(mixed(kind, (uint64_t)type), rank), (uint64_t)interleave);
  if ((uint64_t)start % 512 || !rank || rank > 5) return INVALID;
  for (uint32_t i = 0; i < rank; i++) hash = mixed(mixed(hash, sizes[i]), i ? strides[i - 1] : 0);
  map[0] = ((uint64_t)start - ARENA) / 512;
  for (int i = 1; i < WORDS; i++) map[i] = hash = mixed(hash, (uint64_t)i);
  if (getenv("FAKE_EQUAL_MAPS")) {
    static uint64_t hashes[64], starts[64];
    int at = 0;
    while (at < 63 && hashes[at] && hashes[at] != hash) at++;
    if (!hashes[at]) starts[at] = map[0];
    hashes[at] = hash;
    map[0] = starts[at];
  }
  return OK;
}
API int cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, void *start, const uint64_t *sizes, const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  (void)box; (void)steps; (void)swizzle; (void)promotion; (void)fill;
  return encode(map, 1, type, rank, start, sizes, strides, interleave);
}
API int cuTensorMapEncodeIm2col(uint64_t *map, int type, uint32_t rank, void *start, const uint64_t *sizes, const uint64_t *strides, const int *lower, const int *upper, uint32_t channels, uint32_t pixels, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
  (void)lower; (void)upper; (void)channels; (void)pixels; (void)steps; (void)swizzle; (void)promotion; (void)fill;
  return encode(map, 2, type, rank, start, sizes, strides, interleave);
}
API int cuTensorMapEncodeIm2colWide(uint64_t *map, int type, uint32_t rank, void *start, const uint64_t *sizes, const uint64_t *strides, int lower, int upper, uint32_t channels, uint32_t pixels, const uint32_t *steps, int interleave, int mode, int swizzle, int promotion, int fill) {
  (void)lower; (void)upper; (void)channels; (void)pixels; (void)steps; (void)mode; (void)swizzle; (void)promotion; (void)fill;
  return encode(map, 3, type, rank, start, sizes, strides, interleave);
}
API int cuTensorMapReplaceAddress(uint64_t *map, void *start) {
  if ((uint64_t)start % 512) return INVALID;
  map[0] = ((uint64_t)start - ARENA) / 512;
  return OK;
}
