// half: every operation rounds, as on the GPU.  CUDA's own header is no part of NVRTC.
#pragma once

struct half {
  ushort msl_bits;

  half() = default;
  half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(msl_bits) : "f"(x)); }
  half(double x) : half(float(x)) {}
  half(int x) : half(float(x)) {}
  half(uint x) : half(float(x)) {}
  half(bool x) : half(float(x)) {}
  operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(msl_bits));
    return x;
  }
};

#define MSL_HALF_OPERATOR(op)                                                         \
  inline half operator op(half a, half b) { return half(float(a) op float(b)); }      \
  inline float operator op(half a, float b) { return float(a) op b; }                 \
  inline float operator op(float a, half b) { return a op float(b); }                 \
  inline half& operator op##=(half& a, half b) { return a = a op b; }
MSL_HALF_OPERATOR(+)
MSL_HALF_OPERATOR(-)
MSL_HALF_OPERATOR(*)
MSL_HALF_OPERATOR(/)
inline half operator-(half a) { return half(-float(a)); }
