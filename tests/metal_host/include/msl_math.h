// metal_math, metal_common, metal_geometric, metal_relational.
#pragma once

namespace metal {

#define MSL_UNARY(name, expression)                             \
  inline float name(float x) { return expression; }             \
  inline half name(half x) { return half(name(float(x))); }     \
  template <class T, int N>                                     \
  vec<T, N> name(vec<T, N> a) {                                 \
    return msl_each<T, N>([&](int i) { return T(name(a[i])); }); \
  }
#define MSL_BINARY(name, expression)                                            \
  inline float name(float x, float y) { return expression; }                    \
  inline half name(half x, half y) { return half(name(float(x), float(y))); }   \
  template <class T, int N>                                                     \
  vec<T, N> name(vec<T, N> a, vec<T, N> b) {                                    \
    return msl_each<T, N>([&](int i) { return T(name(a[i], b[i])); });          \
  }
#include "msl_math_functions.h"
MSL_BINARY(copysign, __builtin_copysignf(x, y))
MSL_BINARY(nextafter, __builtin_nextafterf(x, y))
MSL_UNARY(sign, x != x ? 0.0f : x > 0 ? 1.0f : x < 0 ? -1.0f : x)
MSL_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))

#define MSL_PREDICATE(name)                                     \
  inline bool name(float x) { return __builtin_##name(x); }     \
  inline bool name(half x) { return name(float(x)); }           \
  inline bool name(bfloat x) { return name(float(x)); }
MSL_PREDICATE(isnan)
MSL_PREDICATE(isinf)
MSL_PREDICATE(isfinite)
MSL_PREDICATE(isnormal)
MSL_PREDICATE(signbit)

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }
inline float modf(float x, float& whole) { return __builtin_modff(x, &whole); }
inline int ilogb(float x) { return __builtin_ilogbf(x); }
inline float sincos(float x, float& c) {
  c = __builtin_cosf(x);
  return __builtin_sinf(x);
}

inline float abs(float x) { return __builtin_fabsf(x); }
inline half abs(half x) { return half(__builtin_fabsf(x)); }
template <class T, class = msl_if_integer<T>>
constexpr T abs(T x) {
  if constexpr (is_unsigned_v<T>) return x;
  else return x < 0 ? T(-x) : x;
}

// A NaN loses against a number.
template <class T, class = msl_if_plain<T>>
constexpr T min(T a, T b) { return a != a ? b : b != b ? a : b < a ? b : a; }
template <class T, class = msl_if_plain<T>>
constexpr T max(T a, T b) { return a != a ? b : b != b ? a : a < b ? b : a; }
template <class T, class = msl_if_plain<T>>
constexpr T min3(T a, T b, T c) { return min(min(a, b), c); }
template <class T, class = msl_if_plain<T>>
constexpr T max3(T a, T b, T c) { return max(max(a, b), c); }
template <class T, class = msl_if_plain<T>>
constexpr T median3(T a, T b, T c) { return max(min(a, b), min(max(a, b), c)); }
template <class T, class = msl_if_plain<T>>
constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }

#define MSL_EACH_2(name)                                                        \
  template <class T, int N>                                                     \
  constexpr vec<T, N> name(vec<T, N> a, vec<T, N> b) {                          \
    return msl_each<T, N>([&](int i) { return T(name(a[i], b[i])); });          \
  }
MSL_EACH_2(min)
MSL_EACH_2(max)
template <class T, int N>
constexpr vec<T, N> abs(vec<T, N> a) {
  return msl_each<T, N>([&](int i) { return T(abs(a[i])); });
}
template <class T, int N>
constexpr vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}
template <class T, int N>
constexpr vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  return msl_each<T, N>([&](int i) { return fma(a[i], b[i], c[i]); });
}

template <class T> constexpr T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N>
constexpr vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  return msl_each<T, N>([&](int i) { return c[i] ? b[i] : a[i]; });
}
template <class T> constexpr T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T, class = msl_if_plain<T>>
constexpr T step(T edge, T x) { return x < edge ? T(0) : T(1); }
template <class T, int N>
constexpr T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = T(sum + a[i] * b[i]);
  return sum;
}
template <class T, int N> T length(vec<T, N> a) { return T(sqrt(dot(a, a))); }

namespace fast {
#include "msl_math_functions.h"
using metal::abs, metal::clamp, metal::fma, metal::max, metal::min;
}  // namespace fast
namespace precise {
#include "msl_math_functions.h"
using metal::abs, metal::clamp, metal::fma, metal::max, metal::min;
}  // namespace precise

}  // namespace metal
