// How a record gets into the journal: reserve, payload, commit.
//
// Owns: the chain of a stream's records. Promises: sequences have no gap; a record is either wholly
// committed or not there (its commit word, last and released after everything, carries salt and
// sequence); a writer without a segment drops the record, counts it and goes on. Called by
// handlers, all lanes together. Never waits. Where records lie says segments.h.
//
// record:   RecordHeader 256 | payload, zero-padded to 128 | commit word 8, line filled up to 128
#pragma once
#include "segments.h"

// Tests make the executor leave, or lose its core, between any two of its steps; a release kernel
// has no such thing.
#ifndef CONCORDIA_STEP
#define CONCORDIA_STEP(place) false
#endif

struct RecordNames {
  uint64_t kind;
  uint64_t token_start;
  uint64_t token_end;
};

constexpr uint64_t kPreviousWord = 3;  // of a header, where the hash of the one before it lies
#if !defined(__CUDACC_RTC__)
static_assert(__builtin_offsetof(RecordHeader, previous_hash) == 8 * kPreviousWord, "the chain");
static_assert(__builtin_offsetof(RecordHeader, header_crc) == 252 &&
                  __builtin_offsetof(SegmentHeader, header_crc) == 252,
              "both are finished alike");
#endif

// What a record is of.
struct Entry {
  const Task* task;
  RecordNames names;
};

// One lane: a header but for its CRC and the hash of the one before it. What it is made of is read
// first: on a GPU a load after a store waits for it, since both might be of the same word.
FUNCTION void fill_header(RecordHeader* header, const Call* call, const Entry& entry,
                          const uint64_t* hash_ptr, uint64_t payload_bytes, uint64_t sequence) {
  const Task* task = entry.task;
  const uint64_t salt = call->journal->salt;
  const uint64_t key[2] = {task->key[0], task->key[1]}, incarnation = task->incarnation;
  const uint32_t region = task->region, flags = task->flags;
  const uint64_t hash[2] = {hash_ptr[0], hash_ptr[1]};
  const uint64_t handler_hash = call->op->handler_hash, step = task->step, stamp = task->stamp_ns;
  const uint64_t layout_hash =
      call->region != nullptr ? call->region->layout_hash : call->journal->layout_hash;
  const uint64_t model_hash = task->model_hash;
  header->magic = kRecordMagic;
  header->version = kAbiVersion;
  header->kind = (uint16_t)entry.names.kind;
  header->salt = salt;
  header->sequence = sequence;
  header->key[0] = key[0];
  header->key[1] = key[1];
  header->incarnation = incarnation;
  header->region = region;
  header->flags = flags;
  header->token_start = (uint32_t)entry.names.token_start;
  header->token_end = (uint32_t)entry.names.token_end;
  header->payload_bytes = payload_bytes;
  header->payload_hash[0] = hash[0];
  header->payload_hash[1] = hash[1];
  header->handler_hash = handler_hash;
  header->layout_hash = layout_hash;
  header->step = step;
  header->stamp_ns = stamp;
  header->origin = 0;
  header->model_hash = model_hash;
  header->header_crc = 0;
  // A segment's header, which is made in the same place, may have left words behind.
  for (uint64_t i = 0; i < sizeof(header->reserved); i += 4)
    *reinterpret_cast<uint32_t*>(header->reserved + i) = 0;
}

// The writer's counters on its control page; after a settle(), so that a reader who sees a count
// finds its records.
FUNCTION void count_records(const Journal* journal) {
  StreamControl* control = journal->control;
  // Who never took a segment is not the stream's writer: an executor that restores from its pool.
  if (control == nullptr || journal->taken == 0) return;
  store_settled(&control->segment_offset, journal->offset);
  store_settled(&control->committed_bytes, journal->committed_bytes);
  store_settled(&control->committed_count, journal->sequence);
}

// Leader, after a settle(): the answers of the tasks before, and their slots back. Nothing when
// none waits.
FUNCTION void flush_answer(Call* call) {
  if (call->answer_count == 0) return;
  count_records(call->journal);
  for (uint64_t i = 0; i < call->answer_count; ++i) {
    const uint64_t position = call->answer_first + i;
    Completion* completion =
        reinterpret_cast<Completion*>(call->completions) + (position & call->completion_mask);
    // pairs with the acquire in read_completion()
    store_settled(&completion->publish, position + 1);
  }
  (void)CONCORDIA_STEP(3);
  store_settled(call->head_word, call->head_value);  // pairs with the acquire in claim()
  call->answer_count = 0;
}

// Leader: the same with a fence of its own.
FUNCTION void settle_answer(Call* call) {
  if (call->answer_count == 0) return;
  settle();
  flush_answer(call);
}

// Leading team: `count` filled headers go before payloads of one size, the first of which is at
// `place`. `previous` is the hash of the header before them, in every lane, and becomes the last
// one's.
FUNCTION void put_headers(RecordHeader* headers, uint64_t count, uint64_t payload_bytes,
                          uint8_t* place, uint64_t previous[2]) {
  uint8_t* target_ptr = place - sizeof(RecordHeader);
  const uint64_t bytes = record_bytes(payload_bytes);
#if CONCORDIA_CUDA
  const uint64_t lane = team_lane();
  const uint64_t* words = reinterpret_cast<const uint64_t*>(headers) + lane;
  uint64_t ahead = *words;
#pragma unroll 1
  for (uint64_t i = 0; i < count; ++i, target_ptr += bytes) {
    uint64_t word = ahead;
    // asked for before the chain needs it
    if (i + 1 < count) ahead = words[(i + 1) * sizeof(RecordHeader) / 8];
    if (lane == kPreviousWord) word = previous[0];
    if (lane == kPreviousWord + 1) word = previous[1];
    reinterpret_cast<uint64_t*>(target_ptr)[lane] = finish_header(word, previous);
  }
#else
  for (uint64_t i = 0; i < count; ++i, target_ptr += bytes) {
    if (!kDeviceShape)
      zero_bytes(target_ptr + sizeof(RecordHeader) + payload_bytes,
                 align_up(payload_bytes, kLineBytes) - payload_bytes);
    headers[i].previous_hash[0] = previous[0];
    headers[i].previous_hash[1] = previous[1];
    seal_header(headers + i, target_ptr, previous);
  }
#endif
}

// Leader: headers and payloads of `count` records of one size are there, the first payload at
// `place`; the words that make them count. `last` is the hash of the last header.
FUNCTION void put_commits(Call* call, uint64_t payload_bytes, uint64_t count, uint8_t* place,
                          const uint64_t last[2]) {
  Journal* journal = call->journal;
  const uint64_t bytes = record_bytes(payload_bytes);
  uint8_t* word_ptr = place + align_up(payload_bytes, kLineBytes);
  // headers and payloads; with them the answer of the task before, which waited for this fence
  settle();
  flush_answer(call);
  // In their order. Should one be seen before the one ahead of it, a reader stops there all the
  // same: neither was acknowledged.
  for (uint64_t i = 0; i < count; ++i)
    // Pairs with the acquire of whoever validates the record, here or in another process.
    store_settled(reinterpret_cast<uint64_t*>(word_ptr + i * bytes),
                  journal->salt ^ ((journal->sequence + i + 1) * kCommitMultiplier));
  journal->offset += count * bytes;
  journal->committed_bytes += count * bytes;
  // the count on the control page follows when the task is answered, after a fence
  journal->sequence += count;
  journal->previous_hash[0] = last[0];
  journal->previous_hash[1] = last[1];
  call->sequence = journal->sequence - 1;
}

// Records whose payloads are on their way and whose headers are made in the stage: all they lack is
// their chain and the words that make them count. Each lane of the leading team has its own copy.
struct Ready {
  uint8_t* place;  // of the first payload
  uint64_t count;
};

// Leading team: what is ready counts, and nothing is any more. All lanes have met since it was.
FUNCTION void put_ready(Call* call, uint64_t lane, uint64_t payload_bytes, Ready* ready) {
  if (ready->count == 0) return;
  const Journal* journal = call->journal;
  uint64_t hash[2] = {journal->previous_hash[0], journal->previous_hash[1]};
  put_headers(reinterpret_cast<RecordHeader*>(call->stage), ready->count, payload_bytes,
              ready->place, hash);
  team_sync();  // every lane's share of the headers is released to the leader
  if (lane == 0) put_commits(call, payload_bytes, ready->count, ready->place, hash);
  team_sync();  // the journal's new end is there for all of the team
  ready->count = 0;
}

// All lanes: places in the pool for the payloads of the next records, at most `most` of this size,
// one behind the other from call->place on; how many, or 0 with the reason in call->status. They
// are ours until the next reserve; without a commit they are simply used again. They come behind
// records that are ready, of the same size, which are put first where the segment ends before.
FUNCTION uint64_t reserve_behind(Call* call, uint64_t lane, uint64_t payload_bytes, uint64_t most,
                                 Ready* ready) {
  if (is_leading_team(lane)) {
    Journal* journal = call->journal;
    team_sync();  // what the leader wrote last is there for its team
    const uint64_t bytes = record_bytes(payload_bytes);
    if (journal->offset + (ready->count + 1) * bytes > journal->segment_bytes)
      put_ready(call, lane, payload_bytes, ready);
    const uint64_t ahead = ready->count * bytes;
    uint64_t status = call->status;
    if (status == kStatusOk) status = find_room(call, lane, journal, payload_bytes, ahead);
    team_sync();  // every lane has read the status that the leader's refusal below may change
    if (lane == 0) {
      call->place = nullptr;
      call->place_count = 0;
      if (status == kStatusOk) {
        const uint64_t start = journal->offset + ahead, room = journal->segment_bytes - start;
        call->place = journal->pool + journal->segment_start + start + sizeof(RecordHeader);
        // one fits; a division is slow, and mostly no more are wanted
        call->place_count = most == 1 ? 1 : smaller(most, room / bytes);
      }
      refuse(call, lane, status);
    }
  }
  grid_sync(call);
  return call->place_count;
}

// All lanes: the same where nothing is ready.
FUNCTION uint64_t reserve_records(Call* call, uint64_t lane, uint64_t payload_bytes,
                                  uint64_t most) {
  Ready none = {};
  return reserve_behind(call, lane, payload_bytes, most, &none);
}

// All lanes: a place for one payload, or null.
FUNCTION uint8_t* reserve_record(Call* call, uint64_t lane, uint64_t payload_bytes) {
  (void)reserve_records(call, lane, payload_bytes, 1);
  return call->place;
}

// Leading team: payload and its hash are there; the header, then the word that makes the record
// count.
FUNCTION void publish_record(Call* call, uint64_t lane, const RecordNames& names,
                             uint64_t payload_bytes) {
  const Journal* journal = call->journal;
  uint64_t hash[2] = {journal->previous_hash[0], journal->previous_hash[1]};
  if (lane == 0)
    fill_header(&call->header, call, {&call->task, names}, call->payload_hash, payload_bytes,
                journal->sequence);
  team_sync();
  put_headers(&call->header, 1, payload_bytes, call->place, hash);
  team_sync();  // every lane's share of the header is released to the leader
  if (lane == 0) put_commits(call, payload_bytes, 1, call->place, hash);
}

// All lanes: commits the payload that lies at call->place, whose hash is in call->payload_hash. The
// next reserve, or the end of the handler, is where all lanes meet again.
FUNCTION void commit_record(Call* call, uint64_t lane, const RecordNames& names,
                            uint64_t payload_bytes) {
  grid_sync(call);  // every lane's payload is released to the leader
  if (is_leading_team(lane)) publish_record(call, lane, names, payload_bytes);
}

// Leading team, after a grid_sync: the same for a payload whose leaves' digests are in
// call->digests.
FUNCTION void commit_digests(Call* call, uint64_t lane, const RecordNames& names,
                             uint64_t payload_bytes) {
  hash_root(call->digests, leaf_count(payload_bytes), call->payload_hash);
  team_sync();
  publish_record(call, lane, names, payload_bytes);
}

// All lanes, device shape: commits the payload that was streamed to call->place.
FUNCTION void commit_streamed(Call* call, uint64_t lane, const RecordNames& names,
                              uint64_t payload_bytes) {
  grid_sync(call);  // payload and digests of every team are released to the leading one
  if (is_leading_team(lane)) commit_digests(call, lane, names, payload_bytes);
}

// All lanes, device shape: makes the `count` payloads that were streamed from call->place on ready.
// The digests of payload i start at i * root_bytes(its leaves); entry(i) says what its record is
// of. Each header is made by a team, beside the others, where staged bytes would lie; only their
// chain is one's work. What was ready before is put by then.
template <class EntryOf>
FUNCTION Ready make_ready(Call* call, uint64_t lane, uint64_t payload_bytes, uint64_t count,
                          EntryOf entry) {
  const Journal* journal = call->journal;
  const uint64_t leaves = leaf_count(payload_bytes), stride = root_bytes(leaves);
  uint8_t* digests = call->digests;
  RecordHeader* headers = reinterpret_cast<RecordHeader*>(call->stage);
  const Ready ready = {call->place, count};
  grid_sync(call);  // payloads and digests of every team are there
  for (uint64_t i = lane / kTeamLanes; i < count; i += call->lanes / kTeamLanes) {
    uint64_t* hash = reinterpret_cast<uint64_t*>(digests + i * stride);
    hash_root(digests + i * stride, leaves, hash);
    team_sync();
    if (team_lane() != 0) continue;
    fill_header(headers + i, call, entry(i), hash, payload_bytes, journal->sequence + i);
    if (i < kFetchedMost) {
      call->group_hash[i][0] = hash[0];
      call->group_hash[i][1] = hash[1];
    }
    if (i != count - 1) continue;
    call->payload_hash[0] = hash[0];
    call->payload_hash[1] = hash[1];
  }
  grid_sync(call);
  return ready;
}

// All lanes, device shape: commits them at once.
template <class EntryOf>
FUNCTION void commit_group(Call* call, uint64_t lane, uint64_t payload_bytes, uint64_t count,
                           EntryOf entry) {
  Ready ready = make_ready(call, lane, payload_bytes, count, entry);
  if (is_leading_team(lane)) put_ready(call, lane, payload_bytes, &ready);
}

// Records that make_ready has room for at once.
FUNCTION uint64_t group_most(const Call* call, uint64_t payload_bytes) {
  return smaller(call->digest_bytes / root_bytes(leaf_count(payload_bytes)),
                 call->stage_bytes / sizeof(RecordHeader));
}
