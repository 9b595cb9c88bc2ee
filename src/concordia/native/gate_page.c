// The gate, for whoever asks from another process.
//
// Owns: this process's place on the page `gate` of the run folder, and the thread that answers.
// Promises: asked by one word, answered in the process's own slot; a page that is not there or not
// as expected is as if nobody asked; the thread takes no signal. Called by context.c once there is
// something to pause. The other side is integrations/program/gate.py, which has the same offsets.
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim.h"

#define PAGE_MAGIC 0x3130455441474E43ull  // "CNGATE01"
#define SLOTS 256                         // processes of a run that have a context
#define STACK_BYTES (256u << 10)

struct slot {
  _Atomic uint32_t pid;   // 0: free
  _Atomic uint32_t seen;  // the last word that was answered; written last, pairs with gate.py
  uint32_t code, streams, captured, pad;
  uint64_t latency_ns;
  char waited_for[96];
};
_Static_assert(sizeof(struct slot) == 128, "slot");

struct page {
  uint64_t magic;
  _Atomic uint32_t wanted;  // odd: paused, even: open; a futex of all processes
  uint32_t timeout_ms;
  uint8_t pad[112];
  struct slot slots[SLOTS];
};

struct watch {
  struct page *page;
  struct slot *slot;
};

static _Atomic int is_started;
static struct watch watched;  // written before its thread is there
static _Atomic(struct slot *) mine;

void gate_page_forked(void) {
  atomic_store(&is_started, 0);
  atomic_store(&mine, NULL);
}

static struct page *mapped(void) {
  char path[PROCESS_PATH_MAX + 8];
  struct stat about;
  snprintf(path, sizeof path, "%s/gate", process_run());
  int file = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  void *memory = MAP_FAILED;
  if (file >= 0 && fstat(file, &about) == 0 && about.st_uid == geteuid() &&
      about.st_size == (off_t)sizeof(struct page))
    memory = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (file >= 0) close(file);
  if (memory == MAP_FAILED) return NULL;
  struct page *page = memory;
  if (page->magic == PAGE_MAGIC) return page;
  munmap(memory, sizeof(struct page));
  return NULL;
}

// The slot of one that was killed serves another.
static struct slot *claimed(struct page *page) {
  for (int at = 0; at < SLOTS; at++) {
    uint32_t owner = atomic_load(&page->slots[at].pid);
    if (owner && (kill((pid_t)owner, 0) == 0 || owner == (uint32_t)getpid())) continue;
    if (atomic_compare_exchange_strong(&page->slots[at].pid, &owner, (uint32_t)getpid()))
      return &page->slots[at];
  }
  return NULL;
}

static void answer(const struct page *page, struct slot *slot, uint32_t wanted) {
  struct gate_report report = {0};
  int code = wanted & 1 ? concordia_pause(page->timeout_ms) : concordia_resume();
  if (wanted & 1) concordia_pause_report(&report);
  slot->code = (uint32_t)code;
  slot->streams = report.streams;
  slot->captured = report.captured;
  slot->latency_ns = report.latency_ns;
  memcpy(slot->waited_for, report.waited_for, sizeof slot->waited_for - 1);
  atomic_store(&slot->seen, wanted);
  syscall(SYS_futex, &slot->seen, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void *answering(void *argument) {
  const struct watch *watch = argument;
  struct page *page = watch->page;
  uint32_t answered = 0;  // who comes while the others are paused is paused, too
  for (;;) {
    uint32_t wanted = atomic_load(&page->wanted);
    if (wanted == answered) {
      syscall(SYS_futex, &page->wanted, FUTEX_WAIT, wanted, NULL, NULL, 0);
      continue;
    }
    answer(page, watch->slot, wanted);
    answered = wanted;
  }
  return NULL;
}

void gate_page_watch(void) {
  pthread_attr_t attributes;
  pthread_t thread;
  sigset_t all, before;
  if (atomic_exchange(&is_started, 1)) return;
  watched.page = mapped();
  watched.slot = watched.page ? claimed(watched.page) : NULL;
  if (!watched.slot || pthread_attr_init(&attributes)) return;
  atomic_store(&mine, watched.slot);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited: signals are for the program's threads
  if (pthread_create(&thread, &attributes, answering, &watched)) {
    coverage_note("no pause from outside", "no thread");
    atomic_store(&watched.slot->pid, 0);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
}

__attribute__((destructor)) static void leave(void) {
  struct slot *slot = atomic_load(&mine);
  if (slot) atomic_store(&slot->pid, 0);
}
