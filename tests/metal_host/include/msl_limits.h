// metal_limits: numeric_limits of the types that MSL has.
#pragma once

namespace metal {

template <class T>
struct numeric_limits {
  static constexpr bool is_signed = is_signed_v<T>, is_integer = true;
  static constexpr int digits = sizeof(T) * 8 - is_signed;
  static constexpr T min() { return is_signed ? T(ulong(1) << (sizeof(T) * 8 - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
};

template <>
struct numeric_limits<bool> {
  static constexpr bool min() { return false; }
  static constexpr bool max() { return true; }
  static constexpr bool lowest() { return false; }
};

template <class T>
struct msl_float_limits {
  static constexpr bool is_signed = true, is_integer = false;
  static constexpr T infinity() { return T(__builtin_inff()); }
  static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }
  static constexpr T signaling_NaN() { return quiet_NaN(); }
};
template <>
struct numeric_limits<float> : msl_float_limits<float> {
  static constexpr int digits = 24;
  static constexpr float max() { return 3.402823466e+38f; }
  static constexpr float min() { return 1.175494351e-38f; }
  static constexpr float lowest() { return -max(); }
  static constexpr float epsilon() { return 1.192092896e-07f; }
};
template <>
struct numeric_limits<half> : msl_float_limits<half> {
  static constexpr int digits = 11;
  static constexpr half max() { return half(65504.0f); }
  static constexpr half min() { return half(6.103515625e-05f); }
  static constexpr half lowest() { return half(-65504.0f); }
  static constexpr half epsilon() { return half(9.765625e-04f); }
};
template <>
struct numeric_limits<bfloat> : msl_float_limits<bfloat> {
  static constexpr int digits = 8;
  static constexpr bfloat max() { return bfloat(3.38953139e38f); }
  static constexpr bfloat min() { return bfloat(1.175494351e-38f); }
  static constexpr bfloat lowest() { return bfloat(-3.38953139e38f); }
  static constexpr bfloat epsilon() { return bfloat(7.8125e-03f); }
};

}  // namespace metal
