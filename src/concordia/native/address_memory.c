// The driver's part in memory whose addresses are kept.
//
// Owns: the calls that reserve a range of addresses and map memory into it. Promises: what could
// not be had is as if it had not been asked for. Called by addresses.c, under its lock.
#include "addresses.h"

static const CUmemAllocationProp property = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                             .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};

uint64_t range_reserve(CUdeviceptr hint, uint64_t bytes, CUdeviceptr *at) {
  int devices = 0, is_virtual = 0;
  size_t granule = 0;
  if (REAL(cuDeviceGetCount, &devices) != CUDA_SUCCESS || devices != 1) return 0;
  if (REAL(cuDeviceGetAttribute, &is_virtual,
           CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 0) != CUDA_SUCCESS ||
      !is_virtual)
    return 0;
  if (REAL(cuMemGetAllocationGranularity, &granule, &property, CU_MEM_ALLOC_GRANULARITY_MINIMUM) !=
          CUDA_SUCCESS ||
      !granule)
    return 0;
  if (REAL(cuMemAddressReserve, at, bytes, 0, hint, 0) != CUDA_SUCCESS) return 0;
  return granule;
}

CUresult range_map(CUdeviceptr address, uint64_t bytes) {
  const CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0},
                                  CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handle;
  CUresult result = REAL(cuMemCreate, &handle, bytes, &property, 0);
  if (result != CUDA_SUCCESS) return result;
  result = REAL(cuMemMap, address, bytes, 0, handle, 0);
  if (result == CUDA_SUCCESS) {
    result = REAL(cuMemSetAccess, address, bytes, &access, 1);
    if (result != CUDA_SUCCESS) REAL(cuMemUnmap, address, bytes);
  }
  REAL(cuMemRelease, handle);  // the mapping keeps the memory
  return result;
}
