// Moving KV between an engine's paged cache and the byte order of a record.
//
// Owns: gather and scatter of token ranges and whole blocks for one geometry, given as KV_* numbers when the handler is compiled, so that
// every stride and bound but the number of tokens is a constant. Promises: KIND_KV_TAIL is layer -> K then V -> head -> token -> element;
// KIND_KV_BLOCK is block -> layer -> the block's bytes as they lie. Block ids are checked before they become addresses.
// Called by kv_append, kv_apply and kv_hash, all lanes together. Does not hash and knows no journal.
#pragma once
#include "call.h"

constexpr uint64_t kLayers = KV_LAYERS, kHeads = KV_HEADS, kElementBytes = KV_ELEMENT_BYTES;
constexpr uint64_t kBlockTokens = KV_BLOCK_TOKENS, kBlockBytes = KV_BLOCK_BYTES, kBlockStride = KV_BLOCK_STRIDE;

struct PlaneShape {
  uint64_t dim, offset, head_stride, token_stride, element_stride;
};
constexpr PlaneShape kPlanes[2] = {
    {KV_KEY_DIM, KV_KEY_OFFSET, KV_KEY_HEAD_STRIDE, KV_KEY_TOKEN_STRIDE, KV_KEY_ELEMENT_STRIDE},
    {KV_VALUE_DIM, KV_VALUE_OFFSET, KV_VALUE_HEAD_STRIDE, KV_VALUE_TOKEN_STRIDE, KV_VALUE_ELEMENT_STRIDE},
};
template <int kPlane>
CONSTANT PlaneShape plane_shape() {
  constexpr PlaneShape shape = kPlanes[kPlane];
  return shape;
}
constexpr uint64_t kTokenBytes = kHeads * (KV_KEY_DIM + KV_VALUE_DIM) * kElementBytes;  // of one layer

// The widest access that every row and stride is a multiple of; bases are multiples of 16 (checked when a region is registered).
CONSTANT uint64_t width_of(uint64_t bits) { return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1; }
CONSTANT bool is_row(const PlaneShape& shape) { return shape.element_stride == kElementBytes; }
CONSTANT uint64_t bits_of(const PlaneShape& shape) {
  return shape.dim * kElementBytes | shape.offset | shape.head_stride | (is_row(shape) ? shape.token_stride : kElementBytes);
}
constexpr uint64_t kChunkBytes = width_of(bits_of({KV_KEY_DIM, KV_KEY_OFFSET, KV_KEY_HEAD_STRIDE, KV_KEY_TOKEN_STRIDE, KV_KEY_ELEMENT_STRIDE}) |
                                          bits_of({KV_VALUE_DIM, KV_VALUE_OFFSET, KV_VALUE_HEAD_STRIDE, KV_VALUE_TOKEN_STRIDE, KV_VALUE_ELEMENT_STRIDE}) |
                                          kBlockStride);
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
  range.ids = reinterpret_cast<const uint32_t*>(call->arena + task->blocks);
  range.id_count = task->block_count;
  range.start = task->token_start % kBlockTokens;
  range.tokens = (uint64_t)task->token_end - task->token_start;
  range.is_raw = task->record_kind == kKindKvBlock;
  range.bytes = range.is_raw ? range.id_count * kLayers * kBlockBytes : kLayers * range.tokens * kTokenBytes;
  return range;
}

// All lanes: whether the task's range can be touched. Refuses the task otherwise.
FUNCTION bool check_range(Call* call, uint64_t lane) {
  const Task* task = &call->task;
  const bool is_named = call->region != nullptr && call->region->base_count == kLayers && task->token_start < task->token_end &&
                        (task->record_kind == kKindKvTail || task->record_kind == kKindKvBlock) &&
                        task->block_count == (task->token_end - 1) / kBlockTokens - task->token_start / kBlockTokens + 1 &&
                        task->blocks % 4 == 0 && task->blocks <= call->arena_bytes &&
                        task->block_count * 4ull <= call->arena_bytes - task->blocks;
  if (is_named) {
    const Range range = range_of(call);
    const uint64_t block_count = call->region->block_count;
    for_each_lane(call, lane, range.id_count, [=](uint64_t i) {
      if (range.ids[i] >= block_count) store<kRelaxed, kDevice>(&call->is_bad, 1);
    });
  }
  grid_sync(call);
  if (is_named && load<kRelaxed, kDevice>(&call->is_bad) == 0) return true;
  refuse(call, lane, kStatusBadTask);
  return false;
}

FUNCTION uint8_t* block_address(const Call* call, uint64_t layer, uint64_t block) {
  return reinterpret_cast<uint8_t*>(reinterpret_cast<const uint64_t*>(call->region->bases)[layer]) + block * kBlockStride;
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

// One head's tokens that lie in one block, by one CPU lane. Rows are copied whole. Where elements of a token lie apart (K of vLLM's CPU
// backend: [element][token]), the loop runs along whichever side is contiguous for more than one token.
template <bool kGather, int kPlane>
FUNCTION void move_head(uint8_t* region_ptr, uint8_t* payload_ptr, uint64_t tokens) {
  constexpr PlaneShape kShape = plane_shape<kPlane>();
  constexpr uint64_t kRow = kShape.dim * kElementBytes;
  if constexpr (is_row(kShape) && kShape.token_stride == kRow) {
    move_bytes<kGather>(region_ptr, payload_ptr, tokens * kRow);
  } else if constexpr (is_row(kShape)) {
    for (uint64_t t = 0; t < tokens; ++t) move_bytes<kGather>(region_ptr + t * kShape.token_stride, payload_ptr + t * kRow, kRow);
  } else {
    for (uint64_t e = 0; e < kShape.dim; ++e)
      for (uint64_t t = 0; t < tokens; ++t)
        move_unit<kGather, kElementBytes>(region_ptr + e * kShape.element_stride + t * kShape.token_stride,
                                          payload_ptr + t * kRow + e * kElementBytes);
  }
}

template <bool kGather, int kPlane>
FUNCTION void move_plane_rows(const Call* call, uint64_t lane, const Range& range, uint8_t* payload_ptr) {
  constexpr PlaneShape kShape = plane_shape<kPlane>();
  constexpr uint64_t kRow = kShape.dim * kElementBytes;
  for_each_lane(call, lane, kLayers * kHeads, [=](uint64_t i) {
    const uint64_t layer = i / kHeads, head = i % kHeads;
    uint8_t* head_ptr = payload_ptr + layer * range.tokens * kTokenBytes + head * range.tokens * kRow;
    if constexpr (kPlane == 1) head_ptr += range.tokens * kHeads * KV_KEY_DIM * kElementBytes;
    uint64_t token = 0;
    for (uint64_t b = 0; b < range.id_count; ++b) {
      const uint64_t slot = b == 0 ? range.start : 0;
      const uint64_t tokens = smaller(kBlockTokens - slot, range.tokens - token);
      uint8_t* region_ptr = block_address(call, layer, range.ids[b]) + kShape.offset + head * kShape.head_stride + slot * kShape.token_stride;
      move_head<kGather, kPlane>(region_ptr, head_ptr + token * kRow, tokens);
      token += tokens;
    }
  });
}

// One plane in units of kChunkBytes (rows) or one element, neighbours in the payload to neighbouring lanes.
template <bool kGather, int kPlane>
FUNCTION void move_plane_units(const Call* call, uint64_t lane, const Range& range, uint8_t* payload_ptr) {
  constexpr PlaneShape kShape = plane_shape<kPlane>();
  constexpr uint32_t kUnit = is_row(kShape) ? kChunkBytes : kElementBytes;
  constexpr uint32_t kRowUnits = kShape.dim * kElementBytes / kUnit;
  constexpr uint64_t kUnitStride = is_row(kShape) ? kUnit : kShape.element_stride;
  const uint32_t tokens = (uint32_t)range.tokens;
  for_each_lane(call, lane, kLayers * kHeads * range.tokens * kRowUnits, [=](uint64_t index) {
    const uint32_t i = (uint32_t)index;  // a payload is below 4 GiB, and 32-bit division is several times cheaper on a GPU
    const uint32_t unit = i % kRowUnits, row = i / kRowUnits, token = row % tokens, head = row / tokens % kHeads, layer = row / tokens / kHeads;
    const uint32_t place = (uint32_t)range.start + token, block = range.ids[place / kBlockTokens], slot = place % kBlockTokens;
    uint8_t* region_ptr = block_address(call, layer, block) + kShape.offset + head * kShape.head_stride + slot * kShape.token_stride + unit * kUnitStride;
    uint8_t* unit_ptr = payload_ptr + layer * range.tokens * kTokenBytes + ((uint64_t)(head * tokens + token) * kRowUnits + unit) * kUnit;
    if constexpr (kPlane == 1) unit_ptr += range.tokens * kHeads * KV_KEY_DIM * kElementBytes;
    move_unit<kGather, kUnit>(region_ptr, unit_ptr);
  });
}

template <bool kGather>
FUNCTION void move_blocks(const Call* call, uint64_t lane, const Range& range, uint8_t* payload_ptr) {
  constexpr uint64_t kUnits = kDeviceShape ? kBlockBytes / kRawBytes : 1;
  for_each_lane(call, lane, range.id_count * kLayers * kUnits, [=](uint64_t i) {
    const uint64_t unit = i % kUnits, layer = i / kUnits % kLayers, block = i / kUnits / kLayers;
    uint8_t* region_ptr = block_address(call, layer, range.ids[block]);
    uint8_t* unit_ptr = payload_ptr + (block * kLayers + layer) * kBlockBytes;
    if constexpr (kDeviceShape) move_unit<kGather, kRawBytes>(region_ptr + unit * kRawBytes, unit_ptr + unit * kRawBytes);
    else move_bytes<kGather>(region_ptr, unit_ptr, kBlockBytes);
  });
}

// All lanes: region -> payload (gather) or payload -> region (scatter).
template <bool kGather>
FUNCTION void move_range(const Call* call, uint64_t lane, const Range& range, uint8_t* payload_ptr) {
  if (range.is_raw) {
    move_blocks<kGather>(call, lane, range, payload_ptr);
  } else if constexpr (kDeviceShape) {
    move_plane_units<kGather, 0>(call, lane, range, payload_ptr);
    if constexpr (KV_VALUE_DIM != 0) move_plane_units<kGather, 1>(call, lane, range, payload_ptr);
  } else {
    move_plane_rows<kGather, 0>(call, lane, range, payload_ptr);
    if constexpr (KV_VALUE_DIM != 0) move_plane_rows<kGather, 1>(call, lane, range, payload_ptr);
  }
}
