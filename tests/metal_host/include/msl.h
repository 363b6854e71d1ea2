// Metal's standard library for g++ and clang++ (C++17).  Address spaces are erased; what lanes do
// together is the runtime's.  No C++ headers: `thread`, `device` and others become macros below.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../runtime/abi.h"

#define METAL_FUNC inline __attribute__((__always_inline__))
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

#include "msl_traits.h"
#include "msl_bfloat.h"
#include "msl_limits.h"
#include "msl_vec.h"
#include "msl_math.h"
#include "msl_integer.h"
#include "msl_simd.h"
#include "msl_matrix.h"
#include "msl_atomic.h"
#include "msl_internals.h"
#include "msl_launch.h"

using metal::as_type, metal::bfloat, metal::vec;
#define MSL_GLOBAL_VECTORS(t) using metal::t##2, metal::t##3, metal::t##4;
MSL_GLOBAL_VECTORS(bool)
MSL_GLOBAL_VECTORS(char)
MSL_GLOBAL_VECTORS(uchar)
MSL_GLOBAL_VECTORS(short)
MSL_GLOBAL_VECTORS(ushort)
MSL_GLOBAL_VECTORS(int)
MSL_GLOBAL_VECTORS(uint)
MSL_GLOBAL_VECTORS(long)
MSL_GLOBAL_VECTORS(ulong)
MSL_GLOBAL_VECTORS(half)
MSL_GLOBAL_VECTORS(float)
MSL_GLOBAL_VECTORS(bfloat)

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wliteral-suffix"
#pragma GCC system_header
constexpr half operator""h(long double x) { return half(x); }
constexpr metal::bfloat operator""bf(long double x) { return metal::bfloat(float(x)); }
#pragma GCC diagnostic pop

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX half(65504.0f)
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f

// Last: from here on these words are MSL's.
#define device
#define constant
#define threadgroup
#define thread
#define kernel
#define coherent(x)
