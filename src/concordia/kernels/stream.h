// A payload on its way from memory to its place: every word is read once, hashed, and stored once.
//
// Owns: teams (a warp on the GPU, one lane on the CPU), the hash that a team computes together, and
// the pass over a payload's leaves. Promises: what is hashed is what is stored, because both come
// from the same register; the values are those of hash.h; nothing beyond the payload is read but
// the rest of its last 8 bytes. Used in device shape only. Called by journal.h and handlers, all
// lanes together.
//
// One team takes one leaf. On the GPU lane t of a warp reads word t % 8 of stripes t / 8, t / 8 +
// 4, ...: 256 bytes side by side per load. XXH3's accumulator j adds up over the 16 stripes of a
// block in any order, so four lanes share it.
#pragma once
#include "hash.h"

// What gives the words of a payload by offset also says where they lie, for whoever takes many at
// once: whole stretches of this size lie in one piece (kHasStretches), or even whole leaves
// (kIsLinear).
constexpr uint32_t kStretchBytes = 128;

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

// All accumulators, one per lane and four times over -> both halves of the hash. Group 0 computes
// the low half, group 1 the high half.
FUNCTION void finish_team(uint64_t sum, uint64_t bytes, uint64_t* hash_ptr) {
  const TeamPlace place = team_place();
  const uint64_t next = exchange_lanes(sum, 1);
  const uint64_t offset = (place.group == 0 ? 11 : kSecretBytes - 64 - 11) + 8 * place.word;
  uint64_t mixed =
      place.word % 2 == 0 ? mix_product(sum ^ secret_at(offset), next ^ secret_at(offset + 8)) : 0;
  mixed += exchange_lanes(mixed, 2);
  mixed += exchange_lanes(mixed, 4);
  mixed += place.group == 0 ? bytes * kPrime64_1 : ~(bytes * kPrime64_2);
  mixed = avalanche(mixed);
  if (place.word == 0 && place.group < 2) hash_ptr[place.group] = mixed;
}

// A lane's words of one block: of stripes 4 * i + its group. By value, never by address: an array
// in local memory would make every load wait for the one before.
struct Four {
  uint64_t a, b, c, d;
};

FUNCTION uint64_t keyed_product(uint64_t word, uint64_t secret) {
  const uint64_t key = word ^ secret;
  return (key & 0xffffffffu) * (key >> 32);
}

// What a block adds to the lane's accumulator, when all its stripes are there; the last of a leaf
// has a key of its own.
FUNCTION uint64_t whole_block(Four word, TeamPlace place, bool has_last, uint64_t last_key) {
  const uint64_t* secret = kSecret + place.group + place.word;
  const uint64_t fourth = has_last && place.group == 3 ? last_key : secret[12];
  const uint64_t product = keyed_product(word.a, secret[0]) + keyed_product(word.b, secret[4]) +
                           keyed_product(word.c, secret[8]) + keyed_product(word.d, fourth);
  return add_groups(product + exchange_lanes(word.a + word.b + word.c + word.d, 1));
}

// The same for a block that may end early: stripes behind `last` add nothing, `last` has its own
// key. Stripes count from this block.
FUNCTION uint64_t part_block(Four word, TeamPlace place, uint32_t last, uint64_t last_key) {
  const uint64_t* secret = kSecret + place.group + place.word;
  const auto product = [=](uint64_t data, uint32_t i) {
    const uint32_t stripe = 4 * i + place.group;
    return stripe > last ? 0 : keyed_product(data, stripe == last ? last_key : secret[4 * i]);
  };
  const uint64_t sum =
      product(word.a, 0) + product(word.b, 1) + product(word.c, 2) + product(word.d, 3);
  return add_groups(sum + exchange_lanes(word.a + word.b + word.c + word.d, 1));
}

FUNCTION uint64_t scramble(uint64_t sum, const TeamPlace& place) {
  return (sum ^ sum >> 47 ^ kSecret[16 + place.word]) * kPrime32_1;
}

// The whole team: the hash of `bytes` bytes that load(offset) gives in words; sink(offset, word)
// gets each of them once.
template <class Load, class Sink>
FUNCTION void hash_words(uint32_t bytes, Load load, Sink sink, uint64_t* hash_ptr) {
  const TeamPlace place = team_place();
  const uint32_t last = bytes / (uint32_t)kStripeBytes - 1;
  const uint64_t last_key = last_secret(place.word);
  uint64_t sum = first_sum(place.word);
#pragma unroll 1
  for (uint32_t block = 0; block <= last; block += kStripesPerBlock) {
    const uint32_t first = (block + place.group) * (uint32_t)kStripeBytes + 8 * place.word;
    const auto take = [=](uint32_t i) {
      return block + 4 * i + place.group <= last ? load(first + i * 256) : 0;
    };
    const auto give = [=](uint32_t i, uint64_t word) {
      if (block + 4 * i + place.group <= last) sink(first + i * 256, word);
    };
    const Four word = {take(0), take(1), take(2), take(3)};
    give(0, word.a), give(1, word.b), give(2, word.c), give(3, word.d);
    sum += part_block(word, place, last - block, last_key);
    // The last stripe comes after the last scrambling, wherever it lies.
    if (block + kStripesPerBlock <= last) sum = scramble(sum, place);
  }
  finish_team(sum, bytes, hash_ptr);
}

// The whole team: one leaf that is all there. Every lane finds one stretch of 128 bytes and the
// others ask it where it lies; in the k-th access of 256 bytes lane t takes word t. Eight accesses
// are under way at once.
template <class Words>
FUNCTION void hash_whole_leaf(const Words& words, uint32_t start, uint8_t* target_ptr,
                              uint64_t* hash_ptr) {
  const TeamPlace place = team_place();
  const uint32_t t = threadIdx.x % 32;
  const uint64_t last_key = last_secret(place.word);
  const uint64_t stretch =
      reinterpret_cast<uint64_t>(words.address(start + (Words::kIsLinear ? 0 : t * kStretchBytes)));
  const auto take = [=](uint32_t k) {
    const uint64_t from = Words::kIsLinear ? stretch + 256 * k + 8 * t
                                           : lane_value(stretch, 2 * k + t / 16) + t % 16 * 8;
    return *reinterpret_cast<const uint64_t*>(from);
  };
  uint64_t* target = reinterpret_cast<uint64_t*>(target_ptr + start) + t;
  const auto give = [=](uint32_t k, Four word) {
    if (target_ptr == nullptr) return;
    target[32 * k] = word.a, target[32 * k + 32] = word.b, target[32 * k + 64] = word.c,
                target[32 * k + 96] = word.d;
  };
  uint64_t sum = first_sum(place.word);
  {
    const Four one = {take(0), take(1), take(2), take(3)},
               two = {take(4), take(5), take(6), take(7)};
    give(0, one), give(4, two);
    sum = scramble(sum + whole_block(one, place, false, 0), place);
    sum = scramble(sum + whole_block(two, place, false, 0), place);
  }
  {
    const Four three = {take(8), take(9), take(10), take(11)},
               four = {take(12), take(13), take(14), take(15)};
    give(8, three), give(12, four);
    sum = scramble(sum + whole_block(three, place, false, 0), place);
    sum += whole_block(four, place, true, last_key);
  }
  finish_team(sum, kLeafBytes, hash_ptr);
}

// The whole team: CRC and hash of a header that lies in its registers, word t in lane t; returns
// the word with the CRC in it.
FUNCTION uint64_t finish_header(uint64_t word, uint64_t* hash_ptr) {
  const uint32_t t = threadIdx.x % 32;
  uint32_t crc = crc_multiply((uint32_t)word ^ (t == 0 ? 0xffffffffu : 0),
                              kCrcPowers.power[kHeaderWords - 2 * t]);
  if (t != 31)
    crc ^= crc_multiply((uint32_t)(word >> 32), kCrcPowers.power[kHeaderWords - 2 * t - 1]);
#pragma unroll
  for (uint32_t distance = 1; distance < 32; distance *= 2)
    crc ^= (uint32_t)exchange_lanes(crc, distance);
  if (t == 31) word = (word & 0xffffffffu) | (uint64_t)~crc << 32;
  // a header is four stripes, so lane t holds word t % 8 of stripe t / 8
  const TeamPlace place = team_place();
  const uint64_t key =
      word ^ (place.group == 3 ? last_secret(place.word) : kSecret[place.group + place.word]);
  const uint64_t sum = add_groups((key & 0xffffffffu) * (key >> 32) + exchange_lanes(word, 1));
  finish_team(first_sum(place.word) + sum, 256, hash_ptr);
  return word;
}
#else
constexpr uint64_t kTeamLanes = 1;
FUNCTION void team_sync() {}

template <class Load, class Sink>
FUNCTION void hash_words(uint32_t bytes, Load load, Sink sink, uint64_t* hash_ptr) {
  // a lane of a CPU is given leaves only; roots are hashed where they lie
  alignas(64) uint64_t words[kLeafBytes / 8];
  for (uint32_t offset = 0; offset < bytes; offset += 8) {
    words[offset / 8] = load(offset);
    sink(offset, words[offset / 8]);
  }
  hash_long(reinterpret_cast<const uint8_t*>(words), bytes, hash_ptr);
}
#endif

FUNCTION bool is_leading_team(uint64_t lane) { return lane < kTeamLanes; }

// Words of plain memory at an address that is a multiple of 8; zeroes behind its end.
struct MemoryWords {
  static constexpr bool kHasStretches = true, kIsLinear = true;
  const uint8_t* data_ptr;
  uint64_t bytes;
  FUNCTION_MEMBER const uint8_t* address(uint64_t offset) const { return data_ptr + offset; }
  FUNCTION_MEMBER uint64_t operator()(uint64_t offset) const {
    const uint64_t word = *reinterpret_cast<const uint64_t*>(data_ptr + offset);
    return offset + 8 <= bytes ? word : word & ((1ull << (bytes - offset) * 8) - 1);
  }
};

// All lanes: moves the payload that words(offset) gives to `target_ptr` (null: only hashes), padded
// with zeroes to whole lines, and writes each leaf's digest to digest(leaf). The caller syncs
// before anybody looks at either.
template <class Words, class Digest>
FUNCTION void stream_leaves(Call* call, uint64_t lane, uint64_t bytes, uint8_t* target_ptr,
                            Words words, Digest digest) {
  const uint64_t padded = target_ptr == nullptr ? 0 : align_up(bytes, kLineBytes);
  const uint64_t leaves = leaf_count(bytes), teams = call->lanes / kTeamLanes;
#pragma unroll 1
  for (uint64_t leaf = lane / kTeamLanes; leaf < leaves; leaf += teams) {
    const uint64_t start = leaf * kLeafBytes;
#if CONCORDIA_CUDA
    if constexpr (Words::kHasStretches) {
      if (start + kLeafBytes <= bytes) {
        hash_whole_leaf(words, (uint32_t)start, target_ptr, digest(leaf));
        continue;
      }
    }
#endif
    hash_words(
        kLeafBytes,
        [=](uint32_t offset) { return start + offset < bytes ? words(start + offset) : 0; },
        [=](uint32_t offset, uint64_t word) {
          if (start + offset < padded)
            *reinterpret_cast<uint64_t*>(target_ptr + start + offset) = word;
        },
        digest(leaf));
  }
}

// The same for payloads of whole leaves in one piece each: half the code, which a handler's stack
// is limited by.
template <class Words, class Digest>
FUNCTION void stream_whole_leaves(Call* call, uint64_t lane, uint64_t bytes, uint8_t* target_ptr,
                                  Words words, Digest digest) {
#if CONCORDIA_CUDA
  const uint64_t leaves = bytes / kLeafBytes, teams = call->lanes / kTeamLanes;
#pragma unroll 1
  for (uint64_t leaf = lane / kTeamLanes; leaf < leaves; leaf += teams)
    hash_whole_leaf(words, (uint32_t)(leaf * kLeafBytes), target_ptr, digest(leaf));
#else
  stream_leaves(call, lane, bytes, target_ptr, words, digest);
#endif
}

// The same as stream_leaves with digests one after the other, for one payload.
template <class Words>
FUNCTION void stream_payload(Call* call, uint64_t lane, uint64_t bytes, uint8_t* target_ptr,
                             Words words) {
  uint64_t* digests = reinterpret_cast<uint64_t*>(call->digests);
  stream_leaves(call, lane, bytes, target_ptr, words,
                [=](uint64_t leaf) { return digests + 2 * leaf; });
}

// One team: the hash over the digests of `leaves` leaves at `digests_ptr`.
FUNCTION void hash_root(uint8_t* digests_ptr, uint64_t leaves, uint64_t* hash_ptr) {
  const uint64_t padded = root_bytes(leaves);
#if CONCORDIA_CUDA
  const MemoryWords words = {digests_ptr, padded};
  hash_words((uint32_t)padded,
             [=](uint32_t offset) { return offset < leaves * 16 ? words(offset) : 0; },
             [](uint32_t, uint64_t) {}, hash_ptr);
#else
  zero_bytes(digests_ptr + leaves * 16, padded - leaves * 16);
  hash_long(digests_ptr, padded, hash_ptr);
#endif
}

// All lanes: the hash of a payload whose leaves were streamed, into call->payload_hash, for
// everyone to read.
FUNCTION void finish_payload(Call* call, uint64_t lane, uint64_t bytes) {
  grid_sync(call);  // every team's digests are there
  if (is_leading_team(lane)) hash_root(call->digests, leaf_count(bytes), call->payload_hash);
  grid_sync(call);
}
