// metal_integer and metal_pack.
#pragma once

namespace metal {

template <class T> constexpr int msl_bits_of = sizeof(T) * 8;
template <class T> constexpr ulong msl_widen(T x) { return ulong(make_unsigned_t<T>(x)); }

template <class T> constexpr T popcount(T x) { return T(__builtin_popcountl(msl_widen(x))); }
template <class T>
constexpr T clz(T x) {
  return x == 0 ? T(msl_bits_of<T>) : T(__builtin_clzl(msl_widen(x)) - (64 - msl_bits_of<T>));
}
template <class T>
constexpr T ctz(T x) { return x == 0 ? T(msl_bits_of<T>) : T(__builtin_ctzl(msl_widen(x))); }
template <class T>
constexpr T reverse_bits(T x) {
  T result = 0;
  for (int i = 0; i < msl_bits_of<T>; i++)
    if (x >> i & 1) result |= T(1) << (msl_bits_of<T> - 1 - i);
  return result;
}
template <class T>
constexpr T extract_bits(T x, uint offset, uint bits) {
  if (bits == 0) return T(0);
  return T(T(x << (msl_bits_of<T> - bits - offset)) >> (msl_bits_of<T> - bits));
}
template <class T>
constexpr T insert_bits(T base, T insert, uint offset, uint bits) {
  T low = bits >= uint(msl_bits_of<T>) ? T(~T(0)) : T((T(1) << bits) - 1);
  T mask = T(low << offset);
  return T((base & ~mask) | ((insert << offset) & mask));
}
template <class T>
constexpr T rotate(T x, T n) {
  uint k = n & (msl_bits_of<T> - 1);
  return k ? T(x << k | x >> (msl_bits_of<T> - k)) : x;
}

inline int mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
inline ulong mulhi(ulong a, ulong b) {
  return ulong((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int mul24(int a, int b) { return a * b; }
inline uint mul24(uint a, uint b) { return a * b; }
inline int mad24(int a, int b, int c) { return a * b + c; }
inline uint mad24(uint a, uint b, uint c) { return a * b + c; }

template <class T>
constexpr make_unsigned_t<T> absdiff(T a, T b) { return a > b ? a - b : b - a; }
template <class T>
constexpr T addsat(T a, T b) {
  T sum{};
  if (!__builtin_add_overflow(a, b, &sum)) return sum;
  return b < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
}
template <class T>
constexpr T subsat(T a, T b) {
  T difference{};
  if (!__builtin_sub_overflow(a, b, &difference)) return difference;
  return is_unsigned_v<T> || b > 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
}

inline float4 unpack_unorm4x8_to_float(uint v) {
  return float4((v & 255) / 255.0f, (v >> 8 & 255) / 255.0f, (v >> 16 & 255) / 255.0f,
                (v >> 24) / 255.0f);
}

}  // namespace metal
