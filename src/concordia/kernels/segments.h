// The writer's place in its stream, and the segments that it is lent.
//
// Owns: Journal, and how a segment is taken. Promises: an entry that cannot be true is not taken;
// reads of the control page are checked before they become addresses; without a segment a record is
// dropped and counted. Called by journal.h. Never waits. Knows nothing of what records hold.
//
// segment:  SegmentHeader | record | record | ... | rest too short for the next record
#pragma once
#include "stream.h"

struct Journal {
  uint8_t* pool;  // 0: no journal is attached, and every append is dropped
  uint64_t pool_bytes;
  uint64_t segment_bytes;
  StreamControl* control;
  uint64_t taken;
  uint64_t segment_start;  // in the pool
  uint64_t offset;  // first free byte of the segment; segment_bytes when there is none yet
  uint64_t salt;
  uint64_t sequence;  // of the next record
  uint64_t previous_hash[2];  // of the header before it
  uint64_t committed_bytes;
  uint64_t dropped;
  uint64_t layout_hash;  // of the stream, for records of no region
};

CONSTANT uint64_t record_bytes(uint64_t payload_bytes) {
  return sizeof(RecordHeader) + align_up(payload_bytes, kLineBytes) + kLineBytes;
}

FUNCTION void write_header(uint8_t* target_ptr, const void* header_ptr) {
  for (uint64_t i = 0; i < 256; i += 16)
    copy_wide(target_ptr + i, static_cast<const uint8_t*>(header_ptr) + i);
}

// Leading team: gives a header that is whole but for its CRC that, and puts it to its place; `hash`
// is its hash then, in every lane.
FUNCTION void seal_header(void* header_ptr, uint8_t* target_ptr, uint64_t hash[2]) {
#if CONCORDIA_CUDA
  const uint64_t word = static_cast<const uint64_t*>(header_ptr)[team_lane()];
  reinterpret_cast<uint64_t*>(target_ptr)[team_lane()] = finish_header(word, hash);
#else
  const uint8_t* bytes_ptr = static_cast<const uint8_t*>(header_ptr);
  static_cast<RecordHeader*>(header_ptr)->header_crc = header_crc(bytes_ptr);
  hash_long(bytes_ptr, sizeof(RecordHeader), hash);
  write_header(target_ptr, header_ptr);
#endif
}

// Leader: fills in the header of the next lent segment, in call->header; false when none is lent or
// the entry cannot be true.
FUNCTION bool next_segment(Call* call, Journal* journal) {
  const StreamControl* control = journal->control;
  // pairs with the owner's release after it filled the entry
  const uint64_t lent = load<kAcquire, kSystem>(&control->lent_count);
  if (journal->taken >= lent || lent - journal->taken > kLentCapacity) return false;
  const uint64_t* entry = control->lent + 2 * (journal->taken % kLentCapacity);
  // all of them in one trip over the bus
  const uint64_t segment = entry[0] & 0xffffffffu, ordinal = entry[0] >> 32, salt = entry[1];
  const uint64_t stream = control->stream, layout_hash = control->layout_hash;
  if (ordinal != (uint32_t)journal->taken) return false;  // nobody would read what is put there
  if ((segment + 1) * journal->segment_bytes > journal->pool_bytes) return false;
  static_assert(sizeof(SegmentHeader) == sizeof(RecordHeader), "both are built in call->header");
  SegmentHeader* header = reinterpret_cast<SegmentHeader*>(&call->header);
  zero_words(reinterpret_cast<uint64_t*>(header), sizeof(*header) / 8);
  header->magic = kSegmentMagic;
  header->version = kAbiVersion;
  header->segment = (uint32_t)segment;
  header->stream = stream;
  header->ordinal = ordinal;
  header->salt = salt;
  header->first_sequence = journal->sequence;
  header->predecessor_hash[0] = journal->previous_hash[0];
  header->predecessor_hash[1] = journal->previous_hash[1];
  header->segment_bytes = journal->segment_bytes;
  journal->layout_hash = layout_hash;
  return true;
}

// Leading team: takes the next lent segment and puts its header there; false as above.
FUNCTION bool take_segment(Call* call, uint64_t lane, Journal* journal) {
  if (!any_in_team(lane == 0 && next_segment(call, journal))) return false;
  team_sync();  // the header is there for all of the team
  const SegmentHeader* header = reinterpret_cast<const SegmentHeader*>(&call->header);
  const uint64_t start = header->segment * journal->segment_bytes;
  uint64_t hash[2];
  seal_header(&call->header, journal->pool + start, hash);
  team_sync();  // all of it is written, and the leader may go on
  if (lane != 0) return true;
  journal->previous_hash[0] = hash[0];
  journal->previous_hash[1] = hash[1];
  journal->segment_start = start;
  journal->offset = sizeof(SegmentHeader);
  journal->salt = header->salt;
  journal->taken += 1;
  // the owner may reuse the entry: we have read it
  store<kRelease, kSystem>(&journal->control->taken_count, journal->taken);
  return true;
}

// Leading team: room for a record in this segment, behind `ahead` bytes of others, or in the next;
// otherwise the status that refuses it.
FUNCTION uint64_t find_room(Call* call, uint64_t lane, Journal* journal, uint64_t payload_bytes,
                            uint64_t ahead) {
  if (journal->pool == nullptr) return kStatusJournalFull;
  const uint64_t bytes = record_bytes(payload_bytes);
  if (payload_bytes > journal->segment_bytes ||
      bytes > journal->segment_bytes - sizeof(SegmentHeader))
    return kStatusTooLarge;
  const bool has_room = journal->offset + ahead + bytes <= journal->segment_bytes;
  team_sync();  // every lane has looked before the leader takes a segment
  if (has_room || take_segment(call, lane, journal)) return kStatusOk;
  if (lane == 0) {
    journal->dropped += 1;
    store<kRelaxed, kSystem>(&journal->control->dropped_count, journal->dropped);
  }
  return kStatusJournalFull;
}
