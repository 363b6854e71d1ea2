// Metal's library as declarations for clang's "C++ for OpenCL 2021", with real address spaces.
// The gate only compiles; nothing here is run.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline
#define coherent(x)

#include "gate_traits.h"
#include "gate_vec.h"
#include "gate_math.h"
#include "gate_simd.h"

using metal::as_type, metal::bfloat, metal::vec;
#define GATE_GLOBAL_VECTORS(t) using metal::t##2, metal::t##3, metal::t##4;
GATE_GLOBAL_VECTORS(bool) GATE_GLOBAL_VECTORS(char) GATE_GLOBAL_VECTORS(uchar)
GATE_GLOBAL_VECTORS(short) GATE_GLOBAL_VECTORS(ushort) GATE_GLOBAL_VECTORS(int)
GATE_GLOBAL_VECTORS(uint) GATE_GLOBAL_VECTORS(long) GATE_GLOBAL_VECTORS(ulong)
GATE_GLOBAL_VECTORS(half) GATE_GLOBAL_VECTORS(float) GATE_GLOBAL_VECTORS(bfloat)

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define X(n) float __metal_##n(float, int);
X(fabs) X(acos) X(acosh) X(asin) X(asinh) X(atan) X(atanh) X(ceil) X(cos) X(cosh) X(cospi) X(exp)
X(exp10) X(exp2) X(floor) X(fract) X(log) X(log10) X(log2) X(rint) X(round) X(rsqrt) X(sin) X(sinh)
X(sinpi) X(sqrt) X(tan) X(tanh) X(tanpi) X(trunc)
#undef X
#define X(n) float __metal_##n(float, float, int);
X(atan2) X(divide) X(fmax) X(fmin) X(fmod) X(pow) X(powr)
#undef X
float __metal_fma(float, float, float);
float __metal_nextafter(float, float);
float __metal_fmax3(float, float, float, int);
float __metal_fmin3(float, float, float, int);
float __metal_fmedian3(float, float, float, int);
float __metal_frexp(float, thread int*);
float __metal_ldexp(float, int, int);
ushort __metal_get_simdgroup_size(ushort);
#define X(n) template <class T> T __metal_simd_##n(T);
X(sum) X(product) X(min) X(max) X(xor) X(prefix_exclusive_product) X(prefix_exclusive_sum)
X(prefix_inclusive_product) X(prefix_inclusive_sum)
#undef X
#define X(n) template <class T> T __metal_simd_##n(T, ushort);
X(broadcast) X(shuffle) X(shuffle_down) X(shuffle_up) X(shuffle_xor) X(shuffle_rotate_down)
X(shuffle_rotate_up)
#undef X
template <class T> T __metal_simd_shuffle_and_fill_down(T, T, ushort, ushort);
template <class T> T __metal_simd_shuffle_and_fill_up(T, T, ushort, ushort);

namespace msl {
template <class T, int ID> threadgroup T& threadgroup_variable(const constant char*);
}

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT1_2_F 0.70710678118654752440f
#define double error_double_is_not_a_type_of_Metal
#define kernel
