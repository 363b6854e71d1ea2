// Step attention's two kernels: a span of keys for the query heads of a threadgroup, and the sum
// over spans.  To be put behind the text of step_attention.metal, which says in what order they add.

// Which of a lane's keys its query heads may see, one bit each.
template <typename Plan, typename Sees>
METAL_FUNC uint visible_keys(Sees sees, int rows, int shared_by, int keys, SpanPlace at) {
  uint found = 0;
#pragma clang loop unroll(full)
  for (int q = 0; q < Plan::each; q++) {
    const int row = (at.first_head + q) / shared_by;
#pragma clang loop unroll(full)
    for (int tile = 0; tile < Plan::tiles; tile++) {
      const int index = at.key_group * Plan::tiles + tile;
      const int key = at.span * SPAN + index * SIMD_WIDTH + at.lane;
      if (row < rows && key < keys && sees(row, key)) {
        found |= 1u << (q * Plan::tiles + tile);
      }
    }
  }
  return found;
}

// Turn scores into weights, and find the largest score of the span.
template <typename Plan>
METAL_FUNC void weigh(
    thread float (&scores)[Plan::each][Plan::tiles],
    thread float (&largest)[Plan::each],
    uint visible,
    threadgroup float* maxima,
    SpanPlace at) {
#pragma clang loop unroll(full)
  for (int q = 0; q < Plan::each; q++) {
    float most = UNSEEN;
#pragma clang loop unroll(full)
    for (int tile = 0; tile < Plan::tiles; tile++) {
      const bool sees = (visible >> (q * Plan::tiles + tile)) & 1u;
      most = sees ? max(most, scores[q][tile]) : most;
    }
    largest[q] = simd_max(most);
  }
  if (Plan::key_groups > 1) {
    threadgroup float* mine = maxima + at.head_group * Plan::each;
    if (at.lane == 0) {
      for (int q = 0; q < Plan::each; q++) {
        mine[at.key_group * Plan::heads + q] = largest[q];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
    for (int q = 0; q < Plan::each; q++) {
      for (int group = 0; group < Plan::key_groups; group++) {
        largest[q] = max(largest[q], mine[group * Plan::heads + q]);
      }
    }
  }
#pragma clang loop unroll(full)
  for (int q = 0; q < Plan::each; q++) {
#pragma clang loop unroll(full)
    for (int tile = 0; tile < Plan::tiles; tile++) {
      const bool sees = (visible >> (q * Plan::tiles + tile)) & 1u;
      scores[q][tile] = sees ? exp2(scores[q][tile] - largest[q]) : 0.0f;
    }
  }
}

// The sum over a span's tiles as a tree: a simdgroup's first, then those of the key groups.
template <int tiles>
METAL_FUNC void add_tile(thread float& sum, thread float& pair, float now, int tile) {
  if (tiles == 1) {
    sum = now;
  } else if (tile % 2 == 0) {
    pair = now;
  } else {
    pair += now;
    sum = tile == 1 ? pair : sum + pair;
  }
}

// What a span gives one query head, [head_dim] sums with the largest score and the sum of weights.
struct SpanResult {
  device float* partial;
  int heads;
  int kv_heads;
  int rows;
  int spans;

  device float* of(int index, int head_dim, SpanPlace at) const thread {
    const int shared_by = heads / kv_heads;
    const long head = at.kv_head * shared_by + index % shared_by;
    const long row = index / shared_by;
    return partial + ((row * heads + head) * spans + at.span) * (head_dim + 2);
  }

  bool has(int index) const thread { return index / (heads / kv_heads) < rows; }
};

// Add what the key groups found for a query head, and store it.
template <typename Plan>
METAL_FUNC void store_head(
    const thread float (&sums)[Plan::chunks][Plan::own],
    float largest,
    float total,
    threadgroup float* partial,
    SpanResult result,
    int index,
    SpanPlace at) {
  constexpr int pitch = Plan::head_dim + 1;
  constexpr int apart = Plan::head_groups * pitch;
  const bool owns = at.lane * Plan::own < Plan::chunk;
  const int first_dim = at.lane * Plan::own;
  threadgroup float* shared = partial + at.head_group * pitch;
  if (Plan::key_groups > 1) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last values, the last head are done
    threadgroup float* mine = shared + at.key_group * apart;
    for (int i = 0; i < Plan::chunks * Plan::own && owns; i++) {
      mine[i / Plan::own * Plan::chunk + first_dim + i % Plan::own] =
          sums[i / Plan::own][i % Plan::own];
    }
    if (at.lane == 0) {
      mine[Plan::head_dim] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (at.key_group > 0 || !result.has(index)) {
    return;
  }
  device float* to = result.of(index, Plan::head_dim, at);
  if (at.lane == 0) {
    const threadgroup float* all = shared + Plan::head_dim;
    to[Plan::head_dim] = largest;
    to[Plan::head_dim + 1] =
        Plan::key_groups == 1 ? total : tree_sum<Plan::key_groups>(all, apart);
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < Plan::chunks * Plan::own; i++) {
    const int dim = i / Plan::own * Plan::chunk + first_dim + i % Plan::own;
    if (owns) {
      to[dim] = Plan::key_groups == 1 ? sums[i / Plan::own][i % Plan::own]
                                      : tree_sum<Plan::key_groups>(shared + dim, apart);
    }
  }
}

// The scores of a lane's keys; on return the first values are on their way.
template <typename Plan>
METAL_FUNC void score_span(
    thread float (&scores)[Plan::each][Plan::tiles],
    thread uint4 (&fetched)[Plan::fetched],
    HeldKeys<typename Plan::T> held,
    threadgroup uint4* staged,
    const threadgroup float* queries,
    SpanPlace at) {
  typedef typename Plan::T T;
  const threadgroup T* my_key = reinterpret_cast<const threadgroup T*>(
      staged + (at.key_group * SIMD_WIDTH + at.lane) * Plan::pitch);
  const threadgroup float* my_queries = queries + at.head_group * Plan::each * Plan::head_dim;
  fetch_chunk<Plan>(fetched, held, 0, at);
  for (int tile = 0; tile < Plan::tiles; tile++) {
    float now[Plan::each] = {};
    for (int chunk = 0; chunk < Plan::chunks; chunk++) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the last chunk is done with
      put_chunk<Plan>(fetched, staged, at);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      fetch_chunk<Plan>(fetched, held, tile * Plan::chunks + chunk + 1, at);
      add_scores<Plan>(now, my_key, my_queries + chunk * Plan::chunk);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < Plan::each * Plan::tiles; i++) {
      const bool is_it = i % Plan::tiles == tile;  // no index that the compiler does not know
      scores[i / Plan::tiles][i % Plan::tiles] =
          is_it ? now[i / Plan::tiles] : scores[i / Plan::tiles][i % Plan::tiles];
    }
  }
}

// Put a tile's weights into the threadgroup's memory, [query head][key]; they add up to `total`.
template <typename Plan>
METAL_FUNC void put_weights(
    const thread float (&scores)[Plan::each][Plan::tiles],
    thread float (&total)[Plan::each],
    int tile,
    threadgroup float* weights,
    SpanPlace at) {
#pragma clang loop unroll(full)
  for (int q = 0; q < Plan::each; q++) {
    float mine = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < Plan::tiles; i++) {
      mine = i == tile ? scores[q][i] : mine;
    }
    weights[q * SIMD_WIDTH + at.lane] = mine;
    total[q] = lane_sum(mine);
  }
}

// The weighted sums of a lane's dimensions over the tiles of a simdgroup, and the sums of weights.
template <typename Plan>
METAL_FUNC void sum_span(
    thread float (&sums)[Plan::each][Plan::chunks][Plan::own],
    thread float (&totals)[Plan::each],
    const thread float (&scores)[Plan::each][Plan::tiles],
    thread uint4 (&fetched)[Plan::fetched],
    HeldKeys<typename Plan::T> held,
    threadgroup uint4* staged,
    threadgroup float* weights,
    SpanPlace at) {
  typedef typename Plan::T T;
  constexpr int rounds = Plan::tiles * Plan::chunks;
  const threadgroup T* my_dims =
      reinterpret_cast<const threadgroup T*>(staged + at.key_group * SIMD_WIDTH * Plan::pitch) +
      min(at.lane * Plan::own, Plan::chunk - Plan::own);
  float pairs[Plan::each][Plan::chunks][Plan::own] = {};
  float total_pairs[Plan::each] = {};
  for (int tile = 0; tile < Plan::tiles; tile++) {
    float now[Plan::each][Plan::chunks][Plan::own] = {};
    float total[Plan::each] = {};
#pragma clang loop unroll(full)
    for (int chunk = 0; chunk < Plan::chunks; chunk++) {
      const int next = rounds + tile * Plan::chunks + chunk + 1;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      put_chunk<Plan>(fetched, staged, at);
      if (chunk == 0) {
        put_weights<Plan>(scores, total, tile, weights, at);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (next < 2 * rounds) {
        fetch_chunk<Plan>(fetched, held, next, at);
      }
      add_values<Plan>(now, chunk, weights, my_dims);
    }
#pragma clang loop unroll(full)
    for (int q = 0; q < Plan::each; q++) {
      add_tile<Plan::tiles>(totals[q], total_pairs[q], total[q], tile);
#pragma clang loop unroll(full)
      for (int i = 0; i < Plan::chunks * Plan::own; i++) {
        const int chunk = i / Plan::own;
        const int own = i % Plan::own;
        add_tile<Plan::tiles>(sums[q][chunk][own], pairs[q][chunk][own], now[q][chunk][own], tile);
      }
    }
  }
}

// A span of keys for the query heads of a simdgroup.
template <typename Plan>
METAL_FUNC void attend_span(
    HeldKeys<typename Plan::T> held,
    uint visible,
    SpanResult result,
    threadgroup uint4* staged,
    const threadgroup float* queries,
    threadgroup float* maxima,
    threadgroup float* weights,
    SpanPlace at) {
  threadgroup float* my_weights =
      weights + (at.key_group * Plan::head_groups + at.head_group) * Plan::each * SIMD_WIDTH;
  uint4 fetched[Plan::fetched];
  float scores[Plan::each][Plan::tiles] = {};
  score_span<Plan>(scores, fetched, held, staged, queries, at);
  float largest[Plan::each];
  weigh<Plan>(scores, largest, visible, maxima, at);
  float sums[Plan::each][Plan::chunks][Plan::own] = {};
  float totals[Plan::each] = {};
  sum_span<Plan>(sums, totals, scores, fetched, held, staged, my_weights, at);
  threadgroup float* exchanged = reinterpret_cast<threadgroup float*>(staged);
#pragma clang loop unroll(full)
  for (int q = 0; q < Plan::each; q++) {
    store_head<Plan>(
        sums[q], largest[q], totals[q], exchanged, result, at.first_head + q, at);
  }
}

// Entry of the first kernel.
//
// Grid: threadgroups (spans, kv heads, tiles of query heads) of 32 * head_groups * key_groups
// threads.  `queries` has heads * head_dim floats, `staged` Plan::staged 16-byte words, `maxima`
// key_groups * heads floats, and `weights` 32 times as many.
template <typename Plan, typename Sees>
METAL_FUNC void step_attention_spans(
    StepQueries<typename Plan::T> from,
    HeldKeys<typename Plan::T> held,
    Sees sees,
    float scale,
    SpanResult result,
    threadgroup float* queries,
    threadgroup uint4* staged,
    threadgroup float* maxima,
    threadgroup float* weights,
    uint3 tile,
    uint thread_index) {
  const int simdgroup = int(thread_index) / SIMD_WIDTH;
  SpanPlace at;
  at.span = int(tile.x);
  at.kv_head = int(tile.y);
  at.head_group = simdgroup % Plan::head_groups;
  at.key_group = simdgroup / Plan::head_groups;
  at.first_head = int(tile.z) * Plan::heads + at.head_group * Plan::each;
  at.lane = int(thread_index) % SIMD_WIDTH;
  const uint visible =
      visible_keys<Plan>(sees, from.rows, from.heads / from.kv_heads, held.count, at);
  bool any = true;
  if (Sees::may_miss) {
    const uint seen = simd_or(visible);
    if (at.lane == 0) {
      maxima[simdgroup] = seen != 0 ? 1.0f : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    any = false;
    for (int i = 0; i < Plan::head_groups * Plan::key_groups; i++) {
      any = any || maxima[i] > 0.0f;
    }
  }
  if (any) {
    stage_queries<Plan>(
        from, scale, queries, int(tile.z) * Plan::heads, at, int(thread_index));
    attend_span<Plan>(held, visible, result, staged, queries, maxima, weights, at);
  } else if (at.key_group == 0 && at.lane < Plan::each && result.has(at.first_head + at.lane)) {
    device float* to = result.of(at.first_head + at.lane, Plan::head_dim, at);
    to[Plan::head_dim] = UNSEEN;
    to[Plan::head_dim + 1] = 0.0f;
  }
}

// Entry of the second kernel: from partial[rows * heads, spans, head_dim + 2] to
// y[rows * heads, head_dim].  A row that sees nothing becomes zero.
//
// Grid: rows * heads threadgroups of head_dim threads, rounded up to whole simdgroups.
template <typename T, int head_dim>
METAL_FUNC void step_attention_merge(
    const device float* partial, device T* y, int spans, uint head, uint thread_index) {
  constexpr int pitch = head_dim + 2;
  constexpr int ahead = 4;  // loads that are on their way together
  const device float* mine = partial + ulong(head) * spans * pitch;
  const int lane = int(thread_index) % SIMD_WIDTH;
  const int dim = int(thread_index);
  const int read = min(dim, head_dim - 1);
  float most = UNSEEN;
  for (int span = lane; span < spans; span += SIMD_WIDTH) {
    most = max(most, mine[span * pitch + head_dim]);
  }
  most = simd_max(most);
  float sum = 0.0f;
  float total = 0.0f;
  for (int first = 0; first < spans; first += SIMD_WIDTH) {
    float share = 0.0f;
    float weights = 0.0f;
    if (first + lane < spans) {
      weights = mine[(first + lane) * pitch + head_dim + 1];
      const float largest = mine[(first + lane) * pitch + head_dim];
      share = weights > 0.0f ? exp2(largest - most) : 0.0f;
    }
    for (int i = 0; i < min(SIMD_WIDTH, spans - first); i += ahead) {
      float found[ahead];
      float shares[ahead];
#pragma clang loop unroll(full)
      for (int j = 0; j < ahead; j++) {
        shares[j] = simd_shuffle(share, ushort(i + j));
        found[j] = shares[j] > 0.0f ? mine[(first + i + j) * pitch + read] : 0.0f;
      }
#pragma clang loop unroll(full)
      for (int j = 0; j < ahead; j++) {
        total = fma(shares[j], simd_shuffle(weights, ushort(i + j)), total);
        sum = fma(shares[j], found[j], sum);
      }
    }
  }
  if (dim < head_dim) {
    y[ulong(head) * head_dim + dim] = T(total > 0.0f ? sum / total : 0.0f);
  }
}
