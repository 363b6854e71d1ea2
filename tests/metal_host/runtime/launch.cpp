// The host's side: buffers, a launch, what came of it.  Called through ctypes by native.py.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <thread>

#include "state.h"

using namespace rt;

namespace {

constexpr size_t kGuard = 1 << 20;  // readable on either side of a buffer, so that overruns report

struct Groups {  // the threadgroups of a launch, in the order in which workers take them
  std::vector<uint32_t> order;
  std::atomic<uint32_t> next{0};
  std::atomic<bool> stopped{false};
};

void* map(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1,
              0);
}

void add_totals(const Worker& worker) {
  std::lock_guard<std::mutex> guard(session.mutex);
  Totals& sum = session.totals;
  const Totals& part = worker.totals;
  sum.accesses += part.accesses;
  sum.barriers += part.barriers;
  sum.threadgroup_bytes = std::max(sum.threadgroup_bytes, part.threadgroup_bytes);
  sum.loads += part.loads;
  sum.stores += part.stores;
  sum.threadgroup_loaded += part.threadgroup_loaded;
  sum.threadgroup_stored += part.threadgroup_stored;
  sum.private_loaded += part.private_loaded;
  sum.private_stored += part.private_stored;
  for (const auto& entry : worker.collectives) {
    auto same = [&](const auto& known) { return known.first == entry.first; };
    auto at = std::find_if(sum.collectives.begin(), sum.collectives.end(), same);
    if (at == sum.collectives.end())
      sum.collectives.push_back({entry.first, entry.second});
    else
      at->second += entry.second;
  }
}

void work(const msl_launch* launch, Groups* groups, uint32_t number) {
  Worker worker;
  worker.launch = launch;
  worker.random_state = (launch->seed + 1) * 0x9E3779B97F4A7C15ull + number * 77;
  worker.arena = static_cast<char*>(map(kArenaBytes));
  if (launch->mode == kCheck) worker.arena_shadow.resize(kArenaBytes);
  set_this_worker(&worker);
  for (uint32_t i; !groups->stopped && (i = groups->next++) < groups->order.size();) {
    run_threadgroup(&worker, groups->order[i]);
    if (worker.fatal) groups->stopped = true;
  }
  set_this_worker(nullptr);
  add_totals(worker);
  if (worker.stacks) munmap(worker.stacks, worker.num_stacks * launch->stack_bytes);
  munmap(worker.arena, kArenaBytes);
}

void order_groups(const msl_launch& launch, Groups* groups) {
  uint64_t count = 1;
  for (int k = 0; k < 3; k++)
    count *= (launch.grid[k] + launch.threads[k] - 1) / launch.threads[k];
  for (uint32_t i = 0; i < count; i++) groups->order.push_back(i);
  Worker dice;
  dice.random_state = launch.seed * 6364136223846793005ull + 1;
  for (uint64_t i = launch.seed ? count : 0; i > 1; i--)
    std::swap(groups->order[i - 1], groups->order[dice.random() % i]);
}

}  // namespace

extern "C" {
void msl_host_reset() {
  session.regions.clear();
  session.errors.clear();
  session.totals = Totals{};
  std::fill(std::begin(session.threadgroup_arguments), std::end(session.threadgroup_arguments), 0);
}

void* msl_host_alloc(uint64_t bytes) {
  return static_cast<char*>(map(bytes + 2 * kGuard)) + kGuard;
}
void msl_host_free(void* at, uint64_t bytes) {
  munmap(static_cast<char*>(at) - kGuard, bytes + 2 * kGuard);
}

void msl_host_region(int index, void* at, uint64_t bytes, int writable, int initialised, int mode,
                     const char* name) {
  uintptr_t lo = reinterpret_cast<uintptr_t>(at);
  Region region{lo, lo + bytes, index, writable != 0, name, {}, {}, 0, 0, 0, 0};
  if (mode == kCheck && writable) region.shadow.resize(bytes);
  for (Cell& cell : region.shadow) cell.initialised = initialised != 0;
  if (mode == kCount) region.last_load.resize(bytes);
  session.regions.push_back(std::move(region));
}

void msl_host_threadgroup_argument(int index, uint32_t bytes) {
  session.threadgroup_arguments[index] = bytes;
}

int msl_host_run(const msl_launch* launch) {
  uint64_t threads = 1ull * launch->threads[0] * launch->threads[1] * launch->threads[2];
  msl_rt_sum_order = launch->sum_order;
  session.totals.threads = 1ull * launch->grid[0] * launch->grid[1] * launch->grid[2];
  if (threads > launch->max_threads) {
    report(nullptr, 0, true, "LIMIT: %llu threads per threadgroup, the limit is %u",
           static_cast<unsigned long long>(threads), launch->max_threads);
    return static_cast<int>(session.errors.size());
  }
  Groups groups;
  order_groups(*launch, &groups);
  if (launch->mode == kCheck) find_segments();
  uint32_t workers = launch->mode == kFast ? launch->workers : 1;
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < workers; i++) others.emplace_back(work, launch, &groups, i);
  work(launch, &groups, 0);
  for (std::thread& other : others) other.join();
  return static_cast<int>(session.errors.size());
}

void msl_host_error(int i, char* text, int capacity, uint64_t* pc) {
  const Error& error = session.errors[static_cast<size_t>(i)];
  snprintf(text, static_cast<size_t>(capacity), "%s", error.message.c_str());
  *pc = error.pc;
}

void msl_host_totals(uint64_t* out) {
  const Totals& t = session.totals;
  uint64_t values[] = {t.threads,           t.accesses,           t.barriers,
                       t.threadgroup_bytes, t.threadgroup_loaded, t.threadgroup_stored,
                       t.private_loaded,    t.private_stored,     t.loads,
                       t.stores,            t.collectives.size()};
  std::copy(std::begin(values), std::end(values), out);
}

void msl_host_collective(int i, char* name, int capacity, uint64_t* count) {
  const auto& entry = session.totals.collectives[static_cast<size_t>(i)];
  snprintf(name, static_cast<size_t>(capacity), "%s", entry.first.c_str());
  *count = entry.second;
}

void msl_host_buffer(int i, uint64_t* out) {
  const Region& r = session.regions[static_cast<size_t>(i)];
  uint64_t values[] = {r.loaded, r.loaded_by_groups, r.loaded_distinct, r.stored};
  std::copy(std::begin(values), std::end(values), out);
}

// Where the library that holds `symbol` was loaded: program counters are relative to it.
uint64_t msl_host_base(void* symbol) {
  Dl_info info;
  return dladdr(symbol, &info) ? reinterpret_cast<uint64_t>(info.dli_fbase) : 0;
}
}
