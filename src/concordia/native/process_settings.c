// What the run's folder says.
//
// Owns: where the folder is, and its settings, a name and a value on each line. Promises: read
// once, and not changed afterwards; a folder that is not this user's alone, or settings that were
// cut, are none. Called by process.c in the shim and by assembler/folder.c in the stand-in for
// ptxas, which find the folder; asked by all files. It writes nothing.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shim.h"

#define SETTINGS_BYTES_MAX (16u << 10)  // as config.py has it (RUN_SETTINGS_BYTES_MAX)

static char run_folder[PROCESS_PATH_MAX];
static char text[SETTINGS_BYTES_MAX + 3];  // "\nname=value\n...", with room for a byte too many

const char *process_run(void) { return run_folder; }

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

static int is_private(const char *folder) {
  struct stat found;
  return lstat(folder, &found) == 0 && S_ISDIR(found.st_mode) && found.st_uid == geteuid() &&
         !(found.st_mode & 077);
}

int process_settle(const char *folder) {
  char path[PROCESS_PATH_MAX + 16];
  if (strlen(folder) >= sizeof run_folder) return 0;
  strcpy(run_folder, folder);
  snprintf(path, sizeof path, "%s/settings", run_folder);
  int file = is_private(run_folder) ? open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW) : -1;
  if (file < 0) return 0;
  text[0] = '\n';
  ssize_t got = read(file, text + 1, SETTINGS_BYTES_MAX + 1);
  close(file);
  int is_whole = got >= 0 && got <= (ssize_t)SETTINGS_BYTES_MAX;  // else torn or not ours
  text[is_whole ? got + 1 : 0] = 0;
  return is_whole;
}

int process_is_disabled(void) {
  const char *disabled = getenv("CONCORDIA_DISABLE");
  return disabled && *disabled && strcmp(disabled, "0") != 0;
}
