// prototype_loss_fma.cuh: the tiles of the streaming softmax loss in f32, on the FMA pipes.
//
// 256 threads own BM = 16·RES resident rows and walk over the other operand in tiles of 64.
//
//        streamed (64, D)                S: thread (y, x) of 16 × 16 owns RES × 4 dot products; both operands come through
//       +----------------+                  shared memory in chunks of 16 columns, transposed, two buffers
//       | ...            |               W: online / against_lse / column_gradient, in registers, then (BM, 64) in shared memory
//       +----------------+               O: warp w owns BM/8 rows, lane l columns 4l.. of every 128; W by broadcast, the streamed
//   res +----+  +----------------+          rows by 16-byte loads straight from the caches: 8 warps read each row, one misses
//   (BM)| S  |  |  O (BM, D)     |
//       +----+  +----------------+
//
// Of the 2·BM·64·D FMA of a tile, S needs 2 16-byte loads of shared memory for 4·RES, O (RES = 4) 2 + NJ for 32·NJ.
// O stays in registers: 64 of them for D ≤ 256, 144 for D ≤ 1152.
#pragma once
#include "softmax_problem.cuh"

#define STREAMED 64
#define CHUNK 16
// Strides of 16-byte groups that neither S's stores nor its loads share banks in more than pairs.
#define PAD 4

// 4 consecutive elements, 0 beyond `width`; `whole`: rows start at 16-byte addresses.
DEVICE float4 load_quad(const float* row, int c, int width, bool whole) {
  if (whole) return c < width ? load16<float4>(row + c) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  return make_float4(c < width ? row[c] : 0.0f, c + 1 < width ? row[c + 1] : 0.0f, c + 2 < width ? row[c + 2] : 0.0f,
                     c + 3 < width ? row[c + 3] : 0.0f);
}
DEVICE void store_quad(float* row, int c, int width, bool whole, const float* v) {
  if (whole) {
    if (c < width) store16(row + c, make_float4(v[0], v[1], v[2], v[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (c + i < width) row[c + i] = v[i];
}

template <int BM>
struct Chunks {
  float resident[2][CHUNK][BM + PAD], streamed[2][CHUNK][STREAMED + PAD];
};

// x = resident rows from `first` · streamed rows from `from`, rows beyond the limits as zeros. `turn` counts chunks over all
// calls: consecutive ones lie in different buffers, so one barrier a chunk is enough.
template <int RES>
DEVICE void dot_products(const float* resident, int first, int limit, const float* streamed, int from, int until, int width,
                         Chunks<16 * RES>& chunks, int& turn, float (&x)[RES][4]) {
  const int BM = 16 * RES;
  bool whole = width % 4 == 0;
  int row = threadIdx.x / 4, part = threadIdx.x % 4 * 4, y = threadIdx.x / 16, col = threadIdx.x % 16;
  bool has_a = row < BM && first + row < limit, has_b = from + row < until;
  const float* a_row = resident + (size_t)(has_a ? first + row : 0) * width;
  const float* b_row = streamed + (size_t)(has_b ? from + row : 0) * width;
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int r = 0; r < RES; r++)
#pragma unroll
    for (int j = 0; j < 4; j++) x[r][j] = 0.0f;
  float4 a = has_a ? load_quad(a_row, part, width, whole) : zero, b = has_b ? load_quad(b_row, part, width, whole) : zero;
  for (int c = 0; c < width; c += CHUNK, turn ^= 1) {
    auto& as = chunks.resident[turn];
    auto& bs = chunks.streamed[turn];
    if (row < BM) as[part][row] = a.x, as[part + 1][row] = a.y, as[part + 2][row] = a.z, as[part + 3][row] = a.w;
    bs[part][row] = b.x, bs[part + 1][row] = b.y, bs[part + 2][row] = b.z, bs[part + 3][row] = b.w;
    __syncthreads();
    if (c + CHUNK < width) {  // the next chunk is on its way while this one is used
      a = has_a ? load_quad(a_row, c + CHUNK + part, width, whole) : zero;
      b = has_b ? load_quad(b_row, c + CHUNK + part, width, whole) : zero;
    }
#pragma unroll
    for (int k = 0; k < CHUNK; k++) {
      float4 v = load16<float4>(&bs[k][col * 4]);
#pragma unroll
      for (int r = 0; r < RES; r++) {
        float u = as[k][y * RES + r];
        x[r][0] += u * v.x, x[r][1] += u * v.y, x[r][2] += u * v.z, x[r][3] += u * v.w;
      }
    }
  }
}

// o[r][...] += Σ_n w[own row r][n] · streamed row n. `live` says which streamed rows take part, where some may not.
template <int ROWS, int NJ>
DEVICE void weighted_rows(const float* streamed, int count, int width, const float (*w)[STREAMED + PAD], const int* live,
                          float (&o)[ROWS][NJ * 4]) {
  bool whole = width % 4 == 0;
  int lane = threadIdx.x % 32;
  for (int n = 0; n < count; n += 4) {
    float weight[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float4 v = load16<float4>(&w[r][n]);
      weight[r][0] = v.x, weight[r][1] = v.y, weight[r][2] = v.z, weight[r][3] = v.w;
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (n + q >= count || (live && !live[n + q])) continue;  // a row that takes no part may hold NaN, and 0 · NaN is NaN
      const float* row = streamed + (size_t)(n + q) * width;
#pragma unroll
      for (int j = 0; j < NJ; j++) {
        int c = lane * 4 + 128 * j;
        if (128 * j >= width) break;
        float4 v = load_quad(row, c, width, whole);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          o[r][j * 4] += weight[r][q] * v.x;
          o[r][j * 4 + 1] += weight[r][q] * v.y;
          o[r][j * 4 + 2] += weight[r][q] * v.z;
          o[r][j * 4 + 3] += weight[r][q] * v.w;
        }
      }
    }
  }
}

// Resident rows z, streamed columns. Sets this split's statistics, and its O unless that is absent.
template <int RES, int NJ>
DEVICE void stream_columns(const Problem& p, float* stats, float* o_out) {
  const int BM = 16 * RES, ROWS = BM / 8;
  SHARED(Chunks<BM>, chunk_array, [1]);
  SHARED(float, w, [BM][STREAMED + PAD]);
  SHARED(float, shrunk, [BM]);
  Chunks<BM>& chunks = chunk_array[0];
  const SoftmaxCall& call = p.call;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, y = threadIdx.x / 16, col = threadIdx.x % 16;
  int first = blockIdx.x * BM, split = blockIdx.y, turn = 0;
  int from = split * call.tiles_per_split * STREAMED, until = min(call.columns, from + call.tiles_per_split * STREAMED);
  int own[RES];
#pragma unroll
  for (int r = 0; r < RES; r++) own[r] = first + y * RES + r;
  RowState<RES> state;
  start_rows(p, own, state);
  float o[ROWS][NJ * 4] = {};

  for (int tile = from; tile < until; tile += STREAMED) {
    float x[RES][4], teacher[RES][4] = {}, shrink[RES];
    int column[4] = {tile + col * 4, tile + col * 4 + 1, tile + col * 4 + 2, tile + col * 4 + 3};
    dot_products<RES>((const float*)p.z, first, call.rows, (const float*)p.column, tile, call.columns, call.width, chunks, turn,
                      x);
    if (p.lse) {
      if (p.teacher_z)
        dot_products<RES>(p.teacher_z, first, call.rows, p.teacher_column, tile, call.columns, call.width, chunks, turn,
                          teacher);
      against_lse(p, column, teacher, x, state);
#pragma unroll
      for (int r = 0; r < RES; r++) shrink[r] = 1.0f;
    } else {
      online<16>(p, column, x, state, shrink);
    }
    if (!o_out) continue;
#pragma unroll
    for (int r = 0; r < RES; r++) {
      store16(&w[y * RES + r][col * 4], make_float4(x[r][0], x[r][1], x[r][2], x[r][3]));
      if (col == 0) shrunk[y * RES + r] = shrink[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float f = shrunk[warp * ROWS + r];
#pragma unroll
      for (int j = 0; j < NJ * 4; j++) o[r][j] *= f;
    }
    weighted_rows<ROWS, NJ>((const float*)p.column + (size_t)tile * call.width, min(STREAMED, call.columns - tile), call.width,
                            w + warp * ROWS, nullptr, o);
    // The chunks' barriers stand between these reads of w and the next tile's writes.
  }

#pragma unroll
  for (int r = 0; r < RES; r++) {
    float sum = lane_sum<16>(state.sum[r]), rounded = lane_sum<16>(state.rounded_sum[r]);
    float target = lane_sum<16>(state.target[r]);
    if (col == 0 && own[r] < call.rows)
      store16(stats + ((size_t)split * call.rows + own[r]) * 4, make_float4(state.max[r], sum, rounded, target));
  }
  if (!o_out) return;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    int row = first + warp * ROWS + r;
    if (row >= call.rows) break;
    float* to = o_out + ((size_t)split * call.rows + row) * call.width;
#pragma unroll
    for (int j = 0; j < NJ; j++) store_quad(to, lane * 4 + 128 * j, call.width, call.width % 4 == 0, &o[r][j * 4]);
  }
}

// Resident columns, streamed rows z. Sets this split's part of dcolumn, or adds to it; sets this split's sums.
template <int RES, int NJ>
DEVICE void stream_rows(const Problem& p, float* dcolumn, float* sums, int add, int bias_slot, int scale_slot, int slots) {
  const int BM = 16 * RES, ROWS = BM / 8;
  SHARED(Chunks<BM>, chunk_array, [1]);
  SHARED(float, w, [BM][STREAMED + PAD]);
  SHARED(int, live, [STREAMED]);
  Chunks<BM>& chunks = chunk_array[0];
  const SoftmaxCall& call = p.call;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, y = threadIdx.x / 16, col = threadIdx.x % 16;
  int first = blockIdx.x * BM, split = blockIdx.y, turn = 0;
  int from = split * call.tiles_per_split * STREAMED, until = min(call.rows, from + call.tiles_per_split * STREAMED);
  int own[RES];
#pragma unroll
  for (int r = 0; r < RES; r++) own[r] = first + y * RES + r;
  ColumnState<RES> state;
  start_columns(p, own, state);
  float o[ROWS][NJ * 4] = {};

  for (int tile = from; tile < until; tile += STREAMED) {
    float x[RES][4], teacher[RES][4] = {};
    int index[4] = {tile + col * 4, tile + col * 4 + 1, tile + col * 4 + 2, tile + col * 4 + 3};
    dot_products<RES>((const float*)p.column, first, call.columns, (const float*)p.z, tile, call.rows, call.width, chunks, turn,
                      x);
    if (p.teacher_z)
      dot_products<RES>(p.teacher_column, first, call.columns, p.teacher_z, tile, call.rows, call.width, chunks, turn, teacher);
    column_gradient(p, index, teacher, x, state);
#pragma unroll
    for (int r = 0; r < RES; r++) store16(&w[y * RES + r][col * 4], make_float4(x[r][0], x[r][1], x[r][2], x[r][3]));
    if (threadIdx.x < STREAMED) live[threadIdx.x] = load_row(p, tile + threadIdx.x).weight != 0.0f;
    __syncthreads();
    weighted_rows<ROWS, NJ>((const float*)p.z + (size_t)tile * call.width, min(STREAMED, call.rows - tile), call.width,
                            w + warp * ROWS, live, o);
  }

  if (sums) {
#pragma unroll
    for (int r = 0; r < RES; r++) {
      float bias = lane_sum<16>(state.bias[r]), scale = lane_sum<16>(state.scale[r]);
      if (col != 0 || own[r] >= call.columns) continue;
      float* to = sums + (size_t)split * slots * call.columns + own[r];
      if (bias_slot >= 0) to[(size_t)bias_slot * call.columns] = bias;
      if (scale_slot >= 0) to[(size_t)scale_slot * call.columns] = scale;
    }
  }
  bool whole = call.width % 4 == 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    int k = first + warp * ROWS + r;
    if (k >= call.columns) break;
    float scale = load_column(p, k).scale;
    float* to = dcolumn + ((size_t)(add ? 0 : split) * call.columns + k) * call.width;
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      int c = lane * 4 + 128 * j;
      if (c >= call.width) break;
      float4 before = add ? load_quad(to, c, call.width, whole) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      float sum[4] = {before.x + scale * o[r][j * 4], before.y + scale * o[r][j * 4 + 1], before.z + scale * o[r][j * 4 + 2],
                      before.w + scale * o[r][j * 4 + 3]};
      store_quad(to, c, call.width, whole, sum);
    }
  }
}
