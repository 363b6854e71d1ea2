// Barriers, simdgroup and quadgroup functions, matrices, atomics, declared only.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags) { return a; }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T>
constexpr bool gate_simd_type = is_arithmetic_v<T> && sizeof(T) <= 4 && !__is_same(T, bfloat);
template <class T, int N> constexpr bool gate_simd_type<vec<T, N>> = gate_simd_type<T>;
template <class T> using gate_if_simd = enable_if_t<gate_simd_type<T>>;

#define GATE_REDUCTION(n)                                 \
  template <class T, class = gate_if_simd<T>> T simd_##n(T); \
  template <class T, class = gate_if_simd<T>> T quad_##n(T);
GATE_REDUCTION(sum) GATE_REDUCTION(product) GATE_REDUCTION(min) GATE_REDUCTION(max)
GATE_REDUCTION(and) GATE_REDUCTION(or) GATE_REDUCTION(xor) GATE_REDUCTION(broadcast_first)
GATE_REDUCTION(prefix_inclusive_sum) GATE_REDUCTION(prefix_exclusive_sum)
GATE_REDUCTION(prefix_inclusive_product) GATE_REDUCTION(prefix_exclusive_product)
#define GATE_SHUFFLE(n)                                           \
  template <class T, class = gate_if_simd<T>> T simd_##n(T, ushort); \
  template <class T, class = gate_if_simd<T>> T quad_##n(T, ushort);
GATE_SHUFFLE(broadcast) GATE_SHUFFLE(shuffle) GATE_SHUFFLE(shuffle_xor) GATE_SHUFFLE(shuffle_up)
GATE_SHUFFLE(shuffle_down) GATE_SHUFFLE(shuffle_rotate_up) GATE_SHUFFLE(shuffle_rotate_down)
template <class T, class = gate_if_simd<T>>
T simd_shuffle_and_fill_down(T, T, ushort, ushort = 32);
template <class T, class = gate_if_simd<T>>
T simd_shuffle_and_fill_up(T, T, ushort, ushort = 32);

bool simd_all(bool);
bool simd_any(bool);
bool quad_all(bool);
bool quad_any(bool);
bool simd_is_first();
struct simd_vote {
  using vote_t = uint64_t;
  explicit operator vote_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T x) { return x; }

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8 && is_floating_point_v<T>, "8x8 of half, bfloat or float");
  using storage_type = vec<T, 2>;
  storage_type gate_elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread storage_type& thread_elements() thread;
  const thread storage_type& thread_elements() const thread;
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
template <class T> using gate_matrix = simdgroup_matrix<T, 8, 8>;
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread gate_matrix<D>&, gate_matrix<A>, gate_matrix<B>,
                                   gate_matrix<C>);
template <class D, class A, class B>
void simdgroup_multiply(thread gate_matrix<D>&, gate_matrix<A>, gate_matrix<B>);

enum memory_order { memory_order_relaxed = 0 };  // the only one that Metal has everywhere
template <class T>
struct atomic {
  static_assert(__is_same(T, int) || __is_same(T, uint) || __is_same(T, float) ||
                    __is_same(T, ulong) || __is_same(T, bool),
                "atomic int, uint, float, ulong, bool");
  T value;
};

#define GATE_UPDATE(space, n) \
  template <class T>          \
  T atomic_##n##_explicit(volatile space atomic<T>*, decltype(T()), memory_order);
#define GATE_MEMORY(space)                                                                     \
  template <class T>                                                                           \
  void simdgroup_load(thread gate_matrix<T>&, const space T*, ulong = 8,                       \
                      ulong2 = ulong2(0, 0), bool = false);                                    \
  template <class T>                                                                           \
  void simdgroup_store(gate_matrix<T>, space T*, ulong = 8, ulong2 = ulong2(0, 0),             \
                       bool = false);                                                          \
  template <class T> T atomic_load_explicit(const volatile space atomic<T>*, memory_order);    \
  template <class T>                                                                           \
  void atomic_store_explicit(volatile space atomic<T>*, decltype(T()), memory_order);          \
  template <class T>                                                                           \
  bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, thread T*,             \
                                             decltype(T()), memory_order, memory_order);       \
  GATE_UPDATE(space, exchange) GATE_UPDATE(space, fetch_add) GATE_UPDATE(space, fetch_sub)     \
  GATE_UPDATE(space, fetch_min) GATE_UPDATE(space, fetch_max) GATE_UPDATE(space, fetch_and)    \
  GATE_UPDATE(space, fetch_or) GATE_UPDATE(space, fetch_xor)
GATE_MEMORY(device)
GATE_MEMORY(threadgroup)

}  // namespace metal

// OpenCL has types of these names.
#define atomic_int atomic<int>
#define atomic_uint atomic<uint>
#define atomic_float atomic<float>
#define atomic_ulong atomic<ulong>
