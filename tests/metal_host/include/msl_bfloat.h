// bfloat: every operation rounds to nearest even; float and half convert to it only explicitly.
#pragma once

#if defined(MSL_COUNT)  // kept whole, so that a conversion counts as one (see counting.py)
#define MSL_CONVERSION __attribute__((noinline, const))
#else
#define MSL_CONVERSION
#endif

namespace metal {

MSL_CONVERSION constexpr ushort msl_float_to_bfloat(float value) {
  uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return ushort((bits >> 16) | 0x40);  // a quiet NaN
  return ushort((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
MSL_CONVERSION constexpr float msl_bfloat_to_float(ushort bits) {
  return as_type<float>(uint(bits) << 16);
}

struct bfloat {
  ushort msl_bits;

  bfloat() = default;
  template <class T, enable_if_t<is_integral_v<T>, int> = 0>
  constexpr bfloat(T x) : msl_bits(msl_float_to_bfloat(static_cast<float>(x))) {}
  template <class T, enable_if_t<msl_one_of<T, float, half, double>, int> = 0>
  explicit constexpr bfloat(T x) : msl_bits(msl_float_to_bfloat(static_cast<float>(x))) {}
  static constexpr bfloat from_bits(ushort bits) {
    bfloat result(0);
    result.msl_bits = bits;
    return result;
  }

  constexpr float f() const { return msl_bfloat_to_float(msl_bits); }
  template <class T, enable_if_t<is_same_v<T, float> || is_integral_v<T>, int> = 0>
  constexpr operator T() const { return static_cast<T>(f()); }
  template <class T, enable_if_t<is_same_v<T, half>, int> = 0>
  explicit constexpr operator T() const { return static_cast<T>(f()); }

  constexpr bfloat operator-() const { return from_bits(msl_bits ^ 0x8000); }
  constexpr bfloat operator+() const { return *this; }
};

#define MSL_BFLOAT_OPERATOR(op)                                                                   \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(a.f() op b.f()); }             \
  constexpr float operator op(bfloat a, float b) { return a.f() op b; }                           \
  constexpr float operator op(float a, bfloat b) { return a op b.f(); }                           \
  template <class I, class = msl_if_integer<I>>                                                   \
  constexpr bfloat operator op(bfloat a, I b) { return a op bfloat(b); }                          \
  template <class I, class = msl_if_integer<I>>                                                   \
  constexpr bfloat operator op(I a, bfloat b) { return bfloat(a) op b; }                          \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }                    \
  constexpr float& operator op##=(float& a, bfloat b) { return a = a op b.f(); }                  \
  template <class I, class = msl_if_integer<I>>                                                   \
  constexpr bfloat& operator op##=(bfloat& a, I b) { return a = a op bfloat(b); }
MSL_BFLOAT_OPERATOR(+)
MSL_BFLOAT_OPERATOR(-)
MSL_BFLOAT_OPERATOR(*)
MSL_BFLOAT_OPERATOR(/)

#define MSL_BFLOAT_COMPARISON(op)                                                                 \
  constexpr bool operator op(bfloat a, bfloat b) { return a.f() op b.f(); }                       \
  constexpr bool operator op(bfloat a, float b) { return a.f() op b; }                            \
  constexpr bool operator op(float a, bfloat b) { return a op b.f(); }                            \
  template <class I, class = msl_if_integer<I>>                                                   \
  constexpr bool operator op(bfloat a, I b) { return a.f() op bfloat(b).f(); }                    \
  template <class I, class = msl_if_integer<I>>                                                   \
  constexpr bool operator op(I a, bfloat b) { return bfloat(a).f() op b.f(); }
MSL_BFLOAT_COMPARISON(==)
MSL_BFLOAT_COMPARISON(!=)
MSL_BFLOAT_COMPARISON(<)
MSL_BFLOAT_COMPARISON(>)
MSL_BFLOAT_COMPARISON(<=)
MSL_BFLOAT_COMPARISON(>=)

}  // namespace metal
