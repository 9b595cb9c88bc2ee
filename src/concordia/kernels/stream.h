// A payload on its way from memory to its place: every word is read once, hashed, and stored once.
//
// Owns: teams (a warp on the GPU, one lane on the CPU), the hash that a team computes together, and
// the pass over a payload's leaves. Promises: what is hashed is what is stored, because both come
// from the same register; the values are those of hash.h; nothing beyond the payload is read but
// the rest of its last 8 bytes. Used in device shape only. Called by journal.h and handlers, all
// lanes together.
//
// One team takes one leaf. On the GPU lane t of a warp takes 16 bytes, words 2 * (t % 4) and the
// next one, of stripes t / 4, t / 4 + 8, ...: 512 bytes side by side per load. Those two words are
// all that a pair of XXH3's accumulators takes from a stripe, and accumulators add up over the 16
// stripes of a block in any order: eight lanes share a pair and meet once per block.
#pragma once
#include "hash.h"

// What gives the words of a payload by offset also says where they lie, for whoever takes many at
// once: whole stretches of this size lie in one piece (kHasStretches), or even whole leaves
// (kIsLinear).
constexpr uint32_t kStretchBytes = 128;

#if CONCORDIA_CUDA
constexpr uint64_t kTeamLanes = 32;
FUNCTION void team_sync() { __syncwarp(); }

// Which accumulators lane t contributes to (2 * pair and the next), and which stripes it takes.
struct TeamPlace {
  uint32_t pair, group;  // lane = 4 * group + pair
};
FUNCTION TeamPlace team_place() { return {threadIdx.x % 4, threadIdx.x / 4 % 8}; }

// After add_groups a lane has one accumulator: this one.
FUNCTION uint32_t accumulator_of(TeamPlace place) { return 2 * place.pair + place.group % 2; }

struct Pair {
  uint64_t a, b;
};
FUNCTION Pair keys_at(TeamPlace place, uint32_t stripe) {
  const uint64_t* key = kSecret + stripe + 2 * place.pair;
  return {key[0], key[1]};
}

FUNCTION uint64_t last_secret(uint32_t word) { return secret_at(kSecretBytes - 64 - 7 + 8 * word); }
FUNCTION Pair last_keys(TeamPlace place) {
  return {last_secret(2 * place.pair), last_secret(2 * place.pair + 1)};
}

// What 16 bytes of a stripe add to a pair of accumulators: XXH3 gives each its neighbour's word.
FUNCTION void add_words(Pair* sum, Wide data, Pair key) {
  sum->a += keyed_product(data.word[0], key.a) + data.word[1];
  sum->b += keyed_product(data.word[1], key.b) + data.word[0];
}

// Two of them, products and words apart: a product is added by the multiplication, and the sum of
// three words is an instruction for each half. Additions are what a hash at full speed waits for.
struct Sums {
  Pair products, words;
};
FUNCTION void add_two(Sums* sums, Wide one, Pair key, Wide next, Pair next_key) {
  sums->products.a += keyed_product(one.word[0], key.a);
  sums->products.b += keyed_product(one.word[1], key.b);
  sums->products.a += keyed_product(next.word[0], next_key.a);
  sums->products.b += keyed_product(next.word[1], next_key.b);
  sums->words.a += one.word[1] + next.word[1];
  sums->words.b += one.word[0] + next.word[0];
}
FUNCTION Pair total(const Sums& sums) {
  return {sums.products.a + sums.words.a, sums.products.b + sums.words.b};
}

// Adds over the eight groups; even ones then have the first of the pair, odd ones the second.
FUNCTION uint64_t add_groups(Pair sum, TeamPlace place) {
  const bool is_odd = place.group % 2 != 0;
  uint64_t mine = (is_odd ? sum.b : sum.a) + exchange_lanes(is_odd ? sum.a : sum.b, 4);
  mine += exchange_lanes(mine, 8);
  return mine + exchange_lanes(mine, 16);
}

FUNCTION uint64_t scramble(uint64_t sum, TeamPlace place) {
  return scrambled(sum, kSecret[16 + accumulator_of(place)]);
}

// All accumulators, as add_groups leaves them -> the low half of the hash in lane 0 and the high
// half in lane kHighLane. Groups 0 and 1 compute the low half, groups 2 and 3 the high half.
constexpr uint32_t kHighLane = 8;
FUNCTION uint64_t mix_team(uint64_t sum, uint64_t bytes) {
  const TeamPlace place = team_place();
  const bool is_odd = place.group % 2 != 0, is_high = place.group / 2 % 2 != 0;
  const uint64_t other = exchange_lanes(sum, 4);
  const uint64_t first = is_odd ? other : sum, second = is_odd ? sum : other;
  const uint64_t offset = (is_high ? kSecretBytes - 64 - 11 : 11) + 16 * place.pair;
  uint64_t mixed = mix_product(first ^ secret_at(offset), second ^ secret_at(offset + 8));
  mixed += exchange_lanes(mixed, 1);
  mixed += exchange_lanes(mixed, 2);
  mixed += is_high ? ~(bytes * kPrime64_2) : bytes * kPrime64_1;
  return avalanche(mixed);
}
FUNCTION void finish_team(uint64_t sum, uint64_t bytes, uint64_t* hash_ptr) {
  const uint64_t mixed = mix_team(sum, bytes);
  if (team_lane() == 0) hash_ptr[0] = mixed;
  if (team_lane() == kHighLane) hash_ptr[1] = mixed;
}

// The whole team: the hash of `bytes` bytes that load(offset) gives in words; sink(offset, word)
// gets each of them once.
template <class Load, class Sink>
FUNCTION void hash_words(uint32_t bytes, Load load, Sink sink, uint64_t* hash_ptr) {
  const TeamPlace place = team_place();
  const uint32_t last = bytes / (uint32_t)kStripeBytes - 1;
  uint64_t sum = first_sum(accumulator_of(place));
#pragma unroll 1
  for (uint32_t block = 0; block <= last; block += kStripesPerBlock) {
    Pair part = {};
#pragma unroll
    for (uint32_t i = place.group; i < kStripesPerBlock; i += 8) {
      if (block + i > last) continue;
      const uint32_t from = (block + i) * (uint32_t)kStripeBytes + 16 * place.pair;
      const Wide data = {load(from), load(from + 8)};
      sink(from, data.word[0]);
      sink(from + 8, data.word[1]);
      add_words(&part, data, block + i == last ? last_keys(place) : keys_at(place, i));
    }
    sum += add_groups(part, place);
    // The last stripe comes after the last scrambling, wherever it lies.
    if (block + kStripesPerBlock <= last) sum = scramble(sum, place);
  }
  team_sync();  // every lane has read the words: the hash may go over them
  finish_team(sum, bytes, hash_ptr);
}

// The whole team: one leaf that is all there. Every lane finds one stretch of 128 bytes and the
// others ask it where it lies; the k-th access takes the k-th 512 bytes. All eight accesses are
// under way at once.
template <class Words>
FUNCTION void hash_whole_leaf(const Words& words, uint32_t start, uint8_t* target_ptr,
                              uint64_t* hash_ptr) {
  constexpr uint32_t kAccesses = kLeafBytes / 512;
  const TeamPlace place = team_place();
  const uint32_t t = threadIdx.x % 32;
  const uint64_t stretch =
      reinterpret_cast<uint64_t>(words.address(start + (Words::kIsLinear ? 0 : t * kStretchBytes)));
  Wide data[kAccesses];
#pragma unroll
  for (uint32_t k = 0; k < kAccesses; ++k) {
    const uint64_t from = Words::kIsLinear ? stretch + 512 * k + 16 * t
                                           : lane_value(stretch, 4 * k + t / 8) + t % 8 * 16;
    data[k] = *reinterpret_cast<const Wide*>(from);
  }
  const Pair near = keys_at(place, place.group), far = keys_at(place, place.group + 8);
  uint64_t sum = first_sum(accumulator_of(place));
#pragma unroll
  for (uint32_t block = 0; block < kAccesses / 2; ++block) {
    const bool is_end = block == kAccesses / 2 - 1;
    const Pair last = is_end && place.group == 7 ? last_keys(place) : far;
    Sums sums = {};
    add_two(&sums, data[2 * block], near, data[2 * block + 1], last);
    sum += add_groups(total(sums), place);
    if (!is_end) sum = scramble(sum, place);
  }
  // Behind the sums, which one CTA is a fifth faster with: a bus that is busy holds nothing up.
  if (target_ptr != nullptr) {
    Wide* target = reinterpret_cast<Wide*>(target_ptr + start) + t;
#pragma unroll
    for (uint32_t k = 0; k < kAccesses; ++k) target[32 * k] = data[k];
  }
  finish_team(sum, kLeafBytes, hash_ptr);
}

// The whole team: CRC and hash of a header that lies in its registers, word t in lane t; returns
// the word with the CRC in it, and the hash to every lane.
FUNCTION uint64_t finish_header(uint64_t word, uint64_t hash[2]) {
  const uint32_t t = threadIdx.x % 32;
  uint32_t crc = crc_multiply((uint32_t)word ^ (t == 0 ? 0xffffffffu : 0),
                              kCrcPowers.power[kHeaderWords - 2 * t]);
  if (t != 31)
    crc ^= crc_multiply((uint32_t)(word >> 32), kCrcPowers.power[kHeaderWords - 2 * t - 1]);
#pragma unroll
  for (uint32_t distance = 1; distance < 32; distance *= 2)
    crc ^= (uint32_t)exchange_lanes(crc, distance);
  if (t == 31) word = (word & 0xffffffffu) | (uint64_t)~crc << 32;
  // A header is four stripes: the first half of the lanes takes two words each.
  const TeamPlace place = team_place();
  const Wide data = {lane_value(word, 2 * t % 32), lane_value(word, (2 * t + 1) % 32)};
  Pair part = {};
  add_words(&part, data, place.group == 3 ? last_keys(place) : keys_at(place, place.group));
  if (place.group > 3) part = {};
  const uint64_t sum = first_sum(accumulator_of(place)) + add_groups(part, place);
  const uint64_t mixed = mix_team(sum, 256);
  hash[0] = lane_value(mixed, 0);
  hash[1] = lane_value(mixed, kHighLane);
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

// Words of plain memory at an address that is a multiple of 16; zeroes behind its end.
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

// One team: moves a leaf of the payload of `bytes` bytes that words(offset) gives to its place
// behind `target_ptr` (null: only hashes), padded with zeroes to whole lines.
template <class Words>
FUNCTION void stream_leaf(const Words& words, uint64_t leaf, uint64_t bytes, uint8_t* target_ptr,
                          uint64_t* hash_ptr) {
  const uint64_t padded = target_ptr == nullptr ? 0 : align_up(bytes, kLineBytes);
  const uint64_t start = leaf * kLeafBytes;
#if CONCORDIA_CUDA
  if constexpr (Words::kHasStretches) {
    if (start + kLeafBytes <= bytes)
      return hash_whole_leaf(words, (uint32_t)start, target_ptr, hash_ptr);
  }
#endif
  hash_words(
      kLeafBytes,
      [=](uint32_t offset) { return start + offset < bytes ? words(start + offset) : 0; },
      [=](uint32_t offset, uint64_t word) {
        if (start + offset < padded)
          *reinterpret_cast<uint64_t*>(target_ptr + start + offset) = word;
      },
      hash_ptr);
}

// All lanes: moves a whole payload, and writes each leaf's digest to digest(leaf). The caller syncs
// before anybody looks at either.
template <class Words, class Digest>
FUNCTION void stream_leaves(Call* call, uint64_t lane, uint64_t bytes, uint8_t* target_ptr,
                            Words words, Digest digest) {
  const uint64_t leaves = leaf_count(bytes), teams = call->lanes / kTeamLanes;
#pragma unroll 1
  for (uint64_t leaf = lane / kTeamLanes; leaf < leaves; leaf += teams)
    stream_leaf(words, leaf, bytes, target_ptr, digest(leaf));
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
