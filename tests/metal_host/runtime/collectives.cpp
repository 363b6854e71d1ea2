// Where lanes meet: quadgroup and simdgroup operations, barriers.  Who is missing, and may it be?
#include <algorithm>
#include <cstring>

#include "state.h"

namespace rt {

static bool same_operation(const Wait& a, const Wait& b) {
  return a.line == b.line && a.width == b.width && !strcmp(a.file, b.file) &&
         !strcmp(a.name, b.name);
}

static void count_collective(Worker* worker, const char* name) {
  for (auto& [known, count] : worker->collectives)
    if (known == name) return void(count++);
  worker->collectives.push_back({name, 1});
}

// The combining function stands for hardware: its instructions are not the kernel's.
static void combine(Worker* worker, const Wait& wait, void* const* payloads, uint32_t mask) {
  const msl_launch& launch = *worker->launch;
  count_collective(worker, wait.name);
  if (!wait.combine) return;
  if (launch.counts_live) *launch.counts_live = launch.counts_sink;
  wait.combine(payloads, mask);
  if (launch.counts_live) *launch.counts_live = launch.counts;
}

static bool resolve_quad(Worker* worker, uint32_t first, uint32_t end) {
  void* payloads[kQuad] = {};
  uint32_t mask = 0;
  Lane* leader = nullptr;
  for (uint32_t i = first; i < end; i++) {
    Lane& lane = worker->lanes[i];
    if (lane.state == LaneState::done) continue;
    if (lane.state != LaneState::at_simd || lane.wait.width != kQuad) return false;
    if (leader && !same_operation(leader->wait, lane.wait)) return false;
    if (!leader) leader = &lane;
    mask |= 1u << (i - first);
    payloads[i - first] = lane.wait.payload;
  }
  if (!leader) return false;
  combine(worker, leader->wait, payloads, mask);
  for (uint32_t i = first; i < end; i++)
    if (mask >> (i - first) & 1) worker->lanes[i].state = LaneState::running;
  return true;
}

struct Meeting {
  Lane* leader = nullptr;  // first lane at a simdgroup operation
  Lane* other = nullptr;   // a lane that waits elsewhere
};

static Meeting look(Worker* worker, uint32_t first, uint32_t end) {
  Meeting meeting;
  for (uint32_t i = first; i < end; i++)
    if (worker->lanes[i].state == LaneState::at_simd && !meeting.leader)
      meeting.leader = &worker->lanes[i];
  for (uint32_t i = first; meeting.leader && i < end; i++) {
    Lane& lane = worker->lanes[i];
    if (lane.state == LaneState::done || meeting.other) continue;
    bool together = lane.state == LaneState::at_simd &&
                    same_operation(meeting.leader->wait, lane.wait) &&
                    lane.num_ops == meeting.leader->num_ops;
    if (!together) meeting.other = &lane;
  }
  return meeting;
}

static void report_divergence(Worker* worker, const Lane& a, const Lane& b) {
  worker->current = const_cast<Lane*>(&a);
  report(worker, 0, false,
         "DIVERGENT: lane %u waits in %s at %s:%d (its operation %llu) while lane %u of the same "
         "simdgroup is in %s at %s:%d (operation %llu)",
         a.at.lane, a.wait.name, base_name(a.wait.file), a.wait.line,
         static_cast<unsigned long long>(a.num_ops), b.at.lane, b.wait.name,
         base_name(b.wait.file), b.wait.line, static_cast<unsigned long long>(b.num_ops));
  worker->current = nullptr;
}

// Not strict: the lanes that are furthest behind go on by themselves, as masked hardware would.
static Lane* furthest_behind(Worker* worker, uint32_t first, uint32_t end, Lane* leader) {
  for (uint32_t i = first; i < end; i++) {
    Lane& lane = worker->lanes[i];
    if (lane.state != LaneState::at_simd) continue;
    if (lane.num_ops < leader->num_ops ||
        (lane.num_ops == leader->num_ops && lane.wait.line < leader->wait.line))
      leader = &lane;
  }
  return leader;
}

static void complete(Worker* worker, uint32_t first, uint32_t end, Lane* leader, bool together) {
  void* payloads[kSimd] = {};
  uint32_t mask = 0;
  for (uint32_t i = first; i < end; i++) {
    Lane& lane = worker->lanes[i];
    if (lane.state != LaneState::at_simd || !same_operation(lane.wait, leader->wait)) continue;
    if (lane.num_ops != leader->num_ops) continue;
    mask |= 1u << (i - first);
    payloads[i - first] = lane.wait.payload;
  }
  uint32_t present = static_cast<uint32_t>(__builtin_popcount(mask));
  if (together && present != end - first) {
    worker->current = leader;
    report(worker, 0, false, "PARTIAL: %s at %s:%d runs with %u of %u lanes (the others returned)",
           leader->wait.name, base_name(leader->wait.file), leader->wait.line, present,
           end - first);
    worker->current = nullptr;
  }
  combine(worker, leader->wait, payloads, mask);
  if (leader->wait.is_barrier) worker->simd_epochs[first / kSimd].pass(leader->wait.flags);
  for (uint32_t i = first; i < end; i++)
    if (mask >> (i - first) & 1) worker->lanes[i].state = LaneState::running;
}

bool resolve_simdgroup(Worker* worker, uint32_t simdgroup) {
  uint32_t first = simdgroup * kSimd, end = std::min(worker->num_threads, first + kSimd);
  bool any = false;
  for (uint32_t quad = first; quad < end; quad += kQuad)
    any |= resolve_quad(worker, quad, std::min(end, quad + kQuad));
  if (any) return true;
  Meeting meeting = look(worker, first, end);
  if (!meeting.leader) return false;
  if (meeting.other) {
    report_divergence(worker, *meeting.leader, *meeting.other);
    if (worker->launch->strict) {
      worker->fatal = true;
      return false;
    }
    meeting.leader = furthest_behind(worker, first, end, meeting.leader);
  }
  complete(worker, first, end, meeting.leader, !meeting.other);
  return true;
}

// All lanes are done or wait at a threadgroup barrier.
bool release_threadgroup(Worker* worker) {
  uint32_t num_done = 0;
  Lane *waiting = nullptr, *elsewhere = nullptr;
  for (uint32_t i = 0; i < worker->num_threads; i++) {
    Lane& lane = worker->lanes[i];
    if (lane.state == LaneState::done) {
      num_done++;
    } else if (!waiting) {
      waiting = &lane;
    } else if (!same_operation(lane.wait, waiting->wait)) {
      elsewhere = &lane;
    }
  }
  if (!waiting) return false;
  worker->current = waiting;
  const Wait& wait = waiting->wait;
  if (elsewhere)
    report(worker, 0, true, "DIVERGENT-BARRIER: threads wait at different barriers %s:%d and %s:%d",
           base_name(wait.file), wait.line, base_name(elsewhere->wait.file), elsewhere->wait.line);
  else if (num_done)
    report(worker, 0, worker->launch->strict,
           "BARRIER-AFTER-EXIT: %u of %u threads returned before the threadgroup_barrier at %s:%d",
           num_done, worker->num_threads, base_name(wait.file), wait.line);
  worker->current = nullptr;
  if (worker->fatal) return false;
  worker->epochs.pass(wait.flags);
  worker->totals.barriers++;
  for (uint32_t i = 0; i < worker->num_threads; i++)
    if (worker->lanes[i].state == LaneState::at_threadgroup)
      worker->lanes[i].state = LaneState::running;
  return true;
}

static void wait_here(LaneState state, const Wait& wait) {
  Worker* worker = this_worker();
  Lane* lane = worker->current;
  lane->wait = wait;
  lane->state = state;
  if (wait.width == kSimd) lane->num_ops++;
  worker->leave();
}

}  // namespace rt

using namespace rt;

extern "C" {
int msl_rt_sum_order = 0;

const msl_builtins* msl_rt_builtins() { return &this_worker()->current->at; }

void msl_rt_collective(int width, const char* name, const char* file, int line, void* payload,
                       msl_combine function) {
  wait_here(LaneState::at_simd, {width, line, file, name, payload, function, 0, false});
}

void msl_rt_simd_barrier(unsigned flags, const char* file, int line) {
  wait_here(LaneState::at_simd,
            {kSimd, line, file, "simdgroup_barrier", nullptr, nullptr, flags, true});
}

void msl_rt_barrier(unsigned flags, const char* file, int line) {
  wait_here(LaneState::at_threadgroup,
            {0, line, file, "threadgroup_barrier", nullptr, nullptr, flags, true});
}
}
