// Gated low-rank weights: y[gate_split:] += scale * (x[gate_split:] A) B, for the few rows of a
// step.  To be put behind the text of skinny_qmm.metal.
//
// `gated_lora_down` forms h = x[gate_split:] A once for all layers that share x (q, k and v; gate
// and up), with their A stacked.  `AddGatedLora` adds scale * h B where the quantised matmul stores
// its sum, in float32, before the one rounding.  Rows before the gate split are stored as they are.

constant constexpr int RANKS_EACH = 2;  // of a simdgroup

// Add the products of four inputs, from k on, to the sums of a lane.
template <typename T, int rows>
METAL_FUNC void add_low_rank(
    thread float (&sums)[rows][RANKS_EACH],
    const device T* x,
    const device T* lora_a,
    SkinnyShape shape,
    int first_row,
    int first_rank,
    int k) {
  vec<T, 4> weights[RANKS_EACH];
#pragma clang loop unroll(full)
  for (int rank = 0; rank < RANKS_EACH; rank++) {
    const int r = min(first_rank + rank, shape.outputs - 1);
    weights[rank] =
        *reinterpret_cast<const device vec<T, 4>*>(lora_a + ulong(r) * shape.inputs + k);
  }
#pragma clang loop unroll(full)
  for (int row = 0; row < rows; row++) {
    const int m = min(first_row + row, shape.rows - 1);
    const vec<T, 4> inputs =
        *reinterpret_cast<const device vec<T, 4>*>(x + ulong(m) * shape.inputs + k);
#pragma clang loop unroll(full)
    for (int rank = 0; rank < RANKS_EACH; rank++) {
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        sums[row][rank] = fma(float(inputs[i]), float(weights[rank][i]), sums[row][rank]);
      }
    }
  }
}

// Entry of the first product: low_rank[G, R] = x[gate_split:, K] A[R, K]^T, with G = M - gate_split.
//
// Grid: threadgroups (ceil(R / (2 * simdgroups)), ceil(G / rows)) of 32 * simdgroups threads.  K is a
// multiple of 8.
template <typename T, int rows, int simdgroups>
METAL_FUNC void gated_lora_down(
    const device T* x,
    const device T* lora_a,
    device float* low_rank,
    SkinnyShape shape,  // its outputs are the R stacked ranks
    int gate_split,
    uint2 tile,
    uint thread_index) {
  const int simdgroup = int(thread_index) / SIMD_WIDTH;
  const int lane = int(thread_index) % SIMD_WIDTH;
  const int first_rank = (int(tile.x) * simdgroups + simdgroup) * RANKS_EACH;
  const int first_row = gate_split + int(tile.y) * rows;

  float sums[rows][RANKS_EACH];
  for (int row = 0; row < rows; row++) {
    for (int rank = 0; rank < RANKS_EACH; rank++) {
      sums[row][rank] = 0.0f;
    }
  }
  for (int k = lane * 4; k < shape.inputs; k += SIMD_WIDTH * 4) {
    add_low_rank<T, rows>(sums, x, lora_a, shape, first_row, first_rank, k);
  }
#pragma clang loop unroll(full)
  for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
    for (int rank = 0; rank < RANKS_EACH; rank++) {
      const float sum = simd_sum(sums[row][rank]);
      const int m = first_row + row;
      const int r = first_rank + rank;
      if (lane == 0 && m < shape.rows && r < shape.outputs) {
        low_rank[ulong(m - gate_split) * shape.outputs + r] = sum;
      }
    }
  }
}

// Adds the second product where a sum is stored.
template <typename T>
struct AddGatedLora {
  const device float* low_rank;  // [G, stacked], beginning at this layer's first rank
  const device T* lora_b;        // [rank, N]
  float scale;
  int gate_split;
  int rank;
  int stacked;
  int outputs;

  float operator()(float sum, int row, int output) const thread {
    if (row < gate_split) {
      return sum;
    }
    const device float* h = low_rank + ulong(row - gate_split) * stacked;
    float low = 0.0f;
    for (int r = 0; r < rank; r++) {
      low = fma(h[r], float(lora_b[ulong(r) * outputs + output]), low);
    }
    return fma(scale, low, sum);
  }
};
