// The assembler that would have been started without us.
//
// Owns: where it lies. Promises: the user's own (TRITON_PTXAS_PATH, as `concordia run` found it)
// before the one that the calling Triton brings along, which is known by the library that this
// process has mapped; the one that `concordia run` saw only where neither can be asked. Never
// ourselves.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "assembler.h"

#define ANCESTORS_MAX 4  // a shell or a wrapper may stand between Triton and us
#define LINE_BYTES_MAX 4096

static int is_usable(const char *path) {
  struct stat found, own;
  if (access(path, X_OK) != 0 || stat(path, &found) != 0 || !S_ISREG(found.st_mode)) return 0;
  if (stat("/proc/self/exe", &own) != 0) return 0;
  return found.st_dev != own.st_dev || found.st_ino != own.st_ino;
}

// Beside the library of the Triton that this process runs.
static int is_beside_triton(int pid, const char *name, char *path, size_t bytes) {
  static const char library[] = "/_C/libtriton.so";
  char maps[64], line[LINE_BYTES_MAX];
  int is_found = 0;
  snprintf(maps, sizeof maps, "/proc/%d/maps", pid);
  FILE *file = fopen(maps, "re");
  while (file && !is_found && fgets(line, sizeof line, file)) {
    char *from = strchr(line, '/'), *to = from ? strstr(from, library) : NULL;
    if (!to) continue;
    int used = snprintf(path, bytes, "%.*s/backends/nvidia/bin/%s", (int)(to - from), from, name);
    is_found = used < (int)bytes && is_usable(path);
  }
  if (file) fclose(file);
  return is_found;
}

static int parent_of(int pid) {
  char path[64], line[512];
  int parent = 0;
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE *file = fopen(path, "re");
  const char *behind = file && fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
  if (!behind || sscanf(behind, ") %*c %d", &parent) != 1) parent = 0;
  if (file) fclose(file);
  return parent;
}

int real_find(const char *name, char *path, size_t bytes) {
  char setting[80];
  snprintf(setting, sizeof setting, "real_%s", name);
  if (process_setting(setting, path, bytes) && is_usable(path)) return 1;
  int pid = getppid();
  for (int i = 0; i < ANCESTORS_MAX && pid > 1; i++, pid = parent_of(pid))
    if (is_beside_triton(pid, name, path, bytes)) return 1;
  snprintf(setting, sizeof setting, "found_%s", name);
  return process_setting(setting, path, bytes) && is_usable(path);
}
