// A rewritten image, out of its file in the cache.
//
// Owns: reading `<key>.image` and writing the addresses into its slots. Promises: every length is
// checked against the file's own, the checksum before anything is believed; the bytes are a copy of
// this process, so that nobody changes them after the check; what is not exactly right is as if it
// were not there, and so is a file that names another image. The format is that of
// instrument/cache.py. Called by load.c.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shim.h"

struct header {
  char magic[8];
  uint32_t version, flags;
  uint64_t image_bytes;
  uint32_t slot_count, kernel_count;
  uint64_t kernels_bytes;
  uint32_t crc32c, zero;
  uint64_t key[2];  // of the original
};
_Static_assert(sizeof(struct header) == 64, "header");

struct slot {
  uint64_t offset;
  uint32_t kind, name;
};
_Static_assert(sizeof(struct slot) == 16, "slot");

#define POPULATE_WRITE 23  // of madvise, since Linux 5.14

enum { VERSION = 3, UNCHANGED = 1, SLOTS_MAX = 1 << 20, KERNELS_MAX = 1 << 16, KERNEL_BYTES = 12 };
enum { SLOT_TEXT = 1, SLOT_LOW, SLOT_HIGH, SLOT_RAW };

static uint64_t slot_bytes(uint32_t kind) { return kind == SLOT_RAW ? 8 : 16; }

static int are_slots_right(const struct slot *slots, uint32_t count, const uint8_t *image,
                           uint64_t image_bytes) {
  for (uint32_t i = 0; i < count; i++) {
    const struct slot *slot = &slots[i];
    if (slot->kind < SLOT_TEXT || slot->kind > SLOT_RAW || slot->name != 0) return 0;
    uint64_t bytes = slot_bytes(slot->kind);
    if (slot->offset > image_bytes || bytes > image_bytes - slot->offset) return 0;
    for (uint64_t j = 0; slot->kind == SLOT_TEXT && j < bytes; j++) {
      uint8_t digit = image[slot->offset + j];
      if (!((digit >= '0' && digit <= '9') || (digit >= 'a' && digit <= 'f'))) return 0;
    }
  }
  return 1;
}

static void fill(uint8_t *image, const struct slot *slots, uint32_t count, uint64_t address) {
  for (uint32_t i = 0; i < count; i++) {
    uint8_t *at = image + slots[i].offset;
    uint32_t low = (uint32_t)address, high = (uint32_t)(address >> 32);
    char digits[17];
    switch (slots[i].kind) {
      case SLOT_TEXT:
        snprintf(digits, sizeof digits, "%016llx", (unsigned long long)address);
        memcpy(at, digits, 16);
        break;
      case SLOT_LOW:
        memcpy(at + 4, &low, 4);  // the immediate of a 16-byte instruction
        break;
      case SLOT_HIGH:
        memcpy(at + 4, &high, 4);
        break;
      default:
        memcpy(at, &address, 8);
    }
  }
}

// The kernels of the table, each within it.
static int are_kernels_right(const uint8_t *at, uint64_t bytes, uint32_t count) {
  for (; count; count--) {
    uint16_t lengths[2];
    if (bytes < KERNEL_BYTES) return 0;
    memcpy(lengths, at + 8, 4);
    uint64_t used = KERNEL_BYTES + (uint64_t)lengths[0] + lengths[1];
    if (used > bytes) return 0;
    at += used;
    bytes -= used;
  }
  return bytes == 0;
}

static enum cache_answer accept(uint8_t *memory, uint64_t bytes, const uint64_t key[2],
                                struct replacement *found) {
  struct header header;
  memcpy(&header, memory, sizeof header);
  if (memcmp(header.magic, "CNCIMG01", 8) != 0 || header.version != VERSION || header.zero)
    return CACHE_DAMAGED;
  if (header.key[0] != key[0] || header.key[1] != key[1]) return CACHE_FOREIGN;
  if (header.slot_count > SLOTS_MAX || header.kernel_count > KERNELS_MAX ||
      header.image_bytes > IMAGE_BYTES_MAX || header.kernels_bytes > IMAGE_BYTES_MAX)
    return CACHE_DAMAGED;
  uint64_t kernels_at = sizeof header + sizeof(struct slot) * (uint64_t)header.slot_count;
  uint64_t image_at = kernels_at + header.kernels_bytes;
  if (image_at + header.image_bytes != bytes) return CACHE_DAMAGED;
  if (hash_crc32c(memory + sizeof header, bytes - sizeof header) != header.crc32c)
    return CACHE_DAMAGED;
  if (!are_kernels_right(memory + kernels_at, header.kernels_bytes, header.kernel_count))
    return CACHE_DAMAGED;
  found->kernels = memory + kernels_at;
  found->kernels_bytes = header.kernels_bytes;
  found->kernel_count = header.kernel_count;
  if (header.flags == UNCHANGED) return CACHE_UNCHANGED;
  const struct slot *slots = (const struct slot *)(memory + sizeof header);
  if (header.flags || !header.image_bytes ||
      !are_slots_right(slots, header.slot_count, memory + image_at, header.image_bytes))
    return CACHE_DAMAGED;
  found->image = memory + image_at;
  found->image_bytes = header.image_bytes;
  fill(found->image, slots, header.slot_count, found->control);
  return CACHE_READY;
}

#define HUGE_BYTES (2ull << 20)
#define HUGE_NS_MAX 600000  // small pages take as long; a huge one that the kernel has, 100 us

// Zeroed memory. Faults of small pages take several times as long as the read into them, so large
// pieces lie on huge pages, and what is left over is faulted in at once; where the kernel does
// neither, it is memory all the same. Some have no huge page at hand: memory is in pieces, or a
// virtual machine has given it back to its host. The first page of a piece shows that, and from
// then on this process takes small ones.
static uint8_t *made(uint64_t *bytes) {
  static _Atomic int are_huge_slow;
  uint64_t used = (*bytes + 4095) & ~4095ull;
  uint64_t spare = used >= HUGE_BYTES / 2 && !atomic_load(&are_huge_slow) ? HUGE_BYTES : 0;
  if (spare && used % HUGE_BYTES >= HUGE_BYTES / 2) used = (used + HUGE_BYTES - 1) & -HUGE_BYTES;
  uint8_t *memory = mmap(NULL, used + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                         -1, 0);
  if (memory == MAP_FAILED) return NULL;
  uint64_t before = spare ? -(uintptr_t)memory & (HUGE_BYTES - 1) : 0;
  if (before) munmap(memory, before);
  if (spare) munmap(memory + before + used, spare - before);
  memory += before;
  int saved = errno;
  uint64_t began = now_ns();
  if (spare && madvise(memory, used, MADV_HUGEPAGE) == 0 &&
      madvise(memory, HUGE_BYTES, POPULATE_WRITE) == 0 && now_ns() - began > HUGE_NS_MAX) {
    atomic_store(&are_huge_slow, 1);
    madvise(memory, used, MADV_NOHUGEPAGE);  // what is there stays
  }
  madvise(memory, *bytes, POPULATE_WRITE);
  errno = saved;
  *bytes = used;
  return memory;
}

static int read_all(int file, uint8_t *memory, uint64_t bytes) {
  uint64_t done = 0;
  while (done < bytes) {
    ssize_t got = pread(file, memory + done, bytes - done, (off_t)done);
    if (got <= 0) return 0;  // an interrupted read is one more original, nothing worse
    done += (uint64_t)got;
  }
  return 1;
}

enum cache_answer cache_load(const char *folder, const uint64_t key[2], uint64_t control,
                             struct replacement *found) {
  char path[PROCESS_PATH_MAX + 64];
  *found = (struct replacement){.control = control};
  snprintf(path, sizeof path, "%s/%016llx%016llx.image", folder, (unsigned long long)key[0],
           (unsigned long long)key[1]);
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (file < 0) return CACHE_MISSING;
  struct stat about;
  enum cache_answer answer = CACHE_DAMAGED;
  if (fstat(file, &about) == 0 && S_ISREG(about.st_mode) && about.st_uid == geteuid() &&
      !(about.st_mode & 022) && about.st_size >= (off_t)sizeof(struct header) &&
      (uint64_t)about.st_size <= 3 * IMAGE_BYTES_MAX) {
    uint64_t bytes = (uint64_t)about.st_size;
    // Zeros behind it: a PTX text at the end of the file ends there; then room for a wrapper.
    uint64_t wrapper_at = (bytes + 16) & ~(uint64_t)7;
    uint64_t mapped = wrapper_at + sizeof(struct wrapper);
    uint8_t *memory = made(&mapped);
    if (memory) {
      found->memory = memory;
      found->memory_bytes = mapped;
      found->wrapper = (struct wrapper *)(found->memory + wrapper_at);
      if (read_all(file, memory, bytes)) answer = accept(memory, bytes, key, found);
    }
  }
  close(file);
  if (answer < CACHE_UNCHANGED) cache_release(found);
  return answer;
}

void cache_release(struct replacement *found) {
  if (found->memory) munmap(found->memory, found->memory_bytes);
  *found = (struct replacement){0};
}
