// A program that is resumed: brought forward to where it was.
//
// Owns: the checkpoint that it goes on from. Promises: from its first points on kernels and graphs
// are left out, copies to the host are answered from the log, and everything else runs; so the
// host gets into the state that it had. At the point of the checkpoint the regions get their bytes,
// which are read back and compared, and from there all runs. What is not as it was ends the program
// before it has computed anything. Called by points.c and launch.c.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "addresses.h"

enum { LINE_BYTES = 256, COMPARE_BYTES = 1 << 20, MOVED_SAID = 3 };
enum { WAIT_SWEEP_MS = 5000 };  // for a thread that frees what was of regions that are gone

struct saved {
  char name[NAME_MAX_BYTES];
  uint64_t bytes, offset, address;
};

uint64_t forward_target, forward_reads_end;
static struct saved saved[REGIONS_MAX];
static int saved_count;
static const uint8_t *pages;
static uint64_t pages_bytes;

static int read_index(FILE *file) {
  char line[LINE_BYTES];
  int format = 0;
  if (!fgets(line, sizeof line, file) || sscanf(line, "concordia-restore %d", &format) != 1 ||
      format != 1)
    return 0;
  while (fgets(line, sizeof line, file)) {
    struct saved *row = &saved[saved_count];
    if (sscanf(line, "ordinal %lu", &forward_target) == 1) continue;
    if (sscanf(line, "reads %lu", &forward_reads_end) == 1) continue;
    if (saved_count == REGIONS_MAX ||
        sscanf(line, "region %63s %lu %lu %lu", row->name, &row->bytes, &row->offset,
               &row->address) != 4)
      return 0;
    saved_count++;
  }
  return forward_target > 0;
}

static int map_pages(const char *path) {
  struct stat found;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0 || fstat(file, &found) != 0) return 0;
  pages_bytes = (uint64_t)found.st_size;
  void *made = mmap(NULL, pages_bytes, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  pages = made;
  return made != MAP_FAILED;
}

int forward_open(void) {
  char path[4096];
  snprintf(path, sizeof path, "%s/restore", protect_folder);
  FILE *file = fopen(path, "re");
  if (!file) return 1;  // it starts from the beginning
  int is_good = read_index(file);
  fclose(file);
  snprintf(path, sizeof path, "%s/pages", protect_folder);
  is_good = is_good && map_pages(path);
  for (int i = 0; i < saved_count; i++)
    is_good = is_good && saved[i].bytes <= pages_bytes &&
              saved[i].offset <= pages_bytes - saved[i].bytes;
  atomic_store(&protect_mode, PROTECT_WARM);
  if (!is_good) protect_lose("%s/restore is not what was made", protect_folder);
  return is_good;
}

int forward_swallows(const struct launch *launch) {
  if (!IS_FORWARD() || is_capturing(launch->stream, launch->is_per_thread)) return 0;
  atomic_fetch_add_explicit(&board->swallowed, 1, memory_order_relaxed);
  return 1;
}

static const struct saved *saved_of(const struct region *region) {
  for (int i = 0; i < saved_count; i++)
    if (strcmp(saved[i].name, region->name) == 0 && saved[i].bytes == region->bytes)
      return &saved[i];
  return NULL;
}

static void restore_one(const struct region *region, const struct saved *row, uint8_t *buffer) {
  const uint8_t *wanted = pages + row->offset;
  CUresult result = REAL(cuMemcpyHtoD_v2, region->address, wanted, region->bytes);
  for (uint64_t at = 0, bytes; at < region->bytes && result == CUDA_SUCCESS; at += bytes) {
    bytes = region->bytes - at < COMPARE_BYTES ? region->bytes - at : COMPARE_BYTES;
    result = REAL(cuMemcpyDtoH_v2, buffer, region->address + at, bytes);
    if (result == CUDA_SUCCESS && memcmp(buffer, wanted + at, bytes) != 0)
      protect_lose("region %s does not hold what was written", region->name);
  }
  if (result != CUDA_SUCCESS)
    protect_lose("region %s cannot be written: error %d of the driver", region->name, result);
}

// Where addresses are kept: what is not, and whose it is.
static void say_moved(const struct region *region, uint64_t before) {
  const char *why = addresses_has(region->address) ? "in another order than before"
                                                   : "which is not kept";
  notice("concordia: region %s of %lu bytes was at 0x%lx and is at 0x%lx: allocated by %s, %s",
         region->name, region->bytes, before, region->address, region->call, why);
}

void forward_restore(void) {
  static struct region *here[REGIONS_MAX];
  uint8_t *buffer = malloc(COMPARE_BYTES);
  int moved = 0;
  if (!saver_take(WAIT_SWEEP_MS)) protect_lose("regions are being freed at the point");
  protect_lock();
  int count = region_count;
  memcpy(here, regions, sizeof here);
  protect_unlock();
  for (int i = 0; i < count; i++)
    if (!saved_of(here[i]))
      protect_lose("region %s of %lu bytes was not there at point %lu", here[i]->name,
                   here[i]->bytes, forward_target);
  if (count != saved_count)
    protect_lose("%d regions were saved at point %lu, here are %d", saved_count, forward_target,
                 count);
  park_begin();  // for all of it: it waits for the whole GPU
  if (!buffer || REAL(cuCtxSynchronize) != CUDA_SUCCESS)
    protect_lose("what ran before does not end well");
  for (int i = 0; i < count; i++) {
    const struct saved *row = saved_of(here[i]);
    if (here[i]->address != row->address && moved++ < MOVED_SAID && policy.keeps_addresses)
      say_moved(here[i], row->address);
    restore_one(here[i], row, buffer);
  }
  free(buffer);
  if (REAL(cuCtxSynchronize) != CUDA_SUCCESS) protect_lose("the regions cannot be written");
  park_end();
  saver_give();
  munmap((void *)(uintptr_t)pages, pages_bytes);
  notice("concordia: resumed at point %lu: %d regions, %lu launches left out", forward_target,
         count, (unsigned long)atomic_load(&board->swallowed));
  if (moved)
    notice("concordia: %d regions have other addresses than they had: addresses that lie in them, "
           "if any, are wrong", moved);
  atomic_store(&protect_mode, PROTECT_RECORD);
}
