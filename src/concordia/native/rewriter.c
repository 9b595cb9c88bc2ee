// The rewriter, asked for an image that the cache does not have.
//
// Owns: the question, its answer and the time that it may take. Promises: bounded for one image
// and for all of a process; an image that is not answered for in time, a rewriter that has gone or
// a reply that is not one means the original. The image travels in sealed memory, so neither side
// can be changed by the other. No lock is held. The other side is instrument/rewriter.py.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

#define REQUEST_MAGIC 0x51524E43u  // "CNRQ"
#define SOURCE_MAGIC 0x53414E43u   // "CNAS"
#define REPLY_MAGIC 0x50524E43u    // "CNRP"

struct request {
  uint32_t magic, version;
  uint64_t bytes, key[2];
};

static _Atomic uint64_t spent_ns;  // waiting, by all threads together

void rewriter_forked(void) { atomic_store(&spent_ns, 0); }

uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int sealed_copy(const struct image *image) {
  int memory = memfd_create("concordia-image", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (memory < 0) return -1;
  uint64_t done = 0;
  while (done < image->size) {
    ssize_t put = write(memory, image->bytes + done, image->size - done);
    if (put <= 0) break;
    done += (uint64_t)put;
  }
  int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL;
  if (done == image->size && fcntl(memory, F_ADD_SEALS, seals) == 0) return memory;
  close(memory);
  return -1;
}

// The socket's name, which has room for 108 bytes. One that does not fit leads through a descriptor
// of its folder, to be closed by the caller once it is connected; -1: it fits, and /proc, which some
// sandboxes lack, is not needed. instrument/rewriter_socket.py listens under such a name, too.
static int named(struct sockaddr_un *address) {
  static const char form[] = "%s/rewriter.sock";
  size_t room = sizeof address->sun_path;
  *address = (struct sockaddr_un){.sun_family = AF_UNIX};
  if (snprintf(address->sun_path, room, form, process_run()) < (int)room) return -1;
  int folder = open(process_run(), O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
  char through[32];
  snprintf(through, sizeof through, "/proc/self/fd/%d", folder);  // without one nobody is there
  snprintf(address->sun_path, room, form, through);
  return folder;
}

static int connected(void) {
  struct sockaddr_un address;
  int line = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (line < 0) return -1;
  int folder = named(&address);
  int failed = connect(line, (struct sockaddr *)&address, sizeof address);
  if (folder >= 0) close(folder);
  if (!failed) return line;
  close(line);
  return -1;
}

static int sent(int line, const struct image *image, const uint64_t key[2], int memory) {
  struct request request = {.magic = image->kind == IMAGE_SOURCE ? SOURCE_MAGIC : REQUEST_MAGIC,
                            .version = 3,
                            .bytes = image->size,
                            .key = {key[0], key[1]}};
  struct iovec part = {&request, sizeof request};
  union {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr aligned;
  } rights = {.bytes = {0}};
  struct msghdr message = {.msg_iov = &part,
                           .msg_iovlen = 1,
                           .msg_control = rights.bytes,
                           .msg_controllen = sizeof rights.bytes};
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(header), &memory, sizeof(int));
  return sendmsg(line, &message, MSG_NOSIGNAL) == (ssize_t)part.iov_len;
}

static enum rewriter_answer awaited(int line, uint64_t bound_ns) {
  uint64_t deadline = now_ns() + bound_ns;
  for (;;) {
    uint64_t now = now_ns();
    if (now >= deadline) return REWRITER_TIMEOUT;
    struct pollfd ready = {.fd = line, .events = POLLIN};
    int count = poll(&ready, 1, (int)((deadline - now) / 1000000u) + 1);
    if (count < 0 && errno != EINTR) return REWRITER_GONE;
    if (count <= 0) continue;
    uint32_t reply[3];
    ssize_t got = recv(line, reply, sizeof reply, MSG_DONTWAIT);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got != 8 || reply[0] != REPLY_MAGIC || reply[1] > 2) return REWRITER_GONE;
    return reply[1] == 0 ? REWRITER_READY : reply[1] == 1 ? REWRITER_REFUSED : REWRITER_LATER;
  }
}

enum rewriter_answer rewriter_ask(const struct image *image, const uint64_t key[2],
                                  int is_awaited) {
  uint64_t one_ns = process_number("image_wait_ms", 6000) * 1000000u;
  uint64_t all_ns = process_number("process_wait_ms", 120000) * 1000000u;
  uint64_t spent = atomic_load(&spent_ns);
  if (is_awaited && spent >= all_ns) return REWRITER_SPENT;
  if (one_ns > all_ns - spent) one_ns = all_ns - spent;
  uint64_t began = now_ns();
  int saved = errno;
  enum rewriter_answer answer = REWRITER_GONE;
  int line = connected();
  int memory = line < 0 ? -1 : sealed_copy(image);
  if (memory >= 0 && sent(line, image, key, memory))
    answer = is_awaited ? awaited(line, one_ns) : REWRITER_LATER;
  if (memory >= 0) close(memory);
  if (line >= 0) close(line);
  errno = saved;
  if (is_awaited) atomic_fetch_add(&spent_ns, now_ns() - began);
  return answer;
}
