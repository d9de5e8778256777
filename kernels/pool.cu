// pool.cu: cell vectors from token rows, and their gradients back.
//
//   cls :  h_c = x[cell_start[c]]
//   mean:  h_c = mean of x[t],  cell_start[c] + prefix ≤ t < cell_start[c+1] - suffix;  of all t where that leaves none
//   dx_t = dh_c / (number of the cell's tokens) for those tokens, 0 for the others
//
// Forward: a block owns a cell and 256 columns; its 8 warps take the tokens in turn, a lane holds 8 columns in registers, and
// the warps are added up in order through shared memory. Backward: a warp owns a token and finds its cell by bisection.
//
// Bytes at activation size a: forward N·D·a in (cls: C·D·a), 4·C·D out; backward 4·C·D in, N·D·a out. One FLOP an element:
// bound by memory.
#include "common.cuh"

#define WARPS 8

// The tokens that make a cell.
struct Members {
  int first, end;
};
DEVICE Members members(const unsigned* cell_start, int cell, int mean, int prefix, int suffix) {
  int first = (int)cell_start[cell], end = (int)cell_start[cell + 1];
  if (!mean) return Members{first, first + 1};
  return first + prefix + suffix < end ? Members{first + prefix, end - suffix} : Members{first, end};
}

extern "C" __global__ void __launch_bounds__(256) pool_forward(
    const act_t* x,              // (N, D)
    const unsigned* cell_start,  // (C + 1)
    float* h,                    // (C, D)
    int mean, int prefix, int suffix, int width) {
  SHARED(float, sums, [WARPS][32 * PACK]);
  int cell = blockIdx.x, first_column = blockIdx.y * 32 * PACK;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = first_column + lane * PACK;
  bool whole = width % PACK == 0;
  Members tokens = members(cell_start, cell, mean, prefix, suffix);
  Pack sum = {};
  if (c < width) {
    int count = min(PACK, width - c);
#pragma unroll 4
    for (int t = tokens.first + warp; t < tokens.end; t += WARPS) {
      Pack row = load_pack(x + (size_t)t * width + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) sum.v[i] += row.v[i];
    }
  }
  store_pack(&sums[warp][lane * PACK], sum);
  __syncthreads();
  c = first_column + threadIdx.x;
  if (c >= width) return;
  float total = 0.0f;
  for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
  h[(size_t)cell * width + c] = total / (tokens.end - tokens.first);
}

extern "C" __global__ void __launch_bounds__(256) pool_backward(
    const float* dh,             // (C, D)
    const unsigned* cell_start,  // (C + 1)
    act_t* dx,                   // (N, D)
    int tokens, int cells, int mean, int prefix, int suffix, int width) {
  int lane = threadIdx.x % 32, t = blockIdx.x * WARPS + threadIdx.x / 32;
  if (t >= tokens) return;
  // The last cell that starts at or before the token: cells 0 to `low` do.
  int low = 0, high = cells;
  while (low + 1 < high) {
    int middle = (low + high) / 2;
    if ((int)cell_start[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  Members m = cells > 0 ? members(cell_start, low, mean, prefix, suffix) : Members{0, 0};
  bool inside = m.first <= t && t < m.end, whole = width % PACK == 0;
  float scale = inside ? 1.0f / (m.end - m.first) : 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack d = {};
    if (inside) d = load_pack(dh + (size_t)low * width + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) d.v[i] *= scale;
    store_pack(dx + (size_t)t * width + c, d, count, whole);
  }
}
