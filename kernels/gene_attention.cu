// gene_attention.cu: softmax attention over packed cells of any length, forward.
//
//   s_ij = q_i · k_j · scale over the pairs that attend,  lse_i = log Σ_j exp(s_ij)
//   o_i  = Σ_j keep_ij · exp(s_ij - lse_i) · v_j          keep: 0 or 1 / (1 - p), the bits of src/rng.rs
//
// One pass with a running maximum m and sum l (Milakov and Gimelshein 2018; FlashAttention 2022): s never leaves registers.
// Block: 64 queries of the packed batch × one head, 4 warps of 16 queries. Which tiles it visits: gene_attention.cuh.
//
//              key tiles of T rows, two in flight:  while one is multiplied, cp.async brings the next
//                  K [T, K]  V [T, K]     K' V'
//     Q  warp 0   |s = Q·Kᵀ (16, T) -> m, l, p -> o (16, K) += p·V|      Q fragments and o stay in registers (f32: Q in shared)
//     64 warp 1   |                    "                          |      a row's 4 lanes agree on m by two shuffles
//     ×  warp 2   |                    "                          |
//     K  warp 3   |                    "                          |      one barrier per visited tile
//
// Must move: q, k, v in and o out, 4·N·D·a bytes (a = 4 or 2), and 4·N·H of lse; each block reads its cells' K and V again, from
// the second-level cache: 2·D·a·Σ len²/64 bytes. FLOPs: 4·D·Σ len², and one exp a pair and head.
// Shared memory, KiB at K = 32, 64, 128: bf16 25.8, 45.8, 51.5; f32 62.8, 60.5, 71.4. Registers: docs/kernels-attention.md.
#include "gene_attention.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

template <int K>
DEVICE void forward(const act_t* qkv, const Batch& batch, act_t* o, float* lse) {
  constexpr int T = Tile<K>::VISITED, STRIDE = Tile<K>::STRIDE, ELEMENTS = Tile<K>::ELEMENTS;
  DYNAMIC_SHARED(act_t, queries);             // (64, K)
  act_t* keys = queries + ROWS * STRIDE;      // (2, T, K)
  act_t* values = keys + 2 * ELEMENTS;        // (2, T, K)
  int* own = (int*)(values + 2 * ELEMENTS);   // (64) tokens of the queries
  int* tokens = own + ROWS;                   // (2, T) of the keys
  float* strips = (float*)(tokens + 2 * T);   // f32: (4, 16, T)
  const int warp = threadIdx.x / 32, first = blockIdx.x * ROWS, last = min(first + ROWS, batch.shape.tokens);
  const int width = batch.shape.heads * K, stride = 3 * width;
  const act_t* q = qkv + blockIdx.y * K;

  load_rows<K>(queries, q, stride, batch, first, last - first, ROWS);
  load_tokens(own, batch, first, last - first, ROWS);
  cp_async_commit();
  Walk<T> walk(batch, first, last);
  auto load = [&](int stage, const Visit& visit) {
    int valid = visited<T>(visit), rows = round_up16(valid), position = visit.start + visit.tile;
    load_rows<K>(keys + stage * ELEMENTS, q + width, stride, batch, position, valid, rows);
    load_rows<K>(values + stage * ELEMENTS, q + 2 * width, stride, batch, position, valid, rows);
    load_tokens(tokens + stage * T, batch, position, valid, T);
    cp_async_commit();
  };
  bool more = walk.next();
  load(0, walk.visit);
  cp_async_wait<1>();
  __syncthreads();
  Operand<K, true> query(queries + warp * 16 * STRIDE);
  const int* mine = own + warp * 16;
  const int row_token[2] = {mine[fragment_row(0)], mine[fragment_row(2)]};

  const float scale = batch.shape.scale * LOG2_E;
  float sum[2] = {0.0f, 0.0f}, most[2] = {-INFINITY, -INFINITY}, out[K / 8][4] = {};
  for (int stage = 0; more; stage ^= 1) {
    Visit now = walk.visit;
    more = walk.next();
    cp_async_wait<0>();
    __syncthreads();  // the tile has landed for all, and all are done with the other one
    if (more) load(stage ^ 1, walk.visit);
    int row = first + warp * 16 - now.start;
    if (idle<T>(batch, now, row)) continue;

    const int valid = visited<T>(now);
    float s[T / 8][4];
    products<K, T>(s, query, keys + stage * ELEMENTS, valid);
    mask<T>(s, batch, now, row, row_token, tokens + stage * T);

    float top[2] = {most[0], most[1]}, base[2], shrink[2];
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
    if (batch.dropout.threshold) {
      Kept<T> kept = keep_by_row<T>(batch, mine, tokens + stage * T, now.start);
#pragma unroll
      for (int n = 0; n < T / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] = kept(n, e) ? s[n][e] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < K / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[n][e] *= shrink[e / 2];
    accumulate<K, T>(out, s, values + stage * ELEMENTS, valid, strips + warp * Tile<K>::STRIP);
  }

  const int valid = last - first - warp * 16;
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] = quad_sum(sum[h]);
    factor[h] = batch.dropout.scale / sum[h];
    if (threadIdx.x % 4 == 0 && fragment_row(2 * h) < valid)
      lse[batch.row(row_token[h])] = most[h] * batch.shape.scale + logf(sum[h]);
  }
  store_rows<K>(out, factor, queries + warp * 16 * STRIDE, mine, valid, o + blockIdx.y * K, width);
}

extern "C" __global__ void __launch_bounds__(128) gene_attention_forward_32(
    const act_t* qkv,                  // (N, 3·D)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N), marker-sparse: gene_attention_order
    const unsigned* OPTIONAL globals,  // (C), with order
    act_t* o,                          // (N, D)
    float* lse,                        // (N, H)
    AttentionShape shape, Dropout dropout) {
  forward<32>(qkv, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, o, lse);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_forward_64(
    const act_t* qkv,                  // (N, 3·D)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N)
    const unsigned* OPTIONAL globals,  // (C)
    act_t* o,                          // (N, D)
    float* lse,                        // (N, H)
    AttentionShape shape, Dropout dropout) {
  forward<64>(qkv, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, o, lse);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_forward_128(
    const act_t* qkv,                  // (N, 3·D)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N)
    const unsigned* OPTIONAL globals,  // (C)
    act_t* o,                          // (N, D)
    float* lse,                        // (N, H)
    AttentionShape shape, Dropout dropout) {
  forward<128>(qkv, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, o, lse);
}
