// What the files of the stand-in for ptxas know of each other.
//
// Owns: the internal interface. Promises: nothing of the shim is linked but what reads its cache
// and asks the rewriter (cache_file.c, hash.c, rewriter.c), and what reads the run's settings
// (process_settings.c).
#pragma once
#include "../shim.h"

// --- folder.c: the run that this program lies in
int folder_begin(void);               // 0: no run, or not this user's alone, or switched off
const char *folder_name(void);        // that this program was started under, such as "ptxas"
void folder_note(const char *what, const char *why);  // a line for `concordia modules`

// --- real.c
int real_find(const char *name, char *path, size_t bytes);  // the assembler that is stood before

// --- marked.c
int marked_text(const char *path);  // descriptor of the text with its marks, -1: there is none

// --- child.c
struct child {
  int status;     // of waitpid; -1: it was not started, or not done in time
  int out, err;   // what it said, in memory
};

void child_run(const char *path, char *const *arguments, uint64_t bound_ns, struct child *child);
int child_tell(const struct child *child);  // on our own stdout and stderr; 0: not all of it
