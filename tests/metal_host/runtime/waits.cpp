// Waits without progress.  A lane that reads one place again and again may wait for a store of
// another lane: it is left for a while, so that the others run in every schedule.  If all that the
// lanes of a threadgroup do is to wait, the launch ends with a report of where.
#include <sched.h>

#include <cstdio>
#include <map>

#include "state.h"

namespace rt {

constexpr uint64_t kPatience = 1 << 10;       // accesses until a lane lets others run
constexpr uint64_t kIdleAccesses = 1 << 22;   // accesses of all lanes until they wait in vain
constexpr uint64_t kSharedPatience = 1 << 3;  // as many times more where other workers run

void note_progress(Worker* worker) {
  worker->num_idle = 0;
  if (worker->current) worker->current->num_idle = 0;
}

static std::string place_of(uintptr_t at) {
  char text[96];
  for (const Region& region : session.regions) {
    if (!region.holds(at, 1)) continue;
    snprintf(text, sizeof text, "byte %zu of buffer(%d) '%.40s'", static_cast<size_t>(at - region.lo),
             region.index, region.name.c_str());
    return text;
  }
  return "threadgroup memory";
}

static void report_waits(Worker* worker) {
  std::map<uintptr_t, std::pair<uint32_t, Lane*>> by_pc;
  std::map<int, std::pair<uint32_t, Lane*>> at_barriers;
  for (uint32_t i = 0; i < worker->num_threads; i++) {
    Lane& lane = worker->lanes[i];
    if (lane.state == LaneState::done) continue;
    bool runs = lane.state == LaneState::running;
    if (runs && !lane.num_idle) continue;
    auto& entry = runs ? by_pc[lane.idle_pc] : at_barriers[lane.wait.line];
    if (!entry.first++) entry.second = &lane;
  }
  for (auto& [pc, entry] : by_pc) {
    worker->current = entry.second;
    report(worker, pc, true, "WAIT: %u of %u threads wait without progress for %s", entry.first,
           worker->num_threads, place_of(entry.second->idle_at).c_str());
  }
  for (auto& [line, entry] : at_barriers) {
    const Wait& wait = entry.second->wait;
    worker->current = entry.second;
    report(worker, 0, true, "WAIT: %u of %u threads wait without progress in %s at %s:%d",
           entry.first, worker->num_threads, wait.name, base_name(wait.file), line);
  }
}

void note_idle_access(Worker* worker, uintptr_t at, uintptr_t pc) {
  Lane* lane = worker->current;
  if (!lane) return;
  lane->idle_at = at;
  lane->idle_pc = pc;
  bool shared = worker->launch->workers > 1;
  if (++worker->num_idle > kIdleAccesses * (shared ? kSharedPatience : 1)) {
    lane->num_idle++;
    report_waits(worker);
    worker->current = lane;
  } else if (++lane->num_idle % kPatience) {
    return;
  }
  worker->waited = true;
  if (shared) sched_yield();
  worker->leave();
}

// Mode check: a load of the place that was loaded last may be a wait too.
void note_plain_access(Worker* worker, uintptr_t at, uintptr_t pc, bool is_write) {
  Lane* lane = worker->current;
  if (is_write) {
    if (lane->num_idle < kPatience) worker->num_idle = 0;  // this lane gets on
  } else if (lane->idle_at == at && lane->idle_pc == pc) {
    note_idle_access(worker, at, pc);
  } else {
    lane->idle_at = at;
    lane->idle_pc = pc;
  }
}

}  // namespace rt
