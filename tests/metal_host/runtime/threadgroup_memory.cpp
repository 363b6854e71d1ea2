// Threadgroup memory: variables are placed on first use, filled with garbage, 64 bytes apart.
#include <cstring>

#include "state.h"

using namespace rt;

namespace {

constexpr uint32_t kGap = 64;  // an overrun lands here, and is seen

void* place(Worker* worker, const void* site, uint32_t size, uint32_t align, const char* name) {
  uint32_t offset = (worker->arena_used + kGap + align - 1) & ~(align - 1);
  worker->arena_total += (size + 15) & ~15u;
  if (offset + size + kGap > kArenaBytes) {
    report(worker, 0, true, "TGMEM: threadgroup memory far over the limit ('%s', %u bytes)", name,
           size);
    if (worker->current) worker->leave();
    return worker->arena;
  }
  memset(worker->arena + offset, 0xff, size);  // NaN, -1: nothing initialises it on a GPU
  for (uint32_t i = 0; i < size && !worker->arena_shadow.empty(); i++)
    worker->arena_shadow[offset + i] = Cell{};
  worker->arena_used = offset + size;
  uintptr_t at = reinterpret_cast<uintptr_t>(worker->arena) + offset;
  worker->variables.push_back({site, at, at + size, name});
  return worker->arena + offset;
}

}  // namespace

extern "C" {
void* msl_rt_threadgroup(const void* site, unsigned long size, unsigned long align,
                         const char* name) {
  Worker* worker = this_worker();
  for (const ThreadgroupVariable& variable : worker->variables)
    if (variable.site == site) return reinterpret_cast<void*>(variable.lo);
  uint32_t bytes = size > kArenaBytes ? kArenaBytes : static_cast<uint32_t>(size);
  return place(worker, site, bytes, align < 16 ? 16 : static_cast<uint32_t>(align), name);
}

void* msl_rt_threadgroup_argument(int index) {
  const uint32_t& bytes = session.threadgroup_arguments[index];
  return msl_rt_threadgroup(&bytes, bytes, 16, "threadgroup argument");
}
}
