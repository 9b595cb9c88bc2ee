// Who is asking: names of the functions and libraries in the stack of a call.
//
// Owns: one walk of the native stack, and the Python frames where the bootstrap has arranged for
// them. Promises: takes no lock of the interpreter and loads no library: an allocator calls us with
// locks of its own held; at most FRAMES_MAX frames are looked at. Names of functions come from the
// loader, under its lock: a library that allocates while it is being loaded may wait for us there.
// Called by region_rules.c, once for each allocation and only where the policy has a rule that needs
// it.
//
// Python frames: the bootstrap lets faulthandler write the traceback of the thread that gets
// CONCORDIA_STACK_SIGNAL into the file CONCORDIA_STACK_FILE. It needs no interpreter lock for that,
// so raising the signal here gives this thread's frames.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <fnmatch.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "protect.h"

enum { FRAMES_MAX = 128, TEXT_BYTES = 16384 };

// The first walk of a process loads the library that walks, which must not happen in an allocator.
// After policy.c, which reads the rules.
__attribute__((constructor(103))) static void prepare(void) {
  void *frames[1];
  for (int i = 0; IS_PROTECTED() && i < policy.rule_count; i++)
    if (policy.rules[i].stack[0] && backtrace(frames, 1)) return;
}

static int is_like(const char *pattern, const char *name) {
  const char *base = name ? strrchr(name, '/') : NULL;
  return name && (fnmatch(pattern, name, 0) == 0 || (base && fnmatch(pattern, base + 1, 0) == 0));
}

// Whether a descriptor still is what the bootstrap opened: the program may have closed it, and have
// a file of its own by that number, or be a child that was not given it.
static int is_ours(int descriptor) {
  struct stat here, there;
  const char *path = getenv("CONCORDIA_STACK_PATH");
  return path && fstat(descriptor, &here) == 0 && stat(path, &there) == 0 &&
         here.st_dev == there.st_dev && here.st_ino == there.st_ino;
}

// A traceback's lines:   File "train.py", line 12 in step
static int python_matches(const char *pattern) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  static char text[TEXT_BYTES];
  const char *number = getenv("CONCORDIA_STACK_SIGNAL"), *file = getenv("CONCORDIA_STACK_FILE");
  if (!number || !file || !atoi(number)) return 0;
  int descriptor = atoi(file), is_found = 0;
  struct sigaction action;
  // Without a handler the signal would end the program.
  if (sigaction(atoi(number), NULL, &action) != 0 || action.sa_handler == SIG_DFL) return 0;
  pthread_mutex_lock(&lock);
  if (is_ours(descriptor) && ftruncate(descriptor, 0) == 0 &&
      lseek(descriptor, 0, SEEK_SET) == 0) {
    pthread_kill(pthread_self(), atoi(number));  // handled before this returns
    ssize_t bytes = pread(descriptor, text, sizeof text - 1, 0);
    text[bytes > 0 ? bytes : 0] = 0;
    char *rest = text;
    for (char *line; !is_found && (line = strsep(&rest, "\n"));) {
      char *start = strchr(line, '"'), *end = start ? strchr(start + 1, '"') : NULL;
      char *function = end ? strstr(end, " in ") : NULL;
      if (!function) continue;
      *end = 0;
      is_found = is_like(pattern, start + 1) || is_like(pattern, function + 4);
    }
  }
  pthread_mutex_unlock(&lock);
  return is_found;
}

int stack_matches(const char *pattern) {
  void *frames[FRAMES_MAX];
  int count = backtrace(frames, FRAMES_MAX);
  Dl_info info;
  for (int i = 0; i < count; i++)
    if (dladdr(frames[i], &info) &&
        (is_like(pattern, info.dli_fname) || is_like(pattern, info.dli_sname)))
      return 1;
  return python_matches(pattern);
}
