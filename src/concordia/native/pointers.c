// What the program is told of memory whose addresses are kept.
//
// Owns: the hooks of questions about an address. Promises: for the program an allocation is as the
// driver's own: it begins and ends where it was asked for, whatever it is mapped with, belongs to
// the context that it was made in, and has an id that no other has; between allocations there is
// nothing. All else the driver answers, for any other address everything: so it says itself that
// this memory is not for IPC of the old kind. Called by the program, and by libraries that register
// memory. Which allocations there are says addresses.c.
#define _GNU_SOURCE
#include "addresses.h"

#define NOBODYS 16  // asked of the driver in place of an address that is in no allocation

static int is_told(const struct kept *kept, int attribute, void *value) {
  if (!value) return 0;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      if (!kept->context) return 0;  // it has gone, and the driver knows of none
      *(CUcontext *)value = kept->context;
      return 1;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(uint64_t *)value = kept->id; return 1;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)value = kept->address; return 1;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = kept->bytes; return 1;
    default: return 0;
  }
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *bytes, CUdeviceptr address) {
  struct kept found;
  if (!addresses_has(address)) return REAL(cuMemGetAddressRange_v2, start, bytes, address);
  if (!addresses_find(address, &found)) return REAL(cuMemGetAddressRange_v2, start, bytes, NOBODYS);
  if (start) *start = found.address;
  if (bytes) *bytes = found.bytes;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
  struct kept found;
  if (addresses_has(address)) {
    if (!addresses_find(address, &found)) address = NOBODYS;
    else if (is_told(&found, attribute, value)) return CUDA_SUCCESS;
  }
  return REAL(cuPointerGetAttribute, value, attribute, address);
}

CUresult cuPointerGetAttributes(unsigned int count, int *attributes, void **values,
                                CUdeviceptr address) {
  struct kept found;
  int is_kept = addresses_has(address) && addresses_find(address, &found);
  if (addresses_has(address) && !is_kept) address = NOBODYS;
  CUresult result = REAL(cuPointerGetAttributes, count, attributes, values, address);
  for (unsigned int i = 0; is_kept && result == CUDA_SUCCESS && i < count; i++)
    is_told(&found, attributes[i], values[i]);
  return result;
}
