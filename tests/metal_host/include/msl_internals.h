// The compiler's own __metal_* functions, which MLX's bfloat headers call directly.
#pragma once

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define MSL_INTERNAL_1(n) \
  inline float __metal_##n(float x, int) { return metal::n(x); }
#define MSL_INTERNAL_2(n) \
  inline float __metal_##n(float x, float y, int) { return metal::n(x, y); }
#define MSL_INTERNAL_3(n, of) \
  inline float __metal_##n(float a, float b, float c, int) { return metal::of(a, b, c); }
MSL_INTERNAL_1(fabs) MSL_INTERNAL_1(acos) MSL_INTERNAL_1(acosh) MSL_INTERNAL_1(asin)
MSL_INTERNAL_1(asinh) MSL_INTERNAL_1(atan) MSL_INTERNAL_1(atanh) MSL_INTERNAL_1(ceil)
MSL_INTERNAL_1(cos) MSL_INTERNAL_1(cosh) MSL_INTERNAL_1(cospi) MSL_INTERNAL_1(exp)
MSL_INTERNAL_1(exp10) MSL_INTERNAL_1(exp2) MSL_INTERNAL_1(floor) MSL_INTERNAL_1(fract)
MSL_INTERNAL_1(log) MSL_INTERNAL_1(log10) MSL_INTERNAL_1(log2) MSL_INTERNAL_1(rint)
MSL_INTERNAL_1(round) MSL_INTERNAL_1(rsqrt) MSL_INTERNAL_1(sin) MSL_INTERNAL_1(sinh)
MSL_INTERNAL_1(sinpi) MSL_INTERNAL_1(sqrt) MSL_INTERNAL_1(tan) MSL_INTERNAL_1(tanh)
MSL_INTERNAL_1(tanpi) MSL_INTERNAL_1(trunc)
MSL_INTERNAL_2(atan2) MSL_INTERNAL_2(divide) MSL_INTERNAL_2(fmax) MSL_INTERNAL_2(fmin)
MSL_INTERNAL_2(fmod) MSL_INTERNAL_2(pow) MSL_INTERNAL_2(powr)
MSL_INTERNAL_3(fmax3, max3) MSL_INTERNAL_3(fmin3, min3) MSL_INTERNAL_3(fmedian3, median3)
inline float __metal_fma(float a, float b, float c) { return metal::fma(a, b, c); }
inline float __metal_nextafter(float a, float b) { return metal::nextafter(a, b); }
inline float __metal_frexp(float x, int* e) { return __builtin_frexpf(x, e); }
inline float __metal_ldexp(float x, int k, int) { return __builtin_ldexpf(x, k); }
constexpr ushort __metal_get_simdgroup_size(ushort) { return 32; }

#define MSL_INTERNAL_SIMD(n) \
  template <class T> T __metal_simd_##n(T x, MSL_SITE) { return metal::simd_##n(x, MSL_HERE); }
#define MSL_INTERNAL_SHUFFLE(n)               \
  template <class T>                          \
  T __metal_simd_##n(T x, ushort p, MSL_SITE) { \
    return metal::simd_##n(x, p, MSL_HERE);   \
  }
MSL_INTERNAL_SIMD(sum) MSL_INTERNAL_SIMD(product) MSL_INTERNAL_SIMD(min) MSL_INTERNAL_SIMD(max)
MSL_INTERNAL_SIMD(prefix_exclusive_product) MSL_INTERNAL_SIMD(prefix_exclusive_sum)
MSL_INTERNAL_SIMD(prefix_inclusive_product) MSL_INTERNAL_SIMD(prefix_inclusive_sum)
MSL_INTERNAL_SHUFFLE(broadcast) MSL_INTERNAL_SHUFFLE(shuffle)
MSL_INTERNAL_SHUFFLE(shuffle_down) MSL_INTERNAL_SHUFFLE(shuffle_up)
MSL_INTERNAL_SHUFFLE(shuffle_xor) MSL_INTERNAL_SHUFFLE(shuffle_rotate_down)
MSL_INTERNAL_SHUFFLE(shuffle_rotate_up)
inline float __metal_simd_xor(float x, MSL_SITE) {
  return metal::as_type<float>(metal::simd_xor(metal::as_type<uint>(x), MSL_HERE));
}
template <class T>
T __metal_simd_shuffle_and_fill_down(T x, T f, ushort d, ushort m, MSL_SITE) {
  return metal::simd_shuffle_and_fill_down(x, f, d, m, MSL_HERE);
}
template <class T>
T __metal_simd_shuffle_and_fill_up(T x, T f, ushort d, ushort m, MSL_SITE) {
  return metal::simd_shuffle_and_fill_up(x, f, d, m, MSL_HERE);
}
