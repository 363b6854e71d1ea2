// Mamba2's recurrence over the rows of a step: state <- dA state + dt x B, a row of the state
// [Dh, Ds] for each dimension of a head; what is read is C . state + D x.  Frame in
// recurrent_step.metal.
//
// Sums are those of mlx-lm's kernel of one row: lane l has a chain over its Ds / 32 neighbouring
// elements, ascending, and simd_sum adds the lanes.

// H heads of Dh dimensions, G of them for each group of B and C.
template <typename Element, int Dh, int Ds, int H, int G>
struct SsmShape {
  typedef Element T;
  static constant constexpr int dims = Dh;
  static constant constexpr int states = Ds;
  static constant constexpr int heads = H;
  static constant constexpr int groups = H / G;
  static constant constexpr int heads_of_group = G;
  static constant constexpr int each = Ds / 32;
};

// Inputs x [L, H, Dh], B, C [L, H / G, Ds], dt [L, H] and the result y [L, H, Dh], from where a
// lane stands.
template <typename Shape>
struct SsmRows {
  typedef typename Shape::T T;
  static constant constexpr int each = Shape::each;

  const device T* x;
  const device T* B;
  const device T* C;
  const device float* dt;
  device T* y;
  float rate;  // of decay; the head's
  float skip;
  int head;
  int dim;
  int state_dim;
  bool writes;

  int at(int row) const thread { return row * Shape::heads + head; }

  int state_at(int row) const thread {
    return (row * Shape::groups + head / Shape::heads_of_group) * Shape::states + state_dim;
  }

  void update(thread float (&state)[Shape::each], int row) const thread {
    const float step = dt[at(row)];
    const float decay = fast::exp(rate * step);
    const float input = static_cast<float>(x[at(row) * Shape::dims + dim]);
    const device T* inputs = B + state_at(row);
    for (int i = 0; i < Shape::each; i++) {
      const float added = input * step * static_cast<float>(inputs[i]);
      state[i] = decay * state[i] + added;
    }
  }

  float read(const thread float (&state)[Shape::each], int row) const thread {
    const device T* outputs = C + state_at(row);
    float sum = 0.0f;
    for (int i = 0; i < Shape::each; i++) {
      sum += state[i] * static_cast<float>(outputs[i]);
    }
    return simd_sum(sum);
  }

  void write(int row, float result) const thread {
    if (writes) {
      const float input = static_cast<float>(x[at(row) * Shape::dims + dim]);
      y[at(row) * Shape::dims + dim] = static_cast<T>(result + input * skip);
    }
  }
};
