// What the shim says on the program's stderr.
//
// Owns: the one way in which a line of ours gets there. Promises: nobody waits for whoever reads
// it: what a full pipe, a stopped terminal or a socket does not take at once is not said there, but
// noted for `concordia modules`; a reader that has gone ends nobody by a signal; no lock of the
// program's own streams is taken, and its errno stays. Called by all files.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

enum { STDERR = 2, LINE_BYTES = 512 };  // below PIPE_BUF: a pipe takes all of it or nothing

static int is_all(ssize_t written, size_t bytes) { return written == (ssize_t)bytes; }

// Another user's, or without /proc: there may be room now.
static int is_taken_with_room(const char *line, size_t bytes) {
  struct pollfd look = {STDERR, POLLOUT, 0};
  if (poll(&look, 1, 0) != 1 || look.revents != POLLOUT) return 0;
  return is_all(write(STDERR, line, bytes), bytes);
}

// Not to wait is a property of what a descriptor was opened as, and the program's own must keep
// its. So it is opened once more; but not a file, in which each has its own place.
static int is_taken(const char *line, size_t bytes) {
  struct stat about;
  if (fstat(STDERR, &about) != 0) return 0;
  if (S_ISREG(about.st_mode)) return is_all(write(STDERR, line, bytes), bytes);
  if (S_ISSOCK(about.st_mode))
    return is_all(send(STDERR, line, bytes, MSG_DONTWAIT | MSG_NOSIGNAL), bytes);
  int again = open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
  if (again < 0) return is_taken_with_room(line, bytes);
  int is_done = is_all(write(again, line, bytes), bytes);
  int error = errno;
  close(again);
  errno = error;
  return is_done;
}

// The signals of a write that fails would end a program that itself wrote nothing.
static int is_taken_silently(const char *line, size_t bytes) {
  const struct timespec at_once = {0, 0};
  sigset_t signals, before, pending;
  sigemptyset(&signals);
  sigaddset(&signals, SIGPIPE);
  sigaddset(&signals, SIGXFSZ);
  sigaddset(&signals, SIGTTOU);  // of a terminal that stops whoever writes in the background
  if (pthread_sigmask(SIG_BLOCK, &signals, &before) != 0) return 0;
  sigpending(&pending);
  int is_done = is_taken(line, bytes);
  int number = is_done ? 0 : errno == EPIPE ? SIGPIPE : errno == EFBIG ? SIGXFSZ : 0;
  if (number && !sigismember(&pending, number)) {
    sigemptyset(&signals);
    sigaddset(&signals, number);
    while (sigtimedwait(&signals, NULL, &at_once) < 0 && errno == EINTR) continue;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return is_done;
}

void notice(const char *format, ...) {
  char line[LINE_BYTES];
  int saved = errno;
  va_list values;
  va_start(values, format);
  int length = vsnprintf(line, sizeof line - 1, format, values);
  va_end(values);
  if (length > (int)sizeof line - 2) length = (int)sizeof line - 2;
  if (length >= 0) {
    line[length] = '\n';
    int is_said = is_taken_silently(line, (size_t)length + 1);
    line[length] = 0;
    if (!is_said && process_is_active()) coverage_note("not said on stderr", line);
  }
  errno = saved;
}
