// What a program hands to the driver: which kind of image, and where it ends.
//
// Owns: the size of an image, from its headers alone. Promises: reads nothing that is not mapped
// and readable (a pointer that the driver would refuse must not end the program here), and nothing
// beyond the bound; what is not known for certain is IMAGE_OTHER, and passed through as it is.
// Called by load.c. It looks at no kernel.
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "shim.h"

#define PAGE 4096u
#define WRAPPER_MAGIC 0x466243b1u
#define CONTAINER_MAGIC 0xBA55ED50u
#define ELF_MAGIC 0x464c457fu
#define ELF_OF_CUDA 190
#define NO_BITS 8
#define PROBES 512                // pages looked at by one call of the kernel
#define POPULATE_READ 22          // of madvise, since Linux 5.14
#define PTX_BYTES_MAX (64u << 20)  // a text without an end below this is no text
#define SECTIONS_MAX 65535u

// The same by a file in memory, where a sandbox forbids the call below.
static int is_readable_by_file(uintptr_t at, uintptr_t end) {
  int file = memfd_create("concordia-probe", MFD_CLOEXEC);
  int is_readable = file >= 0;
  for (; is_readable && at < end; at += PAGE)
    is_readable = pwrite(file, (const void *)at, 1, 0) == 1;
  if (file >= 0) close(file);
  return is_readable;
}

// Likewise, a page at a time.
static int is_readable_by_pages(uintptr_t at, uintptr_t end) {
  uint8_t seen[PROBES];
  struct iovec remote[PROBES], local = {seen, 0};
  while (at < end) {
    unsigned long count = 0;
    for (; count < PROBES && at < end; count++, at += PAGE)
      remote[count] = (struct iovec){(void *)at, 1};
    local.iov_len = count;
    ssize_t got = process_vm_readv(getpid(), &local, 1, remote, count, 0);
    if (got == (ssize_t)count) continue;
    int is_forbidden = got < 0 && (errno == EPERM || errno == ENOSYS);
    return is_forbidden && is_readable_by_file((uintptr_t)remote[0].iov_base, end);
  }
  return 1;
}

// Whether every page of the range can be read, as the kernel says, not a fault of ours. First it is
// asked for all at once, which maps them, too, for the hash that follows: a sixth of the time. It
// does not do that for every kind of memory.
static int is_readable(const void *from, uint64_t bytes) {
  uintptr_t at = (uintptr_t)from, end = at + bytes;
  if (!bytes || end < at) return 0;
  at &= ~(uintptr_t)(PAGE - 1);
  if (at < PAGE) return 0;
  int saved = errno;
  int is_mapped = madvise((void *)at, end - at, POPULATE_READ) == 0;
  errno = saved;
  return is_mapped || is_readable_by_pages(at, end);
}

static uint16_t u16(const uint8_t *at) {
  uint16_t value;
  memcpy(&value, at, 2);
  return value;
}

static uint32_t u32(const uint8_t *at) {
  uint32_t value;
  memcpy(&value, at, 4);
  return value;
}

static uint64_t u64(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, 8);
  return value;
}

// u16 at 6: header bytes, u64 at 8: bytes behind the header.
static uint64_t container_bytes(const uint8_t *at) {
  uint64_t header = u16(at + 6), body = u64(at + 8);
  if (header < 16 || body == 0 || body > IMAGE_BYTES_MAX - header) return 0;
  return header + body;
}

static uint64_t grown(uint64_t end, uint64_t offset, uint64_t bytes) {
  if (offset > IMAGE_BYTES_MAX || bytes > IMAGE_BYTES_MAX - offset) return UINT64_MAX;
  return offset + bytes > end ? offset + bytes : end;
}

// The farthest end of the headers, the segments and the sections.
static uint64_t elf_bytes(const uint8_t *at) {
  if (!is_readable(at, 64) || at[4] != 2 || at[5] != 1 || u16(at + 18) != ELF_OF_CUDA) return 0;
  uint64_t segments = u64(at + 32), sections = u64(at + 40), end = 64;
  uint64_t segment_bytes = u16(at + 54), segment_count = u16(at + 56);
  uint64_t section_bytes = u16(at + 58), section_count = u16(at + 60);
  if (section_count > SECTIONS_MAX || (section_count && section_bytes != 64) ||
      (segment_count && segment_bytes != 56))
    return 0;
  if (segment_count) end = grown(end, segments, segment_count * segment_bytes);
  if (section_count) end = grown(end, sections, section_count * section_bytes);
  if (end == UINT64_MAX || !section_count || !is_readable(at + sections, section_count * 64))
    return 0;
  for (uint64_t i = 0; i < section_count && end != UINT64_MAX; i++) {
    const uint8_t *section = at + sections + 64 * i;
    if (u32(section + 4) != NO_BITS && u32(section + 4) != 0)
      end = grown(end, u64(section + 24), u64(section + 32));
  }
  return end == UINT64_MAX ? 0 : end;
}

// Up to its NUL, page by page.
static uint64_t text_bytes(const uint8_t *at) {
  uint64_t seen = 0;
  while (seen < PTX_BYTES_MAX) {
    uint64_t piece = PAGE - ((uintptr_t)(at + seen) & (PAGE - 1));
    if (!is_readable(at + seen, piece)) return 0;
    const uint8_t *end = memchr(at + seen, 0, piece);
    if (end) return (uint64_t)(end - at);
    seen += piece;
  }
  return 0;
}

static int is_ptx(const uint8_t *at, uint64_t bytes) {
  uint64_t i = 0;
  while (i < bytes && (at[i] == ' ' || at[i] == '\t' || at[i] == '\n' || at[i] == '\r')) i++;
  const uint64_t left = bytes - i;
  return (left >= 8 && memcmp(at + i, ".version", 8) == 0) ||
         (left >= 2 && at[i] == '/' && (at[i + 1] == '/' || at[i + 1] == '*'));
}

static void find_plain(const uint8_t *at, struct image *image) {
  image->bytes = at;
  if (!is_readable(at, 16)) return;
  uint32_t magic = u32(at);
  if (magic == CONTAINER_MAGIC) {
    image->kind = image->kind == IMAGE_WRAPPED ? IMAGE_WRAPPED : IMAGE_FATBIN;
    image->size = container_bytes(at);
  } else if (magic == ELF_MAGIC) {
    image->kind = IMAGE_CUBIN;
    image->size = elf_bytes(at);
  } else if (image->kind != IMAGE_WRAPPED && at[0] < 0x80 && at[0] >= 9) {
    image->size = text_bytes(at);
    image->kind = IMAGE_PTX;
    if (image->size && !is_ptx(at, image->size)) image->size = 0;
  }
}

int image_find(const void *given, struct image *image) {
  *image = (struct image){.kind = IMAGE_OTHER};
  if (!is_readable(given, 24)) {
    // the shortest texts may end at the end of a page
    if (given && is_readable(given, 1)) find_plain(given, image);
  } else if (u32(given) == WRAPPER_MAGIC) {
    if (u32((const uint8_t *)given + 4) != 1) return 0;  // made of parts that are linked at load
    image->kind = IMAGE_WRAPPED;
    image->wrapper = given;
    find_plain((const uint8_t *)(uintptr_t)u64((const uint8_t *)given + 8), image);
  } else {
    find_plain(given, image);
  }
  if (image->size && image->size <= IMAGE_BYTES_MAX && is_readable(image->bytes, image->size))
    return 1;
  image->kind = IMAGE_OTHER;
  image->size = 0;
  return 0;
}

int image_find_in_file(const void *bytes, uint64_t size, struct image *image) {
  return image_find(bytes, image) && image->kind != IMAGE_WRAPPED && image->size <= size;
}

const char *image_kind_name(enum image_kind kind) {
  static const char *const names[] = {"other", "fatbin", "fatbin", "cubin", "ptx", "source"};
  return names[kind];
}
