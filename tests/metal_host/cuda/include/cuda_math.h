// The functions of metal_math and metal_common that kernels of few rows call.
#pragma once

namespace metal {

inline float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
inline float exp(float x) { return ::expf(x); }
namespace fast {
inline float exp(float x) { return ::__expf(x); }
}  // namespace fast
inline float exp2(float x) { return ::exp2f(x); }
inline float log2(float x) { return ::log2f(x); }
inline float sqrt(float x) { return ::sqrtf(x); }
inline float rsqrt(float x) { return ::rsqrtf(x); }
inline float abs(float x) { return ::fabsf(x); }

template <class T, class = msl_if_integer<T>>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T, class = msl_if_integer<T>>
constexpr T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return ::fminf(a, b); }  // a NaN loses against a number
inline float max(float a, float b) { return ::fmaxf(a, b); }
template <class T>
constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> constexpr T select(T a, T b, bool c) { return c ? b : a; }

}  // namespace metal
