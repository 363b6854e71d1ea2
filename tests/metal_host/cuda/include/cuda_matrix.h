// metal_simdgroup_matrix by shuffles: 8x8, two neighbouring elements a lane, laid out as in MLX and
// on the CPU executor; a product is a chain of fused multiply-adds, its inner index ascending.
#pragma once

namespace metal {

constexpr int msl_matrix_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
constexpr int msl_matrix_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
// The lane that holds an element.
constexpr int msl_matrix_lane(int row, int column) {
  return (row & 4) * 4 + (row & 3) * 2 + (column & 4) * 2 + (column & 3) / 2;
}
constexpr bool msl_matrix_lanes_agree() {
  for (int lane = 0; lane < 32; lane++) {
    if (msl_matrix_lane(msl_matrix_row(lane), msl_matrix_column(lane)) != lane) return false;
  }
  return true;
}
static_assert(msl_matrix_lanes_agree());

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup matrices are 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup matrices hold half, bfloat or float");
  using storage_type = vec<T, 2>;
  storage_type msl_elements;

  simdgroup_matrix() = default;
  storage_type& thread_elements() { return msl_elements; }
  const storage_type& thread_elements() const { return msl_elements; }
};

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c) {
  const int row = msl_matrix_row(msl_lane());
  const int column = msl_matrix_column(msl_lane());
  float first = float(c.msl_elements.v[0]);
  float second = float(c.msl_elements.v[1]);
  // Not unrolled: shuffles limit it anyway, and kernels that multiply 64 times a block stay small.
#pragma unroll 1
  for (int i = 0; i < 8; i += 2) {
    // One lane has a[row][i] and a[row][i + 1]; one has both that are needed of a row of b.
    const ushort of_a = ushort(msl_matrix_lane(row, i));
    const ushort of_b = ushort(msl_matrix_lane(i, column));
    const ushort next_b = ushort(msl_matrix_lane(i + 1, column));
    const float left = simd_shuffle(float(a.msl_elements.v[0]), of_a);
    const float right = simd_shuffle(float(a.msl_elements.v[1]), of_a);
    first = fma(left, simd_shuffle(float(b.msl_elements.v[0]), of_b), first);
    second = fma(left, simd_shuffle(float(b.msl_elements.v[1]), of_b), second);
    first = fma(right, simd_shuffle(float(b.msl_elements.v[0]), next_b), first);
    second = fma(right, simd_shuffle(float(b.msl_elements.v[1]), next_b), second);
  }
  d.msl_elements = vec<D, 2>(D(first), D(second));
}

}  // namespace metal
