// layernorm.cu: residual + dropout + LayerNorm in one pass, forward and backward.
//
//   sum = residual + dropout(x)                      stored in place of x
//   y   = (sum - mean) · rstd · weight + bias
//
//   g = dy · weight, n = (sum - mean) · rstd
//   dsum = rstd · (g - mean_D(g) - n · mean_D(g·n)),  dresidual = dsum,  dx = dsum · dropout factor · 1[sum > 0 if ReLU]
//   dweight += Σ_rows dy·n,  dbias += Σ_rows dy
//
// A warp owns a row and a lane owns every 32nd pack of 8 elements of it, in all passes over the row: so the row can wait in
// shared memory between passes without a barrier. The variance is that of the centred row, which does not cancel.
// Parameter gradients: a lane's columns are the same in all rows of its warp, so each warp adds up its rows in shared memory,
// the block adds up its warps in order, and reduce_columns (reduce.cu) adds up the blocks in order. No atomics.
//
// Bytes at activation size a (4 or 2), by compulsory traffic: forward N·D·a·(x, residual in; sum, y out) = 4·N·D·a, without
// residual and dropout 2·N·D·a; backward N·D·a·(dy, sum in; dx, dresidual out) = 4·N·D·a and 16·blocks·D of partial sums.
// About 8 (forward) and 13 (backward) FLOPs an element: bound by memory everywhere.
#include "common.cuh"

// Row `row`, pack `c` (first column): how many of its elements exist.
DEVICE int pack_size(int width, int c) { return min(PACK, width - c); }

extern "C" __global__ void __launch_bounds__(256) layernorm_forward(
    const act_t* OPTIONAL residual,  // (N, D)
    const act_t* weight,             // (D)
    const act_t* bias,               // (D)
    act_t* x_then_sum,               // (N, D)
    act_t* y,                        // (N, D)
    float* mean,                     // (N)
    float* rstd,                     // (N)
    Dropout dropout, int rows, int width, float eps) {
  DYNAMIC_SHARED(float, rows_of_block);  // (warps, D rounded up to packs)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int row = blockIdx.x * (blockDim.x / 32) + warp;
  if (row >= rows) return;
  bool whole = width % PACK == 0;
  float* cached = rows_of_block + (size_t)warp * (ceil_div(width, PACK) * PACK);
  size_t start = (size_t)row * width;

  float sum = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = pack_size(width, c);
    Pack s = load_pack(x_then_sum + start + c, count, whole);
    if (dropout.threshold) {
      Pack factor = dropout_pack(dropout, row, width, c);
#pragma unroll
      for (int i = 0; i < PACK; i++) s.v[i] *= factor.v[i];
    }
    if (residual) {
      Pack r = load_pack(residual + start + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) s.v[i] += r.v[i];
    }
    if (residual || dropout.threshold) store_pack(x_then_sum + start + c, s, count, whole);
    store_pack(cached + c, s);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum += s.v[i];
  }
  float m = warp_sum(sum) / width;

  float squares = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    Pack s = load_pack(cached + c);
    int count = pack_size(width, c);
#pragma unroll
    for (int i = 0; i < PACK; i++) squares += i < count ? (s.v[i] - m) * (s.v[i] - m) : 0.0f;
  }
  float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);

  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = pack_size(width, c);
    Pack s = load_pack(cached + c), w = load_pack(weight + c, count, whole), b = load_pack(bias + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) s.v[i] = (s.v[i] - m) * r * w.v[i] + b.v[i];
    store_pack(y + start + c, s, count, whole);
  }
  if (lane == 0) {
    mean[row] = m;
    rstd[row] = r;
  }
}

// Three blocks to an SM: with a fourth, the register budget of 64 spills.
extern "C" __global__ void __launch_bounds__(256, 3) layernorm_backward(
    const act_t* dy,            // (N, D)
    const act_t* sum,           // (N, D)
    const float* mean,          // (N)
    const float* rstd,          // (N)
    const act_t* weight,        // (D)
    act_t* dx,                  // (N, D)
    act_t* OPTIONAL dresidual,  // (N, D)
    float* partial,             // (blocks, 2, D): sums over the block's rows for dweight and dbias
    Dropout dropout, int relu_input, int rows, int rows_per_block, int width) {
  DYNAMIC_SHARED(float, columns);  // (warps, 2, D rounded up to packs)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  bool whole = width % PACK == 0;
  int padded = ceil_div(width, PACK) * PACK;
  float* dweight = columns + (size_t)warp * 2 * padded;
  float* dbias = dweight + padded;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    store_pack(dweight + c, Pack{});
    store_pack(dbias + c, Pack{});
  }

  int first = blockIdx.x * rows_per_block, end = min(rows, first + rows_per_block);
  for (int row = first + warp; row < end; row += warps) {
    size_t start = (size_t)row * width;
    float m = mean[row], r = rstd[row];
    float sum_g = 0.0f, sum_gn = 0.0f;
    for (int c = lane * PACK; c < width; c += 32 * PACK) {
      int count = pack_size(width, c);
      Pack d = load_pack(dy + start + c, count, whole), s = load_pack(sum + start + c, count, whole);
      Pack w = load_pack(weight + c, count, whole), dw = load_pack(dweight + c), db = load_pack(dbias + c);
#pragma unroll
      for (int i = 0; i < PACK; i++) {
        float n = (s.v[i] - m) * r, g = d.v[i] * w.v[i];
        dw.v[i] += d.v[i] * n;
        db.v[i] += d.v[i];
        sum_g += g;
        sum_gn += g * n;
      }
      store_pack(dweight + c, dw);
      store_pack(dbias + c, db);
    }
    float mean_g = warp_sum(sum_g) / width, mean_gn = warp_sum(sum_gn) / width;

    // The row comes again, from the first-level cache.
    for (int c = lane * PACK; c < width; c += 32 * PACK) {
      int count = pack_size(width, c);
      Pack d = load_pack(dy + start + c, count, whole), s = load_pack(sum + start + c, count, whole);
      Pack w = load_pack(weight + c, count, whole), out;
#pragma unroll
      for (int i = 0; i < PACK; i++) {
        float n = (s.v[i] - m) * r;
        out.v[i] = r * (d.v[i] * w.v[i] - mean_g - n * mean_gn);
      }
      if (dresidual) store_pack(dresidual + start + c, out, count, whole);
      if (dropout.threshold) {
        Pack factor = dropout_pack(dropout, row, width, c);
#pragma unroll
        for (int i = 0; i < PACK; i++) out.v[i] *= factor.v[i];
      } else if (relu_input) {
#pragma unroll
        for (int i = 0; i < PACK; i++) out.v[i] = s.v[i] > 0.0f ? out.v[i] : 0.0f;
      }
      store_pack(dx + start + c, out, count, whole);
    }
  }

  __syncthreads();
  // Columns of both sums, warps in order.
  for (int c = threadIdx.x; c < 2 * width; c += blockDim.x) {
    const float* column = columns + (c < width ? c : padded + c - width);
    float total = 0.0f;
    for (int w = 0; w < warps; w++) total += column[(size_t)w * 2 * padded];
    partial[(size_t)blockIdx.x * 2 * width + c] = total;
  }
}
