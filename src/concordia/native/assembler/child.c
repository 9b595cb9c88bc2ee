// The assembler as a child of ours, with a bound.
//
// Owns: its start, its end and what it said. Promises: it never outlives us; what it says is kept
// back until its end, so that of a try that came to nothing nobody hears.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "assembler.h"

#define COPY_BYTES 65536

static int is_done(int watch, uint64_t bound_ns) {
  uint64_t deadline = now_ns() + bound_ns;
  for (;;) {
    uint64_t now = now_ns();
    if (now >= deadline) return 0;
    struct pollfd ended = {.fd = watch, .events = POLLIN};
    int count = poll(&ended, 1, (int)((deadline - now) / 1000000u) + 1);
    if (count > 0) return 1;
    if (count < 0 && errno != EINTR) return 0;
  }
}

void child_run(const char *path, char *const *arguments, uint64_t bound_ns, struct child *child) {
  *child = (struct child){-1, memfd_create("out", MFD_CLOEXEC), memfd_create("err", MFD_CLOEXEC)};
  if (child->out < 0 || child->err < 0) return;
  signal(SIGCHLD, SIG_DFL);  // ignored, it would take the status away
  pid_t parent = getpid(), pid = fork();
  if (pid < 0) return;
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent || dup2(child->out, 1) < 0 || dup2(child->err, 2) < 0) _exit(127);
    execv(path, arguments);
    _exit(127);
  }
  int watch = (int)syscall(SYS_pidfd_open, pid, 0);
  int in_time = watch >= 0 && is_done(watch, bound_ns);
  if (!in_time) kill(pid, SIGKILL);
  if (watch >= 0) close(watch);
  int status = -1;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  child->status = in_time ? status : -1;
}

static int is_copied(int from, int to) {
  char bytes[COPY_BYTES];
  off_t at = 0;
  for (;;) {
    ssize_t got = pread(from, bytes, sizeof bytes, at);
    if (got <= 0) return got == 0;
    for (ssize_t done = 0; done < got;) {
      ssize_t put = write(to, bytes + done, (size_t)(got - done));
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) return 0;
      done += put;
    }
    at += got;
  }
}

int child_tell(const struct child *child) {
  int is_all = is_copied(child->out, 1);
  return is_copied(child->err, 2) && is_all;
}
