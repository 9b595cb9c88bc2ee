// What the files that protect a program know of each other.
//
// Owns: the internal interface of policy, allocations, regions, marks, reads and points. Promises:
// without a folder in CONCORDIA_PROTECT all of it does nothing but pass calls on; what goes wrong
// ends the protection, with one line on stderr, and never the program, except where a resumed
// program could only go on with wrong bytes: then it ends before it does. One lock guards all
// tables; it is held for memory accesses only, never while the driver is called. (Of
// locks of single files shim.h says where they are.)
#pragma once
#include <stdatomic.h>

#include "shim.h"

enum {
  MARK_SHIFT = 16,
  MARK_BYTES = 1 << MARK_SHIFT,  // of a page that is marked
  RULES_MAX = 64,
  TRIGGERS_MAX = 16,
  TRUSTED_MAX = 64,
  REGIONS_MAX = 1024,
  ALLOCATIONS_MAX = 1 << 16,
  NAME_MAX_BYTES = 64,
  PATTERN_BYTES = 160,
};

enum protect_mode {
  PROTECT_OFF,      // nothing is protected, or no longer
  PROTECT_RECORD,   // the program runs, and is saved
  PROTECT_WARM,     // a resumed program before it has passed its first points: it runs
  PROTECT_FORWARD,  // and behind them: kernels are left out, what was read is read again
};
extern _Atomic int protect_mode;

#define IS_PROTECTED() \
  (__builtin_expect(atomic_load_explicit(&protect_mode, memory_order_relaxed) != PROTECT_OFF, 0))
#define IS_FORWARD() \
  (__builtin_expect(                                                                  \
      atomic_load_explicit(&protect_mode, memory_order_relaxed) == PROTECT_FORWARD, 0))

void protect_lock(void);
void protect_unlock(void);
// Protection ends here; a program that is being resumed cannot go on, and ends.
void protect_lose(const char *format, ...) __attribute__((format(printf, 1, 2)));

// --- policy.c
struct rule {
  char name[NAME_MAX_BYTES], stack[PATTERN_BYTES], kernel[PATTERN_BYTES];
  uint64_t size_min, size_max, bytes;
  int64_t ordinal;
  int argument;
};
enum trigger_on { ON_GRAPH, ON_KERNEL, ON_SYNCHRONIZE };
struct trigger {
  enum trigger_on on;
  char kernel[PATTERN_BYTES];
  uint64_t every, interval_us;
};
struct policy {
  uint64_t warm, audit, stage_bytes, reads_bytes;
  int rule_count, trigger_count, trusted_count, maps_count, keeps_addresses;
  struct rule rules[RULES_MAX];
  struct trigger triggers[TRIGGERS_MAX];
  char trusted[TRUSTED_MAX][PATTERN_BYTES], maps[TRUSTED_MAX][PATTERN_BYTES];
};
extern struct policy policy;  // filled before any hook is called
extern char protect_folder[3072];

// --- board.c: what the shim and the agent see both
enum { BOARD_VERSION = 1, BOARD_REGIONS_AT = 4096, BOARD_MARKS_AT = 4096 + 128 * REGIONS_MAX };
struct board_region {
  char name[NAME_MAX_BYTES];
  uint64_t bytes, stage_offset, pages, pages_marked, posts, address, reserved[2];
};
struct board {
  uint64_t magic;
  uint32_t version;
  _Atomic uint32_t owner;  // pid of the process that is protected
  _Atomic uint64_t posted, taken, lost;
  _Atomic uint64_t word;  // written in stream order
  uint64_t ordinal, reads_bytes, digest, generation, region_count, is_audited;
  _Atomic uint64_t points, fired, coalesced, swallowed, answered, missed_pages, audits, unjoined;
  uint64_t reserved[12];
  char reason[256];
};
extern struct board *board;
extern uint8_t *stage;  // of the host: policy.stage_bytes
int board_claim(void);  // whether this process is the one that is protected
CUdeviceptr board_word(void);
int stage_reserve(uint64_t offset, uint64_t bytes);

// --- kernels.c
enum { KERNEL_START_BYTES = 64 };
struct kernel {
  void *function;
  _Atomic uint64_t unloads;  // of code, when this was learnt
  const char *name;  // of the driver, while its module is loaded
  size_t length;
  char start[KERNEL_START_BYTES];  // of the name; without an end where it is longer
  uint64_t hash;
  uint32_t triggers, is_trusted;
  int has_plain_maps;  // by policy: of its tensor maps each is as the driver made it
  _Atomic uint64_t *unseen;  // by reason; see unseen.c
  struct kernel *before;  // what the handle meant until code was unloaded, with its counts
  uint64_t rules;
  int is_marking;  // all of its stores mark their pages, but for those through tensor maps
  int has_maps;    // it is known to write through these, too
  int count;  // of parameters; -1: not known
  struct {
    uint32_t offset, bytes;
  } *parameters;
};
const struct kernel *kernel_of(void *function);
void kernels_unloaded(void);  // before the driver does it: handles may mean other code from here on
void kernels_each(void (*see)(const struct kernel *, void *), void *context);

// --- unseen.c: why a launch marks more than it writes
enum unseen {
  UNSEEN_NOTHING,
  UNSEEN_UNTRUSTED,
  UNSEEN_PARAMETERS,
  UNSEEN_MAP,
  UNSEEN_NO_MAP,
  UNSEEN_LOST_MAP,
  UNSEEN_POINTER,
  UNSEEN_REASONS,
};
void unseen_count(const struct kernel *kernel, enum unseen reason);

// --- tensor_maps.c; with the lock
enum { TENSOR_MAP_BYTES = 128 };
// What a map without a known end may reach from its address on.
#define TENSOR_MAP_OPEN(address) (UINT64_MAX - (address))
// Whether these bytes are a map that the driver made, and then the range of what it leads to.
int tensor_map_of(const uint8_t *bytes, uint64_t *address, uint64_t *size);
uint64_t tensor_maps_lost(void);

// --- arguments.c
// Called with each word of a launch's arguments that may be an address, and its offset among them.
typedef void (*see_word)(uint64_t word, uint64_t at, void *context);
struct seer {
  see_word word;
  void (*range)(uint64_t address, uint64_t bytes, void *context);  // of a tensor map
  void *context;
};
// With the lock. All that these arguments lead to; else why there may be more.
enum unseen arguments_reach(const struct kernel *kernel, void **parameters, void **extra,
                            const struct seer *seer);
// The words of arguments of some words at most, as far as they are known.
void arguments_small_words(const struct kernel *kernel, void **parameters, void **extra,
                           see_word see, void *context);
int arguments_word(const struct kernel *kernel, void **parameters, void **extra, int index,
                   uint64_t *word);

// --- allocations.c
struct allocation {
  uint64_t address, bytes;
  const char *call;  // of the program's, that made it
};
int allocation_of(uint64_t address, struct allocation *found);  // with the lock
// Likewise, and with what is mapped right beside it: where a pointer into it may lead.
int allocation_reach(uint64_t address, struct allocation *found);
int is_device_memory(uint64_t address);                          // without

// --- mapped.c; with the lock
void mapped_came(uint64_t address, uint64_t bytes);
void mapped_goes(uint64_t address, uint64_t bytes);
void mapped_around(uint64_t address, struct allocation *found);  // widens it, if it is of any

// --- stack.c
int stack_matches(const char *pattern);

// --- regions.c; all with the lock unless it says otherwise
struct region {
  char name[NAME_MAX_BYTES];
  const char *call;  // that allocated it
  uint64_t address, bytes, pages, stage_offset;
  CUdeviceptr copy;  // on the device, as it was at the last point
  uint8_t *marks;    // by page, of what the host saw being written
  uint8_t *taken;    // and what of them belongs to the point at hand
  int is_whole, is_fresh, is_outside;
  uint64_t pages_marked, posts;
};
extern struct region *regions[REGIONS_MAX];
extern int region_count;
extern uint64_t regions_generation;
extern uint64_t window_base;  // kernels mark what lies in [window_base, + CONTROL_WINDOW_BYTES)
extern CUdeviceptr window_map;  // its first copy
void regions_add(const char *name, const struct allocation *at);  // without the lock
void regions_freed(uint64_t address, uint64_t bytes);                  // without the lock
int regions_drop_copies(void);  // without the lock; whether there is more memory now
void regions_sweep(void);  // without the lock, while no copy is in use: frees those of the gone
// Which region an address lies in, and where, for a digest that knows whose word it is; 0: in none.
uint64_t regions_place(uint64_t word, uint64_t at);
CUcontext regions_context(void);

// --- region_rules.c; without the lock
void rules_allocated(const struct allocation *made);
void rules_launched(const struct kernel *, const struct launch *);

// --- marks.c; without the lock
void marks_wrote(uint64_t address, uint64_t bytes, CUstream stream, int is_per_thread);
void marks_all(CUstream stream, int is_per_thread);
void marks_range(uint64_t address, uint64_t bytes);  // with the lock
int is_capturing(CUstream stream, int is_per_thread);

// --- graphs.c
int graph_marks(void *graph, uint64_t *hash);  // of a launch; 0: it is not known

// --- inside.c: calls that give work; between close and open there is none
int inside_enter(void);  // 1
void inside_leave(void);
int inside_close(void);  // 0: somebody is inside, and stays; then it is open
void inside_open(void);

// --- streams.c
void streams_seen(CUstream stream, int is_per_thread);
int streams_join(CUstream stream, int is_per_thread);    // all work since the last one comes first
int streams_release(CUstream stream, int is_per_thread);  // and what comes next comes after
int streams_before(CUstream stream, int is_per_thread);   // enters; what is given now comes after
void streams_after(const int *is_inside);                 // leaves, if it did
// At the start of a hook of a call that gives work, to its end: between the driver and the marks
// no point comes.
#define ENTERS(stream, per_thread)                            \
  __attribute__((cleanup(streams_after))) const int is_inside = \
      IS_PROTECTED() && streams_before(stream, per_thread)
// The same for one that gives no work, and must not be in the middle of a point.
#define ENTERS_ONLY() \
  __attribute__((cleanup(streams_after))) const int is_inside = IS_PROTECTED() && inside_enter()

// --- reads.c
enum { ENTRY_READ = 1, ENTRY_POINT = 2 };
int reads_open(void);      // with forward_open() before
int reads_register(void);  // for the device
int reads_answer(void *target, uint64_t bytes);  // whether it was: no longer behind FORWARD
CUresult reads_settled(CUstream stream, int is_per_thread);  // its work is done, else all ends
void reads_took(const void *target, uint64_t bytes);
int reads_point(uint64_t ordinal, uint64_t digest, uint64_t *end);  // with the lock
int reads_are_done(uint64_t end);
void reads_async(void *target, CUdeviceptr source, uint64_t bytes, CUstream stream,
                 int is_per_thread);

// --- points.c
void points_launched(const struct launch *launch, const struct kernel *kernel, uint64_t graph_hash);
void points_synchronized(CUstream stream, int is_per_thread);
uint64_t points_digest(void);

// --- saver.c
void saver_fire(CUstream stream, int is_per_thread, uint64_t ordinal, uint64_t digest,
                uint64_t reads_end);
int saver_take(int bound_ms);  // while it is taken no point is, and no copy is in use; 0: not had
void saver_give(void);
// What all points need, with the first region: so that what a program allocates comes in the same
// order behind it, resumed or not.
void saver_prepare(void);
// While it is taken, and protection has ended: the copy of the marks, for its caller to free, or 0.
CUdeviceptr saver_drop_copy(void);
int saver_is_copying(void);  // of what was a region when this is asked; or a moment longer
void saver_sweep(void);  // frees what was of regions that are gone, if it can be taken at once
void saver_forget(struct region *region);  // frees it once nobody uses it

// --- forward.c
extern uint64_t forward_target;  // ordinal of the point at which a resumed program goes on; 0: none
int forward_open(void);
extern uint64_t forward_reads_end;  // and that of what it had read until then
void forward_restore(void);

// --- park.c: around calls that wait for the whole GPU
void park_begin(void);
void park_end(void);
void park_forget_launches(void);

// --- window.c: what kernels mark
int window_open(uint64_t base, uint64_t bytes, CUdeviceptr map, CUstream stream);

// The plain call or that of a thread's own stream.
#define STREAM_CALL(per_thread, name, ...) \
  ((per_thread) ? REAL(name##_ptsz, __VA_ARGS__) : REAL(name, __VA_ARGS__))
