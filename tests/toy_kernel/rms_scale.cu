// rms_scale.cu: each row divided by its root mean square, times a weight per column. The example of docs/kernels.md: compiled
// for the tests alone.
//
//   y = x · weight / sqrt(mean_D(x²) + eps)
//
// A warp owns a row and a lane every 32nd pack of 8 elements of it. The row is read twice; the second time it comes from the
// first-level cache.
//
// Bytes at activation size a: 2·N·D·a, and D·a of weights. 4 FLOPs an element: bound by memory.
#include "common.cuh"

#define WARPS 4

extern "C" __global__ void __launch_bounds__(32 * WARPS) rms_scale(
    const act_t* x,                // (N, D)
    const act_t* OPTIONAL weight,  // (D)
    act_t* y,                      // (N, D)
    int rows, int width, float eps) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * WARPS + warp;
  if (row >= rows) return;
  bool whole = width % PACK == 0;
  size_t start = (size_t)row * width;

  float squares = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    Pack p = load_pack(x + start + c, min(PACK, width - c), whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) squares += p.v[i] * p.v[i];
  }
  float factor = 1.0f / sqrtf(warp_sum(squares) / width + eps);

  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack p = load_pack(x + start + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) p.v[i] *= factor;
    if (weight) {
      Pack w = load_pack(weight + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) p.v[i] *= w.v[i];
    }
    store_pack(y + start + c, p, count, whole);
  }
}
