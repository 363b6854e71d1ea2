// metal_atomic: relaxed only, as in MSL.
#pragma once

namespace metal {

enum memory_order {
  memory_order_relaxed,
  memory_order_acquire,
  memory_order_release,
  memory_order_acq_rel,
  memory_order_seq_cst
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
inline void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

template <class T> struct atomic { T msl_value; };
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;
using atomic_ulong = atomic<ulong>;

template <class T>
struct msl_word {
  static_assert(msl_one_of<T, int, uint, float, ulong>, "MSL has atomic int, uint, float, ulong");
  using bits = conditional_t<sizeof(T) == 8, ulong, uint>;
  static constexpr int type = is_same_v<T, uint>    ? MSL_U32
                              : is_same_v<T, int>   ? MSL_I32
                              : is_same_v<T, float> ? MSL_F32
                                                    : MSL_U64;
  static ulong up(T value) { return as_type<bits>(value); }
  static T down(ulong word) { return as_type<T>(bits(word)); }
};

template <class T>
T msl_atomic_apply(int op, const volatile atomic<T>* at, T value) {
  void* word = const_cast<atomic<T>*>(at);
  using Word = msl_word<T>;
  return Word::down(msl_rt_atomic(op, Word::type, word, Word::up(value), nullptr, nullptr));
}

#define MSL_ATOMIC(name, op)                                                               \
  template <class T>                                                                       \
  T atomic_##name##_explicit(volatile atomic<T>* at, decltype(T()) value, memory_order) { \
    return msl_atomic_apply<T>(op, at, value);                                             \
  }
MSL_ATOMIC(exchange, MSL_EXCHANGE)
MSL_ATOMIC(fetch_add, MSL_ADD)
MSL_ATOMIC(fetch_sub, MSL_SUB)
MSL_ATOMIC(fetch_min, MSL_MIN)
MSL_ATOMIC(fetch_max, MSL_MAX)
MSL_ATOMIC(fetch_and, MSL_AND)
MSL_ATOMIC(fetch_or, MSL_OR)
MSL_ATOMIC(fetch_xor, MSL_XOR)

template <class T>
T atomic_load_explicit(const volatile atomic<T>* at, memory_order) {
  return msl_atomic_apply<T>(MSL_LOAD, at, T());
}
template <class T>
void atomic_store_explicit(volatile atomic<T>* at, decltype(T()) value, memory_order) {
  msl_atomic_apply<T>(MSL_STORE, at, value);
}
template <class T>
bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* at, T* expected,
                                           decltype(T()) value, memory_order, memory_order) {
  using Word = msl_word<T>;
  ulong found = Word::up(*expected);
  int swapped = 0;
  void* word = const_cast<atomic<T>*>(at);
  msl_rt_atomic(MSL_COMPARE_EXCHANGE, Word::type, word, Word::up(value), &found, &swapped);
  *expected = Word::down(found);
  return swapped;
}

}  // namespace metal
