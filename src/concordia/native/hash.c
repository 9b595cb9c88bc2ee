// CRC32C, of a file of the cache.
//
// Owns: the function. Promises: the values of the published algorithm, whatever the processor; a
// test holds them to the crc32c package. Called by cache_file.c. Reads the bytes and nothing else.
#include "shim.h"

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
      wide = __builtin_ia32_crc32di(wide, word_at(at));
      second = __builtin_ia32_crc32di(second, word_at(at + piece));
      third = __builtin_ia32_crc32di(third, word_at(at + 2 * piece));
    }
    wide = moved((uint32_t)wide, piece) ^ second;
    wide = moved((uint32_t)wide, piece) ^ third;
    at += 2 * piece;
    size -= PIECES * piece;
  }
  for (; size >= 8; at += 8, size -= 8) wide = __builtin_ia32_crc32di(wide, word_at(at));
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
