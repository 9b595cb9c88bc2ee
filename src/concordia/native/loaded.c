// Images that were loaded in place of their originals.
//
// Owns: their memory, by the handle of the module or library. Promises: it stays as it is until the
// driver has unloaded it (a program may have promised the driver to keep it); the lock is held for
// a look at the list, never while anybody is called. Called by load.c, and by whoever asks what a
// kernel has. It does not load.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

struct loaded {
  struct loaded *next;
  void *handle;
  struct replacement replacement;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct loaded *first;

// The list of the parent belongs to a context that does not work here; its memory may be in use.
void loaded_forked(void) {
  pthread_mutex_init(&lock, NULL);
  first = NULL;
}

// Taken out of the list before the driver unloads it: its handle may be another's right afterwards.
struct loaded *loaded_take(const void *handle) {
  pthread_mutex_lock(&lock);
  struct loaded **at = &first;
  while (*at && (*at)->handle != handle) at = &(*at)->next;
  struct loaded *found = *at;
  if (found) *at = found->next;
  pthread_mutex_unlock(&lock);
  return found;
}

void loaded_drop(struct loaded *taken) {
  if (!taken) return;
  cache_release(&taken->replacement);
  free(taken);
}

void loaded_keep(struct loaded *taken) {
  if (!taken) return;
  pthread_mutex_lock(&lock);
  taken->next = first;
  first = taken;
  pthread_mutex_unlock(&lock);
}

void loaded_add(void *handle, const struct replacement *replacement) {
  loaded_drop(loaded_take(handle));  // of a context that has gone, and a handle used again
  struct loaded *made = malloc(sizeof *made);
  if (!made) return;  // the memory stays for good, which harms nobody
  *made = (struct loaded){.handle = handle, .replacement = *replacement};
  loaded_keep(made);
}

static uint32_t flags_of(const struct replacement *replacement, const char *name) {
  const uint8_t *at = replacement->kernels;
  size_t wanted = strlen(name);
  for (uint32_t i = 0; i < replacement->kernel_count; i++) {
    uint32_t flags;
    uint16_t lengths[2];
    memcpy(&flags, at, 4);
    memcpy(lengths, at + 8, 4);
    at += 12;
    if (lengths[0] == wanted && memcmp(at, name, wanted) == 0) return flags;
    at += (size_t)lengths[0] + lengths[1];
  }
  return KERNEL_UNKNOWN;
}

uint32_t loaded_kernel_flags(const void *handle, const char *name) {
  uint32_t flags = KERNEL_UNKNOWN;
  pthread_mutex_lock(&lock);
  for (struct loaded *at = first; at; at = at->next)
    if (at->handle == handle) flags = flags_of(&at->replacement, name);
  pthread_mutex_unlock(&lock);
  return flags;
}
