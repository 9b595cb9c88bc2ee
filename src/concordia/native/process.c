// This process: whether it is one of a run, and what the run says.
//
// Owns: the settings, and the moment after a fork. Promises: read once, before any hook can be
// called; without CONCORDIA_RUN, with CONCORDIA_DISABLE=1, or with a run folder that is not this
// user's alone every hook only forwards. A child of fork starts anew: it has no context, no images
// and a log of its own. Called by all files. It writes nothing.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shim.h"

#define SETTINGS_BYTES_MAX 8192  // a dozen lines

static char run_folder[PROCESS_PATH_MAX];
static char text[SETTINGS_BYTES_MAX];  // "\nname=value\n...", not changed afterwards
static int is_active;

int process_is_active(void) { return is_active; }

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

static int read_settings(void) {
  char path[PROCESS_PATH_MAX + 16];
  snprintf(path, sizeof path, "%s/settings", run_folder);
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (file < 0) return 0;
  text[0] = '\n';
  ssize_t got = read(file, text + 1, sizeof text - 2);
  close(file);
  if (got < 0 || got == (ssize_t)sizeof text - 2) return 0;  // torn or not ours
  text[got + 1] = 0;
  return 1;
}

static void forked(void) {
#define PART(name) name##_forked();
#include "parts.def"
#undef PART
}

// After resolve.c, and before any code of a library that needs us.
__attribute__((constructor(102))) static void begin(void) {
  const char *run = getenv("CONCORDIA_RUN");
  const char *disabled = getenv("CONCORDIA_DISABLE");
  if (!run || !*run || strlen(run) >= sizeof run_folder) return;
  if (disabled && *disabled && strcmp(disabled, "0") != 0) return;
  strcpy(run_folder, run);
  if (!is_private(run_folder) || !read_settings()) return;
  if (pthread_atfork(NULL, NULL, forked)) return;
  is_active = 1;
}
