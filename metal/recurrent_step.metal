// The frame of a recurrent layer's step: one state, read once and written once, whatever the rows.
// To be put behind the text of skinny_qmm.metal.
//
//   kept rows       those accepted of the last step, run again from their captured inputs; the state
//                   after them is the one that is stored
//   ordinary rows   in sequence
//   mask groups     each from a copy of the state after its ordinary row
//
// A row is computed alike wherever it stands, so its bits do not depend on the layout.

// order = [kept, ordinary, groups[0 .. ordinary]]; the masks after ordinary row t are rows
// groups[t] .. groups[t + 1] - 1.
struct StepOrder {
  const device int* order;

  int kept() const thread { return order[0]; }
  int ordinary() const thread { return order[1]; }
  int first_mask(int row) const thread { return order[2 + row]; }
};

// Rows has `each`, the elements of the state that a lane has, and
//   update(state, row)    the state after a row
//   read(state, row)      what the layer reads there, from all lanes of a simdgroup
//   write(row, value)     its result
template <typename Rows>
METAL_FUNC void recurrent_step(
    Rows kept, Rows rows, StepOrder order, const device float* state_in, device float* state_out) {
  float state[Rows::each];
  for (int i = 0; i < Rows::each; i++) {
    state[i] = state_in[i];
  }
  for (int row = 0; row < order.kept(); row++) {
    kept.update(state, row);
  }
  for (int i = 0; i < Rows::each; i++) {
    state_out[i] = state[i];
  }
  for (int row = 0; row < order.ordinary(); row++) {
    rows.update(state, row);
    rows.write(row, rows.read(state, row));
    const int end = order.first_mask(row + 1);
    if (order.first_mask(row) < end) {
      float branch[Rows::each];
      for (int i = 0; i < Rows::each; i++) {
        branch[i] = state[i];
      }
      for (int mask = order.first_mask(row); mask < end; mask++) {
        rows.update(branch, mask);
        rows.write(mask, rows.read(branch, mask));
      }
    }
  }
}
