// Relaxed atomics.  Seeded schedules may switch lanes at any of them.
#include <cstring>

#include "state.h"

using namespace rt;

namespace {

template <class T>
T apply(int op, T old, T value) {
  switch (op) {
    case MSL_EXCHANGE: return value;
    case MSL_ADD: return old + value;
    case MSL_SUB: return old - value;
    case MSL_MIN: return old < value ? old : value;
    default: return old > value ? old : value;
  }
}

template <class Word>
Word apply_bits(int op, Word old, Word value) {
  switch (op) {
    case MSL_AND: return old & value;
    case MSL_OR: return old | value;
    default: return old ^ value;
  }
}

template <class Word, class T>
Word combine(int op, Word old, Word value) {
  if (op == MSL_AND || op == MSL_OR || op == MSL_XOR) return apply_bits(op, old, value);
  T a, b;
  memcpy(&a, &old, sizeof a);
  memcpy(&b, &value, sizeof b);
  T result = apply<T>(op, a, b);
  memcpy(&old, &result, sizeof old);
  return old;
}

template <class Word, class T>
Word atomic(int op, void* at, Word value, unsigned long* expected, int* swapped, bool* changed) {
  Word* word = static_cast<Word*>(at);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  if (op == MSL_LOAD) return old;
  if (op == MSL_COMPARE_EXCHANGE) {
    old = static_cast<Word>(*expected);
    *swapped = __atomic_compare_exchange_n(word, &old, value, false, __ATOMIC_RELAXED,
                                           __ATOMIC_RELAXED);
    *expected = old;
    *changed = *swapped && old != value;
    return old;
  }
  Word next;
  do next = op == MSL_STORE ? value : combine<Word, T>(op, old, value);
  while (!__atomic_compare_exchange_n(word, &old, next, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  *changed = next != old;
  return old;
}

unsigned long apply_to(int op, int type, void* at, unsigned long value, unsigned long* expected,
                       int* swapped, bool* changed) {
  if (type == MSL_U64) return atomic<uint64_t, uint64_t>(op, at, value, expected, swapped, changed);
  uint32_t word = static_cast<uint32_t>(value);
  if (type == MSL_I32) return atomic<uint32_t, int32_t>(op, at, word, expected, swapped, changed);
  if (type == MSL_F32) return atomic<uint32_t, float>(op, at, word, expected, swapped, changed);
  return atomic<uint32_t, uint32_t>(op, at, word, expected, swapped, changed);
}

}  // namespace

extern "C" unsigned long msl_rt_atomic(int op, int type, void* at, unsigned long value,
                                       unsigned long* expected, int* swapped) {
  const void* pc = static_cast<const char*>(__builtin_return_address(0)) - 1;
  check_access(at, type == MSL_U64 ? 8 : 4, op != MSL_LOAD, true, pc);
  Worker* worker = this_worker();
  if (worker->fatal) worker->leave();
  if (worker->current && worker->launch->seed && (worker->random() & 3) == 0) worker->leave();
  bool changed = false;
  unsigned long old = apply_to(op, type, at, value, expected, swapped, &changed);
  if (changed)
    note_progress(worker);
  else
    note_idle_access(worker, reinterpret_cast<uintptr_t>(at), reinterpret_cast<uintptr_t>(pc));
  return old;
}
