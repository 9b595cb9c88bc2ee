// A text with its marks, from the run's rewriter.
//
// Owns: the way from a file with PTX to a file in memory with the rewritten text. Promises: what
// cannot be read, is not answered for within the bound or has nothing to mark is no text, and the
// note says which; nothing is left on disk but the rewriter's own cache.
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "assembler.h"

#define TEXT_BYTES_MAX (64u << 20)  // as config.py has it

static const char *const what = "a text was assembled without marks";

static int is_mapped(const char *path, struct image *image) {
  struct stat about;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  void *bytes = MAP_FAILED;
  if (file >= 0 && fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0 &&
      about.st_size <= TEXT_BYTES_MAX)
    bytes = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  if (file >= 0) close(file);
  if (bytes == MAP_FAILED) return 0;
  *image = (struct image){IMAGE_SOURCE, bytes, (uint64_t)about.st_size, NULL};
  return 1;
}

// As often as the rewriter is still at it, within the bound.
static enum rewriter_answer asked(const struct image *image, const uint64_t key[2]) {
  uint64_t deadline = now_ns() + 1000000u * process_number("assembler_wait_ms", 30000);
  enum rewriter_answer answer;
  do answer = rewriter_ask(image, key, 1);
  while (answer == REWRITER_LATER && now_ns() < deadline);
  return answer;
}

static int in_memory(const uint8_t *bytes, uint64_t size) {
  int memory = memfd_create("marked.ptx", 0);  // the assembler inherits it
  for (uint64_t done = 0; memory >= 0 && done < size;) {
    ssize_t put = write(memory, bytes + done, size - done);
    if (put <= 0) {
      close(memory);
      memory = -1;
    } else {
      done += (uint64_t)put;
    }
  }
  return memory;
}

int marked_text(const char *path) {
  static const char *const whys[] = {
      "no file though the rewriter said so", "the rewriter has none for it",
      "the rewriter is still at it",         "the rewriter was too slow",
      "no rewriter",                         "the rewriter was too slow"};
  char folder[PROCESS_PATH_MAX];
  uint64_t key[2];
  struct image image;
  struct replacement found;
  if (!process_setting("assembler_cache", folder, sizeof folder) || !is_mapped(path, &image))
    return -1;
  hash_image(image.bytes, image.size, key);
  enum cache_answer answer = cache_load(folder, key, 0, &found);
  enum rewriter_answer said = REWRITER_READY;
  if (answer < CACHE_UNCHANGED) {
    said = asked(&image, key);
    if (said == REWRITER_READY) answer = cache_load(folder, key, 0, &found);
  }
  if (answer == CACHE_READY) return in_memory(found.image, found.image_bytes);
  if (answer != CACHE_UNCHANGED) folder_note(what, whys[said]);
  return -1;
}
