// native/mapped.c against a model of one byte for each page: mapped_random SEED STEPS. Prints how many stretches of several mappings were found.
#include <stdio.h>
#include <stdlib.h>

#include "mapped.c"

enum { PAGES = 96, PAGE = 4096 };
static int owner[PAGES + 2];  // of a page, from 1 on: its mapping; 0: none
static uint64_t state;

static uint64_t next(void) { state = state * 6364136223846793005ull + 1442695040888963407ull; return state >> 33; }
static uint64_t address_of(int page) { return 0x7f0000000000ull + (uint64_t)page * PAGE; }

static void unmap(int mapping) {
  int first = 1, last;
  while (first <= PAGES && owner[first] != mapping) first++;
  for (last = first; last <= PAGES && owner[last] == mapping; last++) owner[last] = 0;
  if (last > first) mapped_goes(address_of(first), (uint64_t)(last - first) * PAGE);
}

int main(int words, char **word) {
  if (words < 3) return 2;
  state = strtoull(word[1], NULL, 10);
  long several = 0, steps = atol(word[2]);
  for (int step = 1; step <= steps; step++) {
    int page = 1 + (int)(next() % PAGES), end = page;
    if (owner[page]) unmap(owner[page]);
    else if (next() % 3) {
      for (int most = 1 + (int)(next() % 6); end <= PAGES && !owner[end] && end - page < most; end++) owner[end] = step;
      mapped_came(address_of(page), (uint64_t)(end - page) * PAGE);
    }
    for (int at = 0; at < PAGES + 2; at++) {
      int first = at, last = at, mappings = 1;
      struct allocation found = {7, 9, NULL};
      while (owner[at] && owner[first - 1]) mappings += owner[first] != owner[first - 1], first--;
      while (owner[at] && owner[last]) last++;
      mapped_around(address_of(at) + next() % PAGE, &found);
      int is_right = owner[at] ? found.address == address_of(first) && found.bytes == (uint64_t)(last - first) * PAGE : found.address == 7 && found.bytes == 9;
      if (!is_right) { printf("step %d, page %d: %lx %lu\n", step, at, found.address, found.bytes); return 1; }
      several += mappings > 1;
    }
  }
  printf("%ld\n", several);
  return 0;
}
