// metal_simdgroup, metal_quadgroup and barriers: lanes hand a slot to the runtime, which combines.
//
// simd_sum and its like are an ascending exclusive-or butterfly; msl_rt_sum_order changes that.
#pragma once

// The line in the kernel that calls: lanes that meet must have come from the same one.
#define MSL_SITE const char *msl_file = __builtin_FILE(), int msl_line = __builtin_LINE()
#define MSL_HERE msl_file, msl_line

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }
inline void threadgroup_barrier(mem_flags f, MSL_SITE) { msl_rt_barrier(uint(f), MSL_HERE); }
inline void simdgroup_barrier(mem_flags f, MSL_SITE) { msl_rt_simd_barrier(uint(f), MSL_HERE); }

}  // namespace metal

namespace msl {
using namespace metal;

template <class T> struct element { using type = T; };
template <class T, int N> struct element<vec<T, N>> { using type = T; };
template <class T> using element_t = typename element<T>::type;
template <class T>
constexpr bool simd_type =
    is_arithmetic_v<element_t<T>> && sizeof(element_t<T>) <= 4 && !is_same_v<element_t<T>, bfloat>;

template <class T>
struct slot {  // what a lane gives and gets
  T in, out, filler;
  long parameter;
};
template <class T>
slot<T>& lane(void* const* lanes, int i) { return *static_cast<slot<T>*>(lanes[i]); }

template <int W, class T>
T meet(const char* name, msl_combine combine, T x, long parameter, T filler, MSL_SITE) {
  static_assert(simd_type<T>,
                "simd and quad functions take 8-, 16- and 32-bit integers, half, float, vectors");
  slot<T> mine{x, x, filler, parameter};
  msl_rt_collective(W, name, MSL_HERE, &mine, combine);
  return mine.out;
}

// ---- reductions ----
template <class T>
constexpr T highest() {
  using E = element_t<T>;
  if constexpr (is_floating_point_v<E>) return T(numeric_limits<E>::infinity());
  else return T(numeric_limits<E>::max());
}
template <class T>
constexpr T deepest() {
  using E = element_t<T>;
  if constexpr (is_floating_point_v<E>) return T(-numeric_limits<E>::infinity());
  else return T(numeric_limits<E>::min());
}

#define MSL_COMBINER(name, identity_value, expression)      \
  struct name {                                             \
    template <class T> static T identity() { return identity_value; } \
    template <class T> static T of(T a, T b) { return T(expression); } \
  };
MSL_COMBINER(sum, T(0), a + b)
MSL_COMBINER(product, T(1), a* b)
MSL_COMBINER(minimum, highest<T>(), metal::min(a, b))
MSL_COMBINER(maximum, deepest<T>(), metal::max(a, b))
MSL_COMBINER(conjunction_of_bits, T(~T(0)), a& b)
MSL_COMBINER(disjunction_of_bits, T(0), a | b)
MSL_COMBINER(parity_of_bits, T(0), a ^ b)

template <int W, class T, class Op>
T fold(const T* v) {  // in lane order, or against it
  bool ascending = msl_rt_sum_order == 1;
  T total = ascending ? v[0] : v[W - 1];
  for (int i = 1; i < W; i++) total = Op::of(total, ascending ? v[i] : v[W - 1 - i]);
  return total;
}

template <int W, class T, class Op>
void reduce(void* const* lanes, msl_u32 mask) {
  T v[W], next[W];
  for (int i = 0; i < W; i++)
    v[i] = mask >> i & 1 ? lane<T>(lanes, i).in : Op::template identity<T>();
  if (msl_rt_sum_order) {
    T total = fold<W, T, Op>(v);
    for (T& x : v) x = total;
  } else {
    for (int step = 1; step < W; step <<= 1) {
      for (int i = 0; i < W; i++) next[i] = Op::of(v[i], v[i ^ step]);
      for (int i = 0; i < W; i++) v[i] = next[i];
    }
  }
  for (int i = 0; i < W; i++)
    if (mask >> i & 1) lane<T>(lanes, i).out = v[i];
}

template <int W, class T, class Op, bool inclusive>
void scan(void* const* lanes, msl_u32 mask) {
  T total = Op::template identity<T>();
  for (int i = 0; i < W; i++) {
    if (!(mask >> i & 1)) continue;
    slot<T>& q = lane<T>(lanes, i);
    T before = total;
    total = Op::of(total, q.in);
    q.out = inclusive ? total : before;
  }
}

// ---- shuffles: `source` says which lane i reads; kOwn its own value ----
constexpr int kOwn = -1;
struct from_parameter { static int source(int, int, long p) { return int(p); } };
struct from_xor { static int source(int, int i, long p) { return int(i ^ p); } };
struct from_below {
  static int source(int, int i, long p) { return i - p < 0 ? kOwn : int(i - p); }
};
struct from_above {
  static int source(int w, int i, long p) { return i + p >= w ? kOwn : int(i + p); }
};
struct turned_up { static int source(int w, int i, long p) { return int((i + w - p % w) % w); } };
struct turned_down { static int source(int w, int i, long p) { return int((i + p) % w); } };

template <int W, class T, class From, bool uniform>
void shuffle(void* const* lanes, msl_u32 mask) {
  slot<T>* first = nullptr;
  for (int i = 0; i < W; i++) {
    if (!(mask >> i & 1)) continue;
    slot<T>& q = lane<T>(lanes, i);
    if (!first) first = &q;
    if (uniform && q.parameter != first->parameter)
      msl_rt_error("NONUNIFORM: the lane or delta argument differs between lanes", "shuffle", 0);
    int source = From::source(W, i, q.parameter);
    if (source == kOwn) continue;
    if (source >= 0 && source < W && mask >> source & 1) {
      q.out = lane<T>(lanes, source).in;
      continue;
    }
    msl_rt_error("INACTIVE-LANE: reads an inactive or missing lane", "shuffle", 0);
    __builtin_memset(static_cast<void*>(&q.out), 0xff, sizeof(T));
  }
}

// Within rows of `modulo` lanes; what falls off one end comes from the filler of the other.
template <int W, class T, bool down>
void fill_shuffle(void* const* lanes, msl_u32 mask) {
  for (int i = 0; i < W; i++) {
    if (!(mask >> i & 1)) continue;
    slot<T>& q = lane<T>(lanes, i);
    int delta = int(q.parameter >> 16), modulo = int(q.parameter & 0xffff);
    int row = i / modulo * modulo, at = i - row + (down ? delta : -delta);
    bool inside = at >= 0 && at < modulo;
    int source = row + (at + modulo) % modulo;
    if (lanes[source]) {
      q.out = inside ? lane<T>(lanes, source).in : lane<T>(lanes, source).filler;
      continue;
    }
    msl_rt_error("INACTIVE-LANE: reads an inactive or missing lane", "shuffle_and_fill", 0);
  }
}

template <int W, class T>
void broadcast_first(void* const* lanes, msl_u32 mask) {
  T value = lane<T>(lanes, __builtin_ctz(mask)).in;
  for (int i = 0; i < W; i++)
    if (mask >> i & 1) lane<T>(lanes, i).out = value;
}

template <int W>
void ballot(void* const* lanes, msl_u32 mask) {
  uint votes = 0;
  for (int i = 0; i < W; i++)
    if (mask >> i & 1 && lane<uint>(lanes, i).in) votes |= 1u << i;
  for (int i = 0; i < W; i++) {
    if (!(mask >> i & 1)) continue;
    lane<uint>(lanes, i).out = votes;
    lane<uint>(lanes, i).filler = mask;
  }
}

struct votes { uint yes, live; };
template <int W>
votes vote(const char* name, bool yes, MSL_SITE) {
  slot<uint> mine{yes, 0, 0, 0};
  msl_rt_collective(W, name, MSL_HERE, &mine, ballot<W>);
  return {mine.out, mine.filler};
}

}  // namespace msl

namespace metal {

#define MSL_GROUP_REDUCTION(W, group, name, Op)                                                  \
  template <class T>                                                                             \
  T group##_##name(T x, MSL_SITE) {                                                              \
    return msl::meet<W, T>(#group "_" #name, msl::reduce<W, T, msl::Op>, x, 0, x, MSL_HERE);     \
  }
#define MSL_REDUCTION(name, Op) \
  MSL_GROUP_REDUCTION(32, simd, name, Op) MSL_GROUP_REDUCTION(4, quad, name, Op)
MSL_REDUCTION(sum, sum)
MSL_REDUCTION(product, product)
MSL_REDUCTION(min, minimum)
MSL_REDUCTION(max, maximum)
MSL_REDUCTION(and, conjunction_of_bits)
MSL_REDUCTION(or, disjunction_of_bits)
MSL_REDUCTION(xor, parity_of_bits)

#define MSL_GROUP_SCAN(W, group, name, Op, inclusive)                                            \
  template <class T>                                                                             \
  T group##_prefix_##name(T x, MSL_SITE) {                                                       \
    return msl::meet<W, T>(#group "_prefix_" #name, msl::scan<W, T, msl::Op, inclusive>, x, 0,   \
                           x, MSL_HERE);                                                         \
  }
#define MSL_SCAN(name, Op, inclusive) \
  MSL_GROUP_SCAN(32, simd, name, Op, inclusive) MSL_GROUP_SCAN(4, quad, name, Op, inclusive)
MSL_SCAN(inclusive_sum, sum, true)
MSL_SCAN(exclusive_sum, sum, false)
MSL_SCAN(inclusive_product, product, true)
MSL_SCAN(exclusive_product, product, false)

#define MSL_GROUP_SHUFFLE(W, group, name, From, uniform)                                         \
  template <class T>                                                                             \
  T group##_##name(T x, ushort p, MSL_SITE) {                                                    \
    return msl::meet<W, T>(#group "_" #name, msl::shuffle<W, T, msl::From, uniform>, x, p, x,    \
                           MSL_HERE);                                                            \
  }
#define MSL_SHUFFLE(name, From, uniform) \
  MSL_GROUP_SHUFFLE(32, simd, name, From, uniform) MSL_GROUP_SHUFFLE(4, quad, name, From, uniform)
MSL_SHUFFLE(broadcast, from_parameter, true)
MSL_SHUFFLE(shuffle, from_parameter, false)
MSL_SHUFFLE(shuffle_xor, from_xor, true)
MSL_SHUFFLE(shuffle_up, from_below, true)
MSL_SHUFFLE(shuffle_down, from_above, true)
MSL_SHUFFLE(shuffle_rotate_up, turned_up, true)
MSL_SHUFFLE(shuffle_rotate_down, turned_down, true)

#define MSL_GROUP_FILL(W, group, name, down)                                                     \
  template <class T>                                                                             \
  T group##_shuffle_and_fill_##name(T x, T filler, ushort delta, ushort modulo = W, MSL_SITE) {  \
    return msl::meet<W, T>(#group "_shuffle_and_fill_" #name, msl::fill_shuffle<W, T, down>, x,  \
                           long(delta) << 16 | modulo, filler, MSL_HERE);                        \
  }
MSL_GROUP_FILL(32, simd, down, true)
MSL_GROUP_FILL(32, simd, up, false)
MSL_GROUP_FILL(4, quad, down, true)
MSL_GROUP_FILL(4, quad, up, false)

#define MSL_GROUP_VOTES(W, group)                                                                \
  struct group##_vote {                                                                          \
    using vote_t = uint64_t;                                                                     \
    vote_t msl_votes;                                                                            \
    explicit constexpr group##_vote(vote_t v = 0) : msl_votes(v) {}                              \
    explicit constexpr operator vote_t() const { return msl_votes; }                             \
    constexpr bool any() const { return msl_votes; }                                             \
    constexpr bool all() const { return msl_votes == (1ull << W) - 1; }                          \
  };                                                                                             \
  inline group##_vote group##_ballot(bool x, MSL_SITE) {                                         \
    return group##_vote(msl::vote<W>(#group "_ballot", x, MSL_HERE).yes);                        \
  }                                                                                              \
  inline group##_vote group##_active_threads_mask(MSL_SITE) {                                    \
    return group##_vote(msl::vote<W>(#group "_active_threads_mask", true, MSL_HERE).yes);        \
  }                                                                                              \
  inline bool group##_any(bool x, MSL_SITE) {                                                    \
    return msl::vote<W>(#group "_any", x, MSL_HERE).yes;                                         \
  }                                                                                              \
  inline bool group##_all(bool x, MSL_SITE) {                                                    \
    msl::votes v = msl::vote<W>(#group "_all", x, MSL_HERE);                                     \
    return v.yes == v.live;                                                                      \
  }                                                                                              \
  template <class T>                                                                             \
  T group##_broadcast_first(T x, MSL_SITE) {                                                     \
    return msl::meet<W, T>(#group "_broadcast_first", msl::broadcast_first<W, T>, x, 0, x,       \
                           MSL_HERE);                                                            \
  }
MSL_GROUP_VOTES(32, simd)
MSL_GROUP_VOTES(4, quad)

inline bool simd_is_first(MSL_SITE) {
  uint live = msl::vote<32>("simd_is_first", true, MSL_HERE).live;
  return uint(__builtin_ctz(live)) == msl_rt_builtins()->lane;
}

template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T x) { return x; }

}  // namespace metal
