// The key of an image: XXH3, 128 bits, seed 0.
//
// Owns: the function. Promises: the values of the published algorithm for every length, whatever
// the processor; a test holds them to the xxhash package. A start waits for the key of each image,
// and this algorithm is as fast as memory. Called by load.c and assembler/marked.c. Reads the bytes
// and nothing else. (kernels/hash.h is the same for a GPU's lanes, in C++.)
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "shim.h"

// Constants as XXH3's published specification has them: its PRIME64_1 to 5, PRIME32_1 to 3,
// PRIME_MX1 and PRIME_MX2; the secret is its default one.
#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull
#define Q1 0x9E3779B1u
#define Q2 0x85EBCA77u
#define Q3 0xC2B2AE3Du
#define MIX_1 0x165667919E3779F9ull
#define MIX_2 0x9FB21C651E98DF25ull

enum { SECRET = 192, STRIPE = 64, STRIPES = (SECRET - STRIPE) / 8, BLOCK = STRIPE * STRIPES };
enum { LANES = 8, SHORT_MAX = 16, MIDDLE_MAX = 128, LONG_MIN = 241 };

// The algorithm's own, little endian as all that it reads.
static const uint64_t secret_words[SECRET / 8] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
static const uint8_t *const secret = (const uint8_t *)secret_words;

struct wide {
  uint64_t low, high;
};

static inline uint32_t half(const uint8_t *at) {
  uint32_t value;
  memcpy(&value, at, 4);
  return value;
}

static struct wide product(uint64_t a, uint64_t b) {
  unsigned __int128 wide = (unsigned __int128)a * b;
  return (struct wide){(uint64_t)wide, (uint64_t)(wide >> 64)};
}

static uint64_t folded(uint64_t a, uint64_t b) {
  struct wide wide = product(a, b);
  return wide.low ^ wide.high;
}

static uint64_t spread(uint64_t hash) {
  hash = (hash ^ hash >> 37) * MIX_1;
  return hash ^ hash >> 32;
}

static uint64_t spread_more(uint64_t hash) {
  hash = (hash ^ hash >> 33) * P2;
  hash = (hash ^ hash >> 29) * P3;
  return hash ^ hash >> 32;
}

// Two words of the secret, as they change a short input.
static uint64_t change(int at) { return word_at(secret + at) ^ word_at(secret + at + 8); }

static struct wide of_few(const uint8_t *at, uint64_t size) {
  if (!size) return (struct wide){spread_more(change(64)), spread_more(change(80))};
  uint32_t low = (uint32_t)at[0] << 16 | (uint32_t)at[size >> 1] << 24 | at[size - 1] |
                 (uint32_t)size << 8;
  uint32_t turned = __builtin_bswap32(low), high = turned << 13 | turned >> 19;
  return (struct wide){spread_more(low ^ (uint64_t)(half(secret) ^ half(secret + 4))),
                       spread_more(high ^ (uint64_t)(half(secret + 8) ^ half(secret + 12)))};
}

static struct wide of_word(const uint8_t *at, uint64_t size) {
  uint64_t input = half(at) + ((uint64_t)half(at + size - 4) << 32);
  struct wide hash = product(input ^ change(16), P1 + (size << 2));
  hash.high += hash.low << 1;
  hash.low ^= hash.high >> 3;
  hash.low = (hash.low ^ hash.low >> 35) * MIX_2;
  hash.low ^= hash.low >> 28;
  hash.high = spread(hash.high);
  return hash;
}

static struct wide of_two_words(const uint8_t *at, uint64_t size) {
  uint64_t low = word_at(at), high = word_at(at + size - 8);
  struct wide inner = product(low ^ high ^ change(32), P1);
  inner.low += (size - 1) << 54;
  high ^= change(48);
  inner.high += high + (uint64_t)(uint32_t)high * (Q2 - 1);
  inner.low ^= __builtin_bswap64(inner.high);
  struct wide hash = product(inner.low, P2);
  hash.high += inner.high * P2;
  return (struct wide){spread(hash.low), spread(hash.high)};
}

static uint64_t mixed(const uint8_t *at, const uint8_t *with) {
  return folded(word_at(at) ^ word_at(with), word_at(at + 8) ^ word_at(with + 8));
}

static void take(struct wide *sum, const uint8_t *one, const uint8_t *other, const uint8_t *with) {
  sum->low = (sum->low + mixed(one, with)) ^ (word_at(other) + word_at(other + 8));
  sum->high = (sum->high + mixed(other, with + 16)) ^ (word_at(one) + word_at(one + 8));
}

static struct wide of_some(const uint8_t *at, uint64_t size) {
  struct wide sum = {size * P1, 0};
  const uint8_t *end = at + size;
  if (size <= MIDDLE_MAX) {  // from the middle to both ends
    for (int i = (int)(size - 1) / 32; i >= 0; i--)
      take(&sum, at + 16 * i, end - 16 * (i + 1), secret + 32 * i);
  } else {
    for (int i = 0; i < 4; i++) take(&sum, at + 32 * i, at + 32 * i + 16, secret + 32 * i);
    sum = (struct wide){spread(sum.low), spread(sum.high)};
    for (int i = 4; i < (int)size / 32; i++)
      take(&sum, at + 32 * i, at + 32 * i + 16, secret + 3 + 32 * (i - 4));
    take(&sum, end - 16, end - 32, secret + 103);
  }
  uint64_t high = sum.low * P1 + sum.high * P4 + size * P2;
  return (struct wide){spread(sum.low + sum.high), 0 - spread(high)};
}

static void add_stripes(uint64_t sums[LANES], const uint8_t *at, const uint8_t *with, int count) {
  for (; count; count--, at += STRIPE, with += 8)
#pragma GCC unroll 8  // else the sums are in memory
    for (int i = 0; i < LANES; i++) {
      uint64_t input = word_at(at + 8 * i), changed = input ^ word_at(with + 8 * i);
      sums[i ^ 1] += input;
      sums[i] += (changed & 0xFFFFFFFFu) * (changed >> 32);
    }
}

static void scramble(uint64_t sums[LANES]) {
  for (int i = 0; i < LANES; i++)
    sums[i] = (sums[i] ^ sums[i] >> 47 ^ word_at(secret + SECRET - STRIPE + 8 * i)) * Q1;
}

static void add_blocks(uint64_t sums[LANES], const uint8_t *at, uint64_t blocks) {
  for (; blocks; blocks--, at += BLOCK) {
    add_stripes(sums, at, secret, STRIPES);
    scramble(sums);
  }
}

#if defined(__x86_64__)
#define WIDE __attribute__((target("avx2")))

// Half a stripe: a lane takes the product of its own word and the word of its neighbour.
WIDE static inline __m256i added(__m256i sum, const uint8_t *at, const uint8_t *with) {
  __m256i input = _mm256_loadu_si256((const __m256i *)at);
  __m256i changed = _mm256_xor_si256(input, _mm256_loadu_si256((const __m256i *)with));
  __m256i made = _mm256_mul_epu32(changed, _mm256_srli_epi64(changed, 32));
  __m256i turned = _mm256_shuffle_epi32(input, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(sum, _mm256_add_epi64(made, turned));
}

WIDE static void add_blocks_wide(uint64_t sums[LANES], const uint8_t *at, uint64_t blocks) {
  __m256i *first = (__m256i *)sums, *second = first + 1;
  for (; blocks; blocks--) {
    __m256i low = _mm256_loadu_si256(first), high = _mm256_loadu_si256(second);
    for (int n = 0; n < STRIPES; n++, at += STRIPE) {
      low = added(low, at, secret + 8 * n);
      high = added(high, at + STRIPE / 2, secret + 8 * n + STRIPE / 2);
    }
    _mm256_storeu_si256(first, low);
    _mm256_storeu_si256(second, high);
    scramble(sums);
  }
}
#endif

static uint64_t merged(const uint64_t sums[LANES], const uint8_t *with, uint64_t hash) {
  for (int i = 0; i < LANES; i += 2)
    hash += folded(sums[i] ^ word_at(with + 8 * i), sums[i + 1] ^ word_at(with + 8 * i + 8));
  return spread(hash);
}

typedef void blocks_adder(uint64_t sums[LANES], const uint8_t *at, uint64_t blocks);

static struct wide of_many(const uint8_t *at, uint64_t size, blocks_adder *add) {
  uint64_t sums[LANES] = {Q3, P1, P2, P3, P4, Q2, P5, Q1};
  uint64_t blocks = (size - 1) / BLOCK, left = (size - 1) % BLOCK;
  add(sums, at, blocks);
  add_stripes(sums, at + blocks * BLOCK, secret, (int)(left / STRIPE));
  add_stripes(sums, at + size - STRIPE, secret + SECRET - STRIPE - 7, 1);
  return (struct wide){merged(sums, secret + 11, size * P1),
                       merged(sums, secret + SECRET - STRIPE - 11, ~(size * P2))};
}

static struct wide hash_by(const uint8_t *at, uint64_t size, blocks_adder *add) {
  if (size >= LONG_MIN) return of_many(at, size, add);
  if (size > SHORT_MAX) return of_some(at, size);
  if (size > 8) return of_two_words(at, size);
  return size > 3 ? of_word(at, size) : of_few(at, size);
}

void hash_image(const void *bytes, uint64_t size, uint64_t key[2]) {
  blocks_adder *add = add_blocks;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) add = add_blocks_wide;
#endif
  struct wide hash = hash_by(bytes, size, add);
  key[0] = hash.high;
  key[1] = hash.low;
}

void hash_image_plain(const void *bytes, uint64_t size, uint64_t key[2]) {
  struct wide hash = hash_by(bytes, size, add_blocks);
  key[0] = hash.high;
  key[1] = hash.low;
}
