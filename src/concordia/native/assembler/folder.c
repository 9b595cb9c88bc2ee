// The run folder that the stand-in lies in.
//
// Owns: how it is found, and the notes for `concordia modules`. Promises: the folder is found by
// this program's own path, so that an environment that was cleaned or is another run's changes
// nothing; one that is not this user's alone is none (process_settings.c).
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "assembler.h"

#define NOTE_BYTES_MAX 512

static char own_name[64];

const char *folder_name(void) { return own_name; }

int folder_begin(void) {
  char path[PROCESS_PATH_MAX + sizeof own_name];
  ssize_t got = readlink("/proc/self/exe", path, sizeof path - 1);
  if (got <= 0 || got == sizeof path - 1) return 0;
  path[got] = 0;
  char *name = strrchr(path, '/');
  if (!name || strlen(name + 1) >= sizeof own_name) return 0;
  strcpy(own_name, name + 1);
  *name = 0;
  return process_settle(path) && !process_is_disabled();
}

void folder_note(const char *what, const char *why) {
  char path[PROCESS_PATH_MAX + 48], line[NOTE_BYTES_MAX];
  static const char form[] = "{\"event\": \"note\", \"what\": \"%s\", \"why\": \"%s\"}\n";
  int length = snprintf(line, sizeof line, form, what, why);
  snprintf(path, sizeof path, "%s/modules/%d.log", process_run(), (int)getpid());
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) return;
  ssize_t put = length < (int)sizeof line ? write(file, line, (size_t)length) : 0;
  (void)put;  // a note that cannot be written changes nothing
  close(file);
}
