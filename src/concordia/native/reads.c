// What the program has learnt from its GPU.
//
// Owns: the log of every copy to the host, and of the points between them. Promises: an entry lies
// where its call came in the order of calls, and holds the bytes that the program got, whatever it
// does with its own buffer; a full log ends the protection; a resumed program that asks for
// something else than it did before ends. Called by copies.c and points.c.
//
// file:  header, 4096 bytes | entry | entry | ...      entry:  32 bytes | its bytes, padded to 32
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "protect.h"

enum { HEADER_BYTES = 4096, VERSION = 1 };
#define WAIT_WORK_NS 60000000000ull  // kernels are left out, or few: copies alone take no minute
#define LOOK_NS 20000
#define MAGIC 0x5344414552434e43ull  // "CNCREADS"

struct entry {
  uint32_t kind;
  _Atomic uint32_t done;
  uint64_t bytes, ordinal, digest;
};
_Static_assert(sizeof(struct entry) == 32, "resume.py reads it so");

extern uint64_t forward_reads_end;
static uint8_t *log_ptr;
static uint64_t log_bytes, at = HEADER_BYTES, known_done = HEADER_BYTES;
static CUdeviceptr device;  // the log's address there; 0: not registered

int reads_open(void) {
  char path[4096];
  struct stat found;
  snprintf(path, sizeof path, "%s/reads", protect_folder);
  int file = open(path, O_RDWR | O_CLOEXEC);
  void *made = MAP_FAILED;
  if (file >= 0 && fstat(file, &found) == 0 && found.st_size > HEADER_BYTES) {
    log_bytes = (uint64_t)found.st_size;
    made = mmap(NULL, log_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  if (file >= 0) close(file);
  const uint64_t *header = made;
  if (made == MAP_FAILED || header[0] != MAGIC || header[1] != VERSION ||
      forward_reads_end > log_bytes) {
    protect_lose("%s is not what was made", path);
    return 0;
  }
  log_ptr = made;
  return 1;
}

static uint64_t whole(uint64_t bytes) { return sizeof(struct entry) + (bytes + 31) / 32 * 32; }

static struct entry *append(uint32_t kind, uint64_t bytes) {
  if (bytes > log_bytes || whole(bytes) > log_bytes - at) return NULL;
  struct entry *entry = (struct entry *)(void *)(log_ptr + at);
  *entry = (struct entry){.kind = kind, .bytes = bytes};
  at += whole(bytes);
  return entry;
}

static struct entry *next(uint32_t kind, uint64_t bytes) {
  struct entry *entry = (struct entry *)(void *)(log_ptr + at);
  if (at + sizeof *entry > forward_reads_end || entry->kind != kind || entry->bytes != bytes ||
      whole(bytes) > forward_reads_end - at)
    return NULL;
  at += whole(bytes);
  return entry;
}

// The place of one more read: new, or as it was; NULL: protection is over.
static struct entry *read_entry(uint64_t bytes, int *mode) {
  if (!board_claim()) return NULL;
  protect_lock();
  *mode = atomic_load(&protect_mode);
  struct entry *entry = *mode == PROTECT_RECORD ? append(ENTRY_READ, bytes)
                        : *mode == PROTECT_OFF  ? NULL
                                                : next(ENTRY_READ, bytes);
  protect_unlock();
  if (entry || *mode == PROTECT_OFF) return entry;
  if (*mode == PROTECT_RECORD) protect_lose("the log of reads is full: make limits.reads larger");
  else protect_lose("the program reads %lu bytes where it once read something else", bytes);
  return NULL;
}

int reads_answer(void *target, uint64_t bytes) {
  if (!board_claim()) return 0;
  protect_lock();
  // Under the lock: another thread may have restored the regions since it was looked at, and then
  // this read is a real one.
  int is_forward = IS_FORWARD();
  struct entry *entry = is_forward ? next(ENTRY_READ, bytes) : NULL;
  protect_unlock();
  if (is_forward && !entry)
    protect_lose("the program reads %lu bytes where it once read something else", bytes);
  if (!entry) return 0;
  memcpy(target, entry + 1, bytes);
  atomic_fetch_add(&board->answered, 1);
  return 1;
}

CUresult reads_settled(CUstream stream, int is_per_thread) {
  const struct timespec pause = {0, LOOK_NS};
  int mode = CU_STREAM_CAPTURE_MODE_RELAXED;  // another stream may be capturing
  uint64_t end = now_ns() + WAIT_WORK_NS;
  CUresult result, exchanged = REAL(cuThreadExchangeStreamCaptureMode, &mode);
  while ((result = STREAM_CALL(is_per_thread, cuStreamQuery, stream)) == CUDA_ERROR_NOT_READY &&
         now_ns() < end)
    nanosleep(&pause, NULL);
  if (exchanged == CUDA_SUCCESS) REAL(cuThreadExchangeStreamCaptureMode, &mode);
  if (result != CUDA_SUCCESS)
    protect_lose("the work before a read is not done in time, or not well: error %d", result);
  return result;
}

static void compare(const struct entry *entry, const void *target) {
  if (memcmp(entry + 1, target, entry->bytes) != 0)
    protect_lose("the program computes other bytes than it once did: it cannot be repeated");
}

void reads_took(const void *target, uint64_t bytes) {
  int mode;
  struct entry *entry = read_entry(bytes, &mode);
  if (!entry) return;
  if (mode == PROTECT_RECORD) {
    memcpy(entry + 1, target, bytes);
    // pairs with the acquire in reads_are_done: the bytes are there
    atomic_store_explicit(&entry->done, 1, memory_order_release);
  } else {
    compare(entry, target);
  }
}

// A read and a first region may come in two threads at the same moment.
static CUresult registered(void) {
  static pthread_mutex_t registering = PTHREAD_MUTEX_INITIALIZER;
  CUdeviceptr found = 0;
  CUresult result = CUDA_SUCCESS;
  pthread_mutex_lock(&registering);
  if (!device) {
    result = REAL(cuMemHostRegister_v2, log_ptr, log_bytes, 3);  // portable, mapped
    if (result == CUDA_SUCCESS) result = REAL(cuMemHostGetDevicePointer_v2, &found, log_ptr, 0);
    if (result == CUDA_SUCCESS) device = found;
  }
  pthread_mutex_unlock(&registering);
  return result;
}

int reads_register(void) {
  CUresult result = registered();
  if (result != CUDA_SUCCESS)
    protect_lose("the log of reads cannot be registered: error %d of the driver", result);
  return result == CUDA_SUCCESS;
}

void reads_async(void *target, CUdeviceptr source, uint64_t bytes, CUstream stream,
                 int is_per_thread) {
  int mode;
  struct entry *entry = read_entry(bytes, &mode);
  if (!entry) return;
  if (mode != PROTECT_RECORD) {  // what is compared must be there: it waits, a few times in a life
    if (reads_settled(stream, is_per_thread) == CUDA_SUCCESS) compare(entry, target);
    return;
  }
  if (!reads_register()) return;
  CUdeviceptr done = device + (uint64_t)((uint8_t *)&entry->done - log_ptr);
  CUresult result = STREAM_CALL(is_per_thread, cuMemcpyDtoHAsync_v2, entry + 1, source, bytes,
                                stream);
  if (result == CUDA_SUCCESS)
    result = STREAM_CALL(is_per_thread, cuStreamWriteValue32_v2, stream, done, 1, 0);
  if (result != CUDA_SUCCESS) protect_lose("a read cannot be logged: error %d", result);
}

int reads_point(uint64_t ordinal, uint64_t digest, uint64_t *end) {
  struct entry *entry;
  if (atomic_load(&protect_mode) == PROTECT_RECORD) {
    entry = append(ENTRY_POINT, 0);
    if (!entry) {
      protect_lose("the log of reads is full: make limits.reads larger");
      return 0;
    }
    entry->ordinal = ordinal;
    entry->digest = digest;
    // pairs with the acquire in reads_are_done, as that of a read
    atomic_store_explicit(&entry->done, 1, memory_order_release);
  } else {
    entry = next(ENTRY_POINT, 0);
    if (!entry || entry->ordinal != ordinal || entry->digest != digest) {
      protect_lose("up to point %lu the program has launched something else than it once did, or on "
                   "other places of its regions", ordinal);
      return 0;
    }
  }
  *end = at;
  return 1;
}

int reads_are_done(uint64_t end) {
  while (known_done < end) {
    const struct entry *entry = (const struct entry *)(const void *)(log_ptr + known_done);
    // pairs with the release in reads_took and reads_point, and with the word that the driver
    // writes behind the bytes of an asynchronous read
    if (!atomic_load_explicit(&entry->done, memory_order_acquire)) return 0;
    known_done += whole(entry->bytes);
  }
  return 1;
}
