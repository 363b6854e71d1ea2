// The matrix variant of skinny_qmm.metal, for 4 rows and more: the same sums in the same order on
// the 8x8 matrix units.  To be put behind the text of skinny_qmm.metal.
//
//   threadgroup   one simdgroup a chunk (or two chunks), 8 * column_tiles outputs, 8 * row_tiles rows
//   A             weights: 8 outputs x 8 octets at one place j, dequantised in registers
//   B             x: 8 octets x 8 rows at the same place
//
// A lane holds two neighbouring elements of an 8x8 matrix, see `MatrixLane`.  Of A these are one
// output and two neighbouring octets: 16 packed values that lie side by side, 8 bytes at 4 bits.
// Of B they are one octet of two rows: two loads of 16 bytes at half precision.  There is no
// barrier before the sums meet.  That a multiply adds its eight products one after the other, as a
// chain of fused multiply-adds, is not documented; whoever relies on equal bits checks it first.

// Where a lane's two elements of an 8x8 matrix are: (row, column) and (row, column + 1).
struct MatrixLane {
  int row;
  int column;

  static MatrixLane of(int lane) {
    const int quad = lane / 4;
    MatrixLane found;
    found.row = (quad & 4) + (lane / 2) % 4;
    found.column = (quad & 2) * 2 + (lane % 2) * 2;
    return found;
  }
};

// Two neighbouring octets of one weight row, as packed 16-bit words.
template <typename T, int group_size, int bits>
struct WeightPair {
  ushort words[bits];
  float scale;
  float bias;

  // Read octets `octet` and `octet + 1` (even) of block `block`; zeros behind the row's end.
  void load(
      const device uint* weight,
      const device T* scales,
      const device T* biases,
      int output,
      int block,
      int octet,
      int inputs) thread {
    const int k = block * BLOCK + octet * OCTET;
    if (k < inputs) {
      const device uchar* row =
          reinterpret_cast<const device uchar*>(weight) + ulong(output) * inputs * bits / 8;
      load_words(row + k * bits / 8);
      const ulong group = ulong(output) * (inputs / group_size) + k / group_size;
      scale = float(scales[group]);
      bias = float(biases[group]);
    } else {
      for (int i = 0; i < bits; i++) {
        words[i] = 0;
      }
      scale = 0.0f;
      bias = 0.0f;
    }
  }

  void load_words(const device uchar* from) thread {
    if (bits % 4 == 0) {
      for (int i = 0; i + 3 < bits; i += 4) {
        const ushort4 four = *reinterpret_cast<const device ushort4*>(from + 2 * i);
        words[i] = four.x;
        words[i + 1] = four.y;
        words[i + 2] = four.z;
        words[i + 3] = four.w;
      }
    } else {
      for (int i = 0; i < bits; i++) {
        words[i] = *reinterpret_cast<const device ushort*>(from + 2 * i);
      }
    }
  }

  float2 values(int place) const thread {
    const uint low = packed_value<ushort, bits>(words, place);
    const uint high = packed_value<ushort, bits>(words, OCTET + place);
    return float2(fma(scale, float(low), bias), fma(scale, float(high), bias));
  }
};

// One octet of two neighbouring rows of x.
template <typename T>
struct InputPair {
  vec<T, 4> low[2];
  vec<T, 4> high[2];

  // Read octet `octet` of block `block`; zeros behind the last row and the row's end.
  void load(const device T* x, SkinnyShape shape, int row, int block, int octet) thread {
    const int k = block * BLOCK + octet * OCTET;
    for (int i = 0; i < 2; i++) {
      low[i] = vec<T, 4>(T(0.0f));
      high[i] = vec<T, 4>(T(0.0f));
      if (row + i < shape.rows && k < shape.inputs) {
        const device T* from = x + ulong(row + i) * shape.inputs + k;
        low[i] = *reinterpret_cast<const device vec<T, 4>*>(from);
        high[i] = *reinterpret_cast<const device vec<T, 4>*>(from + 4);
      }
    }
  }

  float2 values(int place) const thread {
    return place < 4 ? float2(float(low[0][place]), float(low[1][place]))
                     : float2(float(high[0][place - 4]), float(high[1][place - 4]));
  }
};

// What one block needs.
template <typename T, int row_tiles, int column_tiles, int group_size, int bits>
struct MatrixBlock {
  WeightPair<T, group_size, bits> weights[column_tiles];
  InputPair<T> inputs[row_tiles];
};

// sums += A * B, with the sums kept as plain registers between multiplies.
METAL_FUNC void multiply_add(thread float2& sums, float2 a, float2 b) {
  simdgroup_matrix<float, 8, 8> left;
  simdgroup_matrix<float, 8, 8> right;
  simdgroup_matrix<float, 8, 8> total;
  // What `thread_elements` returns has another name for each compiler; its first two are a lane's.
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(total.thread_elements()) = sums;
  simdgroup_multiply_accumulate(total, left, right, total);
  sums = reinterpret_cast<thread float2&>(total.thread_elements());
}

template <typename T, int row_tiles, int column_tiles, int group_size, int bits>
METAL_FUNC void load_matrix_block(
    thread MatrixBlock<T, row_tiles, column_tiles, group_size, bits>& found,
    const device T* x,
    const device uint* weight,
    const device T* scales,
    const device T* biases,
    SkinnyShape shape,
    int first_row,
    int first_output,
    int block,
    MatrixLane at) {
#pragma clang loop unroll(full)
  for (int tile = 0; tile < column_tiles; tile++) {
    const int n = min(first_output + tile * 8 + at.row, shape.outputs - 1);
    found.weights[tile].load(weight, scales, biases, n, block, at.column, shape.inputs);
  }
#pragma clang loop unroll(full)
  for (int tile = 0; tile < row_tiles; tile++) {
    found.inputs[tile].load(x, shape, first_row + tile * 8 + at.column, block, at.row);
  }
}

// Add one block to the chains of a simdgroup.
template <typename T, int row_tiles, int column_tiles, int group_size, int bits>
METAL_FUNC void add_matrix_block(
    thread float2 (&sums)[row_tiles][column_tiles],
    const thread MatrixBlock<T, row_tiles, column_tiles, group_size, bits>& block) {
#pragma clang loop unroll(full)
  for (int place = 0; place < OCTET; place++) {
    float2 inputs[row_tiles];
#pragma clang loop unroll(full)
    for (int tile = 0; tile < row_tiles; tile++) {
      inputs[tile] = block.inputs[tile].values(place);
    }
#pragma clang loop unroll(full)
    for (int column = 0; column < column_tiles; column++) {
      const float2 weights = block.weights[column].values(place);
#pragma clang loop unroll(full)
      for (int row = 0; row < row_tiles; row++) {
        multiply_add(sums[row][column], weights, inputs[row]);
      }
    }
  }
}

// The chain of one chunk, with the next block on its way while one is multiplied.
template <typename T, int row_tiles, int column_tiles, int group_size, int bits>
METAL_FUNC void sum_chunk(
    thread float2 (&sums)[row_tiles][column_tiles],
    const device T* x,
    const device uint* weight,
    const device T* scales,
    const device T* biases,
    SkinnyShape shape,
    int first_row,
    int first_output,
    int chunk,
    MatrixLane at) {
#pragma clang loop unroll(full)
  for (int row = 0; row < row_tiles; row++) {
#pragma clang loop unroll(full)
    for (int column = 0; column < column_tiles; column++) {
      sums[row][column] = float2(0.0f);
    }
  }
  const int blocks = (shape.inputs + BLOCK - 1) / BLOCK;
  if (chunk >= blocks) {
    return;
  }
  MatrixBlock<T, row_tiles, column_tiles, group_size, bits> next;
  load_matrix_block(
      next, x, weight, scales, biases, shape, first_row, first_output, chunk, at);
  for (int block = chunk; block < blocks; block += NUM_CHUNKS) {
    const MatrixBlock<T, row_tiles, column_tiles, group_size, bits> now = next;
    if (block + NUM_CHUNKS < blocks) {
      load_matrix_block(
          next, x, weight, scales, biases, shape, first_row, first_output,
          block + NUM_CHUNKS, at);
    }
    add_matrix_block<T, row_tiles, column_tiles, group_size, bits>(sums, now);
  }
}

// The sum over `count` (8 or 16) neighbouring partial sums that lie `stride` apart.
template <int count>
METAL_FUNC float tree_sum(const threadgroup float* partial, int stride) {
  float sums[count];
#pragma clang loop unroll(full)
  for (int i = 0; i < count; i++) {
    sums[i] = partial[i * stride];
  }
#pragma clang loop unroll(full)
  for (int apart = 1; apart < count; apart *= 2) {
#pragma clang loop unroll(full)
    for (int i = 0; i < count; i += 2 * apart) {
      sums[i] += sums[i + apart];
    }
  }
  return sums[0];
}

// Store the sums of one tile of 8 rows: into threadgroup memory, and from there through the tree.
template <typename T, int column_tiles, int simdgroups, typename Store>
METAL_FUNC void store_matrix_tile(
    const thread float2 (&sums)[column_tiles],
    device T* y,
    SkinnyShape shape,
    const thread Store& store,
    threadgroup float* partial,
    MatrixLane at,
    int first_row,
    int first_output,
    uint thread_index) {
  constexpr int width = 8 * column_tiles;
  threadgroup float* mine = partial + int(thread_index) / SIMD_WIDTH * 8 * width;
#pragma clang loop unroll(full)
  for (int column = 0; column < column_tiles; column++) {
    const float2 pair = sums[column];
    mine[at.column * width + column * 8 + at.row] = pair.x;
    mine[(at.column + 1) * width + column * 8 + at.row] = pair.y;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index); i < 8 * width; i += simdgroups * SIMD_WIDTH) {
    const int row = first_row + i / width;
    const int n = first_output + i % width;
    if (row < shape.rows && n < shape.outputs) {
      const float sum = tree_sum<simdgroups>(partial + i, 8 * width);
      y[ulong(row) * shape.outputs + n] = T(store(sum, row, n));
    }
  }
}

// Entry of the matrix variant.
//
// Grid: threadgroups (ceil(N / (8 * column_tiles)), ceil(M / (8 * row_tiles))) of 32 * simdgroups
// threads, simdgroups 8 or 16.  `partial` has simdgroups * 64 * column_tiles floats.
template <
    typename T,
    int row_tiles,
    int column_tiles,
    int simdgroups,
    int group_size,
    int bits,
    typename Store>
METAL_FUNC void skinny_qmm_matrix(
    const device T* x,
    const device uint* weight,
    const device T* scales,
    const device T* biases,
    device T* y,
    SkinnyShape shape,
    const thread Store& store,
    threadgroup float* partial,
    uint2 tile,
    uint thread_index) {
  const int simdgroup = int(thread_index) / SIMD_WIDTH;
  const MatrixLane at = MatrixLane::of(int(thread_index) % SIMD_WIDTH);
  const int first_row = int(tile.y) * 8 * row_tiles;
  const int first_output = int(tile.x) * 8 * column_tiles;
  constexpr int chunks_each = NUM_CHUNKS / simdgroups;

  float2 sums[row_tiles][column_tiles];
  sum_chunk<T, row_tiles, column_tiles, group_size, bits>(
      sums, x, weight, scales, biases, shape, first_row, first_output,
      simdgroup * chunks_each, at);
  if (chunks_each == 2) {
    float2 more[row_tiles][column_tiles];
    sum_chunk<T, row_tiles, column_tiles, group_size, bits>(
        more, x, weight, scales, biases, shape, first_row, first_output,
        simdgroup * chunks_each + 1, at);
#pragma clang loop unroll(full)
    for (int row = 0; row < row_tiles; row++) {
#pragma clang loop unroll(full)
      for (int column = 0; column < column_tiles; column++) {
        sums[row][column] += more[row][column];
      }
    }
  }

#pragma clang loop unroll(full)
  for (int row_tile = 0; row_tile < row_tiles; row_tile++) {
    store_matrix_tile<T, column_tiles, simdgroups>(
        sums[row_tile], y, shape, store, partial, at, first_row + row_tile * 8, first_output,
        thread_index);
    if (row_tile + 1 < row_tiles) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next tile takes the place
    }
  }
}
