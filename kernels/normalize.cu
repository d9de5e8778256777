// normalize.cu: rows centred and scaled to unit length, and the gradient through it.
//
//   z  = (h - center) · r,   r = 1 / sqrt(max(‖h - center‖², 1e-24))
//   dh = r · (dz - (dz · z) z)                                          set, or added
//
// A warp owns a row and a lane every 32nd pack of 8 elements, in both passes over it; the second pass finds the row in the
// first-level cache, so nothing is staged. A square that overflows gives r = NaN: it must not pass for a row of zeros.
//
// Bytes: forward 4·N·D in and out = 8·N·D; backward 8·N·D in, 4·N·D out (and in, when added). 5 and 7 FLOPs an element: bound
// by memory. No shared memory.
#include "common.cuh"

// A warp's row of this launch.
DEVICE int warp_row() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

extern "C" __global__ void __launch_bounds__(256) normalize_forward(
    const float* h,                // (N, D)
    const float* OPTIONAL center,  // (D)
    float* z,                      // (N, D)
    float* inverse_norm,           // (N)
    int rows, int width) {
  int row = warp_row(), lane = threadIdx.x % 32;
  if (row >= rows) return;
  bool whole = width % PACK == 0;
  size_t start = (size_t)row * width;

  float squares = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack x = load_pack(h + start + c, count, whole);
    if (center) {
      Pack m = load_pack(center + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) x.v[i] -= m.v[i];
    }
#pragma unroll
    for (int i = 0; i < PACK; i++) squares += x.v[i] * x.v[i];
  }
  squares = warp_sum(squares);
  float r = 1.0f / sqrtf(fmaxf(squares, 1e-24f));
  if (!(squares < INFINITY)) r = NAN;

  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack x = load_pack(h + start + c, count, whole);
    if (center) {
      Pack m = load_pack(center + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) x.v[i] -= m.v[i];
    }
#pragma unroll
    for (int i = 0; i < PACK; i++) x.v[i] *= r;
    store_pack(z + start + c, x, count, whole);
  }
  if (lane == 0) inverse_norm[row] = r;
}

extern "C" __global__ void __launch_bounds__(256) normalize_backward(
    const float* dz,            // (N, D)
    const float* z,             // (N, D)
    const float* inverse_norm,  // (N)
    float* dh,                  // (N, D)
    int accumulate, int rows, int width) {
  int row = warp_row(), lane = threadIdx.x % 32;
  if (row >= rows) return;
  bool whole = width % PACK == 0;
  size_t start = (size_t)row * width;

  float dot = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack d = load_pack(dz + start + c, count, whole), x = load_pack(z + start + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) dot += d.v[i] * x.v[i];
  }
  dot = warp_sum(dot);
  float r = inverse_norm[row];

  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack d = load_pack(dz + start + c, count, whole), x = load_pack(z + start + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) d.v[i] = r * (d.v[i] - dot * x.v[i]);
    if (accumulate) {
      Pack before = load_pack(dh + start + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) d.v[i] += before.v[i];
    }
    store_pack(dh + start + c, d, count, whole);
  }
}
