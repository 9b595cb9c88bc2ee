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

// The bracket that closes the set at `at`, such as [a-z] or [!0-9]; NULL: that is no set.
static const char *set_end(const char *at, const char *end) {
  const char *close = at + 1;
  if (close < end && *close == '!') close++;
  if (close < end && *close == ']') close++;
  return close < end ? memchr(close, ']', (size_t)(end - close)) : NULL;
}

static int is_in_set(const char *at, const char *close, char letter) {
  int is_without = at[1] == '!', is_named = 0;
  for (at += 1 + is_without; at < close;) {
    int is_range = close - at > 2 && at[1] == '-';
    const char *last = is_range ? at + 2 : at;
    is_named |= lower(*at) <= lower(letter) && lower(letter) <= lower(*last);
    at = last + 1;
  }
  return is_named != is_without;
}

// Whether one letter is what the pattern wants next; `at` moves behind that.
static int is_letter(const char **at, const char *end, char letter) {
  const char *close = **at == '[' ? set_end(*at, end) : NULL;
  int is_right = close          ? is_in_set(*at, close, letter)
                 : **at == '?' ? 1
                               : lower(**at) == lower(letter);
  *at = (close ? close : *at) + 1;
  return is_right;
}

static int is_match(const char *at, const char *end, const char *name) {
  const char *star = NULL, *behind = NULL;  // the last *, and what it has not swallowed
  for (;;) {
    if (at < end && *at == '*') {
      star = ++at;
      behind = name;
    } else if (!*name && at == end) {
      return 1;
    } else if (*name && at < end && is_letter(&at, end, *name)) {
      name++;
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
