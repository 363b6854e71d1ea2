// metal_simdgroup and barriers: a simdgroup is a warp of 32 lanes, all of which take part.
//
// simd_sum and its like are an ascending exclusive-or butterfly, as on the CPU executor.
#pragma once

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

// CUDA's barriers order all memory among those that meet.
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

constexpr uint msl_all_lanes = 0xffffffffu;
inline uint msl_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
inline int msl_lane() { return int(msl_thread() % 32); }

// The value that another lane has.
template <class T>
T msl_of_lane(T x, int lane) {
  static_assert(is_arithmetic_v<T> && sizeof(T) <= 4 && !is_same_v<T, bfloat>,
                "simd functions take half, float and integers of at most 32 bits");
  if constexpr (sizeof(T) == 4) {
    return as_type<T>(__shfl_sync(msl_all_lanes, as_type<uint>(x), lane));
  } else if constexpr (sizeof(T) == 2) {
    return as_type<T>(ushort(__shfl_sync(msl_all_lanes, uint(as_type<ushort>(x)), lane)));
  } else {
    return T(__shfl_sync(msl_all_lanes, uint(x), lane));
  }
}

template <class T> T simd_shuffle(T x, ushort lane) { return msl_of_lane(x, lane); }
template <class T> T simd_broadcast(T x, ushort lane) { return msl_of_lane(x, lane); }
template <class T>
T simd_shuffle_xor(T x, ushort mask) { return msl_of_lane(x, msl_lane() ^ mask); }
template <class T>
T simd_shuffle_up(T x, ushort delta) {
  const int lane = msl_lane() - delta;
  return msl_of_lane(x, lane < 0 ? msl_lane() : lane);
}
template <class T>
T simd_shuffle_down(T x, ushort delta) {
  const int lane = msl_lane() + delta;
  return msl_of_lane(x, lane > 31 ? msl_lane() : lane);
}

#define MSL_REDUCTION(name, expression)                       \
  template <class T>                                          \
  T simd_##name(T a) {                                        \
    for (int step = 1; step < 32; step <<= 1) {               \
      const T b = simd_shuffle_xor(a, ushort(step));          \
      a = T(expression);                                      \
    }                                                         \
    return a;                                                 \
  }
MSL_REDUCTION(sum, a + b)
MSL_REDUCTION(product, a* b)
MSL_REDUCTION(min, min(a, b))
MSL_REDUCTION(max, max(a, b))
MSL_REDUCTION(and, a& b)
MSL_REDUCTION(or, a | b)
MSL_REDUCTION(xor, a ^ b)
inline bool simd_any(bool x) { return __any_sync(msl_all_lanes, x); }
inline bool simd_all(bool x) { return __all_sync(msl_all_lanes, x); }

// Memory of a threadgroup; the number keeps variables of one type apart.
template <class T, int ID>
T& msl_threadgroup_variable() {
  __shared__ T variable;
  return variable;
}

}  // namespace metal

namespace msl {  // the name that the rewriter writes
template <class T, int ID>
T& threadgroup_variable(const char*) { return metal::msl_threadgroup_variable<T, ID>(); }
}  // namespace msl
