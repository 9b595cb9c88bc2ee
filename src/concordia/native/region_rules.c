// Which memory is protected.
//
// Owns: how far each rule of the policy has come. Promises: a region is an allocation that a rule
// names, or the part of one that a kernel's argument names; of several rules the first counts; names
// are by the order of the program's own allocations, so a resumed program has the same; a kernel's
// rule is followed once, and where its argument is no such memory nothing is protected. Called by
// allocations.c and launches.
#define _GNU_SOURCE
#include <stdio.h>

#include "protect.h"

static uint64_t matched[RULES_MAX];  // allocations that a rule has met; with the lock
static _Atomic uint64_t done_rules;  // kernel rules that have their region

void rules_allocated(const struct allocation *made) {
  for (int i = 0; i < policy.rule_count; i++) {
    const struct rule *rule = &policy.rules[i];
    char name[NAME_MAX_BYTES + 24];
    if (rule->kernel[0] || made->bytes < rule->size_min || made->bytes > rule->size_max) continue;
    if (rule->stack[0] && !stack_matches(rule->stack)) continue;
    protect_lock();
    uint64_t ordinal = matched[i]++;
    protect_unlock();
    if (rule->ordinal >= 0 && (uint64_t)rule->ordinal != ordinal) continue;
    if (rule->ordinal >= 0) snprintf(name, sizeof name, "%s", rule->name);
    else snprintf(name, sizeof name, "%s.%lu", rule->name, ordinal);
    regions_add(name, made);
    return;  // the first rule that names it
  }
}

void rules_launched(const struct kernel *kernel, const struct launch *launch) {
  uint64_t rules = kernel->rules & ~atomic_load(&done_rules);
  for (int i = 0; rules; i++, rules >>= 1) {
    struct allocation found = {0};
    const struct rule *rule = &policy.rules[i];
    uint64_t word;
    if (!(rules & 1)) continue;
    if (atomic_fetch_or(&done_rules, 1ull << i) & 1ull << i) continue;
    if (!arguments_word(kernel, launch->parameters, launch->extra, rule->argument, &word)) {
      protect_lose("region %s: kernel %s has no pointer %d", rule->name, kernel->name,
                   rule->argument);
      return;
    }
    protect_lock();
    int is_there = allocation_of(word, &found);
    protect_unlock();
    uint64_t start = rule->bytes ? word : found.address;
    uint64_t bytes = rule->bytes ? rule->bytes : found.bytes;
    if (!is_there || start + bytes > found.address + found.bytes) {
      protect_lose("region %s: argument %d of kernel %s is no memory of %lu bytes", rule->name,
                   rule->argument, kernel->name, bytes);
      return;
    }
    found.address = start;
    found.bytes = bytes;
    regions_add(rule->name, &found);
  }
}
