// A program that Triton takes for ptxas, and that has it assemble texts with store marks.
//
// Owns: what becomes of a call. Promises: on any doubt, and whenever the assembler does not take
// the marked text, the real assembler takes our place with the arguments as they came, so exit
// code, output and messages are its own; nothing waits without a bound. Asked for its version it
// adds a line that names the marks, because Triton finds its finished kernels by that text: a run
// without us never finds those with marks. Built and placed by integrations/program/assembler.py.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "assembler.h"

#define ARGUMENTS_MAX 1024
#define PATH_OF_TEXT_BYTES 48

enum { NOT_FOUND = 127 };

// What is linked later, debugged or told elsewhere stays as it is.
static int is_left_alone(const char *argument) {
  static const char *const names[] = {"-c", "--compile-only", "-ewp", "--extensible-whole-program",
                                      "-optf", "--options-file", "-g", "--device-debug"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    size_t length = strlen(names[i]);
    if (strncmp(argument, names[i], length) == 0 && (!argument[length] || argument[length] == '='))
      return 1;
  }
  return 0;
}

static int is_output_next(const char *argument) {
  return strcmp(argument, "-o") == 0 || strcmp(argument, "--output-file") == 0;
}

// Text that may be PTX: the rewriter finds out.
static int is_text(const char *path) {
  char first = 0;
  struct stat about;
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  int is_read = file >= 0 && fstat(file, &about) == 0 && S_ISREG(about.st_mode) &&
                pread(file, &first, 1, 0) == 1;
  if (file >= 0) close(file);
  return is_read && memchr("./ \t\r\n", first, 6) != NULL;
}

// The index of the only argument that is a text; 0: leave the call as it is.
static int input_of(int count, char **arguments) {
  int found = 0, is_output = 0;
  for (int i = 1; i < count; i++) {
    if (is_left_alone(arguments[i])) return 0;
    if (arguments[i][0] != '-' && !is_output && is_text(arguments[i])) {
      if (found) return 0;
      found = i;
    }
    is_output = is_output_next(arguments[i]);
  }
  return found;
}

static int asks_version(int count, char **arguments) {
  for (int i = 1; i < count; i++)
    if (strcmp(arguments[i], "--version") == 0 || strcmp(arguments[i], "-V") == 0) return 1;
  return 0;
}

static int is_good(const struct child *child) {
  return child->status >= 0 && WIFEXITED(child->status) && WEXITSTATUS(child->status) == 0;
}

// The real one's text and our line, or nothing: then Triton goes on to the assembler that it brings
// along. Never the real one's text alone, under which runs without us find their kernels.
static int tell_version(const char *real, char **arguments, uint64_t bound_ns) {
  char key[64];
  struct child child;
  if (!process_setting("assembler_key", key, sizeof key)) return 0;
  child_run(real, arguments, bound_ns, &child);
  if (!is_good(&child) || !child_tell(&child)) return 0;
  dprintf(1, "Store marks of Concordia, options %s\n", key);
  return 0;
}

static int is_assembled(const char *real, int count, char **arguments, uint64_t bound_ns) {
  char path[PATH_OF_TEXT_BYTES], *marked[ARGUMENTS_MAX + 1];
  int input = count <= ARGUMENTS_MAX ? input_of(count, arguments) : 0;
  int text = input ? marked_text(arguments[input]) : -1;
  if (text < 0) return 0;
  snprintf(path, sizeof path, "/proc/self/fd/%d", text);
  memcpy(marked, arguments, sizeof *marked * ((size_t)count + 1));
  marked[input] = path;
  struct child child;
  child_run(real, marked, bound_ns, &child);
  close(text);
  if (is_good(&child)) return child_tell(&child);
  folder_note("a text was assembled without marks", child.status < 0 ? "the assembler was too slow"
                                                                     : "the assembler refused it");
  return 0;
}

int main(int count, char **arguments) {
  int is_active = folder_begin();
  if (count == 2 && strcmp(arguments[1], "--concordia") == 0) return is_active ? 0 : 1;
  char real[PROCESS_PATH_MAX];
  if (count < 1 || !real_find(folder_name(), real, sizeof real)) {
    // No version: Triton goes on to the assembler that it brings along.
    if (asks_version(count, arguments)) return 0;
    fprintf(stderr, "%s of Concordia: no assembler to stand before; set TRITON_PTXAS_PATH\n",
            folder_name());
    return NOT_FOUND;
  }
  arguments[0] = real;  // its messages begin with its own name
  uint64_t bound_ns = 1000000u * process_number("assembler_run_ms", 120000);
  if (is_active && asks_version(count, arguments)) return tell_version(real, arguments, bound_ns);
  if (is_active && is_assembled(real, count, arguments, bound_ns)) return 0;
  execv(real, arguments);
  fprintf(stderr, "%s: %s\n", real, strerror(errno));
  return NOT_FOUND;
}
