// Every handler with four lanes, to be built with ThreadSanitizer or AddressSanitizer: a missing barrier is a race here, a wrong index
// an access out of bounds. Checks that appended bytes come back through kv_apply, and that hashes agree; layouts are for test_handlers.py.
//
// The handlers are compiled as files of their own, with their symbols renamed to <name>_handler; KV_* and PAGE_BYTES as for them. With
// CONCORDIA_CTA they and the executor are the GPU's code, run by the lanes of cta.h, with any argument as work of a framework's stream; the
// host's part is the same.
#include "host.cpp"
#include "kv.h"

#include <stdio.h>
#include <vector>

extern "C" {
void kv_append_handler(Call*, uint64_t);
void kv_apply_handler(Call*, uint64_t);
void kv_hash_handler(Call*, uint64_t);
void bytes_append_handler(Call*, uint64_t);
void page_scan_handler(Call*, uint64_t);
}

constexpr uint64_t kBlocks = 5, kPages = 9, kSegments = 6, kSegmentBytes = 1 << 20, kStage = 1 << 20, kSlots = 64, kScanned = 4;

static void fail(const char* reason, uint64_t a, uint64_t b) {
  fprintf(stderr, "lanes: %s (%lu, %lu)\n", reason, a, b);
  _Exit(1);
}

template <class T>
static T* zeroed(uint64_t bytes) {
  void* found = aligned_alloc(128, align_up(bytes, 128));
  memset(found, 0, align_up(bytes, 128));
  return static_cast<T*>(found);
}

static RingHeader* ring;
static Host* host;

#ifdef CONCORDIA_CTA
extern "C" {
bool run_cta(void (*kernel)(void*), void* arguments);
void concordia_executor(Executor* executor, uint64_t launch, uint64_t* turn);
void concordia_stream_tasks(Executor* tasks, Executor* executor, uint64_t* bell, uint64_t* turn);
void concordia_kv_restore(const Region* region, const Task* tasks, uint64_t count, uint64_t* answers, const uint8_t* arena, uint64_t arena_bytes,
                          const uint8_t* pool_ptr, uint64_t pool_bytes, uint8_t* scratch_ptr, uint64_t digest_bytes, uint64_t id_capacity);
}
static Executor *executor, *journal_owner;  // the same, unless a framework's stream runs the tasks
static uint64_t bell[2], turn;

static Executor* image_of(const ExecutorPlan* plan) {
  Executor* made = zeroed<Executor>(sizeof(Executor));
  concordia_executor_image(made, plan, reinterpret_cast<uint64_t>(made));
  return made;
}
static Host* open_executor(const ExecutorPlan* plan, bool is_stream) {
  journal_owner = executor = image_of(plan);
  if (is_stream) executor = image_of(plan);
  return nullptr;
}
static bool close_executor() { return true; }
static void run_kernel(void (*kernel)(void*), void* arguments) {
  if (!run_cta(kernel, arguments)) fail("no threads", 0, 0);
}
// Sends it in as often as work waits; it leaves when it finds none.
static void send_in() {
  for (int launches = 0; concordia_needs_launch(ring) && launches < 100; ++launches) {
    store<kRelease, kSystem>(&ring->launched, ring->launched + 1);
    bell[0] = ring->launched;
    if (executor == journal_owner) run_kernel([](void*) { concordia_executor(executor, ring->launched, nullptr); }, nullptr);
    else run_kernel([](void*) { concordia_stream_tasks(executor, journal_owner, bell, &turn); }, nullptr);
  }
}

// Payloads back into the region, many at once, where no executor is; one of each kind is promised another hash.
static void restore_many(const Region* region, const ExecutorPlan* plan, const std::vector<Task>& tasks) {
  struct Arguments { const Region* region; const ExecutorPlan* plan; std::vector<Task> tasks; std::vector<uint64_t> answers; };
  Arguments all = {region, plan, tasks, std::vector<uint64_t>(2 * tasks.size(), 99)};
  for (Task task : tasks) {
    task.key[1] ^= 1;
    all.tasks.push_back(task);
  }
  run_kernel([](void* given) {
    Arguments* mine = static_cast<Arguments*>(given);
    const ExecutorPlan* of = mine->plan;
    concordia_kv_restore(mine->region, mine->tasks.data(), mine->tasks.size(), mine->answers.data(), reinterpret_cast<const uint8_t*>(ring->arena), ring->arena_bytes,
                         reinterpret_cast<const uint8_t*>(of->pool), of->pool_bytes, reinterpret_cast<uint8_t*>(of->stage), kStage / 2, kStage / 64);
  }, &all);
  for (uint64_t i = 0; i < all.tasks.size(); ++i)
    if (all.answers[i] != (i < tasks.size() ? kStatusOk : kStatusHashMismatch)) fail("restore of many", i, all.answers[i]);
}
constexpr uint64_t kLaneCount = CONCORDIA_CTA, kIdleNs = 500;  // of a slow clock
#else
static Host* open_executor(const ExecutorPlan* plan, bool) {
  Host* opened = concordia_open(plan);
  if (opened == nullptr) fail("no executor", 0, 0);
  return opened;
}
static bool close_executor() { return concordia_close(host, 60ull * 1000000000u); }
static void send_in() {}
static void restore_many(const Region*, const ExecutorPlan*, const std::vector<Task>&) {}  // a GPU's
constexpr uint64_t kLaneCount = 4, kIdleNs = 20000;
#endif

static uint64_t hand_in(Task task, const std::vector<uint32_t>& ids, const void* payload_ptr, uint64_t payload_bytes) {
  uint64_t position;
  const int said = concordia_submit(ring, host, &task, ids.data(), ids.size(), payload_ptr, payload_bytes, &position);
  if (said != kSubmitted && !(host == nullptr && said == kSubmittedNeedsLaunch)) fail("refused", task.opcode, (uint64_t)said);
  return position;
}
static Completion wait_for(uint64_t position) {
  send_in();
  Completion found;
  if (concordia_wait(ring, position, 60ull * 1000000000u, &found) != kDone) fail("never done", position, 0);
  return found;
}
static Completion run(Task task, const std::vector<uint32_t>& ids, const void* payload_ptr, uint64_t payload_bytes) {
  return wait_for(hand_in(task, ids, payload_ptr, payload_bytes));
}

// A reader beside the writer, as in another process: once the commit word is there, header and payload must be.
constexpr uint64_t kEach = 35, kRecords = 3 + 5 + 3 + kEach + 4, kSalt = 1000;
struct Expected {
  uint8_t* header;
  uint64_t payload_bytes;
};
static Expected expected[kRecords];
static uint64_t expected_count, end_of_records;

static void expect_record(const uint8_t* pool, uint64_t payload_bytes) {
  expected[expected_count] = {const_cast<uint8_t*>(pool) + end_of_records, payload_bytes};
  end_of_records += record_bytes(payload_bytes);
  __atomic_store_n(&expected_count, expected_count + 1, __ATOMIC_RELEASE);
}

static void* read_records(void*) {
  for (uint64_t i = 0; i < kRecords; ++i) {
    while (__atomic_load_n(&expected_count, __ATOMIC_ACQUIRE) <= i) sched_yield();
    uint8_t* payload = expected[i].header + sizeof(RecordHeader);
    const uint64_t* commit = reinterpret_cast<const uint64_t*>(payload + align_up(expected[i].payload_bytes, kLineBytes));
    while (load<kAcquire, kSystem>(commit) != (kSalt ^ ((i + 1) * kCommitMultiplier))) sched_yield();
    RecordHeader header;
    memcpy(&header, expected[i].header, sizeof(header));
    if (header.sequence != i || header.payload_bytes != expected[i].payload_bytes) fail("committed without its header", i, header.sequence);
    uint64_t hash[2], digests[64] = {};
    uint8_t leaf[kLeafBytes];
    for (uint64_t at = 0, n = 0; at < header.payload_bytes; at += kLeafBytes, ++n) {
      memset(leaf, 0, sizeof(leaf));
      memcpy(leaf, payload + at, smaller(kLeafBytes, header.payload_bytes - at));
      hash_long(leaf, kLeafBytes, digests + 2 * n);
    }
    hash_long(reinterpret_cast<uint8_t*>(digests), root_bytes(leaf_count(header.payload_bytes)), hash);
    if (memcmp(hash, header.payload_hash, 16) != 0) fail("committed without its payload", i, header.payload_bytes);
  }
  return nullptr;
}

int main(int count, char**) {
  ring = zeroed<RingHeader>(sizeof(RingHeader));
  ring->slot_count = kSlots;
  ring->completion_count = kSlots * 8;
  ring->slots = reinterpret_cast<uint64_t>(zeroed<Task>(kSlots * sizeof(Task)));
  ring->completions = reinterpret_cast<uint64_t>(zeroed<Completion>(kSlots * 8 * sizeof(Completion)));
  ring->arena_bytes = kSlots * 2048;
  ring->arena = reinterpret_cast<uint64_t>(zeroed<uint8_t>(ring->arena_bytes));
  ring->lease_ns = 10000000;
  ring->idle_ns = kIdleNs;
  uint64_t* table = zeroed<uint64_t>(kOperatorCapacity * 8);
  ring->operators = reinterpret_cast<uint64_t>(table);

  std::vector<uint8_t*> layers;
  for (uint64_t layer = 0; layer < kLayers; ++layer) {
    layers.push_back(zeroed<uint8_t>(kBlocks * kBlockStride));
    for (uint64_t i = 0; i < kBlocks * kBlockStride; ++i) layers[layer][i] = (uint8_t)(i * 31 + i / 251 + layer);
  }
  uint8_t* pages = zeroed<uint8_t>(kPages * PAGE_BYTES);
  Region kv = {}, opaque = {};
  kv.bases = reinterpret_cast<uint64_t>(layers.data());
  kv.base_count = kLayers;
  kv.block_count = kBlocks;
  uint64_t page_base = reinterpret_cast<uint64_t>(pages);
  opaque.bases = reinterpret_cast<uint64_t>(&page_base);
  opaque.base_count = 1;
  opaque.block_count = kPages;
  opaque.page_hashes = reinterpret_cast<uint64_t>(zeroed<uint64_t>(16 * kPages + 8 + 4 * kPages));
  const HandlerFunction handlers[] = {nullptr, kv_append_handler, kv_apply_handler, kv_hash_handler, bytes_append_handler, page_scan_handler};
  Operator operators[6] = {};
  for (uint64_t i = 1; i < 6; ++i) {
    operators[i].function = reinterpret_cast<uint64_t>(handlers[i]);
    operators[i].region = i < 4 ? reinterpret_cast<uint64_t>(&kv) : i == 5 ? reinterpret_cast<uint64_t>(&opaque) : 0;
    concordia_publish_operator(ring, i, reinterpret_cast<uint64_t>(&operators[i]), i);
  }

  StreamControl* control = zeroed<StreamControl>(sizeof(StreamControl));
  for (uint64_t i = 0; i < kSegments; ++i) {
    control->lent[2 * i] = i | i << 32;
    control->lent[2 * i + 1] = kSalt + i;
  }
  control->lent_count = kSegments;
  ExecutorPlan plan = {};
  plan.ring = reinterpret_cast<uint64_t>(ring);
  plan.pool = reinterpret_cast<uint64_t>(zeroed<uint8_t>(kSegments * kSegmentBytes));
  plan.pool_bytes = kSegments * kSegmentBytes;
  plan.segment_bytes = kSegmentBytes;
  plan.control = reinterpret_cast<uint64_t>(control);
  plan.stage = reinterpret_cast<uint64_t>(zeroed<uint8_t>(kStage));
  plan.stage_bytes = kStage;
  plan.ids = reinterpret_cast<uint64_t>(zeroed<uint8_t>(kStage / kLeafBytes * 64));
  plan.digest_bytes = kStage / kLeafBytes * 16 + kRootBytesMin + kScanned * kRootBytesMin;
  plan.digests = reinterpret_cast<uint64_t>(zeroed<uint8_t>(plan.digest_bytes));
  plan.lanes = kLaneCount;
  const uint8_t* pool = reinterpret_cast<const uint8_t*>(plan.pool);
  end_of_records = sizeof(SegmentHeader);
  pthread_t reader;
  pthread_create(&reader, nullptr, read_records, nullptr);
  host = open_executor(&plan, count > 1);

  struct { uint32_t kind, start, end; std::vector<uint32_t> ids; } ranges[] = {
      {kKindKvTail, 1, 2, {3}}, {kKindKvTail, kBlockTokens - 1, 2 * kBlockTokens + 1, {4, 0, 2}}, {kKindKvBlock, 0, 2 * kBlockTokens, {1, 3}},
  };
  std::vector<Task> restores;
  std::vector<std::vector<uint32_t>> restored_ids;
  for (auto& range : ranges) {
    Task task = {};
    task.kind = kTaskAppend;
    task.record_kind = range.kind;
    task.token_start = range.start;
    task.token_end = range.end;
    task.opcode = 3;
    const Completion hashed = run(task, range.ids, nullptr, 0);
    task.opcode = 1;
    const uint64_t tokens = range.end - range.start, at = end_of_records;
    const uint64_t bytes = range.kind == kKindKvTail ? kLayers * tokens * kTokenBytes : kLayers * kBlockBytes * range.ids.size();
    expect_record(pool, bytes);
    const Completion appended = run(task, range.ids, nullptr, 0);
    if (appended.status != kStatusOk || memcmp(appended.payload_hash, hashed.payload_hash, 16) != 0) fail("append", appended.status, at);
    for (uint8_t* layer : layers) memset(layer, 0, kBlocks * kBlockStride);
    task.opcode = 2;
    task.source = plan.pool + at + sizeof(RecordHeader);
    task.source_bytes = bytes;
    memcpy(task.key, appended.payload_hash, 16);
    if (run(task, range.ids, nullptr, 0).status != kStatusOk) fail("apply", range.kind, bytes);
    task.blocks = 512 * restores.size(), task.block_count = (uint32_t)range.ids.size();
    restores.push_back(task);
    restored_ids.push_back(range.ids);
    task.opcode = 3;
    if (memcmp(run(task, range.ids, nullptr, 0).payload_hash, appended.payload_hash, 16) != 0) fail("what was applied is not what was appended", bytes, 0);
    for (uint64_t layer = 0; layer < kLayers; ++layer)
      for (uint64_t i = 0; i < kBlocks * kBlockStride; ++i) layers[layer][i] = (uint8_t)(i * 31 + i / 251 + layer);
  }
  uint8_t payload[5000];
  for (uint64_t size = 0; size <= sizeof(payload); size += 1250) {
    memset(payload, (int)size, sizeof(payload));
    Task task = {};
    task.opcode = 4;
    task.kind = kTaskAppend;
    expect_record(pool, size);
    if (run(task, {}, payload, size).status != kStatusOk) fail("bytes", size, 0);
  }
  for (uint64_t round = 0; round < 3; ++round) {
    Task task = {};
    task.opcode = 5;
    task.kind = kTaskCheckpoint;
    task.token_end = kPages;
    pages[round * PAGE_BYTES] += round != 0;
    expect_record(pool, kLeafBytes + (round == 0 ? kPages : 1) * PAGE_BYTES);
    const Completion scanned = run(task, {}, nullptr, 0);
    if (scanned.status != kStatusOk || scanned.result != (round == 0 ? kPages : 1)) fail("scan", scanned.status, scanned.result);
  }
  Task each = {};  // a record for each block; groups of them are chained while the next are on their way
  each.kind = kTaskAppend, each.opcode = 1, each.record_kind = kKindKvBlock, each.token_end = kEach * kBlockTokens, each.arg = kAppendEach;
  std::vector<uint32_t> ids;
  for (uint32_t i = 0; i < kEach; ++i) ids.push_back(i * 3 % kBlocks), expect_record(pool, kLayers * kBlockBytes);
  const Completion all = run(each, ids, nullptr, 0);
  if (all.status != kStatusOk || all.result != kEach) fail("each block", all.status, all.result);
  std::vector<uint64_t> positions;  // a step's tokens, which a GPU appends together
  for (uint32_t i = 0; i < 4; ++i) {
    Task token = {};
    token.kind = kTaskAppend, token.opcode = 1, token.record_kind = kKindKvTail, token.token_start = 3 + i, token.token_end = 4 + i;
    expect_record(pool, kLayers * kTokenBytes);
    positions.push_back(hand_in(token, {i}, nullptr, 0));
  }
  for (const uint64_t position : positions)
    if (const Completion token = wait_for(position); token.status != kStatusOk || token.sequence != position - positions[0] + kRecords - 4) fail("token", token.status, token.sequence);
  Task wrong = {};  // refused by its handler, once before all lanes have looked and once after
  wrong.kind = kTaskRestore, wrong.opcode = 2, wrong.record_kind = kKindKvTail, wrong.token_start = 1, wrong.token_end = 2;
  if (run(wrong, {3}, nullptr, 0).status != kStatusBadTask || run(wrong, {kBlocks}, nullptr, 0).status != kStatusBadTask) fail("a wrong task", 0, 0);
  for (uint64_t i = 0; i < restores.size(); ++i)
    memcpy(reinterpret_cast<uint8_t*>(ring->arena) + restores[i].blocks, restored_ids[i].data(), 4 * restored_ids[i].size());
  restore_many(&kv, &plan, restores);
  pthread_join(reader, nullptr);
  if (!close_executor()) fail("the executor did not end", 0, 0);
  printf("{\"records\": %lu}\n", control->committed_count);
  return 0;  // what was allocated lives as long as the program
}
