// The gated delta rule over the rows of a step: state <- g state + k (beta (v - k . g state)), a row
// of the state [Dv, Dk] for each value; what is read is q . state.  Frame in recurrent_step.metal.
//
// Sums are those of mlx-lm's kernels of one row, in their order:
//
//   lane l of 32    a chain over its Dk / 32 neighbouring elements, ascending
//   32 lanes        simd_sum; or, where mlx-lm packs eight rows of the state into a simdgroup,
//                   the butterfly of distances 1, 2, 4, 8, 16, whose first three are in one lane

METAL_FUNC float sum_of_row(const thread float (&chains)[1]) {
  return simd_sum(chains[0]);
}

METAL_FUNC float sum_of_row(const thread float (&chains)[8]) {
  float sum = ((chains[0] + chains[1]) + (chains[2] + chains[3])) +
      ((chains[4] + chains[5]) + (chains[6] + chains[7]));
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  return sum;
}

// The shape of a layer; `lanes` (32 or 4) share a row of the state.  The gates are one for each
// head, or one for each head and key dimension.
template <typename Element, typename Beta, int Dk, int Dv, int Hk, int Hv, int lanes, bool by_key>
struct DeltaShape {
  typedef Element T;
  typedef Beta B;
  static constant constexpr int keys = Dk;
  static constant constexpr int values = Dv;
  static constant constexpr int key_heads = Hk;
  static constant constexpr int heads = Hv;
  static constant constexpr int each = Dk / lanes;
  static constant constexpr int chain = Dk / 32;
  static constant constexpr int shared_by = lanes;
  static constant constexpr bool gates_by_key = by_key;
};

// Inputs q, k [L, Hk, Dk], v [L, Hv, Dv], g [L, Hv] or [L, Hv, Dk], beta [L, Hv] and the result
// y [L, Hv, Dv], from where a lane stands.
template <typename Shape>
struct DeltaRows {
  typedef typename Shape::T T;
  static constant constexpr int each = Shape::each;
  static constant constexpr int chains = Shape::each / Shape::chain;

  const device T* q;
  const device T* k;
  const device T* v;
  const device float* g;
  const device typename Shape::B* beta;
  device T* y;
  int head;
  int value;
  int key;
  bool writes;

  float gate(int row, int i) const thread {
    const int at = row * Shape::heads + head;
    return Shape::gates_by_key ? g[at * Shape::keys + key + i] : g[at];
  }

  int key_at(int row) const thread {
    const int key_head = head / (Shape::heads / Shape::key_heads);
    return (row * Shape::key_heads + key_head) * Shape::keys + key;
  }

  void update(thread float (&state)[Shape::each], int row) const thread {
    const device T* keys = k + key_at(row);
    float sums[chains];
    for (int c = 0; c < chains; c++) {
      float sum = 0.0f;
      for (int i = c * Shape::chain; i < (c + 1) * Shape::chain; i++) {
        state[i] = state[i] * gate(row, i);
        sum += state[i] * static_cast<float>(keys[i]);
      }
      sums[c] = sum;
    }
    const int at = row * Shape::heads + head;
    const float memory = sum_of_row(sums);
    const float delta =
        (static_cast<float>(v[at * Shape::values + value]) - memory) * static_cast<float>(beta[at]);
    for (int i = 0; i < Shape::each; i++) {
      state[i] = state[i] + static_cast<float>(keys[i]) * delta;
    }
  }

  float read(const thread float (&state)[Shape::each], int row) const thread {
    const device T* queries = q + key_at(row);
    float sums[chains];
    for (int c = 0; c < chains; c++) {
      float sum = 0.0f;
      for (int i = c * Shape::chain; i < (c + 1) * Shape::chain; i++) {
        sum += state[i] * static_cast<float>(queries[i]);
      }
      sums[c] = sum;
    }
    return sum_of_row(sums);
  }

  void write(int row, float result) const thread {
    if (writes) {
      y[(row * Shape::heads + head) * Shape::values + value] = static_cast<T>(result);
    }
  }
};
