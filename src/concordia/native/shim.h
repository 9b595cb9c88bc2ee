// What the files of the shim know of each other.
//
// Owns: the internal interface. Promises: nothing here is exported from the library except what
// hooks.def lists and what is marked EXPORTED. How a hook is added: a line in hooks.def, and the
// function of that name in the file that owns the matter. How a launch is watched: a line in
// observers.def, and NAME_before and NAME_after. Hooks run in any thread of a foreign program, and
// nothing here forks. No lock is held while the rewriter or the driver is called, but around calls
// that wait for no work of the GPU and below which is neither a hook nor another lock (addresses.c
// maps, gate_streams.c begins captures and records events), and where who comes for the same thing
// must wait until it is there (regions.c adds, reads.c registers, gate.c pauses).
#pragma once
#include <string.h>

#include "cuda_abi.h"

#define EXPORTED __attribute__((visibility("default")))

// --- hooks: prototypes, and the driver's own functions
#define HOOK(name, parameters) EXPORTED CUresult name parameters;
#include "hooks.def"
#undef HOOK

struct real {
#define HOOK(name, parameters) CUresult(*name) parameters;
#define CALL(name, parameters) CUresult(*name) parameters;
#include "calls.def"
#include "hooks.def"
#undef HOOK
#undef CALL
};
extern struct real real;  // filled before any hook can be called; not changed afterwards

// The driver's own function; a driver that lacks it says so as one that is too old does.
#define REAL(name, ...) (real.name ? real.name(__VA_ARGS__) : (CUresult)CUDA_ERROR_NOT_FOUND)

// --- launches
// LAUNCH_LEGACY: its arguments were given before, and nobody knows them.
enum launch_kind { LAUNCH_KERNEL, LAUNCH_COOPERATIVE, LAUNCH_GRAPH, LAUNCH_LEGACY };

struct launch {
  enum launch_kind kind;
  int is_per_thread;  // a null stream is this thread's own (the _ptsz functions)
  void *function;     // CUfunction or CUkernel; of a graph its CUgraphExec
  CUstream stream;
  unsigned int grid[3], block[3], shared_bytes;  // zero for a graph
  void **parameters, **extra;                    // as given; either may be NULL
  const CUlaunchConfig *config;                  // of cuLaunchKernelEx, else NULL
};

void launch_before(const struct launch *launch);
void launch_after(const struct launch *launch, CUresult result);
int forward_swallows(const struct launch *launch);  // forward.c: whether it is left out
void launch_counted(void);  // into the coverage

#define OBSERVER(name)                             \
  void name##_before(const struct launch *launch); \
  void name##_after(const struct launch *launch, CUresult result);
#include "observers.def"
#undef OBSERVER

// --- process.c, process_settings.c: the run that this process is of
#define PROCESS_PATH_MAX 1024  // of a folder with its NUL; config.py has it (RUN_PATH_BYTES_MAX)

int process_is_active(void);  // else every hook only forwards
int process_is_disabled(void);           // by the user
int process_settle(const char *folder);  // once; 0: not a run's, or not this user's alone
const char *process_run(void);
int process_setting(const char *name, char *value, size_t bytes);  // 0: not set, or too long
uint64_t process_number(const char *name, uint64_t otherwise);
#define PART(name) void name##_forked(void);
#include "parts.def"
#undef PART

// --- key.c, hash.c: eight bytes that may lie anywhere
static inline uint64_t word_at(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, 8);
  return value;
}

// --- key.c
void hash_image(const void *bytes, uint64_t size, uint64_t key[2]);  // XXH3, 128 bits
void hash_image_plain(const void *bytes, uint64_t size, uint64_t key[2]);  // without AVX2

// --- hash.c
uint32_t hash_crc32c(const void *bytes, uint64_t size);
uint32_t hash_crc32c_plain(const void *bytes, uint64_t size);  // without the processor's help

// --- images.c
#define IMAGE_BYTES_MAX (1ull << 30)  // as config.py has it

// IMAGE_SOURCE: PTX that goes to an assembler, which assembler/ stands before.
enum image_kind { IMAGE_OTHER, IMAGE_WRAPPED, IMAGE_FATBIN, IMAGE_CUBIN, IMAGE_PTX, IMAGE_SOURCE };

// What the runtime hands over: a pointer to a container.
struct wrapper {
  uint32_t magic, version;
  const void *data;
  void *unused;
};

struct image {
  enum image_kind kind;
  const uint8_t *bytes;  // of a wrapped one: of its container
  uint64_t size;         // 0: not known; then the image is passed through
  const struct wrapper *wrapper;  // NULL unless wrapped
};

int image_find(const void *given, struct image *image);
int image_find_in_file(const void *bytes, uint64_t size, struct image *image);
const char *image_kind_name(enum image_kind kind);

// --- library.c
int library_of(const void *address, char *path, size_t bytes);

// --- opaque.c
int opaque_library(const char *path);  // whether its images stay as they are, by policy

// --- cache_file.c
// CACHE_FOREIGN: a whole file, of another image. The last two are what the rewriter has said.
enum cache_answer { CACHE_MISSING, CACHE_DAMAGED, CACHE_FOREIGN, CACHE_UNCHANGED, CACHE_READY };

struct replacement {
  uint64_t control;  // address that the slots were filled with
  uint8_t *memory;   // all of the file
  uint64_t memory_bytes;
  uint8_t *image;
  uint64_t image_bytes;
  struct wrapper *wrapper;  // room for one that lives as long as the image
  const uint8_t *kernels;  // the file's table; checked
  uint64_t kernels_bytes;
  uint32_t kernel_count;
};

enum cache_answer cache_load(const char *folder, const uint64_t key[2], uint64_t control,
                             struct replacement *found);
void cache_release(struct replacement *found);

// --- rewriter.c
enum rewriter_answer {
  REWRITER_READY,
  REWRITER_REFUSED,
  REWRITER_LATER,
  REWRITER_TIMEOUT,
  REWRITER_GONE,
  REWRITER_SPENT,  // this process has waited as long as it may
};

enum rewriter_answer rewriter_ask(const struct image *image, const uint64_t key[2], int is_awaited);
uint64_t now_ns(void);

// --- loaded.c: what was loaded in place of an original, until it is unloaded
#define KERNEL_UNKNOWN 0xFFFFFFFFu  // of an original, or no kernel of this name

struct loaded;

void loaded_add(void *handle, const struct replacement *replacement);  // takes it over
struct loaded *loaded_take(const void *handle);  // before it is unloaded; NULL for an original
void loaded_drop(struct loaded *taken);          // after that
void loaded_keep(struct loaded *taken);          // when the driver did not unload it
uint32_t loaded_kernel_flags(const void *handle, const char *name);  // as the cache file has them

// --- control.c: the control block
uint64_t control_address(void);         // 0: there is none, and no image may be hooked
const char *control_why_not(void);      // one line
void control_make(CUcontext context, CUdevice device);

// --- coverage.c: what happened in this process, for `concordia modules`
struct coverage {
  const char *call, *library, *outcome, *why;
  const struct image *image;
  const uint64_t *key;
  uint64_t ns, own_ns;  // of the call; of it before the driver's
};

void coverage_image(const struct coverage *coverage);
void coverage_note(const char *what, const char *why);
void coverage_count(const char *name, uint64_t value);  // one line at the end of the process
void coverage_unseen(const char *kernel, const char *why, uint64_t count);
void unseen_told(void);  // unseen.c: at that end

// --- notice.c: a line on stderr, for which nobody waits; without its line break
void notice(const char *format, ...) __attribute__((format(printf, 1, 2)));

// --- gate.c, gate_streams.c, gate_page.c: launches that wait
enum { GATE_DONE, GATE_LATE, GATE_ALREADY, GATE_NOT_ACTIVE };

struct gate_report {
  uint64_t latency_ns;         // from the request to a GPU at rest
  uint32_t streams, captured;  // waited for; left out because they were being captured
  char waited_for[96];         // at the bound
};

EXPORTED int concordia_pause(uint64_t timeout_ms);  // GATE_DONE, or why not; then nothing is held
EXPORTED int concordia_resume(void);
EXPORTED int concordia_is_paused(void);
EXPORTED uint64_t concordia_held(void);  // launches that were held since the last pause began
EXPORTED void concordia_pause_report(struct gate_report *report);

void streams_note(CUstream stream, int is_per_thread);
void streams_gone(CUstream stream);            // before the driver destroys it
void streams_context_gone(CUcontext context);  // likewise
void streams_context_leaves(CUcontext context);  // before a release that may be the last
void streams_context_left(CUcontext context, int is_alive);  // and after it
int streams_drain(uint64_t deadline, struct gate_report *report);
void gate_page_watch(void);
