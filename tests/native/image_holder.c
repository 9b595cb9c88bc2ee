// A library that has to do with images; see tests/test_shim_opaque.py. IMAGE is the text of one, CONTAINER the bytes of another.
#include <stddef.h>
#include <stdint.h>

const char image[] = IMAGE;
const unsigned char container[] = {CONTAINER};

struct {
  uint32_t magic, version;
  const void *data;
  void *unused;
} wrapper = {0x466243b1, 1, NULL, NULL};

int load(int (*loader)(void **, const void *), void **handle, const void *given) {
  volatile int result = loader(handle, given);  // no jump: the caller is here
  return result;
}
