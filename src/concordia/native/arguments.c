// The arguments of a launch: what of them may lead to memory.
//
// Owns: how a launch's words and tensor maps are found. Promises: they are read only inside the
// parameters that the driver describes, or the buffer that the program gave; every place where a
// map can lie is looked at; what may be one and is not known is said. Called by marks.c, graphs.c
// and points.c. It marks nothing.
//
// Where a map can lie: the GPU takes it from an address that is a multiple of 64 only. So it begins
// at a multiple of 64 among a launch's arguments, and lies inside one of them.
//
//   offset  0       64      128     192     256     320
//           | words |  a map that is known  | words |    at 64: found. At 0, 128: they overlap it,
//           |<-- not one -->|       |<-- not one -->|    and two maps share no byte
//
// Bytes that are all zero are none either: through it nobody can write.
#define _GNU_SOURCE
#include <string.h>

#include "protect.h"

enum { SMALL_BYTES = 64 };  // a pointer, or some; tables of them have places that nobody filled
enum { MAP_ALIGNMENT = 64 };
enum { EXTRA_END = 0, EXTRA_BUFFER = 1, EXTRA_SIZE = 2 };

static const uint8_t *buffer_of(void **extra, uint64_t *bytes) {
  const uint8_t *buffer = NULL;
  *bytes = 0;
  for (int i = 0; i < 8 && extra && extra[i] != (void *)EXTRA_END; i += 2) {
    if (extra[i] == (void *)EXTRA_BUFFER) buffer = extra[i + 1];
    if (extra[i] == (void *)EXTRA_SIZE && extra[i + 1]) *bytes = *(const size_t *)extra[i + 1];
  }
  return *bytes ? buffer : NULL;
}

// The words from `at` to `end` of bytes that lie `offset` behind the first argument's begin.
static void words_of(const uint8_t *bytes, uint64_t offset, uint64_t at, uint64_t end,
                     see_word see, void *context) {
  uint64_t word;
  for (at += -(offset + at) % 8; at + 8 <= end; at += 8) {
    memcpy(&word, bytes + at, 8);
    see(word, offset + at, context);
  }
}

static int is_zero(const uint8_t *bytes) {
  uint64_t word, all = 0;
  for (int at = 0; at < TENSOR_MAP_BYTES; at += 8) {
    memcpy(&word, bytes + at, 8);
    all |= word;
  }
  return !all;
}

struct found {
  int maps, unknown;  // places of maps that are known, and of what may be one
};

static void look(const uint8_t *bytes, uint64_t offset, uint64_t size, const struct seer *seer,
                 struct found *found) {
  uint64_t words = 0, address, room, at = -offset % MAP_ALIGNMENT;
  int is_open = 0;  // whether what lies half before `at` may be a map
  while (at + TENSOR_MAP_BYTES <= size) {
    if (tensor_map_of(bytes + at, &address, &room)) {
      found->unknown -= is_open;
      found->maps++;
      seer->range(address, room, seer->context);
      words_of(bytes, offset, words, at, seer->word, seer->context);
      words = at += TENSOR_MAP_BYTES;
      is_open = 0;
    } else {
      is_open = !is_zero(bytes + at);
      found->unknown += is_open;
      at += MAP_ALIGNMENT;
    }
  }
  words_of(bytes, offset, words, size, seer->word, seer->context);
}

enum unseen arguments_reach(const struct kernel *kernel, void **parameters, void **extra,
                            const struct seer *seer) {
  struct found found = {0};
  uint64_t bytes = 0;
  if (!parameters) {
    const uint8_t *buffer = buffer_of(extra, &bytes);
    if (!buffer && kernel->count != 0) return UNSEEN_PARAMETERS;
    look(buffer, 0, bytes, seer, &found);
  } else if (kernel->count < 0) {
    return UNSEEN_PARAMETERS;
  }
  for (int i = 0; parameters && i < kernel->count; i++)
    look(parameters[i], kernel->parameters[i].offset, kernel->parameters[i].bytes, seer, &found);
  // Its maps are in memory, where they may be changed at any time.
  if (kernel->has_maps && !found.maps) return UNSEEN_NO_MAP;
  if (!found.unknown) return UNSEEN_NOTHING;
  if (tensor_maps_lost()) return UNSEEN_LOST_MAP;
  return kernel->has_plain_maps ? UNSEEN_NOTHING : UNSEEN_MAP;
}

void arguments_small_words(const struct kernel *kernel, void **parameters, void **extra,
                           see_word see, void *context) {
  uint64_t bytes = 0;
  const uint8_t *buffer = parameters ? NULL : buffer_of(extra, &bytes);
  for (int i = 0; i < kernel->count; i++) {
    uint32_t offset = kernel->parameters[i].offset, size = kernel->parameters[i].bytes;
    const uint8_t *argument = parameters ? parameters[i] : buffer + offset;
    if (size > SMALL_BYTES || (!parameters && (!buffer || offset + size > bytes))) continue;
    words_of(argument, offset, 0, size, see, context);
  }
}

int arguments_word(const struct kernel *kernel, void **parameters, void **extra, int index,
                   uint64_t *word) {
  uint64_t bytes;
  if (index >= kernel->count || kernel->parameters[index].bytes < 8) return 0;
  if (parameters) {
    memcpy(word, parameters[index], 8);
    return 1;
  }
  const uint8_t *buffer = buffer_of(extra, &bytes);
  if (!buffer || kernel->parameters[index].offset + 8 > bytes) return 0;
  memcpy(word, buffer + kernel->parameters[index].offset, 8);
  return 1;
}
