// The fake driver that works later, fake_gpu.c, with answers to questions about addresses.
//
// Owns: the table of what is allocated and mapped, as far as it is asked for. Promises: it answers as the vendor's does: memory that is mapped ends where its
// mapping ends, an attribute says the whole reservation of it, it has one id for each mapping, belongs to no context, and cannot be shared by the old kind of
// IPC; what nobody has is an error, or zeros where several attributes are asked for at once.
#define cuMemAlloc_v2 gpu_cuMemAlloc_v2
#define cuMemFree_v2 gpu_cuMemFree_v2
#define cuMemCreate gpu_cuMemCreate
#define cuMemMap gpu_cuMemMap
#define cuMemUnmap gpu_cuMemUnmap
#define cuPointerGetAttribute gpu_cuPointerGetAttribute
#include "fake_gpu.c"
#undef cuMemAlloc_v2
#undef cuMemFree_v2
#undef cuMemCreate
#undef cuMemMap
#undef cuMemUnmap
#undef cuPointerGetAttribute

static struct known { uint64_t address, bytes, id; int is_mapped; } table[1 << 12];
static int created;
static uint64_t ids;

// With the lock.
static struct known *found(uint64_t address) {
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (address - table[i].address < table[i].bytes) return &table[i];
  return NULL;
}
static void learn(uint64_t address, uint64_t bytes, int is_mapped) {
  pthread_mutex_lock(&lock);
  struct known *place = table;
  while (place->bytes) if (++place == table + sizeof table / sizeof *table) abort();
  *place = (struct known){address, bytes, ++ids, is_mapped};
  pthread_mutex_unlock(&lock);
}
static void forget(uint64_t address) {
  pthread_mutex_lock(&lock);
  struct known *place = found(address);
  if (place && place->address == address) place->bytes = 0;
  pthread_mutex_unlock(&lock);
}
API int fake_created(void) { return created; }
API uint64_t fake_live(void) { return live; }
API void fake_leave(uint64_t bytes) { most = live + bytes; }  // so much memory is left

API R cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  R result = gpu_cuMemAlloc_v2(address, bytes);
  if (result == OK) learn(*address, bytes, 0);
  return result;
}
API R cuMemFree_v2(uint64_t address) { forget(address); return gpu_cuMemFree_v2(address); }
API R cuMemCreate(uint64_t *handle, size_t bytes, const void *property, unsigned long long flags) { created++; return gpu_cuMemCreate(handle, bytes, property, flags); }
API R cuMemMap(uint64_t address, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) { learn(address, bytes, 1); return gpu_cuMemMap(address, bytes, offset, handle, flags); }
API R cuMemUnmap(uint64_t address, size_t bytes) { forget(address); return gpu_cuMemUnmap(address, bytes); }

static R about(const struct known *known, int attribute, void *value) {
  switch (attribute) {
    case 1: *(uint64_t *)value = known->is_mapped ? 0 : CONTEXT; return OK;
    case 2: *(unsigned *)value = 2; return OK;
    case 7: *(uint64_t *)value = known->id; return OK;
    case 10: *(unsigned *)value = !known->is_mapped; return OK;
    case 11: *(uint64_t *)value = known->is_mapped ? ARENA + ARENA_BYTES / 2 : known->address; return OK;
    case 12: *(uint64_t *)value = known->is_mapped ? 1ull << 40 : known->bytes; return OK;
    default: return INVALID;
  }
}
API R cuPointerGetAttribute(void *value, int attribute, uint64_t address) {
  pthread_mutex_lock(&lock);
  struct known *known = found(address);
  R result = known ? about(known, attribute, value) : INVALID;
  pthread_mutex_unlock(&lock);
  return result;
}
API R cuPointerGetAttributes(unsigned count, const int *attributes, void **values, uint64_t address) {
  R result = OK;
  pthread_mutex_lock(&lock);
  struct known *known = found(address);
  for (unsigned i = 0; i < count && result == OK; i++)
    if (known) result = about(known, attributes[i], values[i]);
    else memset(values[i], 0, attributes[i] == 2 || attributes[i] == 10 ? 4 : 8);
  pthread_mutex_unlock(&lock);
  return result;
}
API R cuMemGetAddressRange_v2(uint64_t *start, size_t *bytes, uint64_t address) {
  pthread_mutex_lock(&lock);
  struct known *known = found(address);
  if (known && start) *start = known->address;
  if (known && bytes) *bytes = known->bytes;
  pthread_mutex_unlock(&lock);
  return known ? OK : NOT_FOUND;
}
API R cuIpcGetMemHandle(void *handle, uint64_t address) {
  pthread_mutex_lock(&lock);
  struct known *known = found(address);
  pthread_mutex_unlock(&lock);
  memset(handle, 0, 64);
  return known && !known->is_mapped ? OK : INVALID;
}
API R cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return OK; }
