// Which library a piece of memory belongs to.
//
// Owns: the name of the file that was mapped where an address lies. Promises: takes no lock of the
// loader's (dladdr does): an image may be loaded by a thread that another one, inside dlopen, waits
// for. Called by load.c. It resolves no symbol.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "shim.h"

#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 35)
static int of_program(char *path, size_t bytes) {
  ssize_t got = readlink("/proc/self/exe", path, bytes - 1);
  path[got > 0 ? got : 0] = 0;
  return got > 0;
}

int library_of(const void *address, char *path, size_t bytes) {
  struct dl_find_object found;
  path[0] = 0;
  if (_dl_find_object((void *)(uintptr_t)address, &found) != 0) return 0;
  const char *name = found.dlfo_link_map->l_name;
  if (!name || !*name) return of_program(path, bytes);
  snprintf(path, bytes, "%s", name);
  return 1;
}
#else
// Slower: the kernel's own table of what is mapped.
int library_of(const void *address, char *path, size_t bytes) {
  char line[1024];
  int is_found = 0;
  path[0] = 0;
  FILE *maps = fopen("/proc/self/maps", "re");
  while (maps && !is_found && fgets(line, sizeof line, maps)) {
    unsigned long from, to;
    char *name = strchr(line, '/');
    if (sscanf(line, "%lx-%lx", &from, &to) != 2) continue;
    if ((uintptr_t)address < from || (uintptr_t)address >= to) continue;
    if (!name) break;
    name[strcspn(name, "\n")] = 0;
    snprintf(path, bytes, "%s", name);
    is_found = 1;
  }
  if (maps) fclose(maps);
  return is_found;
}
#endif
