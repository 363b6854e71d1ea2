// The state of a launch: lanes, workers, buffers, shadow memory, errors.
#pragma once
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"

// Filled in by the host (a ctypes structure of the same layout).
struct msl_launch {
  void (*entry)(void* const*);
  void* const* args;
  uint64_t** counts_live;  // mode count: where the kernel finds its block counters, or null
  uint64_t *counts, *counts_sink;
  uint64_t seed;
  uint32_t grid[3], threads[3];
  uint32_t threadgroup_limit, max_threads, stack_bytes, workers;
  int32_t mode, strict, preempt, sum_order;
};

namespace rt {

enum Mode : int32_t { kFast, kCheck, kCount };
enum class LaneState : uint8_t { done, running, at_simd, at_threadgroup };

constexpr uint32_t kSimd = 32, kQuad = 4;
constexpr uint32_t kArenaBytes = 256 << 10;
constexpr uint16_t kSeveral = 0xffff;
constexpr int kMaxBuffers = 31;

struct Wait {  // what a lane waits for
  int width, line;
  const char *file, *name;
  void* payload;
  msl_combine combine;
  unsigned flags;
  bool is_barrier;
};

struct Lane {
  void* sp;
  uintptr_t stack;  // lowest address
  LaneState state;
  msl_builtins at;
  Wait wait;
  uint64_t num_ops;  // simdgroup operations so far: lanes that meet must agree
  uint32_t depth;
  uintptr_t frames[64];
  uint64_t num_idle;  // accesses that may be a wait: they changed nothing
  uintptr_t idle_at, idle_pc;
};

struct Cell {  // shadow of one byte: who wrote and read it last, and in which epochs
  uint32_t write_group, read_group;  // ordinal of the threadgroup + 1; 0: none
  uint32_t write_epoch, write_simd_epoch, read_epoch, read_simd_epoch;
  uint16_t write_thread, read_thread, read_simd;  // kSeveral: more than one
  bool initialised : 1, written_atomically : 1, read_by_groups : 1;
};

struct Region {  // a buffer of the launch
  uintptr_t lo, hi;
  int index;
  bool writable;
  std::string name;
  std::vector<Cell> shadow;
  std::vector<uint32_t> last_load;  // mode count: the threadgroup that last loaded a byte
  uint64_t loaded, loaded_by_groups, loaded_distinct, stored;
  bool holds(uintptr_t at, size_t bytes) const { return at >= lo && at + bytes <= hi; }
};

struct ThreadgroupVariable {
  const void* site;
  uintptr_t lo, hi;
  const char* name;
};

struct Error {
  std::string message;
  uintptr_t pc;  // 0: the message says where
};

struct Epochs {  // barriers passed, by the memory that they order
  uint32_t threadgroup = 1, device = 1;
  uint32_t of(bool threadgroup_memory) const { return threadgroup_memory ? threadgroup : device; }
  void pass(unsigned flags) {
    threadgroup += (flags & MSL_MEM_THREADGROUP) != 0;
    device += (flags & MSL_MEM_DEVICE) != 0;
  }
};

struct PendingStore {  // a second store to a byte: harmless where it changes nothing
  bool on = false;
  uintptr_t at, pc;
  size_t bytes;
  unsigned char before[64];
  std::string message;
};

struct Totals {
  uint64_t threads = 0, accesses = 0, barriers = 0, threadgroup_bytes = 0;
  uint64_t loads = 0, stores = 0;  // instructions, private memory left out
  uint64_t threadgroup_loaded = 0, threadgroup_stored = 0, private_loaded = 0, private_stored = 0;
  std::vector<std::pair<std::string, uint64_t>> collectives;
};

struct Worker {  // one host thread; runs one threadgroup at a time
  const msl_launch* launch;
  Lane* current = nullptr;
  void* scheduler_sp = nullptr;
  std::vector<Lane> lanes;
  char* stacks = nullptr;
  size_t num_stacks = 0;
  char* arena = nullptr;  // threadgroup memory
  std::vector<Cell> arena_shadow;
  uint32_t arena_used = 0, arena_total = 0;
  std::vector<ThreadgroupVariable> variables;
  uint32_t group = 0;  // ordinal of the threadgroup + 1
  Epochs epochs;
  std::vector<Epochs> simd_epochs;
  uint32_t num_threads = 0, num_simdgroups = 0;
  bool fatal = false;
  bool waited = false;    // a lane left because it may wait for another one
  uint64_t num_idle = 0;  // as of a lane, of all lanes since one of them made progress
  PendingStore pending;
  size_t last_region = 0;
  uint64_t random_state = 1;
  Totals totals;
  std::vector<std::pair<const char*, uint64_t>> collectives;

  uint64_t random();
  void leave();  // back to the scheduler; the lane keeps its state
};

struct Session {  // between msl_host_reset and the next one
  std::vector<Region> regions;
  std::vector<Error> errors;
  uint32_t threadgroup_arguments[kMaxBuffers] = {};
  Totals totals;
  std::mutex mutex;
};

extern Session session;
Worker* this_worker();
void set_this_worker(Worker* worker);

// errors.cpp
const char* base_name(const char* file);
void report(Worker* worker, uintptr_t pc, bool fatal, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
void report_pending_store(Worker* worker);
// collectives.cpp: true when a lane of the simdgroup can go on
bool resolve_simdgroup(Worker* worker, uint32_t simdgroup);
bool release_threadgroup(Worker* worker);  // false: finished, or an error
// waits.cpp
void note_progress(Worker* worker);
void note_idle_access(Worker* worker, uintptr_t at, uintptr_t pc);
void note_plain_access(Worker* worker, uintptr_t at, uintptr_t pc, bool is_write);
// scheduler.cpp
void run_threadgroup(Worker* worker, uint32_t ordinal);
// shadow.cpp
void check_access(const void* at, size_t bytes, bool is_write, bool is_atomic, const void* pc);
// segments.cpp
void find_segments();
enum class Segment { none, read_only, writable };
Segment segment_of(uintptr_t at);

}  // namespace rt
