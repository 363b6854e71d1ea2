// Attention for the few rows of a step: softmax(scale * Q K^T) V over the keys that a row may see,
// with K and V read once for up to 32 query heads.  To be put behind the text of skinny_qmm.metal.
//
// The order of summation depends on a key's index alone, so a row's bits do not depend on how many
// rows ride along, nor on keys that it may not see:
//
//   key = 128 s + 32 t + j      span s, tile t, place j
//   score                       one chain of fused multiply-adds, dimensions ascending
//   span                        weight = 2^(score - largest score of the span), 0 where not seen
//   tile                        one chain over its keys, ascending; spans add theirs as
//                               (t0 + t1) + (t2 + t3), sums of weights likewise
//   row                         one chain over the spans, ascending, each with its share
//
// The first kernel takes a span, a kv head and up to 32 of the query heads that share it; what it
// finds is float32: D sums, the largest score, the sum of weights.  The second adds the spans up.

constant constexpr int SPAN = 128;
constant constexpr int SPAN_TILES = 4;
constant constexpr float UNSEEN = -3.0e38f;  // below every score, and finite
constant constexpr float LOG2_E = 1.44269504f;

// How a threadgroup is made up: its simdgroups share `head_groups` times `each` query heads and
// `key_groups` times `tiles` tiles of keys.  Keys and values come in chunks of dimensions.
template <typename Element, int dims, int some, int few, int by_head, int by_key>
struct SpanPlan {
  typedef Element T;
  static constant constexpr int head_dim = dims;
  static constant constexpr int chunk = some;  // divides head_dim; a multiple of 16 bytes
  static constant constexpr int each = few;
  static constant constexpr int head_groups = by_head;
  static constant constexpr int key_groups = by_key;
  static constant constexpr int heads = few * by_head;
  static constant constexpr int tiles = SPAN_TILES / by_key;
  static constant constexpr int chunks = dims / some;
  static constant constexpr int wide = 16 / int(sizeof(Element));  // elements of 16 bytes
  static constant constexpr int quads = some / wide;               // of a key's chunk
  static constant constexpr int pitch = quads | 1;  // odd, so that eight keys meet all banks
  static constant constexpr int fetched = (SIMD_WIDTH * quads - 1) / (SIMD_WIDTH * by_head) + 1;
  static constant constexpr int own = some > SIMD_WIDTH ? 2 : 1;  // dimensions of a lane
  static constant constexpr int staged = by_key * SIMD_WIDTH * (quads | 1);  // 16 bytes each
};

// Which keys a row may see.
struct SeeAll {
  static constant constexpr bool may_miss = false;  // whether a span may be hidden from all rows
  bool operator()(int row, int key) const thread { return true; }
};

struct SeeCausally {
  static constant constexpr bool may_miss = false;
  int first;  // index of the first row's own key
  bool operator()(int row, int key) const thread { return key <= first + row; }
};

struct SeeMasked {
  static constant constexpr bool may_miss = true;
  const device bool* mask;
  long row_stride;
  long key_stride;
  bool operator()(int row, int key) const thread {
    return mask[row * row_stride + key * key_stride];
  }
};

// Keys and values of one kv head; the elements of a row lie side by side.
template <typename T>
struct HeldKeys {
  const device T* keys;
  const device T* values;
  long key_stride;
  long value_stride;
  int count;
};

// Queries of all heads, [heads, rows, head_dim] with strides.
template <typename T>
struct StepQueries {
  const device T* queries;
  long head_stride;
  long row_stride;
  long dim_stride;
  int heads;
  int kv_heads;
  int rows;
};

// Where a simdgroup stands.
struct SpanPlace {
  int span;
  int kv_head;
  int first_head;  // of the simdgroup, among the rows times heads that share the kv head
  int head_group;
  int key_group;
  int lane;
};

// Load this thread's part of one chunk of one tile; what lies behind the last key is zero.
template <typename Plan>
METAL_FUNC void fetch_chunk(
    thread uint4 (&held)[Plan::fetched],
    HeldKeys<typename Plan::T> from,
    int round,
    SpanPlace at) {
  typedef typename Plan::T T;
  constexpr int rounds = Plan::tiles * Plan::chunks;
  const bool is_value = round >= rounds;
  const device T* base = is_value ? from.values : from.keys;
  const long stride = is_value ? from.value_stride : from.key_stride;
  const int tile = at.key_group * Plan::tiles + (round % rounds) / Plan::chunks;
  const int first_key = at.span * SPAN + tile * SIMD_WIDTH;
  const int first_dim = round % Plan::chunks * Plan::chunk;
#pragma clang loop unroll(full)
  for (int i = 0; i < Plan::fetched; i++) {
    const int place = at.head_group * SIMD_WIDTH + at.lane + i * SIMD_WIDTH * Plan::head_groups;
    const int key = place / Plan::quads;
    held[i] = uint4(0u);
    if (key < SIMD_WIDTH && first_key + key < from.count) {
      const int dim = first_dim + place % Plan::quads * Plan::wide;
      held[i] = *reinterpret_cast<const device uint4*>(base + (first_key + key) * stride + dim);
    }
  }
}

// Put it into the threadgroup's memory, [tile of this round][key][chunk].
template <typename Plan>
METAL_FUNC void put_chunk(
    const thread uint4 (&held)[Plan::fetched], threadgroup uint4* staged, SpanPlace at) {
  threadgroup uint4* to = staged + at.key_group * SIMD_WIDTH * Plan::pitch;
#pragma clang loop unroll(full)
  for (int i = 0; i < Plan::fetched; i++) {
    const int place = at.head_group * SIMD_WIDTH + at.lane + i * SIMD_WIDTH * Plan::head_groups;
    if (place / Plan::quads < SIMD_WIDTH) {
      to[place / Plan::quads * Plan::pitch + place % Plan::quads] = held[i];
    }
  }
}

// Put the queries there, scaled; those behind the last head are zero.
template <typename Plan>
METAL_FUNC void stage_queries(
    StepQueries<typename Plan::T> from,
    float scale,
    threadgroup float* staged,
    int first_head,
    SpanPlace at,
    int thread_index) {
  const int shared_by = from.heads / from.kv_heads;
  constexpr int threads = SIMD_WIDTH * Plan::head_groups * Plan::key_groups;
  for (int i = thread_index; i < Plan::heads * Plan::head_dim; i += threads) {
    const int index = first_head + i / Plan::head_dim;
    const int row = index / shared_by;
    const int head = at.kv_head * shared_by + index % shared_by;
    float value = 0.0f;
    if (row < from.rows) {
      value = float(from.queries[head * from.head_stride + row * from.row_stride +
                                 i % Plan::head_dim * from.dim_stride]);
    }
    staged[i] = value * (scale * LOG2_E);
  }
}

// Add a chunk of dimensions to the scores of a lane's key.
template <typename Plan>
METAL_FUNC void add_scores(
    thread float (&scores)[Plan::each],
    const threadgroup typename Plan::T* key,
    const threadgroup float* queries) {
  typedef typename Plan::T T;
  for (int dim = 0; dim < Plan::chunk; dim += Plan::wide) {
    vec<T, 4> fours[Plan::wide / 4];
#pragma clang loop unroll(full)
    for (int four = 0; four < Plan::wide / 4; four++) {
      fours[four] = *reinterpret_cast<const threadgroup vec<T, 4>*>(key + dim + 4 * four);
    }
#pragma clang loop unroll(full)
    for (int q = 0; q < Plan::each; q++) {
#pragma clang loop unroll(full)
      for (int four = 0; four < Plan::wide / 4; four++) {
        const float4 query = *reinterpret_cast<const threadgroup float4*>(
            queries + q * Plan::head_dim + dim + 4 * four);
#pragma clang loop unroll(full)
        for (int i = 0; i < 4; i++) {
          scores[q] = fma(query[i], float(fours[four][i]), scores[q]);
        }
      }
    }
  }
}

// Add a tile's keys to the sums of a lane's dimensions in one chunk, ascending.
template <typename Plan>
METAL_FUNC void add_values(
    thread float (&sums)[Plan::each][Plan::chunks][Plan::own],
    int chunk,
    const threadgroup float* weights,
    const threadgroup typename Plan::T* values) {
  constexpr int few = 4;
  for (int key = 0; key < SIMD_WIDTH; key += few) {
    float value[few][Plan::own];
#pragma clang loop unroll(full)
    for (int i = 0; i < few * Plan::own; i++) {
      const int at = (key + i / Plan::own) * Plan::pitch * Plan::wide + i % Plan::own;
      value[i / Plan::own][i % Plan::own] = float(values[at]);
    }
#pragma clang loop unroll(full)
    for (int q = 0; q < Plan::each; q++) {
      const float4 weight =
          *reinterpret_cast<const threadgroup float4*>(weights + q * SIMD_WIDTH + key);
#pragma clang loop unroll(full)
      for (int i = 0; i < few * Plan::own; i++) {
        const int own = i % Plan::own;
        sums[q][chunk][own] =
            fma(weight[i / Plan::own], value[i / Plan::own][own], sums[q][chunk][own]);
      }
    }
  }
}

// A sum over lanes as a tree, neighbours first.
METAL_FUNC float lane_sum(float value) {
  value += simd_shuffle_xor(value, 1);
  value += simd_shuffle_xor(value, 2);
  value += simd_shuffle_xor(value, 4);
  value += simd_shuffle_xor(value, 8);
  value += simd_shuffle_xor(value, 16);
  return value;
}
