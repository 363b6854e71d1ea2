// Vectors of 2, 3 and 4 elements, packed vectors, metal::array.
#pragma once

namespace metal {

template <class T, int N> struct vec;

// A named selection of elements, such as .xy: it lies over the vector's storage.
template <class T, int K, int... I>
struct msl_swizzle {
  T element[K];
  constexpr operator vec<T, sizeof...(I)>() const {
    return vec<T, sizeof...(I)>(element[I]...);
  }
};

template <class S, class T> using msl_if_other_number =
    enable_if_t<is_arithmetic_v<S> && !is_same_v<S, T>>;
template <class T, class U> using msl_if_differs = enable_if_t<!is_same_v<T, U>>;
template <class T, class U, int N, int... I>
using msl_if_selects = enable_if_t<sizeof...(I) == N && !is_same_v<T, U>>;

// Mode count: a vector is copied by one load and one store, as on a GPU; elsewhere the compiler may
// take it apart.
#if defined(MSL_COUNT)
template <int bytes> struct msl_word_of { using type = uint; };
template <> struct msl_word_of<1> { using type = uchar; };
template <> struct msl_word_of<2> { using type = ushort; };
template <> struct msl_word_of<8> { using type = ulong; };
#define MSL_WHOLE_COPY(N)                                                                         \
  typedef typename msl_word_of<sizeof(T)>::type msl_whole                                         \
      __attribute__((vector_size(N * sizeof(T)), may_alias));                                     \
  constexpr vec(const vec& o) : v{} { *this = o; }                                                \
  constexpr vec& operator=(const vec& o) {                                                        \
    if (__builtin_is_constant_evaluated())                                                        \
      for (int i = 0; i < N; i++) v[i] = o.v[i];                                                  \
    else                                                                                          \
      *(msl_whole*)v = *(const msl_whole*)o.v;                                                    \
    return *this;                                                                                 \
  }
#else
#define MSL_WHOLE_COPY(N)
#endif

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  using value_type = T;
  union {
    struct { T x, y; };
    struct { T r, g; };
    T v[2];
    msl_swizzle<T, 2, 0, 1> xy;
    msl_swizzle<T, 2, 1, 0> yx;
    msl_swizzle<T, 2, 0, 0> xx;
    msl_swizzle<T, 2, 1, 1> yy;
  };
  vec() = default;
  MSL_WHOLE_COPY(2)
  constexpr vec(T s) : x(s), y(s) {}
  template <class S, class = msl_if_other_number<S, T>>
  constexpr vec(S s) : vec(static_cast<T>(s)) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  template <class U, int K, int... I, class = msl_if_selects<T, U, 2, I...>>
  explicit constexpr vec(msl_swizzle<U, K, I...> s) : vec(vec<U, 2>(s)) {}
  template <class U, class = msl_if_differs<T, U>>
  explicit constexpr vec(vec<U, 2> o) : x(static_cast<T>(o.x)), y(static_cast<T>(o.y)) {}
  constexpr T& operator[](int i) { return v[i]; }
  constexpr const T& operator[](int i) const { return v[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  using value_type = T;
  union {
    struct { T x, y, z; };
    struct { T r, g, b; };
    T v[3];
    msl_swizzle<T, 3, 0, 1> xy;
    msl_swizzle<T, 3, 1, 2> yz;
    msl_swizzle<T, 3, 0, 2> xz;
    msl_swizzle<T, 3, 0, 1, 2> xyz;
  };
  vec() = default;
  constexpr vec(T s) : x(s), y(s), z(s) {}
  template <class S, class = msl_if_other_number<S, T>>
  constexpr vec(S s) : vec(static_cast<T>(s)) {}
  constexpr vec(T p, T q, T s) : x(p), y(q), z(s) {}
  constexpr vec(vec<T, 2> p, T q) : vec(p.x, p.y, q) {}
  constexpr vec(T p, vec<T, 2> q) : vec(p, q.x, q.y) {}
  template <class U, int K, int... I, class = msl_if_selects<T, U, 3, I...>>
  explicit constexpr vec(msl_swizzle<U, K, I...> s) : vec(vec<U, 3>(s)) {}
  template <class U, class = msl_if_differs<T, U>>
  explicit constexpr vec(vec<U, 3> o)
      : vec(static_cast<T>(o.x), static_cast<T>(o.y), static_cast<T>(o.z)) {}
  constexpr T& operator[](int i) { return v[i]; }
  constexpr const T& operator[](int i) const { return v[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  using value_type = T;
  union {
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    T v[4];
    msl_swizzle<T, 4, 0, 1> xy, lo;
    msl_swizzle<T, 4, 2, 3> zw, hi;
    msl_swizzle<T, 4, 1, 2> yz;
    msl_swizzle<T, 4, 0, 2> xz, even;
    msl_swizzle<T, 4, 1, 3> yw, odd;
    msl_swizzle<T, 4, 0, 1, 2> xyz;
    msl_swizzle<T, 4, 1, 2, 3> yzw;
    msl_swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };
  vec() = default;
  MSL_WHOLE_COPY(4)
  constexpr vec(T s) : x(s), y(s), z(s), w(s) {}
  template <class S, class = msl_if_other_number<S, T>>
  constexpr vec(S s) : vec(static_cast<T>(s)) {}
  constexpr vec(T p, T q, T s, T t) : x(p), y(q), z(s), w(t) {}
  constexpr vec(vec<T, 2> p, vec<T, 2> q) : vec(p.x, p.y, q.x, q.y) {}
  constexpr vec(vec<T, 3> p, T q) : vec(p.x, p.y, p.z, q) {}
  constexpr vec(T p, vec<T, 3> q) : vec(p, q.x, q.y, q.z) {}
  constexpr vec(vec<T, 2> p, T q, T s) : vec(p.x, p.y, q, s) {}
  constexpr vec(T p, T q, vec<T, 2> s) : vec(p, q, s.x, s.y) {}
  template <class U, int K, int... I, class = msl_if_selects<T, U, 4, I...>>
  explicit constexpr vec(msl_swizzle<U, K, I...> s) : vec(vec<U, 4>(s)) {}
  template <class U, class = msl_if_differs<T, U>>
  explicit constexpr vec(vec<U, 4> o)
      : vec(static_cast<T>(o.x), static_cast<T>(o.y), static_cast<T>(o.z), static_cast<T>(o.w)) {}
  constexpr T& operator[](int i) { return v[i]; }
  constexpr const T& operator[](int i) const { return v[i]; }
};

// A vector whose element i is f(i).
template <class R, int N, class F>
constexpr vec<R, N> msl_each(F f) {
  vec<R, N> result(f(0));
  for (int i = 1; i < N; i++) result[i] = f(i);
  return result;
}

#define MSL_VECTOR_OPERATOR(op)                                                                   \
  template <class T, int N>                                                                       \
  constexpr vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                                     \
    return msl_each<T, N>([&](int i) { return T(a[i] op b[i]); });                                \
  }                                                                                               \
  template <class T, int N, class S, class = msl_if_number<S>>                                    \
  constexpr vec<T, N> operator op(vec<T, N> a, S s) { return a op vec<T, N>(s); }                 \
  template <class T, int N, class S, class = msl_if_number<S>>                                    \
  constexpr vec<T, N> operator op(S s, vec<T, N> a) { return vec<T, N>(s) op a; }                 \
  template <class T, int N, class S>                                                              \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, S s) { return a = a op s; }
MSL_VECTOR_OPERATOR(+)
MSL_VECTOR_OPERATOR(-)
MSL_VECTOR_OPERATOR(*)
MSL_VECTOR_OPERATOR(/)
MSL_VECTOR_OPERATOR(%)
MSL_VECTOR_OPERATOR(&)
MSL_VECTOR_OPERATOR(|)
MSL_VECTOR_OPERATOR(^)
MSL_VECTOR_OPERATOR(<<)
MSL_VECTOR_OPERATOR(>>)

#define MSL_VECTOR_COMPARISON(op)                                                                 \
  template <class T, int N>                                                                       \
  constexpr vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {                                  \
    return msl_each<bool, N>([&](int i) { return a[i] op b[i]; });                                \
  }                                                                                               \
  template <class T, int N, class S, class = msl_if_number<S>>                                    \
  constexpr vec<bool, N> operator op(vec<T, N> a, S s) { return a op vec<T, N>(s); }              \
  template <class T, int N, class S, class = msl_if_number<S>>                                    \
  constexpr vec<bool, N> operator op(S s, vec<T, N> a) { return vec<T, N>(s) op a; }
MSL_VECTOR_COMPARISON(==)
MSL_VECTOR_COMPARISON(!=)
MSL_VECTOR_COMPARISON(<)
MSL_VECTOR_COMPARISON(>)
MSL_VECTOR_COMPARISON(<=)
MSL_VECTOR_COMPARISON(>=)
MSL_VECTOR_COMPARISON(&&)
MSL_VECTOR_COMPARISON(||)

template <class T, int N>
constexpr vec<T, N> operator-(vec<T, N> a) {
  return msl_each<T, N>([&](int i) { return T(-a[i]); });
}
template <class T, int N>
constexpr vec<T, N> operator~(vec<T, N> a) {
  return msl_each<T, N>([&](int i) { return T(~a[i]); });
}
template <class T, int N>
constexpr vec<bool, N> operator!(vec<T, N> a) {
  return msl_each<bool, N>([&](int i) { return !a[i]; });
}
template <int N>
constexpr bool any(vec<bool, N> a) {
  for (int i = 0; i < N; i++)
    if (a[i]) return true;
  return false;
}
template <int N>
constexpr bool all(vec<bool, N> a) {
  return !any(!a);
}

template <class T, int N>
struct packed_vec {  // no alignment beyond an element's
  T v[N];
  packed_vec() = default;
  packed_vec(vec<T, N> o) {
    for (int i = 0; i < N; i++) v[i] = o[i];
  }
  operator vec<T, N>() const {
    return msl_each<T, N>([&](int i) { return v[i]; });
  }
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
};

#define MSL_NAME_VECTORS(t)           \
  using t##2 = vec<t, 2>;             \
  using t##3 = vec<t, 3>;             \
  using t##4 = vec<t, 4>;             \
  using packed_##t##2 = packed_vec<t, 2>; \
  using packed_##t##3 = packed_vec<t, 3>; \
  using packed_##t##4 = packed_vec<t, 4>;
MSL_NAME_VECTORS(bool)
MSL_NAME_VECTORS(char)
MSL_NAME_VECTORS(uchar)
MSL_NAME_VECTORS(short)
MSL_NAME_VECTORS(ushort)
MSL_NAME_VECTORS(int)
MSL_NAME_VECTORS(uint)
MSL_NAME_VECTORS(long)
MSL_NAME_VECTORS(ulong)
MSL_NAME_VECTORS(half)
MSL_NAME_VECTORS(float)
MSL_NAME_VECTORS(bfloat)

template <class T, size_t N>
struct array {
  T v[N];
  T& operator[](size_t i) { return v[i]; }
  constexpr const T& operator[](size_t i) const { return v[i]; }
  constexpr size_t size() const { return N; }
};

}  // namespace metal
