// anchor.cu: how far unit rows have moved from where they were, and the pull back.
//
//   loss_i = 1 - z_i · z⁰_i,   dz_i -= scale · z⁰_i
//
// Both in one pass over z⁰: a warp owns a row, a lane every 32nd pack of 8 elements.
//
// Bytes: 12·N·D in (z, z⁰, dz), 4·N·D out. 4 FLOPs an element: bound by memory. No shared memory.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) anchor(
    const float* z,   // (N, D)
    const float* z0,  // (N, D)
    float* loss,      // (N)
    float* dz,        // (N, D) +=
    float scale, int rows, int width) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  bool whole = width % PACK == 0;
  size_t start = (size_t)row * width;
  float dot = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack x = load_pack(z + start + c, count, whole), x0 = load_pack(z0 + start + c, count, whole);
    Pack d = load_pack(dz + start + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      dot += x.v[i] * x0.v[i];
      d.v[i] -= scale * x0.v[i];
    }
    store_pack(dz + start + c, d, count, whole);
  }
  dot = warp_sum(dot);
  if (lane == 0) loss[row] = 1.0f - dot;
}
