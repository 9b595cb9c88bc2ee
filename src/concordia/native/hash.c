// XXH64 with two seeds in one pass, and CRC32C.
//
// Owns: the two functions. Promises: the values of the published algorithms, whatever the
// processor; a test holds them to the xxhash and crc32c packages. Called by images.c and
// cache_file.c. Reads the bytes and nothing else.
#include <string.h>

#include "shim.h"

#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull

static inline uint64_t turn(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

static inline uint64_t word(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, 8);
  return value;
}

static inline uint64_t lane(uint64_t sum, uint64_t input) {
  return turn(sum + input * P2, 31) * P1;
}

static inline void take(uint64_t sums[2][4], int i, uint64_t input) {
  sums[0][i] = lane(sums[0][i], input);
  sums[1][i] = lane(sums[1][i], input);
}

static uint64_t finish(uint64_t hash, const uint8_t *at, uint64_t left) {
  for (; left >= 8; at += 8, left -= 8) hash = turn(hash ^ lane(0, word(at)), 27) * P1 + P4;
  if (left >= 4) {
    uint32_t half;
    memcpy(&half, at, 4);
    hash = turn(hash ^ half * P1, 23) * P2 + P3;
    at += 4, left -= 4;
  }
  for (; left; at++, left--) hash = turn(hash ^ *at * P5, 11) * P1;
  hash = (hash ^ hash >> 33) * P2;
  hash = (hash ^ hash >> 29) * P3;
  return hash ^ hash >> 32;
}

static uint64_t gathered(const uint64_t sums[4]) {
  uint64_t hash = turn(sums[0], 1) + turn(sums[1], 7) + turn(sums[2], 12) + turn(sums[3], 18);
  for (int i = 0; i < 4; i++) hash = (hash ^ lane(0, sums[i])) * P1 + P4;
  return hash;
}

void hash_image(const void *bytes, uint64_t size, uint64_t key[2]) {
  const uint8_t *at = bytes;
  uint64_t left = size, hashes[2];
  if (size >= 32) {
    uint64_t sums[2][4];
    for (uint64_t seed = 0; seed < 2; seed++) {
      sums[seed][0] = seed + P1 + P2;
      sums[seed][1] = seed + P2;
      sums[seed][2] = seed;
      sums[seed][3] = seed - P1;
    }
    for (; left >= 32; at += 32, left -= 32) {
      take(sums, 0, word(at));  // four calls, not a loop: the sums stay in registers, twice as fast
      take(sums, 1, word(at + 8));
      take(sums, 2, word(at + 16));
      take(sums, 3, word(at + 24));
    }
    hashes[0] = gathered(sums[0]);
    hashes[1] = gathered(sums[1]);
  } else {
    hashes[0] = P5;
    hashes[1] = 1 + P5;
  }
  for (int i = 0; i < 2; i++) key[i] = finish(hashes[i] + size, at, left);
}

static uint32_t crc_of_byte(uint32_t crc) {
  for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
  return crc;
}

static uint32_t crc_by_table(uint32_t crc, const uint8_t *at, uint64_t size) {
  uint32_t table[256];
  for (uint32_t i = 0; i < 256; i++) table[i] = crc_of_byte(i);
  for (; size; at++, size--) crc = crc >> 8 ^ table[(crc ^ *at) & 0xff];
  return crc;
}

#if defined(__x86_64__)
#define POLYNOMIAL 0x82F63B78u  // bit 31 is x to the power of 0
#define ONE 0x80000000u
#define PIECES 3             // an instruction takes three cycles, and one can begin in each
#define PIECE_BYTES_MIN 1024  // below, joining takes longer than is won

static uint32_t times(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a; a <<= 1) {
    if (a & ONE) product ^= b;
    b = b >> 1 ^ (b & 1 ? POLYNOMIAL : 0);
  }
  return product;
}

// What as many zero bytes make of a sum.
static uint32_t moved(uint32_t crc, uint64_t bytes) {
  uint32_t power = ONE >> 8;
  for (; bytes; bytes >>= 1, power = times(power, power))
    if (bytes & 1) crc = times(crc, power);
  return crc;
}

__attribute__((target("sse4.2"))) static uint32_t crc_by_instruction(uint32_t crc,
                                                                      const uint8_t *at,
                                                                      uint64_t size) {
  uint64_t wide = crc, piece = size / PIECES & ~(uint64_t)7;
  if (piece >= PIECE_BYTES_MIN) {
    uint64_t second = 0, third = 0;
    for (const uint8_t *end = at + piece; at < end; at += 8) {
      wide = __builtin_ia32_crc32di(wide, word(at));
      second = __builtin_ia32_crc32di(second, word(at + piece));
      third = __builtin_ia32_crc32di(third, word(at + 2 * piece));
    }
    wide = moved((uint32_t)wide, piece) ^ second;
    wide = moved((uint32_t)wide, piece) ^ third;
    at += 2 * piece;
    size -= PIECES * piece;
  }
  for (; size >= 8; at += 8, size -= 8) wide = __builtin_ia32_crc32di(wide, word(at));
  crc = (uint32_t)wide;
  for (; size; at++, size--) crc = __builtin_ia32_crc32qi(crc, *at);
  return crc;
}
#endif

uint32_t hash_crc32c(const void *bytes, uint64_t size) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~crc_by_instruction(~0u, bytes, size);
#endif
  return ~crc_by_table(~0u, bytes, size);
}

uint32_t hash_crc32c_plain(const void *bytes, uint64_t size) {
  return ~crc_by_table(~0u, bytes, size);
}
