// gene_attention_backward_sm90.cu: the gradients of gene_attention_sm90.cu. Five products, no atomics on floats, the same bits in
// every run.
//
//   p_ij = exp(s_ij - lse_i),  delta_i = do_i · o_i,  ds_ij = p_ij · (keep_ij · do_i · v_j - delta_i)
//   dq_i = scale · Σ_j ds_ij k_j,   dk_j = scale · Σ_i ds_ij q_i,   dv_j = Σ_i keep_ij p_ij do_i
//
// gene_attention_stats_sm90     delta, and beside it lse in base 2, by head and position
// gene_attention_backward_sm90  a block owns 128 keys of a cell and head, 64 per consumer, and visits query tiles of 128
// gene_attention_dq_sm90        sums of dq to bf16 rows
//
//   per visit, transposed, so that pᵀ and dsᵀ are left operands as they stand in the registers:
//     sᵀ = K·Qᵀ, dpᵀ = V·dOᵀ  (64, 128)       ->  pᵀ, dsᵀ in pairs         dv += pᵀ·dO     dk += dsᵀ·Q      (64, 64)
//     dsᵀ of both consumers through shared memory  ->  dq (128, 64) = ds·K, 64 rows each  ->  f32, 32 KiB in fragment order
//
// dq of a query tile is the sum over key tiles, and those are different blocks. A warp of the producer hands each visit's share to
// the copy engine, which adds it in the second-level cache (the first share is stored: nothing is cleared). The order of the sum is
// fixed: block n starts at query tile n and goes round, so tile m gets the shares of key tiles m, m - 1, m - 2, ...; a counter per
// tile says how many are in. All blocks of a cell and head do step t at about the same time on different tiles, so nobody waits long:
// step t of block n needs step t - 1 of block n + 1, and nothing else. This asks for all blocks of a cell and head to be resident
// (a cooperative launch, one block a multiprocessor; at most as many key tiles as blocks), and items in order of the list.
//
// Must move 8·N·D bf16 and 8·N·H of stats; dq once to f32 and back, 8·N·D; from the second-level cache Q and dO, 4·D·Σ len²/128,
// and the shares of dq, 4·D·Σ len²/128. FLOPs 10·D·Σ len², one exp a pair and head.
// Shared memory: K, V 32; two stages of Q, dO 64; ds 32; dq 32 KiB, and 3 KiB. Registers: 2 consumers, 232 each (marker-sparse 224).
#include "gene_attention_sm90.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int STAGES = 2;
constexpr int DQ_FLOATS = T * K;
// Named barriers: both consumers, and each alone.
constexpr int BOTH = 1, OWN = 2;

// ---- delta and lse, by head and position: what a column of sᵀ needs, 8 bytes side by side
extern "C" __global__ void __launch_bounds__(256) gene_attention_stats_sm90(
    const act_t* d_o,               // (N, D)
    const act_t* o,                 // (N, D)
    const float* lse,               // (N, H)
    const unsigned* OPTIONAL order, // (N)
    float* delta,                   // (N, H)
    float* stats,                   // (H, N, 2): lse · log2 e, delta
    AttentionShape shape) {
  const int lane = threadIdx.x % 8, rows = shape.tokens * shape.heads;
  // 8 lanes a row of 64; whole warps take part, or a shuffle would miss some.
  for (int base = blockIdx.x * 32; base < rows; base += gridDim.x * 32) {
    const int row = base + threadIdx.x / 8, position = row / shape.heads, head = row % shape.heads;
    const bool exists = row < rows;
    const int token = exists ? (order ? (int)order[position] : position) : 0;
    float sum = 0.0f;
    if (exists) {
      const size_t at = ((size_t)token * shape.heads + head) * K + lane * PACK;
      Pack x = load_pack(d_o + at), y = load_pack(o + at);
#pragma unroll
      for (int i = 0; i < PACK; i++) sum += x.v[i] * y.v[i];
    }
#pragma unroll
    for (int bit = 4; bit > 0; bit >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, bit);
    if (exists && lane == 0) {
      const size_t at = (size_t)token * shape.heads + head;
      delta[at] = sum;
      *reinterpret_cast<float2*>(stats + ((size_t)head * shape.tokens + position) * 2) = make_float2(lse[at] * LOG2_E, sum);
    }
  }
}

struct Backward {
  unsigned char *keys, *values;        // 128 rows, the block's own
  unsigned char *queries, *gradients;  // STAGES tiles of 128 rows: Q, dO
  unsigned char* ds;                   // two tiles (128 keys, 64 queries)
  float* dq;                           // (8 warps, 8, 32 lanes, 4)
  float2* stats;                       // (STAGES, 128): lse · log2 e, delta
  int* tokens;                         // (STAGES, 128) marker-sparse: of the queries
  Mbarrier *own_full, *own_empty, *full, *empty, *dq_full, *dq_empty;
  Item* item;
  unsigned* mark;  // (STAGES) TileMark

  static constexpr int BYTES = 2 * TILE_BYTES + 2 * STAGES * TILE_BYTES + T * T * 2 + DQ_FLOATS * 4 + STAGES * T * 12 +
                               8 * (4 + 2 * STAGES) + sizeof(Item) + 4 * STAGES;

  __device__ __forceinline__ explicit Backward(unsigned char* shared) {
    keys = shared;
    values = keys + TILE_BYTES;
    queries = values + TILE_BYTES;
    gradients = queries + STAGES * TILE_BYTES;
    ds = gradients + STAGES * TILE_BYTES;
    dq = (float*)(ds + T * T * 2);
    stats = (float2*)(dq + DQ_FLOATS);
    item = (Item*)(stats + STAGES * T);
    own_full = (Mbarrier*)(item + 1), own_empty = own_full + 1;
    dq_full = own_full + 2, dq_empty = own_full + 3;
    full = own_full + 4, empty = full + STAGES;
    tokens = (int*)(empty + STAGES);
    mark = (unsigned*)(tokens + STAGES * T);
  }
};

// The cell and the key tile of a work item, and the query tiles that it visits, in its order.
template <bool SPARSE>
struct Visits {
  const Batch& batch;
  int start, length, globals, own, tiles;
  __device__ __forceinline__ Visits(const Batch& batch, const Work& work) : batch(batch) {
    const int cell = work.entry.cell(0);
    start = (int)batch.cell_start[cell];
    length = (int)batch.cell_start[cell + 1] - start;
    globals = SPARSE ? (int)batch.globals[cell] : 0;
    own = work.part, tiles = work.entry.parts;
  }
  __device__ __forceinline__ bool meets(int a, int b) const {
    return !SPARSE ||
           meet(batch, start, globals, a * T, min(a * T + T, length), b * T, min(b * T + T, length));
  }
  // Of the block's own tile with one that starts at `row`; both are full.
  __device__ __forceinline__ bool meets_all(int row) const {
    return own * T + T <= length && meet_all(batch, start, length, globals, own * T, own * T + T, row);
  }
  // Steps go round from the block's own tile; `tiles` when there is none left.
  __device__ __forceinline__ int from(int step) const {
    while (step < tiles && !meets(own, tile(step))) step++;
    return step;
  }
  __device__ __forceinline__ int tile(int step) const { return own + step < tiles ? own + step : own + step - tiles; }
  // How many shares of dq come before this block's at that step.
  __device__ __forceinline__ int before(int step) const {
    if (!SPARSE) return step;
    const int query = tile(step);
    int count = 0;
    for (int earlier = 0; earlier < step; earlier++) count += meets(query, (query - earlier + tiles) % tiles);
    return count;
  }
};

// Marker-sparse: the loads of three warps, `thread` of 96.
DEVICE void gather(unsigned char* to, const __nv_bfloat16* from, size_t stride, const Batch& batch, int position, int valid,
                   int thread) {
#pragma unroll 1
  for (int i = thread; i < T * 8; i += 96) {
    int row = i / 8, chunk = i % 8;
    bool read = row < valid;
    size_t token = read ? batch.token(position + row) : 0;
    cp_async_zero<16>(to + swizzle128(row * 128 + chunk * 16), from + token * stride + chunk * 8, read);
  }
}

// Dense: one thread drives the copy engine, a warp brings the stats. Marker-sparse: three warps do both.
template <bool SPARSE>
DEVICE void load_item(const Backward& b, const TensorMap* qkv_map, const TensorMap* d_o_map, const __nv_bfloat16* qkv,
                      const __nv_bfloat16* d_o, const float* stats, const Batch& batch, const Work& work, unsigned parity,
                      Place<STAGES>& place) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int thread = (warp == 3 ? 2 : warp) * 32 + lane;  // of 96; warp 2 sends dq
  const bool leader = threadIdx.x == 0, copies = SPARSE || leader;
  const int width = batch.shape.heads * K, column = work.head * K;
  const Visits<SPARSE> visits(batch, work);
  const int own = visits.own * T;

  if (copies) {
    mbarrier_wait(b.own_empty, parity ^ 1);
    if (leader) {
      b.item->slot[0] = Slot{visits.start, visits.length, own, visits.globals};
      b.item->head = work.head;
    }
    if (SPARSE) {
      gather(b.keys, qkv + width + column, 3 * width, batch, visits.start + own, visits.length - own, thread);
      gather(b.values, qkv + 2 * width + column, 3 * width, batch, visits.start + own, visits.length - own, thread);
      cp_async_commit();
      cp_async_wait<0>();
      async_fence();
      mbarrier_arrive(b.own_full);
    } else {
      mbarrier_arrive_expect(b.own_full, 2 * TILE_BYTES);
      for (int half = 0; half < 2; half++) {
        const int row = visits.start + own + half * SLOT;
        tma_load(b.keys + half * SLOT_BYTES, qkv_map, row, width + column, b.own_full);
        tma_load(b.values + half * SLOT_BYTES, qkv_map, row, 2 * width + column, b.own_full);
      }
    }
  }
  for (int step = 0, next; step < visits.tiles; step = next) {
    next = visits.from(step + 1);
    const int stage = place.stage, tile = visits.tile(step) * T, position = visits.start + tile, valid = visits.length - tile;
    mbarrier_wait(b.empty + stage, place.parity ^ 1);
    if (leader) {
      const bool last = next >= visits.tiles;
      b.mark[stage] = tile_mark(tile, -1, last, last, SPARSE && visits.meets_all(tile));
    }
    if (copies && !SPARSE) {
      mbarrier_arrive_expect(b.full + stage, 2 * TILE_BYTES);
      for (int half = 0; half < 2; half++) {
        const int at = stage * TILE_BYTES + half * SLOT_BYTES, row = position + half * SLOT;
        tma_load(b.queries + at, qkv_map, row, column, b.full + stage);
        tma_load(b.gradients + at, d_o_map, row, column, b.full + stage);
      }
    }
    if (SPARSE || warp == 1) {
      if (SPARSE) {
        gather(b.queries + stage * TILE_BYTES, qkv + column, 3 * width, batch, position, valid, thread);
        gather(b.gradients + stage * TILE_BYTES, d_o + column, width, batch, position, valid, thread);
        cp_async_commit();
      }
      const float2* from = reinterpret_cast<const float2*>(stats) + (size_t)work.head * batch.shape.tokens + position;
      for (int i = SPARSE ? thread : lane; i < T; i += SPARSE ? 96 : 32) {
        b.stats[stage * T + i] = i < valid ? from[i] : make_float2(0.0f, 0.0f);
        if (SPARSE) b.tokens[stage * T + i] = i < valid ? batch.token(position + i) : (int)NO_TOKEN;
      }
      if (SPARSE) {
        cp_async_wait<0>();
        async_fence();
      }
      mbarrier_arrive(b.full + stage);
    }
    place.next();
  }
}

// The shares of dq, to where they are summed; by one thread.
template <bool SPARSE>
DEVICE void send_item(const Backward& b, float* sums, unsigned* counters, const Batch& batch, const Work& work, unsigned& parity) {
  const Visits<SPARSE> visits(batch, work);
  const int first = work.entry.first * batch.shape.heads + work.head * work.entry.parts;
  for (int step = 0; step < visits.tiles; step = visits.from(step + 1), parity ^= 1) {
    const int tile = first + visits.tile(step), before = visits.before(step);
    mbarrier_wait(b.dq_full, parity);
    wait_until(counters + tile, before);
    float* to = sums + (size_t)tile * DQ_FLOATS;
    if (before == 0)
      bulk_store(to, b.dq, DQ_FLOATS * 4);
    else
      bulk_add(to, b.dq, DQ_FLOATS * 4);
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(b.dq_empty);
    bulk_wait<0>();
    signal(counters + tile);
  }
}

// 64 rows of gradients, times a factor, through the consumer's own 64 rows of shared memory to rows of `out`.
DEVICE void store_rows(const float (&x)[K / 8][4], float factor, unsigned char* slab, const Batch& batch, int start, int row,
                       int length, __nv_bfloat16* out, size_t stride) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < K / 8; n++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      *reinterpret_cast<uint32_t*>(slab + swizzle128((warp_row + fragment_row(2 * h)) * 128 + fragment_column(n, 0) * 2)) =
          pack_bf16(x[n][2 * h] * factor, x[n][2 * h + 1] * factor);
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * 8; i += 32) {
    int r = i / 8;
    if (row + r < length)
      store16(out + (size_t)batch.token(start + row + r) * stride + i % 8 * 8,
              load16<uint4>(slab + swizzle128((warp_row + r) * 128 + i % 8 * 16)));
  }
}

template <bool SPARSE, bool DROPOUT>
DEVICE void consume(const Backward& b, Batch batch, __nv_bfloat16* dqkv) {
  const int slot = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, warp_row = warp % 4 * 16;
  const int width = batch.shape.heads * K;
  const float scale = batch.shape.scale * LOG2_E;
  // dpᵀ is queued with sᵀ, or once sᵀ has become pᵀ: marker-sparse, whose masks need the registers.
  constexpr bool LATE = SPARSE;
  Place<STAGES> place;
  unsigned own_parity = 0, dq_parity = 1;

  for (;; own_parity ^= 1) {
    mbarrier_wait(b.own_full, own_parity);
    if (b.item->head < 0) break;
    batch.head = b.item->head;
    const Slot mine = b.item->slot[0];
    const int start = mine.start, length = mine.length, row = mine.first + slot * SLOT + warp_row;
    const Reach reach(batch, start, length, mine.globals, row);
    float dk[K / 8][4] = {}, dv[K / 8][4] = {};

    for (bool last = false; !last; place.next()) {
      const int stage = place.stage;
      mbarrier_wait(b.full + stage, place.parity);
      const TileMark mark{b.mark[stage]};
      const int tile = mark.tile();
      last = mark.last_of_cell();
      const uint64_t query = shared_matrix(b.queries + stage * TILE_BYTES), gradient = shared_matrix(b.gradients + stage * TILE_BYTES);
      float s[T / 8][4], dp[T / 8][4];
      uint32_t p[T / 16][4], ds[T / 16][4];

      auto scores = [&] {
        const uint64_t key = shared_matrix(b.keys + slot * SLOT_BYTES);
        wgmma_hold(s);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < K / 16; k++) wgmma_shared<false, false>(s, key + k * 2, query + k * 2, k > 0);
        wgmma_commit();
      };
      auto gradients = [&] {
        const uint64_t value = shared_matrix(b.values + slot * SLOT_BYTES);
        wgmma_hold(dp);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < K / 16; k++) wgmma_shared<false, false>(dp, value + k * 2, gradient + k * 2, k > 0);
        wgmma_commit();
      };
      const float4* stats = reinterpret_cast<const float4*>(b.stats + stage * T) + lane % 4;  // of columns 2t and 2t + 1

      scores();
      if (!LATE) gradients();
      wgmma_wait<LATE ? 0 : 1>();
      wgmma_hold(s);
      if (SPARSE && !mark.whole()) reach.mask(s, mine.globals - tile, b.tokens + stage * T);
      if (!SPARSE && tile + T > length) mask_columns(s, length - tile);
      if (mine.first + T > length) {
#pragma unroll
        for (int n = 0; n < T / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (row + fragment_row(e) >= length) s[n][e] = -INFINITY;
      }
#pragma unroll
      for (int n = 0; n < T / 8; n++) {
        const float4 column = stats[n * 4];
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = exp2_approx(__fmaf_rn(s[n][e], scale, e % 2 ? -column.z : -column.x));
        // From here on p is what bf16 keeps of it: 32 registers, not 64.
#pragma unroll
        for (int h = 0; h < 2; h++) p[n / 2][n % 2 * 2 + h] = pack_bf16(s[n][2 * h], s[n][2 * h + 1]);
      }
      if (LATE) gradients();
      if (DROPOUT && batch.dropout.threshold) {
        // A pair that is dropped has its sign set, since ds wants p all the same.
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int from = half * (T / 2);
          Kept<T / 2> kept;
          if (SPARSE)
            kept = keep_by_column<T / 2>(batch, Positions{batch, start + row, start + length - 1},
                                         (const int*)b.tokens + stage * T + from, start);
          else
            kept = keep_by_column<T / 2>(batch, Consecutive{start + row}, Consecutive{start + tile + from}, start);
#pragma unroll
          for (int n = 0; n < T / 16; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
              p[half * (T / 32) + n / 2][n % 2 * 2 + h] |=
                  (kept(n, 2 * h) ? 0 : 0x8000u) | (kept(n, 2 * h + 1) ? 0 : 0x80000000u);
        }
      }
      wgmma_wait<0>();
      wgmma_hold(dp);
#pragma unroll
      for (int n = 0; n < T / 8; n++) {
        const float4 column = stats[n * 4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          uint32_t& pair = p[n / 2][n % 2 * 2 + h];
          float low = dp[n][2 * h], high = dp[n][2 * h + 1];
          if (DROPOUT) {
            low = pair & 0x8000u ? 0.0f : low * batch.dropout.scale;
            high = pair & 0x80000000u ? 0.0f : high * batch.dropout.scale;
          }
          ds[n / 2][n % 2 * 2 + h] = pack_bf16(bf16_low(pair & 0x7FFFu) * (low - column.y),
                                               bf16_high(pair & 0x7FFFFFFFu) * (high - column.w));
          if (DROPOUT) pair &= ~((pair & 0x8000u ? 0xFFFFu : 0) | (pair & 0x80000000u ? 0xFFFF0000u : 0));
        }
      }
      wgmma_hold(dv);
      wgmma_hold(dk);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < T / 16; k++) wgmma_fragment<true>(dv, p[k], gradient + k * (16 * 128 >> 4), 1);
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < T / 16; k++) wgmma_fragment<true>(dk, ds[k], query + k * (16 * 128 >> 4), 1);
      wgmma_commit();

      named_barrier_sync(BOTH, 256);  // both have read the last visit's ds
#pragma unroll
      for (int n = 0; n < T / 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int at = (slot * SLOT + warp_row + fragment_row(2 * h)) * 128 + fragment_column(n % 8, 0) * 2;
          *reinterpret_cast<uint32_t*>(b.ds + n / 8 * TILE_BYTES + swizzle128(at)) = ds[n / 2][n % 2 * 2 + h];
        }
      async_fence();
      named_barrier_sync(BOTH, 256);
      float dq[K / 8][4];
      wgmma_wait<0>();
      wgmma_hold(dv);
      wgmma_hold(dk);
      release(b.empty + stage);
      {
        const uint64_t left = shared_matrix(b.ds + slot * TILE_BYTES), right = shared_matrix(b.keys);
        wgmma_hold(dq);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < T / 16; k++)
          wgmma_shared<true, true>(dq, left + k * (16 * 128 >> 4), right + k * (16 * 128 >> 4), k > 0);
        wgmma_commit();
      }
      mbarrier_wait(b.dq_empty, dq_parity);
      dq_parity ^= 1;
      wgmma_wait<0>();
      wgmma_hold(dq);
#pragma unroll
      for (int n = 0; n < K / 8; n++)
        store16(b.dq + ((warp * 8 + n) * 32 + lane) * 4, make_float4(dq[n][0], dq[n][1], dq[n][2], dq[n][3]));
      async_fence();
      release(b.dq_full);
    }

    unsigned char* slab = b.values + slot * SLOT_BYTES;
    __nv_bfloat16* out = dqkv + batch.head * K;
    named_barrier_sync(OWN + slot, 128);  // nobody reads V any more
    store_rows(dk, batch.shape.scale, slab, batch, start, row, length, out + width, 3 * width);
    store_rows(dv, DROPOUT ? batch.dropout.scale : 1.0f, slab, batch, start, row, length, out + 2 * width, 3 * width);
    async_fence();
    release(b.own_empty);
  }
}

template <bool SPARSE, bool DROPOUT>
DEVICE void backward(const TensorMap* qkv_map, const TensorMap* d_o_map, const __nv_bfloat16* qkv, const __nv_bfloat16* d_o,
                     const float* stats, const unsigned* entries, const unsigned* count, const Batch& batch, float* sums,
                     unsigned* counters, __nv_bfloat16* dqkv) {
  DYNAMIC_SHARED(unsigned char, shared);
  const Backward b(shared);
  if (threadIdx.x == 0) {
    mbarrier_init(b.own_full, SPARSE ? 96 : 1);
    mbarrier_init(b.own_empty, 8);
    mbarrier_init(b.dq_full, 8);
    mbarrier_init(b.dq_empty, 1);
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(b.full + stage, SPARSE ? 96 : 33);
      mbarrier_init(b.empty + stage, 8);
    }
    mbarrier_init_fence();
    if (!SPARSE) tma_prefetch(qkv_map), tma_prefetch(d_o_map);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    set_fewer_registers<SPARSE ? 56 : 40>();
    const int items = (int)*count * batch.shape.heads, warp = threadIdx.x / 32;
    unsigned parity = 0;
    if (warp == 2) {
      if (threadIdx.x == 64)
        for (int i = blockIdx.x; i < items; i += gridDim.x)
          send_item<SPARSE>(b, sums, counters, batch, Work(entries, i, batch.shape.heads), parity);
    } else if (SPARSE || threadIdx.x == 0 || warp == 1) {
      Place<STAGES> place;
      for (int i = blockIdx.x; i < items; i += gridDim.x, parity ^= 1)
        load_item<SPARSE>(b, qkv_map, d_o_map, qkv, d_o, stats, batch, Work(entries, i, batch.shape.heads), parity, place);
      if (SPARSE || threadIdx.x == 0) {
        mbarrier_wait(b.own_empty, parity ^ 1);
        if (threadIdx.x == 0) b.item->head = -1;  // no more
        mbarrier_arrive(b.own_full);
      }
    }
  } else {
    set_more_registers<SPARSE ? 224 : 232>();
    consume<SPARSE, DROPOUT>(b, batch, dqkv);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) gene_attention_backward_sm90(
    GRID_CONSTANT TensorMap qkv,  // (N, 3·D)
    GRID_CONSTANT TensorMap d_o,  // (N, D)
    const float* stats,           // (H, N, 2)
    const unsigned* cell_start,   // (C + 1)
    const unsigned* entries,      // (entries, 8) gene_attention_items: 2 slots, not merged
    const unsigned* count,        // (1)
    float* sums,                  // (entries · H, 128 · 64) of dq
    unsigned* counters,           // (entries · H), zeros
    act_t* dqkv,                  // (N, 3·D): dk and dv
    AttentionShape shape) {
  backward<false, false>(&qkv, &d_o, nullptr, nullptr, stats, entries, count,
                         Batch{cell_start, nullptr, nullptr, shape, Dropout{}, 0}, sums, counters, dqkv);
}
extern "C" __global__ void __launch_bounds__(384, 1) gene_attention_backward_dropout_sm90(
    GRID_CONSTANT TensorMap qkv,  // (N, 3·D)
    GRID_CONSTANT TensorMap d_o,  // (N, D)
    const float* stats,           // (H, N, 2)
    const unsigned* cell_start,   // (C + 1)
    const unsigned* entries,      // (entries, 8) gene_attention_items: 2 slots, not merged
    const unsigned* count,        // (1)
    float* sums,                  // (entries · H, 128 · 64) of dq
    unsigned* counters,           // (entries · H), zeros
    act_t* dqkv,                  // (N, 3·D): dk and dv
    AttentionShape shape, Dropout dropout) {
  backward<false, true>(&qkv, &d_o, nullptr, nullptr, stats, entries, count,
                        Batch{cell_start, nullptr, nullptr, shape, dropout, 0}, sums, counters, dqkv);
}
extern "C" __global__ void __launch_bounds__(384, 1) gene_attention_backward_sparse_sm90(
    const act_t* qkv,            // (N, 3·D)
    const act_t* d_o,            // (N, D)
    const float* stats,          // (H, N, 2)
    const unsigned* cell_start,  // (C + 1)
    const unsigned* order,       // (N) gene_attention_order
    const unsigned* globals,     // (C)
    const unsigned* entries,     // (entries, 8) gene_attention_items: 2 slots, not merged
    const unsigned* count,       // (1)
    float* sums,                 // (entries · H, 128 · 64) of dq
    unsigned* counters,          // (entries · H), zeros
    act_t* dqkv,                 // (N, 3·D): dk and dv
    AttentionShape shape, Dropout dropout) {
  backward<true, true>(nullptr, nullptr, qkv, d_o, stats, entries, count,
                       Batch{cell_start, order, globals, shape, dropout, 0}, sums, counters, dqkv);
}

// ---- dq: the sums, times scale, from fragment order to rows of bf16
extern "C" __global__ void __launch_bounds__(256) gene_attention_dq_sm90(
    const float* sums,               // (entries · H, 128 · 64)
    const unsigned* cell_start,      // (C + 1)
    const unsigned* OPTIONAL order,  // (N)
    const unsigned* entries,         // (entries, 8)
    const unsigned* count,           // (1)
    act_t* dqkv,                     // (N, 3·D): dq
    AttentionShape shape) {
  const int items = (int)*count * shape.heads, stride = 3 * shape.heads * K;
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const Work work(entries, i, shape.heads);
    const int cell = work.entry.cell(0), start = (int)cell_start[cell], length = (int)cell_start[cell + 1] - start;
    const float* from = sums + (size_t)i * DQ_FLOATS;
    // A thread: 8 columns of two rows, from the 64 bytes that the row pair's four lanes stored side by side.
    for (int j = threadIdx.x; j < 8 * 8 * 8; j += 256) {
      const int warp = j / 64, g = j / 8 % 8, n = j % 8;
      const float* at = from + ((warp * 8 + n) * 32 + g * 4) * 4;
      float4 x[4];
#pragma unroll
      for (int t = 0; t < 4; t++) x[t] = load16<float4>(at + t * 4);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = work.part * T + warp * 16 + g + 8 * h;
        if (row >= length) continue;
        Pack pack;
#pragma unroll
        for (int t = 0; t < 4; t++) {
          pack.v[2 * t] = (h ? x[t].z : x[t].x) * shape.scale;
          pack.v[2 * t + 1] = (h ? x[t].w : x[t].y) * shape.scale;
        }
        const size_t token = order ? order[start + row] : start + row;
        store_pack(dqkv + token * stride + work.head * K + n * 8, pack);
      }
    }
  }
}
