// Moving KV between an engine's paged cache and the byte order of a record.
//
// Owns: gather and scatter of token ranges and whole blocks for one geometry, given as KV_* numbers
// when the handler is compiled, so that every stride and bound but the number of tokens is a
// constant. Promises: KIND_KV_TAIL is layer -> K then V -> head -> token -> element; KIND_KV_BLOCK
// is block -> layer -> the block's bytes as they lie. Block ids are checked before they become
// addresses. Called by kv_append, kv_apply, kv_hash and kv_restore, all lanes together. Hashes only
// what stream.h reads on its way (stream_range), and knows no journal.
#pragma once
#include "stream.h"

constexpr uint64_t kLayers = KV_LAYERS, kHeads = KV_HEADS, kElementBytes = KV_ELEMENT_BYTES;
constexpr uint64_t kBlockTokens = KV_BLOCK_TOKENS, kBlockBytes = KV_BLOCK_BYTES,
                   kBlockStride = KV_BLOCK_STRIDE;

struct PlaneShape {
  uint64_t dim, offset, head_stride, token_stride, element_stride;
  uint64_t token_tile, token_tile_stride, element_tile, element_tile_stride;  // a tile of 0 is none
};
constexpr PlaneShape kPlanes[2] = {
    {KV_KEY_DIM, KV_KEY_OFFSET, KV_KEY_HEAD_STRIDE, KV_KEY_TOKEN_STRIDE, KV_KEY_ELEMENT_STRIDE,
     KV_KEY_TOKEN_TILE, KV_KEY_TOKEN_TILE_STRIDE, KV_KEY_ELEMENT_TILE, KV_KEY_ELEMENT_TILE_STRIDE},
    {KV_VALUE_DIM, KV_VALUE_OFFSET, KV_VALUE_HEAD_STRIDE, KV_VALUE_TOKEN_STRIDE,
     KV_VALUE_ELEMENT_STRIDE, KV_VALUE_TOKEN_TILE, KV_VALUE_TOKEN_TILE_STRIDE,
     KV_VALUE_ELEMENT_TILE, KV_VALUE_ELEMENT_TILE_STRIDE},
};
template <int kPlane>
CONSTANT PlaneShape plane_shape() {
  constexpr PlaneShape shape = kPlanes[kPlane];
  return shape;
}
// of one layer
constexpr uint64_t kTokenBytes = kHeads * (KV_KEY_DIM + KV_VALUE_DIM) * kElementBytes;

// The widest access that every row and stride is a multiple of; bases are multiples of 16 (checked
// when a region is registered).
CONSTANT uint64_t width_of(uint64_t bits) {
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}
CONSTANT bool is_tiled(const PlaneShape& shape) {
  return shape.token_tile != 0 || shape.element_tile != 0;
}
CONSTANT bool is_row(const PlaneShape& shape) {
  return shape.element_stride == kElementBytes && !is_tiled(shape);
}
CONSTANT uint64_t token_offset(const PlaneShape& shape, uint32_t slot) {
  if (shape.token_tile == 0) return slot * shape.token_stride;
  const uint32_t tile = (uint32_t)shape.token_tile;
  return slot / tile * shape.token_tile_stride + slot % tile * shape.token_stride;
}
CONSTANT uint64_t element_offset(const PlaneShape& shape, uint32_t element) {
  if (shape.element_tile == 0) return element * shape.element_stride;
  const uint32_t tile = (uint32_t)shape.element_tile;
  return element / tile * shape.element_tile_stride + element % tile * shape.element_stride;
}
CONSTANT uint64_t bits_of(const PlaneShape& shape) {
  return shape.dim * kElementBytes | shape.offset | shape.head_stride |
         (is_row(shape) ? shape.token_stride : kElementBytes);
}
constexpr uint64_t kChunkBytes = width_of(bits_of(kPlanes[0]) | bits_of(kPlanes[1]) | kBlockStride);
constexpr uint64_t kRawBytes = width_of(kBlockBytes | kBlockStride);

template <uint64_t kBytes>
FUNCTION void copy_unit(uint8_t* target_ptr, const uint8_t* source_ptr) {
#if CONCORDIA_CUDA
  if constexpr (kBytes == 16) copy_wide(target_ptr, source_ptr);
  else if constexpr (kBytes == 8) *(uint64_t*)target_ptr = *(const uint64_t*)source_ptr;
  else if constexpr (kBytes == 4) *(uint32_t*)target_ptr = *(const uint32_t*)source_ptr;
  else if constexpr (kBytes == 2) *(uint16_t*)target_ptr = *(const uint16_t*)source_ptr;
  else for (uint64_t i = 0; i < kBytes; ++i) target_ptr[i] = source_ptr[i];
#else
  memcpy(target_ptr, source_ptr, kBytes);
#endif
}

// What a KV task names, after it was checked.
struct Range {
  const uint32_t* ids;
  uint64_t id_count;
  uint64_t start;   // token_start within its block
  uint64_t tokens;
  uint64_t bytes;  // of the payload
  bool is_raw;
};

FUNCTION Range range_of(const Call* call) {
  const Task* task = &call->task;
  Range range;
  range.ids =
      kDeviceShape ? call->ids : reinterpret_cast<const uint32_t*>(call->arena + task->blocks);
  range.id_count = task->block_count;
  range.start = task->token_start % kBlockTokens;
  range.tokens = (uint64_t)task->token_end - task->token_start;
  range.is_raw = task->record_kind == kKindKvBlock;
  range.bytes =
      range.is_raw ? range.id_count * kLayers * kBlockBytes : kLayers * range.tokens * kTokenBytes;
  return range;
}

// Leading team: refuses the task unless its range can be touched. In device shape the ids are
// copied beside the executor, because every lane reads them again and again. The others look at
// call->status after the next grid_sync.
FUNCTION void check_range(Call* call, uint64_t lane) {
  if (!is_leading_team(lane)) return;
  const Task* task = &call->task;
  const bool is_named = call->region != nullptr && call->region->base_count == kLayers &&
                        task->token_start < task->token_end &&
                        (task->record_kind == kKindKvTail || task->record_kind == kKindKvBlock) &&
                        task->block_count == (task->token_end - 1) / kBlockTokens -
                                                 task->token_start / kBlockTokens + 1 &&
                        task->block_count <= call->id_capacity && task->blocks % 4 == 0 &&
                        task->blocks <= call->arena_bytes &&
                        task->block_count * 4ull <= call->arena_bytes - task->blocks;
  bool is_bad = !is_named;
  if (is_named) {
    const bool are_near = task->block_count <= call->near_id_count;
    const uint32_t* ids =
        are_near ? call->near_ids : reinterpret_cast<const uint32_t*>(call->arena + task->blocks);
    const uint64_t block_count = call->region->block_count;
    for (uint64_t i = team_lane(); i < task->block_count; i += kTeamLanes) {
      const uint32_t id = ids[i];
      if (id >= block_count) is_bad = true;
      if constexpr (kDeviceShape) call->ids[i] = id;
    }
  }
  if (any_in_team(is_bad)) refuse(call, lane, kStatusBadTask);
}

// Whether a range's leaves find room for their digests.
FUNCTION bool has_digests(const Call* call, const Range& range) {
  return root_bytes(leaf_count(range.bytes)) <= call->digest_bytes;
}

FUNCTION uint8_t* block_address(const Call* call, uint64_t layer, uint64_t block) {
  return reinterpret_cast<uint8_t*>(reinterpret_cast<const uint64_t*>(call->region->bases)[layer]) +
         block * kBlockStride;
}

template <bool kGather, uint64_t kBytes>
FUNCTION void move_unit(uint8_t* region_ptr, uint8_t* payload_ptr) {
  if constexpr (kGather) copy_unit<kBytes>(payload_ptr, region_ptr);
  else copy_unit<kBytes>(region_ptr, payload_ptr);
}

template <bool kGather>
FUNCTION void move_bytes(uint8_t* region_ptr, uint8_t* payload_ptr, uint64_t bytes) {
  if constexpr (kGather) copy_bytes(payload_ptr, region_ptr, bytes);
  else copy_bytes(region_ptr, payload_ptr, bytes);
}

// One head's tokens that lie in one block, from `slot` on, by one CPU lane. Rows are copied whole.
// Where elements of a token lie apart (K of vLLM's CPU backend: [element][token]), the loop runs
// along whichever side is contiguous for more than one token.
template <bool kGather, int kPlane>
FUNCTION void move_head(uint8_t* head_ptr, uint8_t* payload_ptr, uint64_t slot, uint64_t tokens) {
  constexpr PlaneShape kShape = plane_shape<kPlane>();
  constexpr uint64_t kRow = kShape.dim * kElementBytes;
  if constexpr (is_tiled(kShape)) {
    constexpr uint64_t kRun = kShape.element_stride == kElementBytes && kShape.element_tile != 0
                                  ? kShape.element_tile
                                  : 1;
    for (uint64_t t = 0; t < tokens; ++t) {
      uint8_t* token_ptr = head_ptr + token_offset(kShape, (uint32_t)(slot + t));
      for (uint64_t e = 0; e < kShape.dim; e += kRun)
        move_unit<kGather, kRun * kElementBytes>(token_ptr + element_offset(kShape, (uint32_t)e),
                                                 payload_ptr + t * kRow + e * kElementBytes);
    }
    return;
  }
  uint8_t* region_ptr = head_ptr + slot * kShape.token_stride;
  if constexpr (is_row(kShape) && kShape.token_stride == kRow) {
    move_bytes<kGather>(region_ptr, payload_ptr, tokens * kRow);
  } else if constexpr (is_row(kShape)) {
    for (uint64_t t = 0; t < tokens; ++t)
      move_bytes<kGather>(region_ptr + t * kShape.token_stride, payload_ptr + t * kRow, kRow);
  } else {
    for (uint64_t e = 0; e < kShape.dim; ++e) {
      // Every element is a line of its own, and no prefetcher sees that coming: ask for the next
      // head's while this one is read.
      if constexpr (kGather) prefetch(region_ptr + kShape.head_stride + e * kShape.element_stride);
      for (uint64_t t = 0; t < tokens; ++t)
        move_unit<kGather, kElementBytes>(
            region_ptr + e * kShape.element_stride + t * kShape.token_stride,
            payload_ptr + t * kRow + e * kElementBytes);
    }
  }
}

template <bool kGather, int kPlane>
FUNCTION void move_plane_rows(const Call* call, uint64_t lane, const Range& range,
                              uint8_t* payload_ptr) {
  constexpr PlaneShape kShape = plane_shape<kPlane>();
  constexpr uint64_t kRow = kShape.dim * kElementBytes;
  for_each_lane(call, lane, kLayers * kHeads, [=](uint64_t i) {
    const uint64_t layer = i / kHeads, head = i % kHeads;
    uint8_t* head_ptr =
        payload_ptr + layer * range.tokens * kTokenBytes + head * range.tokens * kRow;
    if constexpr (kPlane == 1) head_ptr += range.tokens * kHeads * KV_KEY_DIM * kElementBytes;
    uint64_t token = 0;
    for (uint64_t b = 0; b < range.id_count; ++b) {
      const uint64_t slot = b == 0 ? range.start : 0;
      const uint64_t tokens = smaller(kBlockTokens - slot, range.tokens - token);
      uint8_t* region_ptr =
          block_address(call, layer, range.ids[b]) + kShape.offset + head * kShape.head_stride;
      move_head<kGather, kPlane>(region_ptr, head_ptr + token * kRow, slot, tokens);
      token += tokens;
    }
  });
}

template <bool kGather>
FUNCTION void move_blocks(const Call* call, uint64_t lane, const Range& range,
                          uint8_t* payload_ptr) {
  for_each_lane(call, lane, range.id_count * kLayers, [=](uint64_t i) {
    const uint64_t layer = i % kLayers, block = i / kLayers;
    move_bytes<kGather>(block_address(call, layer, range.ids[block]), payload_ptr + i * kBlockBytes,
                        kBlockBytes);
  });
}

// All lanes of a CPU: region -> payload (gather) or payload -> region (scatter).
template <bool kGather>
FUNCTION void move_range(const Call* call, uint64_t lane, const Range& range,
                         uint8_t* payload_ptr) {
  if (range.is_raw) {
    move_blocks<kGather>(call, lane, range, payload_ptr);
  } else {
    move_plane_rows<kGather, 0>(call, lane, range, payload_ptr);
    if constexpr (KV_VALUE_DIM != 0) move_plane_rows<kGather, 1>(call, lane, range, payload_ptr);
  }
}

// The bytes of a range in a record's order, by offset: what a team streams, or scatters. An offset
// is below 4 GiB, so that every division is one of 32 bits: 64-bit division is a function call on a
// GPU.
template <bool kIsRaw>
class RegionWords {
 public:
  FUNCTION_MEMBER RegionWords(const Call* call, const Range& range)
      : bases_(reinterpret_cast<const uint64_t*>(call->region->bases)),
        ids_(range.ids),
        start_((uint32_t)range.start),
        tokens_((uint32_t)range.tokens),
        bytes_((uint32_t)range.bytes) {}

  // Rows and blocks begin and end with stretches where they are made of them; payloads of blocks
  // are linear where leaves end with blocks.
  static constexpr bool kIsLinear =
      kIsRaw && kBlockBytes % kLeafBytes == 0 && kRawBytes >= 16;
  static constexpr bool kHasStretches =
      kIsRaw ? kRawBytes >= 16 && kBlockBytes % kStretchBytes == 0
             : is_row(kPlanes[0]) && kChunkBytes >= 16 &&
                   KV_KEY_DIM * kElementBytes % kStretchBytes == 0 &&
                   (KV_VALUE_DIM == 0 ||
                    (is_row(kPlanes[1]) && KV_VALUE_DIM * kElementBytes % kStretchBytes == 0));

  FUNCTION_MEMBER const uint8_t* address(uint64_t offset) const {
    return unit_address((uint32_t)offset);
  }
  FUNCTION_MEMBER uint64_t operator()(uint64_t offset) const { return gather((uint32_t)offset); }
  FUNCTION_MEMBER void scatter(uint64_t offset, uint64_t word) const {
    put((uint32_t)offset, word);
  }

 private:
  // The widest piece that never crosses a row or a block, at most a word.
  static constexpr uint32_t kRawUnit = kRawBytes < 8 ? kRawBytes : 8;
  static constexpr bool kAreRows = is_row(kPlanes[0]) && (KV_VALUE_DIM == 0 || is_row(kPlanes[1]));
  static constexpr uint32_t kTailUnit = !kAreRows         ? kElementBytes
                                        : kChunkBytes < 8 ? kChunkBytes
                                                          : 8;
  static constexpr uint32_t kUnit = kIsRaw ? kRawUnit : kTailUnit;
  static constexpr uint32_t kKeyRow = KV_KEY_DIM * kElementBytes,
                            kValueRow = KV_VALUE_DIM == 0 ? 1 : KV_VALUE_DIM * kElementBytes;

  FUNCTION_MEMBER uint8_t* raw_address(uint32_t offset) const {
    const uint32_t piece = offset / (uint32_t)kBlockBytes, layer = piece % (uint32_t)kLayers;
    return block_at(layer, ids_[piece / (uint32_t)kLayers]) + offset % (uint32_t)kBlockBytes;
  }
  // Rows are numbered ((layer * planes + plane) * heads + head) * tokens + token where all of them
  // are equally long.
  FUNCTION_MEMBER uint8_t* tail_address(uint32_t offset) const {
    if constexpr (KV_VALUE_DIM == 0 || KV_VALUE_DIM == KV_KEY_DIM) {
      constexpr uint32_t kPlaneCount = KV_VALUE_DIM == 0 ? 1 : 2;
      const uint32_t row = offset / kKeyRow, head = head_of(row), plane = head / (uint32_t)kHeads;
      const uint32_t layer = plane / kPlaneCount, token = row - head * tokens_;
      if (kPlaneCount == 1 || plane % kPlaneCount == 0)
        return row_address<0>(layer, head % (uint32_t)kHeads, token, offset % kKeyRow);
      return row_address<1>(layer, head % (uint32_t)kHeads, token, offset % kKeyRow);
    } else {
      const uint32_t layer_bytes = tokens_ * (uint32_t)kTokenBytes,
                     key_bytes = tokens_ * (uint32_t)kHeads * kKeyRow;
      const uint32_t layer = offset / layer_bytes, rest = offset - layer * layer_bytes;
      if (rest < key_bytes) return row_in_plane<0, kKeyRow>(layer, rest);
      return row_in_plane<1, kValueRow>(layer, rest - key_bytes);
    }
  }
  template <int kPlane, uint32_t kRow>
  FUNCTION_MEMBER uint8_t* row_in_plane(uint32_t layer, uint32_t rest) const {
    const uint32_t row = rest / kRow, head = head_of(row);
    return row_address<kPlane>(layer, head, row - head * tokens_, rest % kRow);
  }
  FUNCTION_MEMBER uint32_t head_of(uint32_t row) const {
    return tokens_ == 1 ? row : row / tokens_;
  }

  template <int kPlane>
  FUNCTION_MEMBER uint8_t* row_address(uint32_t layer, uint32_t head, uint32_t token,
                                       uint32_t in_row) const {
    constexpr PlaneShape kShape = plane_shape<kPlane>();
    const uint32_t place = start_ + token, slot = place % (uint32_t)kBlockTokens;
    const uint64_t inside = is_row(kShape)
                                ? in_row
                                : element_offset(kShape, in_row / (uint32_t)kElementBytes) +
                                      in_row % (uint32_t)kElementBytes;
    return block_at(layer, ids_[place / (uint32_t)kBlockTokens]) + kShape.offset +
           head * kShape.head_stride + token_offset(kShape, slot) + inside;
  }
  FUNCTION_MEMBER uint8_t* block_at(uint32_t layer, uint32_t block) const {
    return reinterpret_cast<uint8_t*>(bases_[layer]) + block * kBlockStride;
  }

  FUNCTION_MEMBER uint8_t* unit_address(uint32_t offset) const {
    if constexpr (kIsRaw) return raw_address(offset);
    else return tail_address(offset);
  }
  FUNCTION_MEMBER uint64_t gather(uint32_t offset) const {
    uint64_t word = 0;
    for (uint32_t at = 0; at < 8; at += kUnit) {
      if (kUnit != 8 && offset + at >= bytes_) break;
      uint64_t unit = 0;
      copy_unit<kUnit>(reinterpret_cast<uint8_t*>(&unit), unit_address(offset + at));
      word |= unit << 8 * at;
    }
    return word;
  }
  FUNCTION_MEMBER void put(uint32_t offset, uint64_t word) const {
    for (uint32_t at = 0; at < 8; at += kUnit) {
      if (kUnit != 8 && offset + at >= bytes_) break;
      const uint64_t unit = word >> 8 * at;
      copy_unit<kUnit>(unit_address(offset + at), reinterpret_cast<const uint8_t*>(&unit));
    }
  }

  const uint64_t* bases_;
  const uint32_t* ids_;
  uint32_t start_, tokens_, bytes_;
};

// Whether [start, start + bytes) lies in the other stretch.
FUNCTION bool is_within(uint64_t start, uint64_t bytes, const uint8_t* outer_ptr,
                        uint64_t outer_bytes) {
  const uint64_t outer = reinterpret_cast<uint64_t>(outer_ptr);
  return start >= outer && bytes <= outer_bytes && start - outer <= outer_bytes - bytes;
}

// All lanes, device shape: region -> target, hashed on the way (stream.h).
FUNCTION void stream_range(Call* call, uint64_t lane, const Range& range, uint8_t* target_ptr) {
  if (range.is_raw)
    stream_payload(call, lane, range.bytes, target_ptr, RegionWords<true>(call, range));
  else stream_payload(call, lane, range.bytes, target_ptr, RegionWords<false>(call, range));
}

template <bool kIsRaw>
FUNCTION void scatter_words(const Call* call, uint64_t lane, const Range& range,
                            const uint8_t* payload_ptr) {
  constexpr uint64_t kAtOnce = 4;
  const RegionWords<kIsRaw> words(call, range);
  const uint64_t* payload = reinterpret_cast<const uint64_t*>(payload_ptr);
  const uint64_t count = (range.bytes + 7) / 8;
  for (uint64_t first = lane; first < count; first += kAtOnce * call->lanes) {
    uint64_t word[kAtOnce];
    for (uint64_t k = 0; k < kAtOnce; ++k)
      if (first + k * call->lanes < count) word[k] = payload[first + k * call->lanes];
    for (uint64_t k = 0; k < kAtOnce; ++k)
      if (first + k * call->lanes < count) words.scatter(8 * (first + k * call->lanes), word[k]);
  }
}

// All lanes, device shape: payload -> region, several words under way per lane.
FUNCTION void scatter_range(const Call* call, uint64_t lane, const Range& range,
                            const uint8_t* payload_ptr) {
  if (range.is_raw) scatter_words<true>(call, lane, range, payload_ptr);
  else scatter_words<false>(call, lane, range, payload_ptr);
}
