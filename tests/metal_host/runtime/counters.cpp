// Mode count: every load and store of a kernel, by the memory that it touches.
// (Instructions are counted by the kernel itself, block by block: see counting.py.)
#include <algorithm>

#include "state.h"

namespace rt {

static void count_load(Worker* worker, Region& region, uintptr_t at, size_t bytes) {
  region.loaded += bytes;
  for (size_t i = at - region.lo; i < at - region.lo + bytes; i++) {
    uint32_t& last = region.last_load[i];
    region.loaded_distinct += last == 0;
    region.loaded_by_groups += last != worker->group;
    last = worker->group;
  }
}

static void count(const void* address, size_t bytes, bool is_write) {
  Worker* worker = this_worker();
  if (!worker || !worker->current) return;
  uintptr_t at = reinterpret_cast<uintptr_t>(address);
  Totals& totals = worker->totals;
  if (at - worker->current->stack < worker->launch->stack_bytes) {
    (is_write ? totals.private_stored : totals.private_loaded) += bytes;
  } else if (at - reinterpret_cast<uintptr_t>(worker->arena) < kArenaBytes) {
    (is_write ? totals.threadgroup_stored : totals.threadgroup_loaded) += bytes;
    (is_write ? totals.stores : totals.loads)++;
  } else {
    for (Region& region : session.regions) {
      if (!region.holds(at, bytes)) continue;
      (is_write ? totals.stores : totals.loads)++;
      if (is_write)
        region.stored += bytes;
      else
        count_load(worker, region, at, bytes);
    }
  }
}

}  // namespace rt

extern "C" {
void msl_count_load(const void* at, unsigned long bytes) { rt::count(at, bytes, false); }
void msl_count_store(const void* at, unsigned long bytes) { rt::count(at, bytes, true); }
}
