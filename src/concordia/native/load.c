// Images on their way into the driver.
//
// Owns: the hooks of loading and unloading. Promises: the driver is called exactly once for each
// call. Called by the program.
#include "shim.h"

CUresult cuModuleLoad(CUmodule *module, const char *path) {
  return REAL(cuModuleLoad, module, path);
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  return REAL(cuModuleLoadData, module, image);
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int count, void *options,
                            void **values) {
  return REAL(cuModuleLoadDataEx, module, image, count, options, values);
}

CUresult cuModuleLoadFatBinary(CUmodule *module, const void *image) {
  return REAL(cuModuleLoadFatBinary, module, image);
}

CUresult cuModuleUnload(CUmodule module) { return REAL(cuModuleUnload, module); }

CUresult cuLibraryLoadData(CUlibrary *library, const void *image, void *jit_options,
                           void **jit_values, unsigned int jit_count, void *options, void **values,
                           unsigned int count) {
  return REAL(cuLibraryLoadData, library, image, jit_options, jit_values, jit_count, options,
              values, count);
}

CUresult cuLibraryLoadFromFile(CUlibrary *library, const char *path, void *jit_options,
                               void **jit_values, unsigned int jit_count, void *options,
                               void **values, unsigned int count) {
  return REAL(cuLibraryLoadFromFile, library, path, jit_options, jit_values, jit_count, options,
              values, count);
}

CUresult cuLibraryUnload(CUlibrary library) { return REAL(cuLibraryUnload, library); }
