// The files that the shim and the agent see both.
//
// Owns: the mappings of board and stage, and the claim on them. Promises: of the processes of a run
// the first that allocates device memory is protected, and only that one; what is written in stream
// order lands in the board. Called by allocations.c before anything else of the protection.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "protect.h"

#define MAGIC 0x4452414f42434e43ull  // "CNCBOARD"
_Static_assert(sizeof(struct board) <= BOARD_REGIONS_AT, "the regions lie behind");
_Static_assert(offsetof(struct board, reason) == 256, "program_pages.py reads it there");
_Static_assert(sizeof(struct board_region) == 128, "program_pages.py reads it so");

struct board *board;
uint8_t *stage;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int is_ours;
static CUdeviceptr word;
static struct stat stage_file;

static int opened(const char *name, struct stat *found) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", protect_folder, name);
  int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0 || fstat(file, found) == 0) return file;
  close(file);
  return -1;
}

// Room in the stage's file for a region: a full file system is an error here, and not a signal that
// ends the program when a page is written. No descriptor is kept: programs close those that they do
// not know, and the number may be that of a file of theirs.
int stage_reserve(uint64_t offset, uint64_t bytes) {
  struct stat found;
  int error = EINTR, file = opened("stage", &found);
  if (file < 0) return 0;
  if (found.st_dev != stage_file.st_dev || found.st_ino != stage_file.st_ino) error = ENOENT;
  // A program's timer may interrupt it; what has room by then keeps it, so it comes to an end.
  while (error == EINTR) error = posix_fallocate(file, (off_t)offset, (off_t)bytes);
  close(file);
  return error == 0;
}

static void *mapped(const char *name, uint64_t bytes, struct stat *found) {
  int file = opened(name, found);
  if (file < 0) return NULL;
  void *made = MAP_FAILED;
  if ((uint64_t)found->st_size >= bytes)
    made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return made == MAP_FAILED ? NULL : made;
}

static void claim(void) {
  uint64_t marks = (policy.stage_bytes + MARK_BYTES - 1) / MARK_BYTES;
  struct stat file;
  struct board *found = mapped("board", BOARD_MARKS_AT + marks, &file);
  uint32_t nobody = 0;
  if (!found || found->magic != MAGIC || found->version != BOARD_VERSION) {
    protect_lose("%s/board is not what was made", protect_folder);
    return;
  }
  if (!atomic_compare_exchange_strong(&found->owner, &nobody, (uint32_t)getpid())) {
    atomic_store(&protect_mode, PROTECT_OFF);
    notice("concordia: process %d is unprotected: process %u of this run is", (int)getpid(),
           nobody);
    return;
  }
  board = found;
  stage = mapped("stage", policy.stage_bytes, &stage_file);
  if (!stage) {
    protect_lose("%s/stage is not what was made", protect_folder);
    return;
  }
  is_ours = forward_open() && reads_open();
}

int board_claim(void) {
  if (!IS_PROTECTED()) return 0;
  pthread_once(&once, claim);
  return is_ours && IS_PROTECTED();
}

CUdeviceptr board_word(void) {
  if (word) return word;
  CUdeviceptr found = 0;
  CUresult result = REAL(cuMemHostRegister_v2, board, 4096, 3);  // portable, mapped
  if (result == CUDA_SUCCESS)
    result = REAL(cuMemHostGetDevicePointer_v2, &found, (void *)&board->word, 0);
  if (result != CUDA_SUCCESS) {
    protect_lose("the board cannot be registered: error %d of the driver", result);
    return 0;
  }
  return word = found;
}
