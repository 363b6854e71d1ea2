// Vectors for the gate: the constructors and conversions of Metal's, element-wise results only.
#pragma once

namespace metal {

template <class T, int N> struct vec;
template <class T, int K, int... I>
struct gate_swizzle {
  T element[K];
  constexpr operator vec<T, sizeof...(I)>() const {
    return vec<T, sizeof...(I)>(element[I]...);
  }
};

#define GATE_VECTOR_BASICS(N)                                                                \
  using value_type = T;                                                                      \
  vec() = default;                                                                           \
  constexpr vec(const vec&) = default;                                                       \
  constexpr vec& operator=(const vec&) = default;                                            \
  constexpr vec(const constant vec& o) : vec(o.x) {}                                         \
  template <class S, class = enable_if_t<is_arithmetic_v<S> && !__is_same(S, T)>>            \
  constexpr vec(S s) : vec(static_cast<T>(s)) {}                                             \
  template <class U, class = enable_if_t<!__is_same(T, U)>>                                  \
  explicit constexpr vec(vec<U, N> o) : vec(static_cast<T>(o.x)) {}                          \
  template <class U, int K, int... I,                                                        \
            class = enable_if_t<sizeof...(I) == N && !__is_same(T, U)>>                      \
  explicit constexpr vec(gate_swizzle<U, K, I...> s) : vec(vec<U, N>(s)) {}                  \
  constexpr T& operator[](int i) { return v[i]; }                                            \
  constexpr const T& operator[](int i) const { return v[i]; }                                \
  constexpr T operator[](int i) const constant { return v[i]; }

template <class T>
struct vec<T, 2> {
  union {
    struct { T x, y; };
    struct { T r, g; };
    T v[2];
    gate_swizzle<T, 2, 0, 1> xy;
    gate_swizzle<T, 2, 1, 0> yx;
  };
  GATE_VECTOR_BASICS(2)
  constexpr vec(T s) : x(s), y(s) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
};
template <class T>
struct vec<T, 3> {
  union {
    struct { T x, y, z; };
    struct { T r, g, b; };
    T v[3];
    gate_swizzle<T, 3, 0, 1> xy;
    gate_swizzle<T, 3, 1, 2> yz;
    gate_swizzle<T, 3, 0, 2> xz;
    gate_swizzle<T, 3, 0, 1, 2> xyz;
  };
  GATE_VECTOR_BASICS(3)
  constexpr vec(T s) : x(s), y(s), z(s) {}
  constexpr vec(T p, T q, T s) : x(p), y(q), z(s) {}
  constexpr vec(vec<T, 2> p, T q) : vec(p.x, p.y, q) {}
  constexpr vec(T p, vec<T, 2> q) : vec(p, q.x, q.y) {}
};
template <class T>
struct vec<T, 4> {
  union {
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    T v[4];
    gate_swizzle<T, 4, 0, 1> xy, lo;
    gate_swizzle<T, 4, 2, 3> zw, hi;
    gate_swizzle<T, 4, 1, 2> yz;
    gate_swizzle<T, 4, 0, 2> xz, even;
    gate_swizzle<T, 4, 1, 3> yw, odd;
    gate_swizzle<T, 4, 0, 1, 2> xyz;
    gate_swizzle<T, 4, 1, 2, 3> yzw;
  };
  GATE_VECTOR_BASICS(4)
  constexpr vec(T s) : x(s), y(s), z(s), w(s) {}
  constexpr vec(T p, T q, T s, T t) : x(p), y(q), z(s), w(t) {}
  constexpr vec(vec<T, 2> p, vec<T, 2> q) : vec(p.x, p.y, q.x, q.y) {}
  constexpr vec(vec<T, 3> p, T q) : vec(p.x, p.y, p.z, q) {}
  constexpr vec(T p, vec<T, 3> q) : vec(p, q.x, q.y, q.z) {}
  constexpr vec(vec<T, 2> p, T q, T s) : vec(p.x, p.y, q, s) {}
  constexpr vec(T p, T q, vec<T, 2> s) : vec(p, q, s.x, s.y) {}
};

#define GATE_VECTOR_OPERATOR(op)                                                             \
  template <class T, int N>                                                                  \
  constexpr vec<T, N> operator op(vec<T, N> a, vec<T, N>) { return a; }                      \
  template <class T, int N, class S, class = gate_if_number<S>>                              \
  constexpr vec<T, N> operator op(vec<T, N> a, S) { return a; }                              \
  template <class T, int N, class S, class = gate_if_number<S>>                              \
  constexpr vec<T, N> operator op(S, vec<T, N> a) { return a; }                              \
  template <class T, int N, class S>                                                         \
  constexpr vec<T, N> operator op##=(vec<T, N>& a, S) { return a; }
GATE_VECTOR_OPERATOR(+) GATE_VECTOR_OPERATOR(-) GATE_VECTOR_OPERATOR(*)
GATE_VECTOR_OPERATOR(/) GATE_VECTOR_OPERATOR(%) GATE_VECTOR_OPERATOR(&)
GATE_VECTOR_OPERATOR(|) GATE_VECTOR_OPERATOR(^) GATE_VECTOR_OPERATOR(<<)
GATE_VECTOR_OPERATOR(>>)

#define GATE_VECTOR_COMPARISON(op)                                                           \
  template <class T, int N> vec<bool, N> operator op(vec<T, N>, vec<T, N>);                  \
  template <class T, int N, class S, class = gate_if_number<S>>                              \
  vec<bool, N> operator op(vec<T, N>, S);
GATE_VECTOR_COMPARISON(==) GATE_VECTOR_COMPARISON(!=) GATE_VECTOR_COMPARISON(<)
GATE_VECTOR_COMPARISON(>) GATE_VECTOR_COMPARISON(<=) GATE_VECTOR_COMPARISON(>=)
template <class T, int N> constexpr vec<T, N> operator-(vec<T, N> a) { return a; }
template <class T, int N> constexpr vec<T, N> operator~(vec<T, N> a) { return a; }
template <int N> bool any(vec<bool, N>);
template <int N> bool all(vec<bool, N>);

template <class T, int N>
struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(vec<T, N>);
  operator vec<T, N>() const;
  operator vec<T, N>() const device;
  operator vec<T, N>() const threadgroup;
  T& operator[](int i) { return v[i]; }
  const device T& operator[](int i) const device { return v[i]; }
};

#define GATE_NAME_VECTORS(t)              \
  using t##2 = vec<t, 2>;                 \
  using t##3 = vec<t, 3>;                 \
  using t##4 = vec<t, 4>;                 \
  using packed_##t##2 = packed_vec<t, 2>; \
  using packed_##t##3 = packed_vec<t, 3>; \
  using packed_##t##4 = packed_vec<t, 4>;
GATE_NAME_VECTORS(bool) GATE_NAME_VECTORS(char) GATE_NAME_VECTORS(uchar)
GATE_NAME_VECTORS(short) GATE_NAME_VECTORS(ushort) GATE_NAME_VECTORS(int)
GATE_NAME_VECTORS(uint) GATE_NAME_VECTORS(long) GATE_NAME_VECTORS(ulong)
GATE_NAME_VECTORS(half) GATE_NAME_VECTORS(float) GATE_NAME_VECTORS(bfloat)

}  // namespace metal
