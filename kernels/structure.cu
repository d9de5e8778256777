// structure.cu: cosines between prototypes follow the overlap of their marker sets.
//
//   e_kl   = p_k·p_l - c0 - (c1 - c0) J_kl
//   loss_k = 1/(P(P-1)) Σ_{l≠k} e_kl²,   dp_k += scale · 4/(P(P-1)) Σ_{l≠k} e_kl p_l
//
// A warp owns a prototype: its row and its gradient lie in shared memory, a lane owns every 32nd pack of 8 columns of both, so
// no barrier is needed. The others come four at a time (the warps of a block read the same ones, from the first-level cache):
// four dot products together, then one pass that adds all four to the gradient. Each pair's cosine is computed twice, once
// from either side: sharing it would need a second pass over P² numbers.
//
//              p_l  p_l+1  p_l+2  p_l+3   ->
//   warp 0  k  e    e      e      e            dp_k   += e p_l + e p_l+1 + ...
//   warp 1  k' e    e      e      e            dp_k'  += ...
//
// Bytes: 4·P·D in, 8·P·D for dp, 4·P² of J; re-reads stay in the caches. FLOPs: 4·P²·D. P is at most a few thousand.
// Shared memory: 2 rows of D floats a warp.
#include "common.cuh"

// Other prototypes in flight at once.
#define OTHERS 4

extern "C" __global__ void __launch_bounds__(128) structure(
    const float* p,        // (P, D)
    const float* jaccard,  // (P, P)
    float* loss,           // (P)
    float* dp,             // (P, D) +=
    float c0, float c1, float factor, int prototypes, int width) {
  DYNAMIC_SHARED(float, rows_of_block);  // (warps, 2, D rounded up to packs)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = blockIdx.x * (blockDim.x / 32) + warp;
  if (k >= prototypes) return;
  bool whole = width % PACK == 0;
  int padded = ceil_div(width, PACK) * PACK;
  float* own = rows_of_block + (size_t)warp * 2 * padded;
  float* gradient = own + padded;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    store_pack(own + c, load_pack(p + (size_t)k * width + c, min(PACK, width - c), whole));
    store_pack(gradient + c, Pack{});
  }

  double total = 0.0;
  for (int l = 0; l < prototypes; l += OTHERS) {
    float dot[OTHERS] = {};
    for (int c = lane * PACK; c < width; c += 32 * PACK) {
      Pack mine = load_pack(own + c);
#pragma unroll
      for (int j = 0; j < OTHERS; j++) {
        if (l + j >= prototypes) break;
        Pack other = load_pack(p + (size_t)(l + j) * width + c, min(PACK, width - c), whole);
#pragma unroll
        for (int i = 0; i < PACK; i++) dot[j] += mine.v[i] * other.v[i];
      }
    }
#pragma unroll
    for (int j = 0; j < OTHERS; j++) {
      dot[j] = warp_sum(dot[j]);
      if (l + j >= prototypes || l + j == k) {
        dot[j] = 0.0f;
        continue;
      }
      dot[j] -= c0 + (c1 - c0) * jaccard[(size_t)k * prototypes + l + j];
      total += (double)dot[j] * dot[j];
    }
    for (int c = lane * PACK; c < width; c += 32 * PACK) {
      Pack sum = load_pack(gradient + c);
#pragma unroll
      for (int j = 0; j < OTHERS; j++) {
        if (l + j >= prototypes) break;
        Pack other = load_pack(p + (size_t)(l + j) * width + c, min(PACK, width - c), whole);
#pragma unroll
        for (int i = 0; i < PACK; i++) sum.v[i] += dot[j] * other.v[i];
      }
      store_pack(gradient + c, sum);
    }
  }

  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack d = load_pack(dp + (size_t)k * width + c, count, whole), sum = load_pack(gradient + c);
#pragma unroll
    for (int i = 0; i < PACK; i++) d.v[i] += factor * sum.v[i];
    store_pack(dp + (size_t)k * width + c, d, count, whole);
  }
  if (lane == 0) loss[k] = prototypes > 1 ? (float)(total / ((double)prototypes * (prototypes - 1))) : 0.0f;
}
