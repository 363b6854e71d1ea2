// Entry points that compilers call from instrumented code: -fsanitize=thread before each load and
// store, -fsanitize=bounds,alignment,integer-divide-by-zero on a violation.  The sanitizers' own
// libraries are never linked.
#include <cstdio>
#include <cstring>

#include "state.h"

using rt::check_access;

// The caller's address, one byte back, so that it lies in the line that called.
#define CALLER (static_cast<const char*>(__builtin_return_address(0)) - 1)

#define HOOK(name, bytes, is_write) \
  void __tsan_##name(void* at) { check_access(at, bytes, is_write, false, CALLER); }
#define HOOK_BOTH(name, bytes)                        \
  void __tsan_##name(void* at) {                      \
    check_access(at, bytes, false, false, CALLER);    \
    check_access(at, bytes, true, false, CALLER);     \
  }
#define HOOKS(bytes)                                  \
  HOOK(read##bytes, bytes, false)                     \
  HOOK(write##bytes, bytes, true)                     \
  HOOK(volatile_read##bytes, bytes, false)            \
  HOOK(volatile_write##bytes, bytes, true)            \
  HOOK_BOTH(read_write##bytes, bytes)
#define UNALIGNED_HOOKS(bytes)                        \
  HOOK(unaligned_read##bytes, bytes, false)           \
  HOOK(unaligned_write##bytes, bytes, true)           \
  HOOK(unaligned_volatile_read##bytes, bytes, false)  \
  HOOK(unaligned_volatile_write##bytes, bytes, true)  \
  HOOK_BOTH(unaligned_read_write##bytes, bytes)

extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
UNALIGNED_HOOKS(2) UNALIGNED_HOOKS(4) UNALIGNED_HOOKS(8) UNALIGNED_HOOKS(16)

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

void __tsan_read_range(void* at, unsigned long bytes) {
  check_access(at, bytes, false, false, CALLER);
}
void __tsan_write_range(void* at, unsigned long bytes) {
  check_access(at, bytes, true, false, CALLER);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, false, false, CALLER);
  check_access(to, bytes, true, false, CALLER);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  check_access(from, bytes, false, false, CALLER);
  check_access(to, bytes, true, false, CALLER);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  check_access(to, bytes, true, false, CALLER);
  return memset(to, value, bytes);
}

// The return address within a function is its name: twice on one stack is a recursion.
void __tsan_func_entry(void*) {
  rt::Worker* worker = rt::this_worker();
  if (!worker || !worker->current || worker->launch->mode != rt::kCheck) return;
  rt::Lane* lane = worker->current;
  uintptr_t pc = reinterpret_cast<uintptr_t>(CALLER);
  for (uint32_t i = 0; i < lane->depth && i < 64; i++) {
    if (lane->frames[i] != pc) continue;
    rt::report(worker, pc, true, "RECURSION: a function calls itself (not allowed in MSL)");
    worker->leave();
    return;
  }
  if (lane->depth < 64) lane->frames[lane->depth] = pc;
  lane->depth++;
}
void __tsan_func_exit() {
  rt::Worker* worker = rt::this_worker();
  if (worker && worker->current && worker->current->depth) worker->current->depth--;
}

struct SourcePlace {
  const char* file;
  uint32_t line, column;
};

static void violation(void* place, const char* what) {
  rt::Worker* worker = rt::this_worker();
  if (!worker || !worker->current) return;
  auto* source = static_cast<SourcePlace*>(place);
  rt::report(worker, 0, true, "%s at %s:%u", what, rt::base_name(source->file), source->line);
  worker->leave();
}

void __ubsan_handle_out_of_bounds(void* place, unsigned long index) {
  char text[96];
  snprintf(text, sizeof text, "BOUNDS: index %ld outside a private or threadgroup array",
           static_cast<long>(index));
  violation(place, text);
}
void __ubsan_handle_type_mismatch_v1(void* place, unsigned long pointer) {
  char text[96];
  snprintf(text, sizeof text, "ALIGN: misaligned or null pointer 0x%lx", pointer);
  violation(place, text);
}
void __ubsan_handle_divrem_overflow(void* place, unsigned long, unsigned long) {
  violation(place, "DIV: integer division by zero or overflow");
}
}
