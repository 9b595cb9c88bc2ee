// Which memory a tensor map leads to: its bytes do not say so to anybody but the GPU.
//
// Owns: the hooks of the calls that make tensor maps, and a table of what they made, by its bytes.
// Promises: what is found is byte for byte what the driver made, and the range that is said holds
// all that the GPU writes through it (it leaves out what lies outside of a map's tensor); the table
// is bounded, keeps what was in use last, and says when it has lost any; no memory is allocated,
// and the lock is never held while the driver is called. Called by the program, and by arguments.c
// for a launch. Maps that the GPU makes or changes are not known here.
#define _GNU_SOURCE
#include <string.h>

#include "protect.h"

#ifndef TENSOR_MAPS_MAX  // tests have few
#define TENSOR_MAPS_MAX 8192  // some hundred layers, each with some shapes; 1.4 MB if all are used
#endif
enum { RANK_MAX = 5, NOBODY = -1 };

struct known {
  uint8_t bytes[TENSOR_MAP_BYTES];
  uint64_t hash, address, size;
  int next;     // of its bucket, or NOBODY
  int is_used;  // since the last look for one to give up
};
static struct known table[TENSOR_MAPS_MAX];  // all with the lock
static int buckets[TENSOR_MAPS_MAX];         // the first, and 1 more; 0: none
static int count, hand;
static _Atomic uint64_t lost_count;

static uint64_t hash_of(const uint8_t *bytes) {
  uint64_t hash = 0xcbf29ce484222325ull, word;
  for (int at = 0; at < TENSOR_MAP_BYTES; at += 8) {
    memcpy(&word, bytes + at, 8);
    hash = (hash ^ word) * 0x100000001b3ull;
    hash ^= hash >> 29;
  }
  return hash;
}

static struct known *find(const uint8_t *bytes, uint64_t hash) {
  for (int at = buckets[hash % TENSOR_MAPS_MAX] - 1; at != NOBODY; at = table[at].next)
    if (table[at].hash == hash && memcmp(table[at].bytes, bytes, TENSOR_MAP_BYTES) == 0) {
      table[at].is_used = 1;
      return &table[at];
    }
  return NULL;
}

int tensor_map_of(const uint8_t *bytes, uint64_t *address, uint64_t *size) {
  const struct known *found = find(bytes, hash_of(bytes));
  if (!found) return 0;
  *address = found->address;
  *size = found->size;
  return 1;
}

uint64_t tensor_maps_lost(void) { return lost_count; }

// The place of one that nobody asked for since the hand came by, or since it is there; found in two
// turns at most.
static int given_up(void) {
  while (table[hand].is_used) {
    table[hand].is_used = 0;
    hand = (hand + 1) % TENSOR_MAPS_MAX;
  }
  int place = hand, *at = &buckets[table[place].hash % TENSOR_MAPS_MAX];
  hand = (hand + 1) % TENSOR_MAPS_MAX;
  if (*at == place + 1) {
    *at = table[place].next + 1;
  } else {
    int before = *at - 1;
    while (table[before].next != place) before = table[before].next;
    table[before].next = table[place].next;
  }
  lost_count++;
  return place;
}

static void remember(const void *map, uint64_t address, uint64_t size) {
  const uint8_t *bytes = map;
  uint64_t hash = hash_of(bytes);
  protect_lock();
  struct known *found = find(bytes, hash);
  if (found && found->address != address) {  // two answers for the same bytes: both
    found->address = address < found->address ? address : found->address;
    found->size = TENSOR_MAP_OPEN(found->address);
  } else if (found) {
    found->size = size > found->size ? size : found->size;
  } else {
    int place = count < TENSOR_MAPS_MAX ? count++ : given_up();
    int *first = &buckets[hash % TENSOR_MAPS_MAX];
    table[place] = (struct known){
        .hash = hash, .address = address, .size = size, .next = *first - 1};
    memcpy(table[place].bytes, bytes, TENSOR_MAP_BYTES);
    *first = place + 1;
  }
  protect_unlock();
}

// Of an element, by the driver's numbers; 0: packed ones, and what is newer.
static uint64_t element_bytes(int type) {
  static const uint8_t known[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type >= 0 && type < (int)sizeof known ? known[type] : 0;
}

// From its first byte to behind its last; whatever is not plain may go on for ever.
static uint64_t size_of(int type, uint32_t rank, const void *start, const uint64_t *sizes,
                        const uint64_t *strides, int interleave) {
  uint64_t open = TENSOR_MAP_OPEN((uint64_t)(uintptr_t)start), size, step;
  if (!rank || rank > RANK_MAX || interleave || !element_bytes(type)) return open;
  if (__builtin_mul_overflow(sizes[0], element_bytes(type), &size)) return open;
  for (uint32_t i = 1; i < rank; i++)
    if (!sizes[i] || __builtin_mul_overflow(sizes[i] - 1, strides[i - 1], &step) ||
        __builtin_add_overflow(size, step, &size))
      return open;
  return size < open ? size : open;
}

CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *start,
                                const uint64_t *sizes, const uint64_t *strides,
                                const uint32_t *box, const uint32_t *steps, int interleave,
                                int swizzle, int promotion, int fill) {
  CUresult result = REAL(cuTensorMapEncodeTiled, map, type, rank, start, sizes, strides, box, steps,
                         interleave, swizzle, promotion, fill);
  if (result == CUDA_SUCCESS && IS_PROTECTED())
    remember(map, (uint64_t)(uintptr_t)start,
             size_of(type, rank, start, sizes, strides, interleave));
  return result;
}

// Its boxes may begin before a tensor and end behind it: it is taken to have no end.
CUresult cuTensorMapEncodeIm2col(void *map, int type, uint32_t rank, void *start,
                                 const uint64_t *sizes, const uint64_t *strides, const int *lower,
                                 const int *upper, uint32_t channels, uint32_t pixels,
                                 const uint32_t *steps, int interleave, int swizzle, int promotion,
                                 int fill) {
  CUresult result = REAL(cuTensorMapEncodeIm2col, map, type, rank, start, sizes, strides, lower,
                         upper, channels, pixels, steps, interleave, swizzle, promotion, fill);
  if (result == CUDA_SUCCESS && IS_PROTECTED())
    remember(map, (uint64_t)(uintptr_t)start, TENSOR_MAP_OPEN((uint64_t)(uintptr_t)start));
  return result;
}

CUresult cuTensorMapEncodeIm2colWide(void *map, int type, uint32_t rank, void *start,
                                     const uint64_t *sizes, const uint64_t *strides, int lower,
                                     int upper, uint32_t channels, uint32_t pixels,
                                     const uint32_t *steps, int interleave, int mode, int swizzle,
                                     int promotion, int fill) {
  CUresult result = REAL(cuTensorMapEncodeIm2colWide, map, type, rank, start, sizes, strides, lower,
                         upper, channels, pixels, steps, interleave, mode, swizzle, promotion,
                         fill);
  if (result == CUDA_SUCCESS && IS_PROTECTED())
    remember(map, (uint64_t)(uintptr_t)start, TENSOR_MAP_OPEN((uint64_t)(uintptr_t)start));
  return result;
}

CUresult cuTensorMapReplaceAddress(void *map, void *start) {
  uint8_t before[TENSOR_MAP_BYTES];
  uint64_t address = (uint64_t)(uintptr_t)start, size = TENSOR_MAP_OPEN(address), from, room;
  if (IS_PROTECTED() && map) memcpy(before, map, sizeof before);
  else return REAL(cuTensorMapReplaceAddress, map, start);
  CUresult result = REAL(cuTensorMapReplaceAddress, map, start);
  if (result != CUDA_SUCCESS || !IS_PROTECTED()) return result;
  protect_lock();
  if (tensor_map_of(before, &from, &room) && room < TENSOR_MAP_OPEN(from) && room < size)
    size = room;
  protect_unlock();
  remember(map, address, size);
  return result;
}
