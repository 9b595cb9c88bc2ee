// What happened to the images of this process.
//
// Owns: `modules/<pid>.log` in the run folder, a JSON object a line. Promises: bounded; the file is
// opened for each line and appended to in one write, because a program may close descriptors that
// it did not open; a log that cannot be written changes nothing. Called by all files. Read by
// integrations/program/coverage.py.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "shim.h"

#define LINE_BYTES_MAX 4096
#define COUNTS_MAX 32

struct line {
  char text[LINE_BYTES_MAX];
  size_t used;
};

static _Atomic uint64_t written, dropped;
static _Atomic int is_begun;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
  const char *name;
  uint64_t value;
} counts[COUNTS_MAX];

void coverage_forked(void) {
  pthread_mutex_init(&lock, NULL);
  atomic_store(&written, 0);
  atomic_store(&dropped, 0);
  atomic_store(&is_begun, 0);
  memset(counts, 0, sizeof counts);
}

void coverage_count(const char *name, uint64_t value) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < COUNTS_MAX; i++) {
    if (!counts[i].name) counts[i].name = name;
    if (strcmp(counts[i].name, name) != 0) continue;
    counts[i].value += value;
    break;
  }
  pthread_mutex_unlock(&lock);
}

static void put(struct line *line, const char *text) {
  size_t length = strlen(text);
  if (length > sizeof line->text - line->used) return;
  memcpy(line->text + line->used, text, length);
  line->used += length;
}

// A string of JSON, cut where the line would be too long. Bytes that are no ASCII are escaped, so that
// the line is valid whatever a file is called.
static void put_string(struct line *line, const char *text) {
  char piece[8];
  put(line, "\"");
  for (; *text && line->used < LINE_BYTES_MAX - 256; text++) {
    unsigned char byte = (unsigned char)*text;
    if (byte < 0x20 || byte > 0x7e || byte == '"' || byte == '\\')
      snprintf(piece, sizeof piece, "\\u%04x", byte);
    else
      snprintf(piece, sizeof piece, "%c", byte);
    put(line, piece);
  }
  put(line, "\"");
}

static void put_text(struct line *line, const char *name, const char *text) {
  put(line, line->used == 1 ? "\"" : ",\"");
  put(line, name);
  put(line, "\":");
  put_string(line, text ? text : "");
}

static void put_number(struct line *line, const char *name, uint64_t value) {
  char number[32];
  put(line, line->used == 1 ? "\"" : ",\"");
  put(line, name);
  snprintf(number, sizeof number, "\":%llu", (unsigned long long)value);
  put(line, number);
}

static void append(struct line *line) {
  char path[PROCESS_PATH_MAX + 48];
  put(line, "}\n");
  int saved = errno;
  snprintf(path, sizeof path, "%s/modules/%d.log", process_run(), (int)getpid());
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file >= 0) {
    if (write(file, line->text, line->used) != (ssize_t)line->used) atomic_fetch_add(&dropped, 1);
    close(file);
  }
  errno = saved;
}

static void read_line_of(const char *path, char *text, size_t bytes) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t got = file < 0 ? 0 : read(file, text, bytes - 1);
  if (file >= 0) close(file);
  for (ssize_t i = 0; i + 1 < got; i++)
    if (!text[i]) text[i] = ' ';  // words of a command line
  text[got > 0 ? got : 0] = 0;
}

static void begin(void) {
  char command[512];
  struct line line = {.text = "{", .used = 1};
  if (atomic_exchange(&is_begun, 1)) return;
  read_line_of("/proc/self/cmdline", command, sizeof command);
  put_text(&line, "event", "process");
  put_number(&line, "pid", (uint64_t)getpid());
  put_number(&line, "parent", (uint64_t)getppid());
  put_text(&line, "command", command);
  append(&line);
}

// Whether there is room for a line more.
static int is_within(void) {
  uint64_t most = process_number("log_bytes", 16u << 20);
  if (atomic_fetch_add(&written, LINE_BYTES_MAX / 8) < most) return 1;
  atomic_fetch_add(&dropped, 1);
  return 0;
}

void coverage_image(const struct coverage *coverage) {
  char key[33] = "";
  struct line line = {.text = "{", .used = 1};
  coverage_count("images", 1);
  coverage_count(coverage->outcome, 1);
  if (!is_within()) return;
  begin();
  if (coverage->key)
    snprintf(key, sizeof key, "%016llx%016llx", (unsigned long long)coverage->key[0],
             (unsigned long long)coverage->key[1]);
  put_text(&line, "event", "image");
  put_text(&line, "library", coverage->library);
  put_text(&line, "kind", image_kind_name(coverage->image->kind));
  put_text(&line, "key", key);
  put_number(&line, "bytes", coverage->image->size);
  put_text(&line, "outcome", coverage->outcome);
  put_text(&line, "why", coverage->why);
  put_text(&line, "call", coverage->call);
  put_number(&line, "us", coverage->ns / 1000);
  put_number(&line, "own_us", coverage->own_ns / 1000);
  append(&line);
}

void coverage_note(const char *what, const char *why) {
  struct line line = {.text = "{", .used = 1};
  if (!is_within()) return;
  begin();
  put_text(&line, "event", "note");
  put_text(&line, "what", what);
  put_text(&line, "why", why);
  append(&line);
}

void coverage_unseen(const char *kernel, const char *why, uint64_t count) {
  struct line line = {.text = "{", .used = 1};
  if (!is_within()) return;
  put_text(&line, "event", "unseen");
  put_text(&line, "kernel", kernel);
  put_text(&line, "why", why);
  put_number(&line, "count", count);
  append(&line);
}

// Only of a process that has something to say: most of a tree of processes load no image.
__attribute__((destructor)) static void end(void) {
  struct line line = {.text = "{", .used = 1};
  if (!process_is_active() || !atomic_load(&is_begun)) return;
  launch_counted();
  unseen_told();
  put_text(&line, "event", "end");
  pthread_mutex_lock(&lock);
  for (int i = 0; i < COUNTS_MAX && counts[i].name; i++)
    put_number(&line, counts[i].name, counts[i].value);
  pthread_mutex_unlock(&lock);
  if (atomic_load(&dropped)) put_number(&line, "lines dropped", atomic_load(&dropped));
  append(&line);
}
