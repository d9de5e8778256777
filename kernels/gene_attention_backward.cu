// gene_attention_backward.cu: the gradients of gene_attention.cu, in two kernels without atomics.
//
//   p_ij = exp(s_ij - lse_i),  delta_i = do_i · o_i,  ds_ij = p_ij · (keep_ij · do_i · v_j - delta_i)
//   dq_i = scale · Σ_j ds_ij k_j,   dk_j = scale · Σ_i ds_ij q_i,   dv_j = Σ_i keep_ij p_ij do_i
//
// gene_attention_dq:  a block owns 64 queries, visits key tiles, sums dq in registers; it also sets delta, so it runs first.
// gene_attention_dkv: a block owns 64 keys, visits query tiles, sums dk and dv in registers. It works on the transposed tile,
//                     sᵀ = K·Qᵀ, so that pᵀ and dsᵀ are the left operands of its sums as they stand:
//
//        dq:   own Q, dO   visited K, V          dkv:  own K, V   visited Q, dO, lse, delta (two tiles in flight)
//              s  = Q·Kᵀ    dp  = dO·Vᵀ                sᵀ = K·Qᵀ    dpᵀ = V·dOᵀ
//              dq += ds·K                              dv += (keep·p)ᵀ·dO     dk += dsᵀ·Q
//
// Each sum has one owner and one order, so two runs give the same bits. The price: s and dp are computed in both, 7 products in
// place of 5 (14·D·Σ len² FLOPs against 10), and two exps a pair.
// Must move: q, k, v, o, do in and dq, dk, dv out, 8·N·D·a bytes, and 16·N·H for lse and delta.
// Shared memory of dq, KiB at K = 32, 64, 128: bf16 30.8, 54.8, 68.5; f32 71.8, 77.5, 104.4; dkv takes up to 1 more.
#include "gene_attention.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

template <int K>
DEVICE void dq_tile(const act_t* qkv, const act_t* d_o, const act_t* o, const float* lse, const Batch& batch, act_t* dqkv,
                    float* delta) {
  constexpr int T = Tile<K>::VISITED, STRIDE = Tile<K>::STRIDE, ELEMENTS = Tile<K>::ELEMENTS;
  DYNAMIC_SHARED(act_t, queries);               // (64, K)
  act_t* gradients = queries + ROWS * STRIDE;   // (64, K) of o
  act_t* keys = gradients + ROWS * STRIDE;      // (2, T, K)
  act_t* values = keys + 2 * ELEMENTS;          // (2, T, K)
  int* own = (int*)(values + 2 * ELEMENTS);     // (64) tokens of the queries
  int* tokens = own + ROWS;                     // (2, T) of the keys
  float* strips = (float*)(tokens + 2 * T);     // f32: (4, 16, T)
  const int warp = threadIdx.x / 32, first = blockIdx.x * ROWS, last = min(first + ROWS, batch.shape.tokens);
  const int width = batch.shape.heads * K, stride = 3 * width, column = blockIdx.y * K;
  const act_t* q = qkv + column;

  load_rows<K>(queries, q, stride, batch, first, last - first, ROWS);
  load_rows<K>(gradients, d_o + column, width, batch, first, last - first, ROWS);
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
  Operand<K, K <= 64> query(queries + warp * 16 * STRIDE), gradient(gradients + warp * 16 * STRIDE);
  const int* mine = own + warp * 16;
  const int row_token[2] = {mine[fragment_row(0)], mine[fragment_row(2)]}, valid_rows = last - first - warp * 16;

  // delta: a row's 4 lanes share its packs of 8 elements.
  float base[2], dot[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    bool exists = fragment_row(2 * h) < valid_rows;
    dot[h] = base[h] = 0.0f;
    if (exists) {
      base[h] = lse[batch.row(row_token[h])] * LOG2_E;
      const act_t* out = o + (size_t)row_token[h] * width + column;
      const act_t* in = gradients + (warp * 16 + fragment_row(2 * h)) * STRIDE;
#pragma unroll
      for (int c = threadIdx.x % 4 * PACK; c < K; c += 4 * PACK) {
        Pack x = load_pack(out + c), y = load_pack(in + c);
#pragma unroll
        for (int i = 0; i < PACK; i++) dot[h] += x.v[i] * y.v[i];
      }
    }
    dot[h] = quad_sum(dot[h]);
    if (exists && threadIdx.x % 4 == 0) delta[batch.row(row_token[h])] = dot[h];
  }

  const float scale = batch.shape.scale * LOG2_E;
  float dq[K / 8][4] = {};
  for (int stage = 0; more; stage ^= 1) {
    Visit now = walk.visit;
    more = walk.next();
    cp_async_wait<0>();
    __syncthreads();  // the keys have landed for all, and all are done with the other tile
    if (more) load(stage ^ 1, walk.visit);
    int row = first + warp * 16 - now.start;
    if (idle<T>(batch, now, row)) continue;

    const int valid = visited<T>(now);
    float s[T / 8][4], dp[T / 8][4];
    products<K, T>(s, query, keys + stage * ELEMENTS, valid);
    mask<T>(s, batch, now, row, row_token, tokens + stage * T);
    products<K, T>(dp, gradient, values + stage * ELEMENTS, valid);
    if (batch.dropout.threshold) {
      Kept<T> kept = keep_by_row<T>(batch, mine, tokens + stage * T, now.start);
#pragma unroll
      for (int n = 0; n < T / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dp[n][e] = kept(n, e) ? dp[n][e] * batch.dropout.scale : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < T / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        s[n][e] = exp2_approx(__fmaf_rn(s[n][e], scale, -base[e / 2])) * (dp[n][e] - dot[e / 2]);
    accumulate<K, T>(dq, s, keys + stage * ELEMENTS, valid, strips + warp * Tile<K>::STRIP);
  }
  const float factor[2] = {batch.shape.scale, batch.shape.scale};
  store_rows<K>(dq, factor, queries + warp * 16 * STRIDE, mine, valid_rows, dqkv + column, stride);
}

template <int K>
DEVICE void dkv_tile(const act_t* qkv, const act_t* d_o, const float* lse, const float* delta, const Batch& batch,
                     act_t* dqkv) {
  constexpr int T = Tile<K>::VISITED, STRIDE = Tile<K>::STRIDE, ELEMENTS = Tile<K>::ELEMENTS;
  DYNAMIC_SHARED(act_t, keys);                     // (64, K)
  act_t* values = keys + ROWS * STRIDE;            // (64, K)
  act_t* queries = values + ROWS * STRIDE;         // (2, T, K)
  act_t* gradients = queries + 2 * ELEMENTS;       // (2, T, K) of o
  int* own = (int*)(gradients + 2 * ELEMENTS);     // (64) tokens of the keys
  int* tokens = own + ROWS;                        // (2, T) of the queries
  float* bases = (float*)(tokens + 2 * T);         // (2, T) lse
  float* dots = bases + 2 * T;                     // (2, T) delta
  float* strips = dots + 2 * T;                    // f32: (4, 16, T)
  const int warp = threadIdx.x / 32, first = blockIdx.x * ROWS, last = min(first + ROWS, batch.shape.tokens);
  const int width = batch.shape.heads * K, stride = 3 * width, column = blockIdx.y * K;
  const act_t* q = qkv + column;

  load_rows<K>(keys, q + width, stride, batch, first, last - first, ROWS);
  load_rows<K>(values, q + 2 * width, stride, batch, first, last - first, ROWS);
  load_tokens(own, batch, first, last - first, ROWS);
  cp_async_commit();
  Walk<T> walk(batch, first, last);
  auto load = [&](int stage, const Visit& visit) {
    int valid = visited<T>(visit), rows = round_up16(valid), position = visit.start + visit.tile;
    load_rows<K>(queries + stage * ELEMENTS, q, stride, batch, position, valid, rows);
    load_rows<K>(gradients + stage * ELEMENTS, d_o + column, width, batch, position, valid, rows);
    load_tokens(tokens + stage * T, batch, position, valid, T);
    for (int i = threadIdx.x; i < T; i += THREADS) {
      bool read = i < valid;
      size_t row = read ? batch.row(batch.token(position + i)) : 0;
      cp_async_zero<4>(bases + stage * T + i, lse + row, read);
      cp_async_zero<4>(dots + stage * T + i, delta + row, read);
    }
    cp_async_commit();
  };
  bool more = walk.next();
  load(0, walk.visit);
  cp_async_wait<1>();
  __syncthreads();
  Operand<K, K <= 64> key(keys + warp * 16 * STRIDE), value(values + warp * 16 * STRIDE);
  const int* mine = own + warp * 16;
  const int row_token[2] = {mine[fragment_row(0)], mine[fragment_row(2)]};

  const float scale = batch.shape.scale * LOG2_E;
  float* strip = strips + warp * Tile<K>::STRIP;
  float dk[K / 8][4] = {}, dv[K / 8][4] = {};
  for (int stage = 0; more; stage ^= 1) {
    Visit now = walk.visit;
    more = walk.next();
    cp_async_wait<0>();
    __syncthreads();  // the queries have landed for all, and all are done with the other tile
    if (more) load(stage ^ 1, walk.visit);
    int row = first + warp * 16 - now.start;
    if (idle<T>(batch, now, row)) continue;

    const int valid = visited<T>(now);
    float s[T / 8][4], dp[T / 8][4];
    products<K, T>(s, key, queries + stage * ELEMENTS, valid);
    mask<T>(s, batch, now, row, row_token, tokens + stage * T);
#pragma unroll
    for (int n = 0; n < T / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        s[n][e] = exp2_approx(__fmaf_rn(s[n][e], scale, -LOG2_E * bases[stage * T + fragment_column(n, e)]));
    products<K, T>(dp, value, gradients + stage * ELEMENTS, valid);
    Kept<T> kept = {};
    if (batch.dropout.threshold) {
      kept = keep_by_column<T>(batch, mine, tokens + stage * T, now.start);
#pragma unroll
      for (int n = 0; n < T / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dp[n][e] = kept(n, e) ? dp[n][e] * batch.dropout.scale : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < T / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        dp[n][e] = s[n][e] * (dp[n][e] - dots[stage * T + fragment_column(n, e)]);
        if (batch.dropout.threshold && !kept(n, e)) s[n][e] = 0.0f;
      }
    accumulate<K, T>(dv, s, gradients + stage * ELEMENTS, valid, strip);
    accumulate<K, T>(dk, dp, queries + stage * ELEMENTS, valid, strip);
  }
  const int valid_rows = last - first - warp * 16;
  const float of_key[2] = {batch.shape.scale, batch.shape.scale}, of_value[2] = {batch.dropout.scale, batch.dropout.scale};
  store_rows<K>(dk, of_key, keys + warp * 16 * STRIDE, mine, valid_rows, dqkv + width + column, stride);
  store_rows<K>(dv, of_value, values + warp * 16 * STRIDE, mine, valid_rows, dqkv + 2 * width + column, stride);
}

extern "C" __global__ void __launch_bounds__(128) gene_attention_dq_32(
    const act_t* qkv,                  // (N, 3·D)
    const act_t* d_o,                  // (N, D)
    const act_t* o,                    // (N, D)
    const float* lse,                  // (N, H)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N), marker-sparse: gene_attention_order
    const unsigned* OPTIONAL globals,  // (C), with order
    act_t* dqkv,                       // (N, 3·D); sets the first third
    float* delta,                      // (N, H)
    AttentionShape shape, Dropout dropout) {
  dq_tile<32>(qkv, d_o, o, lse, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, dqkv, delta);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_dq_64(
    const act_t* qkv,                  // (N, 3·D)
    const act_t* d_o,                  // (N, D)
    const act_t* o,                    // (N, D)
    const float* lse,                  // (N, H)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N), marker-sparse: gene_attention_order
    const unsigned* OPTIONAL globals,  // (C), with order
    act_t* dqkv,                       // (N, 3·D); sets the first third
    float* delta,                      // (N, H)
    AttentionShape shape, Dropout dropout) {
  dq_tile<64>(qkv, d_o, o, lse, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, dqkv, delta);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_dq_128(
    const act_t* qkv,                  // (N, 3·D)
    const act_t* d_o,                  // (N, D)
    const act_t* o,                    // (N, D)
    const float* lse,                  // (N, H)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N), marker-sparse: gene_attention_order
    const unsigned* OPTIONAL globals,  // (C), with order
    act_t* dqkv,                       // (N, 3·D); sets the first third
    float* delta,                      // (N, H)
    AttentionShape shape, Dropout dropout) {
  dq_tile<128>(qkv, d_o, o, lse, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, dqkv, delta);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_dkv_32(
    const act_t* qkv,                  // (N, 3·D)
    const act_t* d_o,                  // (N, D)
    const float* lse,                  // (N, H)
    const float* delta,                // (N, H)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N)
    const unsigned* OPTIONAL globals,  // (C)
    act_t* dqkv,                       // (N, 3·D); sets the second and the last third
    AttentionShape shape, Dropout dropout) {
  dkv_tile<32>(qkv, d_o, lse, delta, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, dqkv);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_dkv_64(
    const act_t* qkv,                  // (N, 3·D)
    const act_t* d_o,                  // (N, D)
    const float* lse,                  // (N, H)
    const float* delta,                // (N, H)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N)
    const unsigned* OPTIONAL globals,  // (C)
    act_t* dqkv,                       // (N, 3·D); sets the second and the last third
    AttentionShape shape, Dropout dropout) {
  dkv_tile<64>(qkv, d_o, lse, delta, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, dqkv);
}
extern "C" __global__ void __launch_bounds__(128) gene_attention_dkv_128(
    const act_t* qkv,                  // (N, 3·D)
    const act_t* d_o,                  // (N, D)
    const float* lse,                  // (N, H)
    const float* delta,                // (N, H)
    const unsigned* cell_start,        // (C + 1)
    const unsigned* OPTIONAL order,    // (N)
    const unsigned* OPTIONAL globals,  // (C)
    act_t* dqkv,                       // (N, 3·D); sets the second and the last third
    AttentionShape shape, Dropout dropout) {
  dkv_tile<128>(qkv, d_o, lse, delta, Batch{cell_start, order, globals, shape, dropout, (int)blockIdx.y}, dqkv);
}
