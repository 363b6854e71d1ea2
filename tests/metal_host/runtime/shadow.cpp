// Every load and store of a kernel in mode check: bounds, initialised, races by the GPU's rules.
//
// Two accesses to a byte, one of them a store, race unless both are atomic or a barrier that orders
// that memory lies between them: a threadgroup_barrier within a threadgroup, a simdgroup_barrier
// within a simdgroup, nothing across threadgroups.  A barrier starts a new epoch; the shadow keeps
// the epoch of the last store and load of each byte.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace rt {

namespace {

struct Access {
  uintptr_t at, pc;
  size_t bytes;
  bool is_write, is_atomic;
  const char* verb() const { return is_write ? "write" : "read"; }
};

struct Target {  // what an address belongs to; cells is null where nothing is to be checked
  Cell* cells = nullptr;
  const char* name = "";
  size_t offset = 0;
  bool threadgroup = false;
};

void stop(Worker* worker) { worker->leave(); }

Target threadgroup_target(Worker* worker, const Access& a) {
  for (const ThreadgroupVariable& v : worker->variables)
    if (a.at >= v.lo && a.at + a.bytes <= v.hi)
      return {&worker->arena_shadow[a.at - reinterpret_cast<uintptr_t>(worker->arena)], v.name,
              a.at - v.lo, true};
  const ThreadgroupVariable* near = nullptr;
  for (const ThreadgroupVariable& v : worker->variables)
    if (a.at + 64 > v.lo && a.at < v.hi + 64) near = &v;
  report(worker, a.pc, true,
         "OOB: %s of %zu bytes at offset %ld of threadgroup variable '%s' (%zu bytes)", a.verb(),
         a.bytes, near ? static_cast<long>(a.at - near->lo) : -1, near ? near->name : "?",
         near ? static_cast<size_t>(near->hi - near->lo) : 0);
  stop(worker);
  return {};
}

Region* region_of(Worker* worker, const Access& a) {
  auto& regions = session.regions;
  if (worker->last_region < regions.size() && regions[worker->last_region].holds(a.at, a.bytes))
    return &regions[worker->last_region];
  for (size_t i = 0; i < regions.size(); i++) {
    if (!regions[i].holds(a.at, a.bytes)) continue;
    worker->last_region = i;
    return &regions[i];
  }
  return nullptr;
}

void report_wild(Worker* worker, const Access& a) {
  constexpr uintptr_t kNear = 1 << 20;  // the guard on either side of a buffer
  const Region* near = nullptr;
  for (const Region& r : session.regions)
    if (a.at + kNear > r.lo && a.at < r.hi + kNear && (!near || a.at >= r.lo)) near = &r;
  if (near)
    report(worker, a.pc, true,
           "OOB: %s of %zu bytes at byte offset %ld of buffer(%d) '%s' (%zu bytes)", a.verb(),
           a.bytes, static_cast<long>(a.at - near->lo), near->index, near->name.c_str(),
           static_cast<size_t>(near->hi - near->lo));
  else
    report(worker, a.pc, true, "OOB: wild %s at 0x%lx", a.verb(), static_cast<long>(a.at));
  stop(worker);
}

Target buffer_target(Worker* worker, const Access& a) {
  Region* region = region_of(worker, a);
  if (!region) {
    Segment segment = segment_of(a.at);
    if (segment == Segment::none)
      report_wild(worker, a);
    else if (a.is_write)
      report(worker, a.pc, false, "GLOBAL-WRITE: store to a program-scope variable");
    return {};
  }
  if (!region->writable) {
    if (a.is_write) {
      report(worker, a.pc, true, "RO-WRITE: store to read-only buffer(%d) '%s'", region->index,
             region->name.c_str());
      stop(worker);
    }
    return {};
  }
  return {&region->shadow[a.at - region->lo], region->name.c_str(), a.at - region->lo, false};
}

bool within(uintptr_t at, const void* base, size_t bytes) {
  return at - reinterpret_cast<uintptr_t>(base) < bytes;
}

Target find(Worker* worker, const Access& a) {
  const msl_launch& launch = *worker->launch;
  if (within(a.at, worker->stacks, worker->num_stacks * launch.stack_bytes)) {
    report(worker, a.pc, true, "OOB: access to another thread's private memory");
    stop(worker);
    return {};
  }
  if (within(a.at, worker->lanes.data(), worker->lanes.size() * sizeof(Lane))) return {};
  if (within(a.at, launch.args, (kMaxBuffers + 1) * sizeof(void*))) return {};
  if (within(a.at, worker->arena, kArenaBytes)) return threadgroup_target(worker, a);
  return buffer_target(worker, a);
}

struct Earlier {  // the last store or load of a byte
  uint32_t group, epoch, simd_epoch;
  uint16_t thread, simdgroup;
};

constexpr const char* kOtherGroup = "other threadgroup (no ordering inside one dispatch)";

// Why `e` and the present access are not ordered, or null.
const char* unordered(const Worker* worker, const Earlier& e, bool threadgroup) {
  const msl_builtins& me = worker->current->at;
  if (e.group != worker->group) return kOtherGroup;
  if (e.epoch != worker->epochs.of(threadgroup)) return nullptr;
  if (e.simdgroup != me.simdgroup)
    return threadgroup ? "missing threadgroup_barrier(mem_threadgroup)"
                       : "missing threadgroup_barrier(mem_device)";
  bool same_epoch = e.simd_epoch == worker->simd_epochs[me.simdgroup].of(threadgroup);
  return same_epoch && e.thread != me.linear ? "missing simdgroup_barrier" : nullptr;
}

const char* after_store(const Worker* worker, const Access& a, const Cell& c, bool threadgroup) {
  if (!c.write_group || (a.is_atomic && c.written_atomically)) return nullptr;
  return unordered(worker,
                   {c.write_group, c.write_epoch, c.write_simd_epoch, c.write_thread,
                    static_cast<uint16_t>(c.write_thread / kSimd)},
                   threadgroup);
}

const char* after_load(const Worker* worker, const Access& a, const Cell& c, bool threadgroup) {
  if (!a.is_write || a.is_atomic || !c.read_group) return nullptr;
  if (c.read_by_groups) return kOtherGroup;
  return unordered(
      worker, {c.read_group, c.read_epoch, c.read_simd_epoch, c.read_thread, c.read_simd},
      threadgroup);
}

std::string race_text(const char* kind, const Target& t, size_t offset, uint16_t thread,
                      const char* why) {
  char text[400];
  snprintf(text, sizeof text, "RACE: %s on %s '%s' byte offset %zu with thread #%u: %s", kind,
           t.threadgroup ? "threadgroup" : "buffer", t.name, offset, thread, why);
  return text;
}

void hold_store(Worker* worker, const Access& a, const std::string& text) {
  PendingStore& store = worker->pending;
  if (store.on) return;
  const msl_builtins& b = worker->current->at;
  char place[160];
  snprintf(place, sizeof place,
           " [threadgroup (%u,%u,%u) thread (%u,%u,%u) simdgroup %u lane %u]", b.threadgroup[0],
           b.threadgroup[1], b.threadgroup[2], b.thread[0], b.thread[1], b.thread[2], b.simdgroup,
           b.lane);
  store.on = true;
  store.at = a.at;
  store.pc = a.pc;
  store.bytes = std::min(a.bytes, sizeof store.before);
  memcpy(store.before, reinterpret_cast<void*>(a.at), store.bytes);
  store.message = text + place;
}

void remember_load(const Worker* worker, Cell& c, bool threadgroup) {
  const msl_builtins& me = worker->current->at;
  uint32_t epoch = worker->epochs.of(threadgroup);
  uint32_t simd_epoch = worker->simd_epochs[me.simdgroup].of(threadgroup);
  uint16_t thread = static_cast<uint16_t>(me.linear), simd = static_cast<uint16_t>(me.simdgroup);
  if (c.read_group && c.read_group != worker->group) {
    c.read_by_groups = true;
  } else if (c.read_group && c.read_epoch == epoch) {
    if (c.read_simd != simd) {
      c.read_simd = kSeveral;
    } else if (c.read_simd_epoch != simd_epoch) {
      c.read_simd_epoch = simd_epoch;
      c.read_thread = thread;
    } else if (c.read_thread != thread) {
      c.read_thread = kSeveral;
    }
  } else {
    c.read_group = worker->group;
    c.read_epoch = epoch;
    c.read_simd_epoch = simd_epoch;
    c.read_thread = thread;
    c.read_simd = simd;
  }
}

void remember_store(const Worker* worker, const Access& a, Cell& c, bool threadgroup) {
  const msl_builtins& me = worker->current->at;
  c.write_group = worker->group;
  c.write_thread = static_cast<uint16_t>(me.linear);
  c.write_epoch = worker->epochs.of(threadgroup);
  c.write_simd_epoch = worker->simd_epochs[me.simdgroup].of(threadgroup);
  c.written_atomically = a.is_atomic;
  c.initialised = true;
}

// Most accesses: a load within the read-only buffer of the load before.
bool is_plain_load(const Worker* worker, const Access& a) {
  if (a.is_write || worker->last_region >= session.regions.size()) return false;
  const Region& region = session.regions[worker->last_region];
  return !region.writable && region.holds(a.at, a.bytes);
}

// One byte; false after a race, for one report an access is enough.
bool check_byte(Worker* worker, const Access& a, const Target& t, size_t i) {
  Cell& c = t.cells[i];
  bool stale = (c.write_group && c.write_group != worker->group) ||
               (c.read_group && c.read_group != worker->group);
  if (t.threadgroup && stale) c = Cell{};
  if (!a.is_write && !c.write_group && !c.initialised) {
    report(worker, a.pc, false, "UNINIT: read of never-written %s '%s' byte offset %zu",
           t.threadgroup ? "threadgroup variable" : "output buffer", t.name, t.offset + i);
    c.initialised = true;
  }
  if (const char* why = after_store(worker, a, c, t.threadgroup)) {
    const char* kind = a.is_write ? "write/write" : "read after write";
    std::string text = race_text(kind, t, t.offset + i, c.write_thread, why);
    if (!a.is_write || a.is_atomic) return report(worker, a.pc, false, "%s", text.c_str()), false;
    hold_store(worker, a, text);
  } else if (const char* because = after_load(worker, a, c, t.threadgroup)) {
    std::string text = race_text("write after read", t, t.offset + i, c.read_thread, because);
    return report(worker, a.pc, false, "%s", text.c_str()), false;
  }
  if (a.is_write)
    remember_store(worker, a, c, t.threadgroup);
  else
    remember_load(worker, c, t.threadgroup);
  return true;
}

}  // namespace

void check_access(const void* at, size_t bytes, bool is_write, bool is_atomic, const void* pc) {
  Worker* worker = this_worker();
  if (!worker || !worker->current || worker->launch->mode != kCheck) return;
  Access a{reinterpret_cast<uintptr_t>(at), reinterpret_cast<uintptr_t>(pc), bytes, is_write,
           is_atomic};
  if (worker->pending.on) report_pending_store(worker);
  if (a.at - worker->current->stack < worker->launch->stack_bytes) return;
  worker->totals.accesses++;
  if (!is_atomic) note_plain_access(worker, a.at, a.pc, is_write);
  Target target = is_plain_load(worker, a) ? Target{} : find(worker, a);
  for (size_t i = 0; target.cells && i < bytes; i++)
    if (!check_byte(worker, a, target, i)) break;
  // Preempted: the lane stays runnable, so another one may run between any two accesses.
  bool preempt = worker->launch->preempt && (worker->random() & 15) == 0;
  if (worker->fatal || preempt) worker->leave();
}

}  // namespace rt
