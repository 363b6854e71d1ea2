// Quantised matmul for the few rows of a step: y[M, N] = x[M, K] * dequantise(W)[N, K]^T.
//
// The order of summation depends on K alone, so a row's bits do not depend on how many rows ride
// along, nor on which of the two variants computes them:
//
//   k = 64 b + 8 o + j          block b, octet o, place j
//   chunk c = b mod 16          each chunk is one chain of fused multiply-adds over its blocks,
//                               ascending in b, then j, then o
//   y = tree over the chunks    neighbours first: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)) ...
//
// A weight is fma(scale, q, bias) in float32.  One place j of a block is what one 8x8 matrix
// multiply takes (its k are the octets), which is why j comes before o.

#include <metal_stdlib>

using namespace metal;

constant constexpr int NUM_CHUNKS = 16;
constant constexpr int BLOCK = 64;
constant constexpr int OCTET = 8;
constant constexpr int SIMD_WIDTH = 32;
constant constexpr int SCALAR_SIMDGROUPS = 4;  // four chunks each

// Shape of a call.
struct SkinnyShape {
  int rows;     // M
  int outputs;  // N
  int inputs;   // K, a multiple of the group size
};

// What becomes of a sum before it is stored; gated_lora.metal has another.
struct StoreSum {
  float operator()(float sum, int row, int output) const thread { return sum; }
};

// The value of `bits` bits at a place of a run of packed words.
template <typename Word, int bits>
METAL_FUNC uint packed_value(const thread Word* words, int place) {
  constexpr int word_bits = 8 * sizeof(Word);
  const int first = place * bits;
  const int word = first / word_bits;
  const int shift = first % word_bits;
  uint value = uint(words[word]) >> shift;
  if (shift + bits > word_bits) {
    value |= uint(words[word + 1]) << (word_bits - shift);
  }
  return value & ((1u << bits) - 1u);
}

// ---------------------------------------------------------------------------------------------
// Scalar variant: a lane owns whole blocks of a weight row, so its chain needs no other lane.
//
//   threadgroup   4 simdgroups x 32 lanes, 8 * outputs outputs, `rows` rows of x
//   lane          column = lane / 4 of 8, chunk = 4 * simdgroup + lane % 4
//
// Four neighbouring lanes read four neighbouring blocks of one row: 128 bytes at 4 bits.
// ---------------------------------------------------------------------------------------------

// One block of one weight row, as packed words with their scales and biases.
template <typename T, int group_size, int bits>
struct WeightBlock {
  static constant constexpr int num_words = BLOCK * bits / 32;
  static constant constexpr int num_groups = group_size < BLOCK ? BLOCK / group_size : 1;

  uint words[num_words];
  float scales[num_groups];
  float biases[num_groups];

  // Read block `block` of row `output`; what lies behind the row's end is zero.
  void load(
      const device uint* weight,
      const device T* all_scales,
      const device T* all_biases,
      int output,
      int block,
      int inputs) thread {
    const ulong row_words = ulong(inputs) * bits / 32;
    const int left = (inputs - block * BLOCK) * bits / 32;
    load_words(weight + ulong(output) * row_words + ulong(block) * num_words, left);
    const int row_groups = inputs / group_size;
    const ulong first_group = ulong(output) * row_groups;
    for (int i = 0; i < num_groups; i++) {
      const int group = block * BLOCK / group_size + i;
      scales[i] = group < row_groups ? float(all_scales[first_group + group]) : 0.0f;
      biases[i] = group < row_groups ? float(all_biases[first_group + group]) : 0.0f;
    }
  }

  // The widest loads that rows of these bits are aligned to.
  void load_words(const device uint* from, int left) thread {
    if (left < num_words) {
      for (int i = 0; i < num_words; i++) {
        words[i] = i < left ? from[i] : 0u;
      }
    } else if (bits % 4 == 0) {
      for (int i = 0; i + 3 < num_words; i += 4) {
        const uint4 four = *reinterpret_cast<const device uint4*>(from + i);
        words[i] = four.x;
        words[i + 1] = four.y;
        words[i + 2] = four.z;
        words[i + 3] = four.w;
      }
    } else if (bits % 2 == 0) {
      for (int i = 0; i + 1 < num_words; i += 2) {
        const uint2 two = *reinterpret_cast<const device uint2*>(from + i);
        words[i] = two.x;
        words[i + 1] = two.y;
      }
    } else {
      for (int i = 0; i < num_words; i++) {
        words[i] = from[i];
      }
    }
  }

  float value(int octet, int place) const thread {
    const int group = octet * OCTET * num_groups / BLOCK;
    const uint q = packed_value<uint, bits>(words, octet * OCTET + place);
    return fma(scales[group], float(q), biases[group]);
  }
};

// Copy four blocks of each row of x, transposed to [row][block][place][octet]; zeros behind the end.
template <typename T, int rows>
METAL_FUNC void stage_blocks(
    const device T* x,
    threadgroup T* staged,
    SkinnyShape shape,
    int first_row,
    int first_block,
    int lane) {
  const int block = lane / OCTET;
  const int octet = lane % OCTET;
  const int k = (first_block + block) * BLOCK + octet * OCTET;
  for (int row = 0; row < rows; row++) {
    vec<T, 4> low = vec<T, 4>(T(0.0f));
    vec<T, 4> high = vec<T, 4>(T(0.0f));
    if (first_row + row < shape.rows && k < shape.inputs) {
      const device T* from = x + ulong(first_row + row) * shape.inputs + k;
      low = *reinterpret_cast<const device vec<T, 4>*>(from);
      high = *reinterpret_cast<const device vec<T, 4>*>(from + 4);
    }
    threadgroup T* to = staged + (row * 4 + block) * BLOCK + octet;
    for (int place = 0; place < 4; place++) {
      to[place * OCTET] = low[place];
      to[(place + 4) * OCTET] = high[place];
    }
  }
}

// Add one block to the chains of a lane.
template <typename T, int rows, int outputs, int group_size, int bits>
METAL_FUNC void add_block(
    thread float (&sums)[rows][outputs],
    const thread WeightBlock<T, group_size, bits> (&weights)[outputs],
    const threadgroup T* staged) {
#pragma clang loop unroll(full)
  for (int place = 0; place < OCTET; place++) {
    float inputs[rows][OCTET];
#pragma clang loop unroll(full)
    for (int row = 0; row < rows; row++) {
      const threadgroup T* from = staged + row * 4 * BLOCK + place * OCTET;
      const vec<T, 4> low = *reinterpret_cast<const threadgroup vec<T, 4>*>(from);
      const vec<T, 4> high = *reinterpret_cast<const threadgroup vec<T, 4>*>(from + 4);
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        inputs[row][i] = float(low[i]);
        inputs[row][i + 4] = float(high[i]);
      }
    }
#pragma clang loop unroll(full)
    for (int octet = 0; octet < OCTET; octet++) {
#pragma clang loop unroll(full)
      for (int output = 0; output < outputs; output++) {
        const float weight = weights[output].value(octet, place);
#pragma clang loop unroll(full)
        for (int row = 0; row < rows; row++) {
          sums[row][output] = fma(weight, inputs[row][octet], sums[row][output]);
        }
      }
    }
  }
}

// Store the chunks' sums, added by the tree: four chunks of a simdgroup, then the four simdgroups.
// `partial` has rows * outputs * 32 floats and may lie where the copied x lay.
template <typename T, int rows, int outputs, typename Store>
METAL_FUNC void store_scalar_sums(
    const thread float (&sums)[rows][outputs],
    device T* y,
    SkinnyShape shape,
    const thread Store& store,
    threadgroup float* partial,
    int first_row,
    int first_output,
    uint thread_index) {
  const int simdgroup = int(thread_index) / SIMD_WIDTH;
  const int lane = int(thread_index) % SIMD_WIDTH;
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
  for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
    for (int output = 0; output < outputs; output++) {
      float sum = sums[row][output];
      sum += simd_shuffle_xor(sum, 1);
      sum += simd_shuffle_xor(sum, 2);
      if (lane % 4 == 0) {
        partial[((simdgroup * rows) + row) * 8 * outputs + output * 8 + lane / 4] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  constexpr int tile_size = rows * 8 * outputs;
  for (int at = int(thread_index); at < tile_size; at += SCALAR_SIMDGROUPS * SIMD_WIDTH) {
    const int row = first_row + at / (8 * outputs);
    const int n = first_output + at % (8 * outputs);
    if (row < shape.rows && n < shape.outputs) {
      const float low = partial[at] + partial[at + tile_size];
      const float high = partial[at + 2 * tile_size] + partial[at + 3 * tile_size];
      y[ulong(row) * shape.outputs + n] = T(store(low + high, row, n));
    }
  }
}

// Entry of the scalar variant.
//
// Grid: threadgroups (ceil(N / (8 * outputs)), ceil(M / rows)) of 128 threads.  `shared` has
// rows * 1024 elements of T, and no less than rows * outputs * 32 floats.
template <typename T, int rows, int outputs, int group_size, int bits, typename Store>
METAL_FUNC void skinny_qmm_scalar(
    const device T* x,
    const device uint* weight,
    const device T* scales,
    const device T* biases,
    device T* y,
    SkinnyShape shape,
    const thread Store& store,
    threadgroup T* shared,
    uint2 tile,
    uint thread_index) {
  const int simdgroup = int(thread_index) / SIMD_WIDTH;
  const int lane = int(thread_index) % SIMD_WIDTH;
  const int column = lane / 4;
  const int chunk_lane = lane % 4;
  const int first_row = int(tile.y) * rows;
  const int first_output = int(tile.x) * 8 * outputs;
  const int blocks = (shape.inputs + BLOCK - 1) / BLOCK;
  threadgroup T* staged = shared + simdgroup * rows * 4 * BLOCK;

  float sums[rows][outputs];
#pragma clang loop unroll(full)
  for (int row = 0; row < rows; row++) {
#pragma clang loop unroll(full)
    for (int output = 0; output < outputs; output++) {
      sums[row][output] = 0.0f;
    }
  }

  for (int first = simdgroup * 4; first < blocks; first += NUM_CHUNKS) {
    simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes are done with the last four
    stage_blocks<T, rows>(x, staged, shape, first_row, first, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (first + chunk_lane < blocks) {
      WeightBlock<T, group_size, bits> weights[outputs];
#pragma clang loop unroll(full)
      for (int output = 0; output < outputs; output++) {
        const int n = min(first_output + output * 8 + column, shape.outputs - 1);
        weights[output].load(weight, scales, biases, n, first + chunk_lane, shape.inputs);
      }
      add_block<T, rows, outputs, group_size, bits>(sums, weights, staged + chunk_lane * BLOCK);
    }
  }

  store_scalar_sums<T, rows, outputs>(
      sums, y, shape, store, reinterpret_cast<threadgroup float*>(shared), first_row, first_output,
      thread_index);
}
