// A payload on its way from memory to its place: every word is read once, hashed, and stored once.
//
// Owns: teams (a warp on the GPU, one lane on the CPU), the hash that a team computes together, and the pass over a payload's leaves.
// Promises: what is hashed is what is stored, because both come from the same register; the values are those of hash.h; nothing beyond
// the payload is read but the rest of its last 8 bytes. Used in device shape only. Called by journal.h and handlers, all lanes together.
//
// One team takes one leaf. On the GPU lane t of a warp reads word t % 8 of stripes t / 8, t / 8 + 4, ...: 256 bytes side by side per load,
// eight loads under way at once. XXH3's accumulator j adds up over the 16 stripes of a block in any order, so four lanes share it.
#pragma once
#include "hash.h"

#if CONCORDIA_CUDA
constexpr uint64_t kTeamLanes = 32;
FUNCTION void team_sync() { __syncwarp(); }

// What lane t contributes to, and the secret words that it needs.
struct TeamPlace {
  uint32_t word, group;  // of a stripe; which of four stripes
};
FUNCTION TeamPlace team_place() { return {threadIdx.x % 8, threadIdx.x / 8 % 4}; }

// Adds over the four lanes that share an accumulator, so that each of them has the sum.
FUNCTION uint64_t add_groups(uint64_t value) {
  value += exchange_lanes(value, 8);
  return value + exchange_lanes(value, 16);
}

FUNCTION uint64_t last_secret(uint32_t word) { return secret_at(kSecretBytes - 64 - 7 + 8 * word); }

// All accumulators, one per lane and four times over -> both halves of the hash. Group 0 computes the low half, group 1 the high half.
FUNCTION void finish_team(uint64_t sum, uint64_t bytes, uint64_t* hash_ptr) {
  const TeamPlace place = team_place();
  const uint64_t next = exchange_lanes(sum, 1);
  const uint64_t offset = (place.group == 0 ? 11 : kSecretBytes - 64 - 11) + 8 * place.word;
  uint64_t mixed = place.word % 2 == 0 ? mix_product(sum ^ secret_at(offset), next ^ secret_at(offset + 8)) : 0;
  mixed += exchange_lanes(mixed, 2);
  mixed += exchange_lanes(mixed, 4);
  mixed += place.group == 0 ? bytes * kPrime64_1 : ~(bytes * kPrime64_2);
  mixed = (mixed ^ mixed >> 37) * kPrimeMix;
  mixed ^= mixed >> 32;
  if (place.word == 0 && place.group < 2) hash_ptr[place.group] = mixed;
}

// The whole team: the hash of `bytes` bytes that load(offset) gives in words; sink(offset, word) gets each of them once.
template <class Load, class Sink>
FUNCTION void hash_words(uint64_t bytes, Load load, Sink sink, uint64_t* hash_ptr) {
  const TeamPlace place = team_place();
  const uint32_t last = (uint32_t)(bytes / kStripeBytes) - 1;
  const uint64_t scramble = kSecret[16 + place.word], last_key = last_secret(place.word);
  uint64_t sum = first_sum(place.word);
#pragma unroll 1
  for (uint32_t pair = 0; pair <= last; pair += 2 * kStripesPerBlock) {
    uint64_t word[8];
#pragma unroll
    for (uint32_t k = 0; k < 8; ++k) {
      const uint32_t stripe = pair + 4 * k + place.group;
      word[k] = stripe <= last ? load(stripe * kStripeBytes + 8 * place.word) : 0;
    }
#pragma unroll
    for (uint32_t k = 0; k < 8; ++k) {
      const uint32_t stripe = pair + 4 * k + place.group;
      if (stripe <= last) sink(stripe * kStripeBytes + 8 * place.word, word[k]);
    }
#pragma unroll
    for (uint32_t b = 0; b < 2; ++b) {
      const uint32_t block = pair + b * kStripesPerBlock;
      if (block > last) break;
      uint64_t plain = 0, product = 0;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t stripe = block + 4 * i + place.group;
        const uint64_t data = word[4 * b + i];
        const uint64_t key = data ^ (stripe == last ? last_key : kSecret[4 * i + place.group + place.word]);
        plain += data;
        product += stripe <= last ? (key & 0xffffffffu) * (key >> 32) : 0;
      }
      sum += add_groups(product + exchange_lanes(plain, 1));
      // The last stripe has a key of its own and comes after the last scrambling, wherever it lies.
      if (block + kStripesPerBlock <= last) sum = (sum ^ sum >> 47 ^ scramble) * kPrime32_1;
    }
  }
  finish_team(sum, bytes, hash_ptr);
}

// The whole team: CRC and hash of a header that lies in its registers, word t in lane t; returns the word with the CRC in it.
FUNCTION uint64_t finish_header(uint64_t word, uint64_t* hash_ptr) {
  const uint32_t t = threadIdx.x % 32;
  uint32_t crc = crc_multiply((uint32_t)word ^ (t == 0 ? 0xffffffffu : 0), kCrcPowers.power[kHeaderWords - 2 * t]);
  if (t != 31) crc ^= crc_multiply((uint32_t)(word >> 32), kCrcPowers.power[kHeaderWords - 2 * t - 1]);
#pragma unroll
  for (uint32_t distance = 1; distance < 32; distance *= 2) crc ^= (uint32_t)exchange_lanes(crc, distance);
  if (t == 31) word = (word & 0xffffffffu) | (uint64_t)~crc << 32;
  const TeamPlace place = team_place();  // a header is four stripes, so lane t holds word t % 8 of stripe t / 8
  const uint64_t key = word ^ (place.group == 3 ? last_secret(place.word) : kSecret[place.group + place.word]);
  const uint64_t sum = add_groups((key & 0xffffffffu) * (key >> 32) + exchange_lanes(word, 1));
  finish_team(first_sum(place.word) + sum, 256, hash_ptr);
  return word;
}
#else
constexpr uint64_t kTeamLanes = 1;
FUNCTION void team_sync() {}

template <class Load, class Sink>
FUNCTION void hash_words(uint64_t bytes, Load load, Sink sink, uint64_t* hash_ptr) {
  alignas(64) uint64_t words[kLeafBytes / 8];  // a lane of a CPU is given leaves only; roots are hashed where they lie
  for (uint64_t offset = 0; offset < bytes; offset += 8) {
    words[offset / 8] = load(offset);
    sink(offset, words[offset / 8]);
  }
  hash_long(reinterpret_cast<const uint8_t*>(words), bytes, hash_ptr);
}
#endif

FUNCTION bool is_leading_team(uint64_t lane) { return lane < kTeamLanes; }

// Words of plain memory at an address that is a multiple of 8; zeroes behind its end.
struct MemoryWords {
  const uint8_t* data_ptr;
  uint64_t bytes;
  FUNCTION_MEMBER uint64_t operator()(uint64_t offset) const {
    const uint64_t word = *reinterpret_cast<const uint64_t*>(data_ptr + offset);
    return offset + 8 <= bytes ? word : word & ((1ull << (bytes - offset) * 8) - 1);
  }
};

// All lanes: moves the payload that words(offset) gives to `target_ptr` (null: only hashes), padded with zeroes to whole lines, and
// writes each leaf's digest to digest(leaf). The caller syncs before anybody looks at either.
template <class Words, class Digest>
FUNCTION void stream_leaves(Call* call, uint64_t lane, uint64_t bytes, uint8_t* target_ptr, Words words, Digest digest) {
  const uint64_t padded = target_ptr == nullptr ? 0 : align_up(bytes, kLineBytes);
  const uint64_t leaves = leaf_count(bytes), teams = call->lanes / kTeamLanes;
#pragma unroll 1
  for (uint64_t leaf = lane / kTeamLanes; leaf < leaves; leaf += teams) {
    const uint64_t start = leaf * kLeafBytes;
    hash_words(
        kLeafBytes, [=](uint64_t offset) { return start + offset < bytes ? words(start + offset) : 0; },
        [=](uint64_t offset, uint64_t word) {
          if (start + offset < padded) *reinterpret_cast<uint64_t*>(target_ptr + start + offset) = word;
        },
        digest(leaf));
  }
}

// The same with digests one after the other, for one payload.
template <class Words>
FUNCTION void stream_payload(Call* call, uint64_t lane, uint64_t bytes, uint8_t* target_ptr, Words words) {
  uint64_t* digests = reinterpret_cast<uint64_t*>(call->digests);
  stream_leaves(call, lane, bytes, target_ptr, words, [=](uint64_t leaf) { return digests + 2 * leaf; });
}

// One team: the hash over the digests of `leaves` leaves at `digests_ptr`.
FUNCTION void hash_root(uint8_t* digests_ptr, uint64_t leaves, uint64_t* hash_ptr) {
  const uint64_t padded = root_bytes(leaves);
#if CONCORDIA_CUDA
  const MemoryWords words = {digests_ptr, padded};
  hash_words(padded, [=](uint64_t offset) { return offset < leaves * 16 ? words(offset) : 0; }, [](uint64_t, uint64_t) {}, hash_ptr);
#else
  zero_bytes(digests_ptr + leaves * 16, padded - leaves * 16);
  hash_long(digests_ptr, padded, hash_ptr);
#endif
}

// All lanes: the hash of a payload whose leaves were streamed, into call->payload_hash, for everyone to read.
FUNCTION void finish_payload(Call* call, uint64_t lane, uint64_t bytes) {
  grid_sync(call);  // every team's digests are there
  if (is_leading_team(lane)) hash_root(call->digests, leaf_count(bytes), call->payload_hash);
  grid_sync(call);
}
