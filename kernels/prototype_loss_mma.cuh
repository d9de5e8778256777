// prototype_loss_mma.cuh: the tiles of the streaming softmax loss in bf16, on the tensor cores (mma.sync m16n8k16, f32 sums).
//
// 8 warps in teams of GROUP share 16 resident rows per team: BM = 128 / GROUP. Warp g of a team owns columns [g·D/GROUP, ..) of O
// and the same stretch of the sum that S is: O (16, D) of one warp would not fit the registers beyond D = 256.
//
//                    streamed tile (BN, D), two buffers, cp.async
//                   +-----------+-----------+
//                   |  g = 0    |  g = 1    |      S = Σ_g S_g: partial products through shared memory, added in order of g by
//                   +-----------+-----------+          every warp of the team, so all hold the same S, and the same softmax
//   team  +-------+ +-----------+-----------+      W stays in registers: S's accumulators, rounded in pairs, are the A operand
//   (16)  |   S   | |  O, g = 0 |  O, g = 1 |          of the second product
//         +-------+ +-----------+-----------+
//
// Shared memory: (BM + 2·BN) rows of D + 8 elements, the 8 so that the 8 rows of an ldmatrix lie in different banks; and the
// partial products. Per mma: S reads 256 B (its share of an A fragment, 512 B / tiles of 8 columns, and B), O 256 B: at 128 B a
// clock the operands cost about as long as the products do on A100; larger warp tiles are the Hopper path's business.
#pragma once
#include "softmax_problem.cuh"

// Rows [first, first + count) of `from` to a tile of stride `stride`, zeros beyond `limit`, beyond D, and for rows that take no
// part where `checked`. Warps take rows in turn.
template <bool CHECKED>
DEVICE void load_tile(const Problem& p, __nv_bfloat16* tile, int stride, const __nv_bfloat16* from, int first, int limit,
                      int count) {
  int width = p.call.width, padded = stride - 8, lane = threadIdx.x % 32;
  bool whole = width % 8 == 0;
  for (int r = threadIdx.x / 32; r < count; r += 8) {
    bool live = first + r < limit && (!CHECKED || load_row(p, first + r).weight != 0.0f);
    const __nv_bfloat16* row = from + (size_t)(live ? first + r : 0) * width;
    __nv_bfloat16* to = tile + r * stride;
    for (int c = lane * 8; c < padded; c += 256) {
      if (whole && c < width) {
        cp_async_zero<16>(to + c, row + c, live);
      } else {
        for (int i = 0; i < 8; i++) to[c + i] = live && c + i < width ? row[c + i] : from_float<__nv_bfloat16>(0.0f);
      }
    }
  }
}

// The teacher's dot products of this thread's elements, from f32 rows in the caches: exact, and not the fast path (the refine
// objective, which has a teacher, runs in f32).
template <int STR>
DEVICE void teacher_dots(const Problem& p, const float* resident, const int (&own)[2], int own_limit, const float* streamed,
                         const int (&index)[STR], int limit, float (&x)[2][STR]) {
  int width = p.call.width;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int j = 0; j < STR; j++) {
      float sum = 0.0f;
      if (own[r] < own_limit && index[j] < limit)
        for (int c = 0; c < width; c++) sum += resident[(size_t)own[r] * width + c] * streamed[(size_t)index[j] * width + c];
      x[r][j] = sum;
    }
}

template <int GROUP, int STILES, int OTILES>
struct Mma {
  static const int BM = 128 / GROUP, BN = 8 * STILES, STR = 2 * STILES;

  // This warp's place.
  int lane, team, g, begin, end, stride;
  __nv_bfloat16 *resident, *streamed;  // (BM, stride), (2, BN, stride)
  float4* partial;                     // (8 warps, STILES, 32 lanes)

  __device__ __forceinline__ void start(unsigned char* shared, int width) {
    int warp = threadIdx.x / 32, padded = ceil_div(width, 16) * 16, part = ceil_div(padded, 16 * GROUP) * 16;
    lane = threadIdx.x % 32, team = warp / GROUP, g = warp % GROUP;
    begin = min(padded, g * part), end = min(padded, begin + part), stride = padded + 8;
    resident = reinterpret_cast<__nv_bfloat16*>(shared);
    streamed = resident + BM * stride;
    partial = reinterpret_cast<float4*>(streamed + 2 * BN * stride);
  }

  // This warp's part of S: rows lane/4 and lane/4 + 8, columns 8·tile + 2·(lane%4) and the next.
  __device__ __forceinline__ void dot_products(const __nv_bfloat16* tile, float (&s)[STILES][4]) {
#pragma unroll
    for (int n = 0; n < STILES; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    const __nv_bfloat16* a_row = resident + (team * 16 + lane % 16) * stride + lane / 16 * 8;
    const __nv_bfloat16* b_row = tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
    for (int k = begin; k < end; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, a_row + k);
#pragma unroll
      for (int n = 0; n < STILES; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, b_row + n * 8 * stride + k);
        uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_bf16(s[n], a, low);
        mma_bf16(s[n + 1], a, high);
      }
    }
  }

  // S of the team from the parts of its warps. All threads of the block call it.
  __device__ __forceinline__ void add_parts(float (&s)[STILES][4]) {
    if (GROUP == 1) return;
    int warp = threadIdx.x / 32;
#pragma unroll
    for (int n = 0; n < STILES; n++)
      partial[(warp * STILES + n) * 32 + lane] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < STILES; n++) {
      float4 sum = partial[(team * GROUP * STILES + n) * 32 + lane];
#pragma unroll
      for (int other = 1; other < GROUP; other++) {
        float4 part = partial[((team * GROUP + other) * STILES + n) * 32 + lane];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      s[n][0] = sum.x, s[n][1] = sum.y, s[n][2] = sum.z, s[n][3] = sum.w;
    }
  }

  // o += W · tile[:, begin..end).
  __device__ __forceinline__ void weighted_rows(const __nv_bfloat16* tile, const float (&x)[2][STR], float (&o)[OTILES][4]) {
    const __nv_bfloat16* row = tile + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < STILES / 2; k++) {
      uint32_t a[4] = {pack_bf16(x[0][4 * k], x[0][4 * k + 1]), pack_bf16(x[1][4 * k], x[1][4 * k + 1]),
                       pack_bf16(x[0][4 * k + 2], x[0][4 * k + 3]), pack_bf16(x[1][4 * k + 2], x[1][4 * k + 3])};
#pragma unroll
      for (int n = 0; n < OTILES; n += 2) {
        int d = begin + n * 8;
        if (d >= end) break;
        uint32_t b[4];
        ldmatrix_x4_trans(b, row + k * 16 * stride + d);
        uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_bf16(o[n], a, low);
        mma_bf16(o[n + 1], a, high);
      }
    }
  }

  __device__ __forceinline__ void indices(int tile, int (&index)[STR]) {
#pragma unroll
    for (int j = 0; j < STR; j++) index[j] = tile + j / 2 * 8 + lane % 4 * 2 + j % 2;
  }
  // S as (own row, streamed index).
  __device__ __forceinline__ void spread(const float (&s)[STILES][4], float (&x)[2][STR]) {
#pragma unroll
    for (int j = 0; j < STR; j++) x[0][j] = s[j / 2][j % 2], x[1][j] = s[j / 2][2 + j % 2];
  }
};

// As in prototype_loss_fma.cuh.
template <int GROUP, int STILES, int OTILES>
DEVICE void stream_columns(const Problem& p, float* stats, float* o_out) {
  typedef Mma<GROUP, STILES, OTILES> M;
  DYNAMIC_SHARED(unsigned char, shared);
  const SoftmaxCall& call = p.call;
  M m;
  m.start(shared, call.width);
  int first = blockIdx.x * M::BM, split = blockIdx.y;
  int from = split * call.tiles_per_split * M::BN, until = min(call.columns, from + call.tiles_per_split * M::BN);
  int own[2] = {first + m.team * 16 + m.lane / 4, first + m.team * 16 + m.lane / 4 + 8};
  bool idle = first + m.team * 16 >= call.rows;
  RowState<2> state;
  start_rows(p, own, state);
  float o[OTILES][4] = {};

  load_tile<false>(p, m.resident, m.stride, p.z, first, call.rows, M::BM);
  load_tile<false>(p, m.streamed, m.stride, p.column, from, call.columns, M::BN);
  cp_async_commit();
  for (int tile = from, turn = 0; tile < until; tile += M::BN, turn ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there for all, and the other buffer and the parts are free
    if (tile + M::BN < until)
      load_tile<false>(p, m.streamed + (turn ^ 1) * M::BN * m.stride, m.stride, p.column, tile + M::BN, call.columns, M::BN);
    cp_async_commit();
    const __nv_bfloat16* now = m.streamed + turn * M::BN * m.stride;
    float s[STILES][4];
    if (!idle) m.dot_products(now, s);
    m.add_parts(s);
    if (idle) continue;
    float x[2][M::STR], shrink[2];
    int column[M::STR];
    m.spread(s, x);
    m.indices(tile, column);
    if (p.lse) {
      float teacher[2][M::STR] = {};
      if (p.teacher_z) teacher_dots(p, p.teacher_z, own, call.rows, p.teacher_column, column, call.columns, teacher);
      against_lse(p, column, teacher, x, state);
    } else {
      online<4>(p, column, x, state, shrink);
#pragma unroll
      for (int n = 0; n < OTILES; n++)
        o[n][0] *= shrink[0], o[n][1] *= shrink[0], o[n][2] *= shrink[1], o[n][3] *= shrink[1];
    }
    if (o_out) m.weighted_rows(now, x, o);
  }
  if (idle) return;

#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = lane_sum<4>(state.sum[r]), rounded = lane_sum<4>(state.rounded_sum[r]), target = lane_sum<4>(state.target[r]);
    if (own[r] >= call.rows) continue;
    if (m.lane % 4 == 0 && m.g == 0)
      store16(stats + ((size_t)split * call.rows + own[r]) * 4, make_float4(state.max[r], sum, rounded, target));
    if (!o_out) continue;
    float* to = o_out + ((size_t)split * call.rows + own[r]) * call.width;
#pragma unroll
    for (int n = 0; n < OTILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int d = m.begin + n * 8 + m.lane % 4 * 2 + i;
        if (d < min(m.end, call.width)) to[d] = o[n][r * 2 + i];
      }
  }
}

template <int GROUP, int STILES, int OTILES>
DEVICE void stream_rows(const Problem& p, float* dcolumn, float* sums, int add, int bias_slot, int scale_slot, int slots) {
  typedef Mma<GROUP, STILES, OTILES> M;
  DYNAMIC_SHARED(unsigned char, shared);
  const SoftmaxCall& call = p.call;
  M m;
  m.start(shared, call.width);
  int first = blockIdx.x * M::BM, split = blockIdx.y;
  int from = split * call.tiles_per_split * M::BN, until = min(call.rows, from + call.tiles_per_split * M::BN);
  int own[2] = {first + m.team * 16 + m.lane / 4, first + m.team * 16 + m.lane / 4 + 8};
  bool idle = first + m.team * 16 >= call.columns;
  ColumnState<2> state;
  start_columns(p, own, state);
  float o[OTILES][4] = {};

  load_tile<false>(p, m.resident, m.stride, p.column, first, call.columns, M::BM);
  load_tile<true>(p, m.streamed, m.stride, p.z, from, call.rows, M::BN);
  cp_async_commit();
  for (int tile = from, turn = 0; tile < until; tile += M::BN, turn ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + M::BN < until)
      load_tile<true>(p, m.streamed + (turn ^ 1) * M::BN * m.stride, m.stride, p.z, tile + M::BN, call.rows, M::BN);
    cp_async_commit();
    const __nv_bfloat16* now = m.streamed + turn * M::BN * m.stride;
    float s[STILES][4];
    if (!idle) m.dot_products(now, s);
    m.add_parts(s);
    if (idle) continue;
    float x[2][M::STR], teacher[2][M::STR] = {};
    int index[M::STR];
    m.spread(s, x);
    m.indices(tile, index);
    if (p.teacher_z) teacher_dots(p, p.teacher_column, own, call.columns, p.teacher_z, index, call.rows, teacher);
    column_gradient(p, index, teacher, x, state);
    m.weighted_rows(now, x, o);
  }
  if (idle) return;

#pragma unroll
  for (int r = 0; r < 2; r++) {
    float bias = lane_sum<4>(state.bias[r]), scale_sum = lane_sum<4>(state.scale[r]);
    if (own[r] >= call.columns) continue;
    if (sums && m.lane % 4 == 0 && m.g == 0) {
      float* to = sums + (size_t)split * slots * call.columns + own[r];
      if (bias_slot >= 0) to[(size_t)bias_slot * call.columns] = bias;
      if (scale_slot >= 0) to[(size_t)scale_slot * call.columns] = scale_sum;
    }
    float scale = state.column[r].scale;
    float* to = dcolumn + ((size_t)(add ? 0 : split) * call.columns + own[r]) * call.width;
#pragma unroll
    for (int n = 0; n < OTILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int d = m.begin + n * 8 + m.lane % 4 * 2 + i;
        if (d < min(m.end, call.width)) to[d] = (add ? to[d] : 0.0f) + scale * o[n][r * 2 + i];
      }
  }
}
