// metal_math, metal_integer and their like, declared only.
#pragma once

namespace metal {

#define GATE_UNARY(n)                      \
  float n(float);                          \
  half n(half);                            \
  template <class T, int N> vec<T, N> n(vec<T, N>);
#define GATE_BINARY(n)                     \
  float n(float, float);                   \
  half n(half, half);                      \
  template <class T, int N> vec<T, N> n(vec<T, N>, vec<T, N>);
#define GATE_MATH                                                                           \
  GATE_UNARY(exp) GATE_UNARY(exp2) GATE_UNARY(exp10) GATE_UNARY(log) GATE_UNARY(log2)       \
  GATE_UNARY(log10) GATE_UNARY(sin) GATE_UNARY(cos) GATE_UNARY(tan) GATE_UNARY(asin)        \
  GATE_UNARY(acos) GATE_UNARY(atan) GATE_UNARY(sinh) GATE_UNARY(cosh) GATE_UNARY(tanh)      \
  GATE_UNARY(asinh) GATE_UNARY(acosh) GATE_UNARY(atanh) GATE_UNARY(sinpi) GATE_UNARY(cospi) \
  GATE_UNARY(tanpi) GATE_UNARY(sqrt) GATE_UNARY(rsqrt) GATE_UNARY(ceil) GATE_UNARY(floor)   \
  GATE_UNARY(trunc) GATE_UNARY(rint) GATE_UNARY(round) GATE_UNARY(fabs) GATE_UNARY(fract)   \
  GATE_BINARY(pow) GATE_BINARY(powr) GATE_BINARY(atan2) GATE_BINARY(fmod) GATE_BINARY(fmin) \
  GATE_BINARY(fmax) GATE_BINARY(fdim) GATE_BINARY(divide)                                   \
  float fma(float, float, float);                                                           \
  half fma(half, half, half);
GATE_MATH
namespace fast {
GATE_MATH
}
namespace precise {
GATE_MATH
}
GATE_UNARY(sign)
GATE_UNARY(saturate)
GATE_BINARY(copysign)
GATE_BINARY(nextafter)

float abs(float);
half abs(half);
template <class T, class = enable_if_t<is_integral_v<T>>> T abs(T);
bool isnan(float);
bool isnan(half);
bool isnan(bfloat);
bool isinf(float);
bool isinf(half);
bool isfinite(float);
bool isfinite(half);
template <class T, class = gate_if_plain<T>> constexpr T min(T a, T) { return a; }
template <class T, class = gate_if_plain<T>> constexpr T max(T a, T) { return a; }
template <class T, class = gate_if_plain<T>> T clamp(T, T, T);
template <class T, class = gate_if_plain<T>> T min3(T, T, T);
template <class T, class = gate_if_plain<T>> T max3(T, T, T);
template <class T, class = gate_if_plain<T>> T median3(T, T, T);
template <class T, int N> vec<T, N> min(vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> max(vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> abs(vec<T, N>);
template <class T, int N> vec<T, N> clamp(vec<T, N>, vec<T, N>, vec<T, N>);
template <class T, int N> vec<T, N> fma(vec<T, N>, vec<T, N>, vec<T, N>);
template <class T> T select(T, T, bool);
template <class T, int N> vec<T, N> select(vec<T, N>, vec<T, N>, vec<bool, N>);
template <class T> T mix(T, T, T);
template <class T, class = gate_if_plain<T>> T step(T, T);
template <class T, int N> T dot(vec<T, N>, vec<T, N>);
template <class T, int N> T length(vec<T, N>);

template <class T> T popcount(T);
template <class T> T clz(T);
template <class T> T ctz(T);
template <class T> T reverse_bits(T);
template <class T> T extract_bits(T, uint, uint);
template <class T> T insert_bits(T, T, uint, uint);
template <class T> T rotate(T, T);
template <class T> T mulhi(T, T);
template <class T> T addsat(T, T);
template <class T> T subsat(T, T);
template <class T> make_unsigned_t<T> absdiff(T, T);
float ldexp(float, int);
float frexp(float, thread int&);
float modf(float, thread float&);

}  // namespace metal
