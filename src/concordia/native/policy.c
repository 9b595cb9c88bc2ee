// What is protected, as the launcher wrote it down.
//
// Owns: `policy`, and the state in which protection is. Promises: lines that do not fit mean no
// protection, said in one line; a forked child is never protected: it is not the process that the
// agent watches. Called at load, by the loader.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

enum { FORMAT = 1, LINE_BYTES = 1024, EXIT_LOST = 70 };

struct policy policy;
char protect_folder[3072];
_Atomic int protect_mode = PROTECT_OFF;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void protect_lock(void) { pthread_mutex_lock(&lock); }
void protect_unlock(void) { pthread_mutex_unlock(&lock); }

void protect_lose(const char *format, ...) {
  int before = atomic_exchange(&protect_mode, PROTECT_OFF);
  if (before == PROTECT_OFF) return;
  char reason[sizeof board->reason] = {0};
  va_list values;
  va_start(values, format);
  vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  if (board) {
    memcpy(board->reason, reason, sizeof reason);
    // pairs with the looks at it in bring.c, and of the agent: the reason is there
    // Release: the reason comes first. Its partner is the load of `lost` in program_pages.py.
    atomic_store_explicit(&board->lost, 1, memory_order_release);
  }
  if (before == PROTECT_RECORD) {
    notice("concordia: unprotected from here on: %s", reason);
    return;
  }
  // What this program would do next would rest on bytes that are not there.
  notice("concordia: cannot resume: %s", reason);
  _exit(EXIT_LOST);
}

static int read_rule(const char *line) {
  if (policy.rule_count == RULES_MAX) return 0;
  struct rule *rule = &policy.rules[policy.rule_count++];
  int found = sscanf(line, "region %63s %lu %lu %ld %d %lu %159s %159s", rule->name,
                     &rule->size_min, &rule->size_max, &rule->ordinal, &rule->argument,
                     &rule->bytes, rule->stack, rule->kernel);
  if (strcmp(rule->stack, "-") == 0) rule->stack[0] = 0;
  if (strcmp(rule->kernel, "-") == 0) rule->kernel[0] = 0;
  return found == 8;
}

static int read_trigger(const char *line) {
  char on[32];
  if (policy.trigger_count == TRIGGERS_MAX) return 0;
  struct trigger *trigger = &policy.triggers[policy.trigger_count++];
  if (sscanf(line, "trigger %31s %lu %lu %159s", on, &trigger->every, &trigger->interval_us,
             trigger->kernel) != 4 ||
      trigger->every == 0)
    return 0;
  if (strcmp(on, "graph-launch") == 0) trigger->on = ON_GRAPH;
  else if (strcmp(on, "kernel") == 0) trigger->on = ON_KERNEL;
  else if (strcmp(on, "stream-synchronize") == 0) trigger->on = ON_SYNCHRONIZE;
  else return 0;
  return 1;
}

static int read_line(const char *line) {
  if (strncmp(line, "region ", 7) == 0) return read_rule(line);
  if (strncmp(line, "trigger ", 8) == 0) return read_trigger(line);
  if (strncmp(line, "trust ", 6) == 0)
    return policy.trusted_count < TRUSTED_MAX &&
           sscanf(line, "trust %159s", policy.trusted[policy.trusted_count++]) == 1;
  if (strncmp(line, "maps ", 5) == 0)
    return policy.maps_count < TRUSTED_MAX &&
           sscanf(line, "maps %159s", policy.maps[policy.maps_count++]) == 1;
  return sscanf(line, "warm %lu", &policy.warm) == 1 ||
         sscanf(line, "addresses %d", &policy.keeps_addresses) == 1 ||
         sscanf(line, "audit %lu", &policy.audit) == 1 ||
         sscanf(line, "stage %lu", &policy.stage_bytes) == 1 ||
         sscanf(line, "reads %lu", &policy.reads_bytes) == 1;
}

static int read_policy(const char *path) {
  char line[LINE_BYTES];
  int format = 0, is_good = 0;
  FILE *file = fopen(path, "re");
  if (!file) return 0;
  if (fgets(line, sizeof line, file) && sscanf(line, "concordia-policy %d", &format) == 1)
    is_good = format == FORMAT;
  while (is_good && fgets(line, sizeof line, file)) is_good = read_line(line);
  fclose(file);
  return is_good && policy.rule_count > 0 && policy.trigger_count > 0;
}

static void leave_child_alone(void) {
  // its parent may have forked while it held the lock
  pthread_mutex_t fresh = PTHREAD_MUTEX_INITIALIZER;
  lock = fresh;
  atomic_store(&protect_mode, PROTECT_OFF);
}

// After resolve(): the driver's functions are there.
__attribute__((constructor(102))) static void open_protection(void) {
  const char *folder = getenv("CONCORDIA_PROTECT");
  char path[4096];
  if (!folder || !*folder || process_is_disabled()) return;
  if (strlen(folder) >= sizeof protect_folder) return;
  strcpy(protect_folder, folder);
  snprintf(path, sizeof path, "%s/policy", folder);
  if (!read_policy(path)) {
    notice("concordia: unprotected: %s cannot be read", path);
    return;
  }
  pthread_atfork(NULL, NULL, leave_child_alone);
  // Until the first context this is only a wish: board_claim() finds out who is protected.
  atomic_store(&protect_mode, PROTECT_RECORD);
}
