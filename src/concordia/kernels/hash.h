// The two checks that a record carries: XXH3-128 over its payload and the header before it, CRC32C
// over its own header.
//
// Owns: both computations. Promises: the values are those of the xxhash and crc32c libraries, for
// any number of lanes, so that a host without this code can verify a journal. Only XXH3's path for
// long inputs is here, for lengths of at least 256 that are multiples of 64: leaves (4096 bytes,
// zero-padded), the padded list of their digests, and headers. XXH3 is specified in the xxHash
// project's document; its eight accumulators depend on each other only at the end, which stream.h
// uses to spread a leaf over a warp.
#pragma once
#include "call.h"

constexpr uint64_t kPrime32_1 = 0x9e3779b1u, kPrime32_2 = 0x85ebca77u, kPrime32_3 = 0xc2b2ae3du;
constexpr uint64_t kPrime64_1 = 0x9e3779b185ebca87ull, kPrime64_2 = 0xc2b2ae3d27d4eb4full;
constexpr uint64_t kPrime64_3 = 0x165667b19e3779f9ull, kPrime64_4 = 0x85ebca77c2b2ae63ull;
constexpr uint64_t kPrime64_5 = 0x27d4eb2f165667c5ull, kPrimeMix = 0x165667919e3779f9ull;
constexpr uint64_t kStripeBytes = 64, kStripesPerBlock = 16, kSecretBytes = 192;

// XXH3's default secret as little-endian words; one word more, for reads that start within the
// last.
TABLE uint64_t kSecret[25] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull, 0};

// Eight bytes of the secret from any byte offset.
FUNCTION uint64_t secret_at(uint64_t offset) {
  const uint64_t word = offset / 8, shift = offset % 8 * 8;
  return shift == 0 ? kSecret[word] : kSecret[word] >> shift | kSecret[word + 1] << (64 - shift);
}

FUNCTION uint64_t first_sum(uint64_t j) {
  const uint64_t even = j == 0   ? kPrime32_3
                        : j == 2 ? kPrime64_2
                        : j == 4 ? kPrime64_4
                                 : kPrime64_5;
  const uint64_t odd = j == 1 ? kPrime64_1 : j == 3 ? kPrime64_3 : j == 5 ? kPrime32_2 : kPrime32_1;
  return j % 2 == 0 ? even : odd;
}

FUNCTION uint64_t mix_product(uint64_t a, uint64_t b) { return a * b ^ mul_high(a, b); }

FUNCTION uint64_t avalanche(uint64_t value) {
  value = (value ^ value >> 37) * kPrimeMix;
  return value ^ value >> 32;
}

// What a word adds to its accumulator, and what becomes of that at the end of a block.
FUNCTION uint64_t keyed_product(uint64_t word, uint64_t secret) {
  const uint64_t key = word ^ secret;
  return mul_wide((uint32_t)key, (uint32_t)(key >> 32));
}
FUNCTION uint64_t scrambled(uint64_t sum, uint64_t secret) {
  return (sum ^ sum >> 47 ^ secret) * kPrime32_1;
}

FUNCTION uint64_t merge_sums(const uint64_t* sums_ptr, uint64_t secret_offset, uint64_t start) {
  uint64_t value = start;
  for (uint64_t i = 0; i < 4; ++i)
    value += mix_product(sums_ptr[2 * i] ^ secret_at(secret_offset + 16 * i),
                         sums_ptr[2 * i + 1] ^ secret_at(secret_offset + 16 * i + 8));
  return avalanche(value);
}

FUNCTION void finish_hash(const uint64_t* sums_ptr, uint64_t bytes, uint64_t* hash_ptr) {
  hash_ptr[0] = merge_sums(sums_ptr, 11, bytes * kPrime64_1);
  hash_ptr[1] = merge_sums(sums_ptr, kSecretBytes - 64 - 11, ~(bytes * kPrime64_2));
}

// Accumulator j over the whole input: what one GPU thread does. Words are read twice, by j and by
// its neighbour, from cache.
FUNCTION uint64_t sum_one(const uint8_t* data_ptr, uint64_t bytes, uint64_t j) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data_ptr);
  const uint64_t stripes = (bytes - 1) / kStripeBytes;
  uint64_t sum = first_sum(j);
  for (uint64_t stripe = 0; stripe < stripes; ++stripe) {
    const uint64_t in_block = stripe % kStripesPerBlock;
    sum += words[stripe * 8 + (j ^ 1)] +
           keyed_product(words[stripe * 8 + j], kSecret[in_block + j]);
    if (in_block == kStripesPerBlock - 1) sum = scrambled(sum, kSecret[16 + j]);
  }
  const uint64_t* last = words + bytes / 8 - 8;
  return sum + last[j ^ 1] + keyed_product(last[j], secret_at(kSecretBytes - 64 - 7 + 8 * j));
}

#if CONCORDIA_CUDA
FUNCTION void hash_long(const uint8_t* data_ptr, uint64_t bytes, uint64_t* hash_ptr) {
  uint64_t sums[8];
#pragma unroll 1  // once per segment: small code rather than quick
  for (uint64_t j = 0; j < 8; ++j) sums[j] = sum_one(data_ptr, bytes, j);
  finish_hash(sums, bytes, hash_ptr);
}
#else
typedef uint64_t Sums __attribute__((vector_size(64)));

FUNCTION Sums load_sums(const void* data_ptr) {
  Sums sums;
  memcpy(&sums, data_ptr, sizeof(sums));
  return sums;
}

FUNCTION Sums add_stripe(Sums sums, const uint8_t* data_ptr, Sums secret) {
  const Sums data = load_sums(data_ptr), key = data ^ secret;
  return sums + __builtin_shufflevector(data, data, 1, 0, 3, 2, 5, 4, 7, 6) +
         (key & 0xffffffffu) * (key >> 32);
}

// All eight accumulators at once: what one CPU lane does.
FUNCTION void hash_long(const uint8_t* data_ptr, uint64_t bytes, uint64_t* hash_ptr) {
  const uint64_t stripes = (bytes - 1) / kStripeBytes;
  Sums sums = {first_sum(0), first_sum(1), first_sum(2), first_sum(3),
               first_sum(4), first_sum(5), first_sum(6), first_sum(7)};
  const Sums scramble = load_sums(kSecret + 16);
  uint64_t stripe = 0;
  for (; stripe + kStripesPerBlock <= stripes; stripe += kStripesPerBlock) {
    for (uint64_t i = 0; i < kStripesPerBlock; ++i)
      sums = add_stripe(sums, data_ptr + (stripe + i) * kStripeBytes, load_sums(kSecret + i));
    sums = (sums ^ sums >> 47 ^ scramble) * kPrime32_1;
  }
  for (uint64_t i = 0; stripe < stripes; ++i, ++stripe)
    sums = add_stripe(sums, data_ptr + stripe * kStripeBytes, load_sums(kSecret + i));
  const uint8_t* secret_ptr = reinterpret_cast<const uint8_t*>(kSecret);
  sums = add_stripe(sums, data_ptr + bytes - kStripeBytes,
                    load_sums(secret_ptr + kSecretBytes - 64 - 7));
  finish_hash(reinterpret_cast<const uint64_t*>(&sums), bytes, hash_ptr);
}
#endif

CONSTANT uint64_t leaf_count(uint64_t bytes) { return (bytes + kLeafBytes - 1) / kLeafBytes; }

// Bytes that the root hash covers: the leaves' digests, zero-padded.
CONSTANT uint64_t root_bytes(uint64_t leaves) {
  return leaves * 16 < kRootBytesMin ? kRootBytesMin : align_up(leaves * 16, kStripeBytes);
}

// All lanes of a CPU: digests of the leaves of [data_ptr, data_ptr + bytes), each at digest(leaf).
// The last leaf is padded in a copy, because what follows in the pool is not ours to write. Device
// shape has stream.h for this.
template <class Digest>
FUNCTION void hash_leaves(Call* call, uint64_t lane, const uint8_t* data_ptr, uint64_t bytes,
                          Digest digest) {
  for_each_lane(call, lane, leaf_count(bytes), [=](uint64_t leaf) {
    const uint8_t* leaf_ptr = data_ptr + leaf * kLeafBytes;
    const uint64_t rest = bytes - leaf * kLeafBytes;
    if (rest >= kLeafBytes) return hash_long(leaf_ptr, kLeafBytes, digest(leaf));
    alignas(64) uint8_t padded[kLeafBytes];
    copy_bytes(padded, leaf_ptr, rest);
    zero_bytes(padded + rest, kLeafBytes - rest);
    hash_long(padded, kLeafBytes, digest(leaf));
  });
}

// All lanes of a CPU: the payload hash of [data_ptr, data_ptr + bytes) into call->payload_hash, for
// everyone to read.
FUNCTION void hash_payload(Call* call, uint64_t lane, const uint8_t* data_ptr, uint64_t bytes) {
  const uint64_t leaves = leaf_count(bytes), padded = root_bytes(leaves);
  uint64_t* digests = reinterpret_cast<uint64_t*>(call->digests);
  hash_leaves(call, lane, data_ptr, bytes, [=](uint64_t leaf) { return digests + 2 * leaf; });
  for_each_lane(call, lane, padded / 8 - leaves * 2,
                [=](uint64_t i) { digests[leaves * 2 + i] = 0; });
  grid_sync(call);
  if (lane == 0) hash_long(call->digests, padded, call->payload_hash);
  grid_sync(call);
}

constexpr uint32_t kCrcPolynomial = 0x82f63b78u;  // Castagnoli, bits reflected

// a * b modulo the polynomial, bits reflected: bit 31 is x^0.
CONSTANT uint32_t crc_multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if (a >> bit & 1) product ^= b;
    b = b >> 1 ^ (b & 1 ? kCrcPolynomial : 0);
  }
  return product;
}

struct CrcPowers {
  uint32_t power[64];  // x^(32 * i)
};
CONSTANT CrcPowers crc_powers() {
  CrcPowers powers = {};
  uint32_t power = 0x80000000u, step = 0x80000000u;
  for (int i = 0; i < 32; ++i) step = step >> 1 ^ (step & 1 ? kCrcPolynomial : 0);
  for (int i = 0; i < 64; ++i) {
    powers.power[i] = power;
    power = crc_multiply(power, step);
  }
  return powers;
}
TABLE CrcPowers kCrcPowers = crc_powers();

constexpr uint64_t kHeaderWords = 63;  // words of four bytes before a header's own CRC

// What word i of a header adds to the header's CRC. The CRC is linear, so the words need no order:
// XOR of all, then inverted.
FUNCTION uint32_t crc_share(const uint8_t* header_ptr, uint64_t i) {
  const uint32_t word =
      reinterpret_cast<const uint32_t*>(header_ptr)[i] ^ (i == 0 ? 0xffffffffu : 0);
  return crc_multiply(word, kCrcPowers.power[kHeaderWords - i]);
}

FUNCTION uint32_t header_crc(const uint8_t* header_ptr) {
#if defined(__SSE4_2__)
  uint64_t crc = 0xffffffffu;
  for (uint64_t i = 0; i < kHeaderWords / 2; ++i)
    crc = __builtin_ia32_crc32di(crc, reinterpret_cast<const uint64_t*>(header_ptr)[i]);
  return ~__builtin_ia32_crc32si((uint32_t)crc,
                                 reinterpret_cast<const uint32_t*>(header_ptr)[kHeaderWords - 1]);
#else
  uint32_t crc = 0;
#if CONCORDIA_CUDA
#pragma unroll 1
#endif
  for (uint64_t i = 0; i < kHeaderWords; ++i) crc ^= crc_share(header_ptr, i);
  return ~crc;
#endif
}
