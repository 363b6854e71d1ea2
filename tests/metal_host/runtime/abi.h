// What kernel code calls: the interface between include/ (Metal's library, address spaces erased)
// and the runtime.  No C++ headers here: kernel text may use names such as `thread` or `device`.
#pragma once

typedef unsigned int msl_u32;

// Position of one GPU thread; simdgroups and quadgroups follow the linear index.
struct msl_builtins {
  msl_u32 thread[3];        // thread_position_in_threadgroup
  msl_u32 threadgroup[3];   // threadgroup_position_in_grid
  msl_u32 size[3];          // threads_per_threadgroup, of this (perhaps edge) threadgroup
  msl_u32 full_size[3];     // dispatch_threads_per_threadgroup
  msl_u32 grid[3];          // threads_per_grid
  msl_u32 threadgroups[3];  // threadgroups_per_grid
  msl_u32 linear, simdgroup, lane, simdgroups, full_simdgroups;
};

enum { MSL_MEM_NONE = 0, MSL_MEM_DEVICE = 1, MSL_MEM_THREADGROUP = 2 };
enum msl_atomic_op {
  MSL_LOAD, MSL_STORE, MSL_EXCHANGE, MSL_ADD, MSL_SUB, MSL_MIN, MSL_MAX, MSL_AND, MSL_OR, MSL_XOR,
  MSL_COMPARE_EXCHANGE
};
enum msl_atomic_type { MSL_U32, MSL_I32, MSL_F32, MSL_U64 };

// Runs once for a whole group; lanes[i] is the payload of lane i, null where `mask` lacks bit i.
typedef void (*msl_combine)(void* const* lanes, msl_u32 mask);

extern "C" {
const msl_builtins* msl_rt_builtins();
// The live lanes of the group (width 32 or 4) meet; `combine` runs once; then all go on.
void msl_rt_collective(int width, const char* name, const char* file, int line, void* payload,
                       msl_combine combine);
void msl_rt_barrier(unsigned flags, const char* file, int line);
void msl_rt_simd_barrier(unsigned flags, const char* file, int line);
void* msl_rt_threadgroup(const void* site, unsigned long size, unsigned long align,
                         const char* name);
void* msl_rt_threadgroup_argument(int index);
void msl_rt_error(const char* message, const char* file, int line);
unsigned long msl_rt_atomic(int op, int type, void* at, unsigned long value,
                            unsigned long* expected, int* swapped);
extern int msl_rt_sum_order;  // 0: ascending butterfly, 1: first to last, 2: last to first
}
