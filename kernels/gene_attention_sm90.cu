// gene_attention_sm90.cu: gene_attention.cu's forward pass for Hopper, bf16 and heads of 64.
//
//   s_ij = q_i · k_j · scale over the pairs that attend,  lse_i = log Σ_j exp(s_ij),  o_i = Σ_j keep_ij exp(s_ij - lse_i) v_j
//
//   producer   | Q | K0 V0 | K1 V1 | K2 V2 | ...            copy engine (dense) or cp.async gathers (marker-sparse), STAGES deep
//   consumer 0     S0 softmax  | S1, P0·V0 | softmax | S2, P1·V1 | softmax ...      wgmma runs while the other consumers do softmax:
//   consumer 1         S0 softmax | S1, P0·V0 | softmax | ...                       they take turns at the tensor cores
//
// Within a consumer, S of the next tile and P·V of this one are queued together, so the exponentials of the next tile run while P·V
// does. S = Q·Kᵀ (64, 128): both operands in shared memory. P stays in the registers that S was in, rounded in pairs, as the left
// operand of P·V. A row belongs to four lanes; o, P and S take 128 registers a thread.
//
// dense: 3 consumers, 160 registers each; with dropout or a pattern, which need more: 2 consumers, 216.
// Must move 8·N·D bytes and 4·N·H of lse; FLOPs 4·D·Σ len², one exp a pair and head. K and V come once per item of up to 64·slots
// rows from the second-level cache: 4·D·Σ len²/(64·slots) bytes.
// Shared memory: (2·slots·8 + STAGES·32) KiB and 2 KiB: 147 KiB with 3 consumers and 3 stages.
#include "gene_attention_sm90.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int STAGES = 3;
// Named barriers: turns at the tensor cores, one per consumer.
constexpr int TURN = 1;

template <int SLOTS>
struct Forward {
  unsigned char* queries;  // SLOTS tiles of 64 rows
  unsigned char* outputs;  // the same, o on its way out
  unsigned char* keys;     // STAGES tiles of 128 rows
  unsigned char* values;
  Mbarrier *query_full, *query_empty, *key_full, *key_empty, *value_full, *value_empty;
  Item* item;      // the one at hand
  unsigned* mark;  // (STAGES) TileMark
  int* tokens;     // (STAGES, 128) marker-sparse: of the keys

  static constexpr int BYTES = 2 * SLOTS * SLOT_BYTES + 2 * STAGES * TILE_BYTES + 8 * (2 + 4 * STAGES) + sizeof(Item) +
                               4 * STAGES * (T + 1);

  __device__ __forceinline__ explicit Forward(unsigned char* shared) {
    queries = shared;
    outputs = queries + SLOTS * SLOT_BYTES;
    keys = outputs + SLOTS * SLOT_BYTES;
    values = keys + STAGES * TILE_BYTES;
    query_full = (Mbarrier*)(values + STAGES * TILE_BYTES);
    query_empty = query_full + 1;
    key_full = query_empty + 1, key_empty = key_full + STAGES;
    value_full = key_empty + STAGES, value_empty = value_full + STAGES;
    item = (Item*)(value_empty + STAGES);
    tokens = (int*)(item + 1);
    mark = (unsigned*)(tokens + STAGES * T);
  }
};

// What the producer does for one item: by one thread (dense), or by all 128.
template <int SLOTS, bool SPARSE>
DEVICE void load_item(const Forward<SLOTS>& f, const TensorMap* map, const __nv_bfloat16* qkv, const Batch& batch,
                      const Work& work, unsigned query_parity, Place<STAGES>& place) {
  const Entry& entry = work.entry;
  const bool leader = threadIdx.x == 0, several = entry.cells > 1;
  const int width = batch.shape.heads * K, column = work.head * K;
  auto start = [&](int c) { return (int)batch.cell_start[entry.cell(c)]; };
  auto length = [&](int c) { return (int)batch.cell_start[entry.cell(c) + 1] - start(c); };
  int first = 0, active = entry.cells;
  if (!several) {
    int tiles = ceil_div(length(0), SLOT);
    first = tiles * work.part / entry.parts;
    active = tiles * (work.part + 1) / entry.parts - first;
    first *= SLOT;
  }

  mbarrier_wait(f.query_empty, query_parity ^ 1);
  if (!SPARSE) mbarrier_arrive_expect(f.query_full, active * SLOT_BYTES);
  for (int s = 0; s < SLOTS; s++) {
    const int c = several ? s : 0, row = several ? 0 : first + s * SLOT;
    Slot slot = {0, 0, 0, 0};
    if (s < active) slot = {start(c), length(c), row, SPARSE ? (int)batch.globals[entry.cell(c)] : 0};
    if (leader) f.item->slot[s] = slot;
    if (s >= active) continue;
    unsigned char* to = f.queries + s * SLOT_BYTES;
    if (SPARSE)
      gather_rows(to, qkv + column, 3 * width, batch, slot.start + row, slot.length - row, SLOT);
    else
      tma_load(to, map, slot.start + row, column, f.query_full);
  }
  if (leader) f.item->head = work.head, f.item->active = active, f.item->cells = entry.cells;
  if (SPARSE) {
    cp_async_commit();
    cp_async_wait<0>();
    async_fence();
    mbarrier_arrive(f.query_full);
  } else {
    mbarrier_arrive(f.query_full);  // behind the writes to `item`
  }

  for (int c = 0; c < entry.cells; c++) {
    const int cell = start(c), end = length(c), row_end = several ? end : min(first + active * SLOT, end);
    const int globals = SPARSE ? (int)batch.globals[entry.cell(c)] : 0;
    auto from = [&](int tile) {
      while (SPARSE && tile < end && !meet(batch, cell, globals, first, row_end, tile, min(tile + T, end))) tile += T;
      return tile;
    };
    for (int tile = from(0), next; tile < end; tile = next) {
      next = from(tile + T);
      const int stage = place.stage, position = cell + tile;
      unsigned char *key = f.keys + stage * TILE_BYTES, *value = f.values + stage * TILE_BYTES;
      mbarrier_wait(f.key_empty + stage, place.parity ^ 1);
      if (leader) {
        const bool last = next >= end, whole = SPARSE && meet_all(batch, cell, end, globals, first, row_end, tile);
        f.mark[stage] = tile_mark(tile, several ? c : -1, last, last && c == entry.cells - 1, whole);
      }
      if (SPARSE) {
        const int valid = end - tile, t = threadIdx.x;
        f.tokens[stage * T + t] = t < valid ? batch.token(position + t) : (int)NO_TOKEN;
        gather_rows(key, qkv + width + column, 3 * width, batch, position, valid, T);
        cp_async_commit();
        mbarrier_wait(f.value_empty + stage, place.parity ^ 1);
        gather_rows(value, qkv + 2 * width + column, 3 * width, batch, position, valid, T);
        cp_async_commit();
        cp_async_wait<1>();
        async_fence();
        mbarrier_arrive(f.key_full + stage);
        cp_async_wait<0>();
        async_fence();
        mbarrier_arrive(f.value_full + stage);
      } else {
        mbarrier_arrive_expect(f.key_full + stage, TILE_BYTES);
        for (int half = 0; half < 2; half++)
          tma_load(key + half * SLOT_BYTES, map, position + half * SLOT, width + column, f.key_full + stage);
        mbarrier_wait(f.value_empty + stage, place.parity ^ 1);
        mbarrier_arrive_expect(f.value_full + stage, TILE_BYTES);
        for (int half = 0; half < 2; half++)
          tma_load(value + half * SLOT_BYTES, map, position + half * SLOT, 2 * width + column, f.value_full + stage);
      }
      place.next();
    }
  }
}

// One consumer warpgroup's rows, and what it knows of them.
struct Rows {
  float most[2], sum[2];
  __device__ __forceinline__ Rows() : most{-INFINITY, -INFINITY}, sum{0.0f, 0.0f} {}

  // s to exp(s - max), the sums with it; `shrink`: what the new maximum makes of what was summed before.
  __device__ __forceinline__ void softmax(float (&s)[T / 8][4], float scale, float (&shrink)[2]) {
    float top[2] = {most[0], most[1]}, base[2];
#pragma unroll
    for (int n = 0; n < T / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) top[e / 2] = fmaxf(top[e / 2], s[n][e]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] = quad_max(top[h]);
      base[h] = top[h] == -INFINITY ? 0.0f : top[h] * scale;  // a row without a pair so far
      shrink[h] = exp2_approx(most[h] * scale - base[h]);
      most[h] = top[h];
      sum[h] *= shrink[h];
    }
#pragma unroll
    for (int n = 0; n < T / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] = exp2_approx(__fmaf_rn(s[n][e], scale, -base[e / 2]));
        sum[e / 2] += s[n][e];
      }
  }
};

// P as left operands: 16 columns each.
DEVICE void round_pairs(const float (&s)[T / 8][4], uint32_t (&p)[T / 16][4]) {
#pragma unroll
  for (int k = 0; k < T / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack_bf16(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
}

template <int SLOTS, bool SPARSE, bool DROPOUT>
DEVICE void consume(const Forward<SLOTS>& f, Batch batch, __nv_bfloat16* o, float* lse) {
  const int slot = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
  const int width = batch.shape.heads * K;
  const float scale = batch.shape.scale * LOG2_E;
  Place<STAGES> place;
  unsigned query_parity = 0;
  auto arrived = [&] {
    mbarrier_wait(f.key_full + place.stage, place.parity);
    return TileMark{f.mark[place.stage]};
  };
  auto skip = [&] {
    release(f.key_empty + place.stage);
    mbarrier_wait(f.value_full + place.stage, place.parity);
    release(f.value_empty + place.stage);
    place.next();
  };

  for (;; query_parity ^= 1) {
    mbarrier_wait(f.query_full, query_parity);
    if (f.item->head < 0) break;
    const Slot mine = f.item->slot[slot];
    const int start = mine.start, length = mine.length, active = f.item->active;
    // Whose turn is next at the tensor cores; 0 where the consumers do not march in step.
    const int next_turn = !SPARSE && f.item->cells == 1 && active > 1 ? TURN + (slot + 1) % active : 0;
    batch.head = f.item->head;
    TileMark now = arrived();
    while (length > 0 && !now.is_for(slot)) {
      skip();
      now = arrived();
    }
    if (length == 0) {  // nothing here but to let the others' tiles pass
      release(f.query_empty);
      for (bool last = false; !last;) {
        last = now.last_of_item();
        skip();
        if (!last) now = arrived();
      }
      continue;
    }

    const int row = mine.first + warp_row;
    const Reach reach(batch, start, length, mine.globals, row);
    Rows rows;
    float s[T / 8][4], out[K / 8][4] = {}, shrink[2];
    uint32_t p[T / 16][4];

    auto scores = [&](int stage) {  // queues S = Q·Kᵀ
      const uint64_t query = shared_matrix(f.queries + slot * SLOT_BYTES), key = shared_matrix(f.keys + stage * TILE_BYTES);
#pragma unroll
      for (int k = 0; k < K / 16; k++) wgmma_shared<false, false>(s, query + k * 2, key + k * 2, k > 0);
      wgmma_commit();
    };
    auto outputs = [&](int stage) {  // queues o += P·V
      const uint64_t value = shared_matrix(f.values + stage * TILE_BYTES);
#pragma unroll
      for (int k = 0; k < T / 16; k++) wgmma_fragment<true>(out, p[k], value + k * (16 * 128 >> 4), 1);
      wgmma_commit();
    };
    auto probabilities = [&](const TileMark& mark, int stage) {
      const int tile = mark.tile();
      if (SPARSE && !mark.whole()) reach.mask(s, mine.globals - tile, f.tokens + stage * T);
      if (!SPARSE && tile + T > length) mask_columns(s, length - tile);
      rows.softmax(s, scale, shrink);
      if (DROPOUT && batch.dropout.threshold) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          Kept<T / 2> kept;
          const int key = half * (T / 2);
          if (SPARSE)
            kept = keep_by_row<T / 2>(batch, Positions{batch, start + row, start + length - 1},
                                      (const int*)f.tokens + stage * T + key, start);
          else
            kept = keep_by_row<T / 2>(batch, Consecutive{start + row}, Consecutive{start + tile + key}, start);
#pragma unroll
          for (int n = 0; n < T / 16; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[half * (T / 16) + n][e] = kept(n, e) ? s[half * (T / 16) + n][e] : 0.0f;
        }
      }
    };

    wgmma_hold(s);
    wgmma_fence();
    scores(place.stage);
    wgmma_wait<0>();
    wgmma_hold(s);
    if (!SPARSE) release(f.key_empty + place.stage);
    probabilities(now, place.stage);
    if (SPARSE) release(f.key_empty + place.stage);  // its tokens were read just now
    round_pairs(s, p);

    while (!now.last_of_cell()) {
      const Place<STAGES> before = place;
      place.next();
      now = arrived();
      mbarrier_wait(f.value_full + before.stage, before.parity);
      if (next_turn) named_barrier_sync(TURN + slot, 256);
      wgmma_hold(s);
      wgmma_hold(out);
      wgmma_fence();
      scores(place.stage);
      outputs(before.stage);
      if (next_turn) named_barrier_arrive(next_turn, 256);
      wgmma_wait<1>();
      wgmma_hold(s);
      if (!SPARSE) release(f.key_empty + place.stage);
      probabilities(now, place.stage);
      if (SPARSE) release(f.key_empty + place.stage);
      wgmma_wait<0>();
      wgmma_hold(out);
      release(f.value_empty + before.stage);
#pragma unroll
      for (int n = 0; n < K / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[n][e] *= shrink[e / 2];
      round_pairs(s, p);
    }
    release(f.query_empty);
    mbarrier_wait(f.value_full + place.stage, place.parity);
    wgmma_hold(out);
    wgmma_fence();
    outputs(place.stage);
    wgmma_wait<0>();
    wgmma_hold(out);
    release(f.value_empty + place.stage);
    place.next();
    while (!now.last_of_item()) {
      now = arrived();
      skip();
    }

    // A warp's 16 rows leave through its own 16 rows of shared memory, 128 bytes each.
#pragma unroll
    for (int h = 0; h < 2; h++) {
      rows.sum[h] = quad_sum(rows.sum[h]);
      const int r = row + fragment_row(2 * h);
      if (lane % 4 == 0 && r < length)
        lse[batch.row(batch.token(start + r))] = rows.most[h] * batch.shape.scale + logf(rows.sum[h]);
    }
    const float kept_scale = DROPOUT ? batch.dropout.scale : 1.0f;
    const float factor[2] = {kept_scale / rows.sum[0], kept_scale / rows.sum[1]};
    unsigned char* output = f.outputs + slot * SLOT_BYTES;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < K / 8; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        *reinterpret_cast<uint32_t*>(output + swizzle128((warp_row + fragment_row(2 * h)) * 128 + fragment_column(n, 0) * 2)) =
            pack_bf16(out[n][2 * h] * factor[h], out[n][2 * h + 1] * factor[h]);
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * 8; i += 32) {
      int r = i / 8;
      if (row + r < length)
        store16(o + (size_t)batch.token(start + row + r) * width + batch.head * K + i % 8 * 8,
                load16<uint4>(output + swizzle128((warp_row + r) * 128 + i % 8 * 16)));
    }
  }
}

template <int SLOTS, bool SPARSE, bool DROPOUT>
DEVICE void forward(const TensorMap* map, const __nv_bfloat16* qkv, const unsigned* entries, const unsigned* count, Batch batch,
                    __nv_bfloat16* o, float* lse) {
  DYNAMIC_SHARED(unsigned char, shared);
  const Forward<SLOTS> f(shared);
  constexpr unsigned LOADERS = SPARSE ? 128 : 1, WARPS = 4 * SLOTS;
  if (threadIdx.x == 0) {
    mbarrier_init(f.query_full, SPARSE ? 128 : 2);
    mbarrier_init(f.query_empty, WARPS);
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(f.key_full + stage, LOADERS);
      mbarrier_init(f.value_full + stage, LOADERS);
      mbarrier_init(f.key_empty + stage, WARPS);
      mbarrier_init(f.value_empty + stage, WARPS);
    }
    mbarrier_init_fence();
    if (!SPARSE) tma_prefetch(map);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    set_fewer_registers<SLOTS == 3 ? 32 : 72>();
    if (SPARSE || threadIdx.x == 0) {
      const int items = (int)*count * batch.shape.heads;
      Place<STAGES> place;
      unsigned parity = 0;
      for (int i = blockIdx.x; i < items; i += gridDim.x, parity ^= 1)
        load_item<SLOTS, SPARSE>(f, map, qkv, batch, Work(entries, i, batch.shape.heads), parity, place);
      mbarrier_wait(f.query_empty, parity ^ 1);
      if (threadIdx.x == 0) f.item->head = -1;  // no more
      mbarrier_arrive(f.query_full);
      if (!SPARSE) mbarrier_arrive(f.query_full);
    }
  } else {
    set_more_registers<SLOTS == 3 ? 160 : 216>();
    // The first turn is the first consumer's; whoever is last hands it on.
    if (threadIdx.x >= 256 && threadIdx.x < 384) named_barrier_arrive(TURN, 256);
    consume<SLOTS, SPARSE, DROPOUT>(f, batch, o, lse);
    if (threadIdx.x < 256) named_barrier_sync(TURN, 256);
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) gene_attention_forward_sm90(
    GRID_CONSTANT TensorMap qkv,  // (N, 3·D)
    const unsigned* cell_start,   // (C + 1)
    const unsigned* entries,      // (entries, 8) gene_attention_items: 3 slots, merged
    const unsigned* count,        // (1)
    act_t* o,                     // (N, D)
    float* lse,                   // (N, H)
    AttentionShape shape) {
  forward<3, false, false>(&qkv, nullptr, entries, count, Batch{cell_start, nullptr, nullptr, shape, Dropout{}, 0}, o, lse);
}
extern "C" __global__ void __launch_bounds__(384, 1) gene_attention_forward_dropout_sm90(
    GRID_CONSTANT TensorMap qkv,  // (N, 3·D)
    const unsigned* cell_start,   // (C + 1)
    const unsigned* entries,      // (entries, 8) gene_attention_items: 2 slots, merged
    const unsigned* count,        // (1)
    act_t* o,                     // (N, D)
    float* lse,                   // (N, H)
    AttentionShape shape, Dropout dropout) {
  forward<2, false, true>(&qkv, nullptr, entries, count, Batch{cell_start, nullptr, nullptr, shape, dropout, 0}, o, lse);
}
extern "C" __global__ void __launch_bounds__(384, 1) gene_attention_forward_sparse_sm90(
    const act_t* qkv,           // (N, 3·D)
    const unsigned* cell_start, // (C + 1)
    const unsigned* order,      // (N) gene_attention_order
    const unsigned* globals,    // (C)
    const unsigned* entries,    // (entries, 8) gene_attention_items: 2 slots, merged
    const unsigned* count,      // (1)
    act_t* o,                   // (N, D)
    float* lse,                 // (N, H)
    AttentionShape shape, Dropout dropout) {
  forward<2, true, true>(nullptr, qkv, entries, count, Batch{cell_start, order, globals, shape, dropout, 0}, o, lse);
}
