// Runs one threadgroup: every lane until it waits, simdgroup after simdgroup, until all are done.
// Seed 0 keeps one fixed order; any other seed draws the order of simdgroups and lanes.
#include <sys/mman.h>

#include <algorithm>

#include "fibre.h"
#include "state.h"

namespace rt {

#if defined(__ELF__)
__attribute__((tls_model("initial-exec")))
#endif
static thread_local Worker* current_worker = nullptr;

Worker* this_worker() { return current_worker; }
void set_this_worker(Worker* worker) { current_worker = worker; }

uint64_t Worker::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void Worker::leave() { msl_fibre_swap(&current->sp, scheduler_sp); }

static void fibre_main() {
  const msl_launch* launch = this_worker()->launch;
  launch->entry(launch->args);
  this_worker()->current->state = LaneState::done;
  note_progress(this_worker());
  this_worker()->leave();
  __builtin_trap();
}

static void enter(Worker* worker, Lane* lane) {
  worker->current = lane;
  msl_fibre_swap(&worker->scheduler_sp, lane->sp);
  worker->current = nullptr;
  report_pending_store(worker);
}

static void reserve_stacks(Worker* worker, uint32_t count) {
  size_t bytes = worker->launch->stack_bytes;
  if (worker->num_stacks >= count) return;
  if (worker->stacks) munmap(worker->stacks, worker->num_stacks * bytes);
  worker->stacks = static_cast<char*>(mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0));
  worker->num_stacks = count;
}

static void place_lane(Worker* worker, uint32_t i, const uint32_t* group, const uint32_t* size) {
  const msl_launch& launch = *worker->launch;
  Lane& lane = worker->lanes[i];
  char* stack = worker->stacks + static_cast<size_t>(i) * launch.stack_bytes;
  lane.stack = reinterpret_cast<uintptr_t>(stack);
  lane.sp = new_fibre(stack, launch.stack_bytes, fibre_main);
  lane.state = LaneState::running;
  lane.wait = Wait{};
  lane.num_ops = lane.depth = 0;
  lane.num_idle = 0;
  uint32_t position[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
  msl_builtins& at = lane.at;
  for (int k = 0; k < 3; k++) {
    at.thread[k] = position[k];
    at.threadgroup[k] = group[k];
    at.size[k] = size[k];
    at.full_size[k] = launch.threads[k];
    at.grid[k] = launch.grid[k];
    at.threadgroups[k] = (launch.grid[k] + launch.threads[k] - 1) / launch.threads[k];
  }
  at.linear = i;
  at.simdgroup = i / kSimd;
  at.lane = i % kSimd;
  at.simdgroups = worker->num_simdgroups;
  at.full_simdgroups = (launch.threads[0] * launch.threads[1] * launch.threads[2] + 31) / kSimd;
}

static void prepare(Worker* worker, uint32_t ordinal) {
  const msl_launch& launch = *worker->launch;
  uint32_t group[3], size[3], rest = ordinal;
  for (int k = 0; k < 3; k++) {
    uint32_t groups = (launch.grid[k] + launch.threads[k] - 1) / launch.threads[k];
    group[k] = rest % groups;
    rest /= groups;
    size[k] = std::min(launch.threads[k], launch.grid[k] - group[k] * launch.threads[k]);
  }
  worker->num_threads = size[0] * size[1] * size[2];
  worker->num_simdgroups = (worker->num_threads + kSimd - 1) / kSimd;
  if (worker->lanes.size() < worker->num_threads) worker->lanes.resize(worker->num_threads);
  reserve_stacks(worker, worker->num_threads);
  worker->group = ordinal + 1;
  worker->epochs = Epochs{};
  worker->num_idle = 0;
  worker->simd_epochs.assign(worker->num_simdgroups, Epochs{});
  worker->variables.clear();
  worker->arena_used = worker->arena_total = 0;
  for (int i = 0; i < kMaxBuffers; i++)
    if (session.threadgroup_arguments[i]) msl_rt_threadgroup_argument(i);
  for (uint32_t i = 0; i < worker->num_threads; i++) place_lane(worker, i, group, size);
}

static void shuffle(Worker* worker, uint32_t* items, uint32_t count) {
  if (!worker->launch->seed) return;
  for (uint32_t i = count; i > 1; i--) std::swap(items[i - 1], items[worker->random() % i]);
}

// Enter every lane of [first, end) that can run; true when there was one.
static bool enter_lanes(Worker* worker, uint32_t first, uint32_t end) {
  uint32_t order[kSimd], count = end - first;
  for (uint32_t i = 0; i < count; i++) order[i] = first + i;
  shuffle(worker, order, count);
  bool any = false;
  for (uint32_t i = 0; i < count && !worker->fatal; i++) {
    Lane& lane = worker->lanes[order[i]];
    if (lane.state != LaneState::running) continue;
    enter(worker, &lane);
    any = true;
  }
  return any;
}

// Let a simdgroup run for a while (seeded: 1 to 4 turns, so that simdgroups interleave).
static bool run_simdgroup(Worker* worker, uint32_t simdgroup) {
  uint32_t first = simdgroup * kSimd, end = std::min(worker->num_threads, first + kSimd);
  uint64_t turns = worker->launch->seed ? 1 + worker->random() % 4 : ~0ull;
  bool progress = false;
  worker->waited = false;
  while (turns-- > 0 && !worker->fatal) {
    progress |= enter_lanes(worker, first, end);
    if (worker->fatal || worker->waited) break;  // what it waits for may come from elsewhere
    bool runnable = false;
    for (uint32_t i = first; i < end; i++)
      runnable |= worker->lanes[i].state == LaneState::running;
    if (runnable) continue;
    if (!resolve_simdgroup(worker, simdgroup)) break;
    note_progress(worker);
    progress = true;
  }
  return progress;
}

void run_threadgroup(Worker* worker, uint32_t ordinal) {
  prepare(worker, ordinal);
  std::vector<uint32_t> order(worker->num_simdgroups);
  for (uint32_t s = 0; s < order.size(); s++) order[s] = s;
  while (!worker->fatal) {
    bool progress = false;
    shuffle(worker, order.data(), static_cast<uint32_t>(order.size()));
    for (uint32_t s : order)
      if (!worker->fatal) progress |= run_simdgroup(worker, s);
    if (worker->fatal || (!progress && !release_threadgroup(worker))) break;
    if (!progress) note_progress(worker);
  }
  worker->totals.threadgroup_bytes =
      std::max<uint64_t>(worker->totals.threadgroup_bytes, worker->arena_total);
  if (worker->arena_total > worker->launch->threadgroup_limit)
    report(worker, 0, true, "TGMEM: %u bytes of threadgroup memory, the limit is %u",
           worker->arena_total, worker->launch->threadgroup_limit);
}

}  // namespace rt
