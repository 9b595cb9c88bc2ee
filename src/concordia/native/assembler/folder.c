// The run folder that the stand-in lies in.
//
// Owns: its settings, by the names that process.c has in the shim, and the notes for `concordia
// modules`. Promises: the folder is found by this program's own path, so that an environment that
// was cleaned or is another run's changes nothing; one that is not this user's alone is none.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "assembler.h"

#define SETTINGS_BYTES_MAX 8192  // as process.c has it
#define NOTE_BYTES_MAX 512

static char run_folder[PROCESS_PATH_MAX], own_name[64];
static char text[SETTINGS_BYTES_MAX];

const char *process_run(void) { return run_folder; }
const char *folder_name(void) { return own_name; }

int process_setting(const char *name, char *value, size_t bytes) {
  char wanted[64];
  int length = snprintf(wanted, sizeof wanted, "\n%s=", name);
  const char *found = length < (int)sizeof wanted ? strstr(text, wanted) : NULL;
  if (!found) return 0;
  found += length;
  size_t used = strcspn(found, "\n");
  if (used >= bytes) return 0;
  memcpy(value, found, used);
  value[used] = 0;
  return 1;
}

uint64_t process_number(const char *name, uint64_t otherwise) {
  char value[32], *end;
  if (!process_setting(name, value, sizeof value)) return otherwise;
  uint64_t number = strtoull(value, &end, 10);
  return *value >= '0' && *value <= '9' && !*end ? number : otherwise;
}

static int is_found(void) {
  ssize_t got = readlink("/proc/self/exe", run_folder, sizeof run_folder - 1);
  if (got <= 0 || got == sizeof run_folder - 1) return 0;
  run_folder[got] = 0;
  char *name = strrchr(run_folder, '/');
  if (!name || strlen(name + 1) >= sizeof own_name) return 0;
  strcpy(own_name, name + 1);
  *name = 0;
  struct stat about;
  return lstat(run_folder, &about) == 0 && S_ISDIR(about.st_mode) &&
         about.st_uid == geteuid() && !(about.st_mode & 077);
}

int folder_begin(void) {
  char path[PROCESS_PATH_MAX + 16];
  if (!is_found()) return 0;
  snprintf(path, sizeof path, "%s/settings", run_folder);
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (file < 0) return 0;
  text[0] = '\n';
  ssize_t got = read(file, text + 1, sizeof text - 2);
  close(file);
  text[got < 0 || got == (ssize_t)sizeof text - 2 ? 0 : got + 1] = 0;  // torn or not ours
  const char *disabled = getenv("CONCORDIA_DISABLE");
  return text[0] && !(disabled && *disabled && strcmp(disabled, "0") != 0);
}

void folder_note(const char *what, const char *why) {
  char path[PROCESS_PATH_MAX + 48], line[NOTE_BYTES_MAX];
  static const char form[] = "{\"event\": \"note\", \"what\": \"%s\", \"why\": \"%s\"}\n";
  int length = snprintf(line, sizeof line, form, what, why);
  snprintf(path, sizeof path, "%s/modules/%d.log", run_folder, (int)getpid());
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) return;
  ssize_t put = length < (int)sizeof line ? write(file, line, (size_t)length) : 0;
  (void)put;  // a note that cannot be written changes nothing
  close(file);
}
