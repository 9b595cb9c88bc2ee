// What the files of memory at kept addresses know of each other, and others of them.
//
// Owns: the internal interface of addresses, address_memory and captures. Promises: where the
// policy keeps no addresses all of it does nothing.
#pragma once
#include "protect.h"

// --- addresses.c
enum { ADDRESSES_NONE = -1 };  // no result of the driver
struct kept {
  uint64_t address, bytes, id;  // as it was asked for; an id no other allocation has
  uint64_t freed;  // 0: it is not; else as the so manieth, and only its place is not free yet
  CUcontext context;  // NULL: it has gone
};
// ADDRESSES_NONE: ask the driver; if it has the memory, `why` is told addresses_missed(), if any.
CUresult addresses_allocate(CUdeviceptr *address, size_t bytes, const char **why);
void addresses_missed(const char *why);
CUresult addresses_free(CUdeviceptr address);  // or ADDRESSES_NONE
CUresult addresses_settle(void);  // waits for all work where something is freed, beside no capture
void addresses_context_gone(CUcontext context);
int addresses_give_back(void);  // memory that nothing is in; whether there was some
int addresses_find(uint64_t address, struct kept *found);  // of an address that it has
int addresses_has(uint64_t address);  // whether it lies in the range of what is kept

// --- address_memory.c
uint64_t range_reserve(CUdeviceptr hint, uint64_t bytes, CUdeviceptr *at);  // its granule, or 0
CUresult range_map(CUdeviceptr address, uint64_t bytes);

// --- captures.c
int captures_begins(CUstream stream, int is_per_thread);  // whether it is new
void captures_failed(CUstream stream, int is_per_thread);  // it did not begin
void captures_stream_gone(CUstream stream);
void captures_context_gone(CUcontext context);
int captures_refuse(void);  // whether there is none: none begins before captures_allow(), or soon
void captures_allow(void);
void captures_unseen(void);
