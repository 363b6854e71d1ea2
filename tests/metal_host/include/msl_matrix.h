// metal_simdgroup_matrix: 8x8 only, two neighbouring elements a lane, laid out as MLX assumes.
#pragma once

namespace metal {

constexpr int msl_matrix_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
constexpr int msl_matrix_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup matrices hold half, bfloat or float");
  using storage_type = vec<T, 2>;
  storage_type msl_elements;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    int lane = int(msl_rt_builtins()->lane);
    for (int k = 0; k < 2; k++) {
      bool on_diagonal = msl_matrix_row(lane) == msl_matrix_column(lane) + k;
      msl_elements[k] = on_diagonal ? diagonal : T(0);
    }
  }
  storage_type& thread_elements() { return msl_elements; }
  const storage_type& thread_elements() const { return msl_elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

}  // namespace metal

namespace msl {

inline bool whole_simdgroup(msl_u32 mask) {
  if (mask == 0xffffffffu) return true;
  msl_rt_error("INACTIVE-LANE: needs all 32 lanes", "simdgroup_matrix", 0);
  return false;
}
inline void expect_whole_simdgroup(void* const*, msl_u32 mask) { whole_simdgroup(mask); }

template <class T> using matrix = simdgroup_matrix<T, 8, 8>;
template <class T>
const T& element_at(const matrix<T>& m, int k) { return m.msl_elements.v[k]; }

template <class D, class A, class B, class C>
struct product_slot {
  matrix<A> a;
  matrix<B> b;
  matrix<C> c;
  matrix<D> d;
};

// c + sum of a[i] b[i], float.  The order that a GPU takes is not documented: a chain of fused
// multiply-adds is what was seen on some; the other sum orders stand for GPUs that differ.
inline float multiply_add(float c, const float* a, const float* b) {
  if (msl_rt_sum_order == 0) {
    for (int i = 0; i < 8; i++) c = __builtin_fmaf(a[i], b[i * 8], c);
    return c;
  }
  float sum = 0;
  for (int i = 7; i >= 0; i--) sum += a[i] * b[i * 8];
  return c + sum;
}

template <class D, class A, class B, class C>
void multiply_accumulate(void* const* lanes, msl_u32 mask) {
  using Slot = product_slot<D, A, B, C>;
  if (!whole_simdgroup(mask)) return;
  float a[64], b[64];
  for (int l = 0; l < 32; l++) {
    for (int k = 0; k < 2; k++) {
      int at = msl_matrix_row(l) * 8 + msl_matrix_column(l) + k;
      a[at] = float(element_at(static_cast<Slot*>(lanes[l])->a, k));
      b[at] = float(element_at(static_cast<Slot*>(lanes[l])->b, k));
    }
  }
  for (int l = 0; l < 32; l++) {
    Slot& slot = *static_cast<Slot*>(lanes[l]);
    for (int k = 0; k < 2; k++) {
      const float *row = a + msl_matrix_row(l) * 8, *column = b + msl_matrix_column(l) + k;
      slot.d.msl_elements[k] =
          static_cast<D>(multiply_add(float(element_at(slot.c, k)), row, column));
    }
  }
}

struct place { ulong row, column; };
inline place place_of(int k, ulong2 origin, bool transpose) {
  int lane = int(msl_rt_builtins()->lane);
  ulong row = ulong(msl_matrix_row(lane)), column = ulong(msl_matrix_column(lane) + k);
  if (transpose) return {column + origin.y, row + origin.x};
  return {row + origin.y, column + origin.x};
}

}  // namespace msl

namespace metal {

template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.msl_elements = vec<T, 2>(value);
  return m;
}

template <class T, class P>
void simdgroup_load(msl::matrix<T>& d, const P* from, ulong stride = 8,
                    ulong2 origin = ulong2(0, 0), bool transpose = false, MSL_SITE) {
  msl_rt_collective(32, "simdgroup_load", MSL_HERE, &d, msl::expect_whole_simdgroup);
  for (int k = 0; k < 2; k++) {
    msl::place at = msl::place_of(k, origin, transpose);
    d.msl_elements[k] = T(from[at.row * stride + at.column]);
  }
}

template <class T, class P>
void simdgroup_store(msl::matrix<T> a, P* to, ulong stride = 8, ulong2 origin = ulong2(0, 0),
                     bool transpose = false, MSL_SITE) {
  msl_rt_collective(32, "simdgroup_store", MSL_HERE, &a, msl::expect_whole_simdgroup);
  for (int k = 0; k < 2; k++) {
    msl::place at = msl::place_of(k, origin, transpose);
    to[at.row * stride + at.column] = P(a.msl_elements[k]);
  }
}

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(msl::matrix<D>& d, msl::matrix<A> a, msl::matrix<B> b,
                                   msl::matrix<C> c, MSL_SITE) {
  msl::product_slot<D, A, B, C> slot{a, b, c, d};
  msl_rt_collective(32, "simdgroup_multiply_accumulate", MSL_HERE, &slot,
                    msl::multiply_accumulate<D, A, B, C>);
  d = slot.d;
}

template <class D, class A, class B>
void simdgroup_multiply(msl::matrix<D>& d, msl::matrix<A> a, msl::matrix<B> b, MSL_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), MSL_HERE);
}

template <class T>
msl::matrix<T> operator*(msl::matrix<T> a, msl::matrix<T> b) {
  msl::matrix<T> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal
