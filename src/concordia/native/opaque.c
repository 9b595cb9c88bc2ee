// Libraries that are left as they are.
//
// Owns: whether a file is one of those that the run names. Promises: it is asked for each load, so
// what the same bytes became elsewhere decides nothing; where there is no list, or where a name was
// cut, the answer is yes; a pattern means what it means to instrument/options.py, in whatever
// locale the program is; no lock, no memory. Called by load.c. It opens no file.
#define _GNU_SOURCE
#include <string.h>

#include "shim.h"

#define LIST_BYTES_MAX 4096  // as config.py has it (OPAQUE_BYTES_MAX)
#define SEPARATOR '/'        // in no name of a file

static unsigned char lower(char letter) {
  return (unsigned char)(letter >= 'A' && letter <= 'Z' ? letter - 'A' + 'a' : letter);
}

static int is_match(const char *at, const char *end, const char *name) {
  const char *star = NULL, *behind = NULL;  // the last *, and what it has not swallowed
  for (;;) {
    if (at < end && *at == '*') {
      star = ++at;
      behind = name;
    } else if (!*name && at == end) {
      return 1;
    } else if (*name && at < end && (*at == '?' || lower(*at) == lower(*name))) {
      at++, name++;
    } else {
      if (!star || !*behind) return 0;
      at = star;
      name = ++behind;
    }
  }
}

int opaque_library(const char *path) {
  char list[LIST_BYTES_MAX + 1];
  if (strlen(path) >= PROCESS_PATH_MAX - 1 || !process_setting("opaque", list, sizeof list))
    return 1;
  const char *name = strrchr(path, '/');
  name = name ? name + 1 : path;
  if (strncmp(name, "lib", 3) == 0) name += 3;
  for (const char *at = list, *end; *at; at = *end ? end + 1 : end) {
    end = strchrnul(at, SEPARATOR);
    if (is_match(at, end, name)) return 1;
  }
  return 0;
}
