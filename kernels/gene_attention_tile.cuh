// gene_attention_tile.cuh: the two matrix products that attention is made of, forward and backward.
//
//   products     s (16, T) = A (16, K) · B (T, K)ᵀ       rows of A are the warp's own, rows of B those of the visited tile
//   accumulate   o (16, K) += P (16, T) · B (T, K)       P is what became of s, in the registers that s is in
//
// bf16: mma.sync m16n8k16 on fragments that ldmatrix takes from shared memory; P is rounded to bf16 on the way, and the
// accumulator fragment of s is, pair by pair, the A fragment that the second product wants. f32: FMA, in the same fragment
// layout, so that softmax, masks and dropout are written once for both; P goes through a strip of shared memory, since a lane
// needs all of its row.
//
// Rows of shared memory are 16 bytes longer than K elements: eight consecutive rows then start in eight different groups of
// four banks, which is what ldmatrix and the float4 loads of the f32 form ask for.
#pragma once
#include "gene_attention_problem.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = 16 * WARPS;  // of a block

template <int K>
struct Tile {
  static_assert(K % 16 == 0, "head width");
  static constexpr int STRIDE = K + 16 / (int)sizeof(act_t);
  // T: rows of a visited tile, so that one is at most 8 KiB. bf16: 64, 64, 32 for K = 32, 64, 128; f32: 64, 32, 16.
  static constexpr int VISITED = 8192 / (K * (int)sizeof(act_t)) < 64 ? 8192 / (K * (int)sizeof(act_t)) : 64;
  // Elements of one of them.
  static constexpr int ELEMENTS = VISITED * STRIDE;
  // Floats of a warp's strip for P.
  static constexpr int STRIP = 16 * (VISITED + 4);
};

#if defined(ACT_BF16)

// A: 16 rows of shared memory. HELD: all its fragments stay in registers, K / 4 of them; else they are read at every use.
template <int K, bool HELD>
struct Operand {
  const act_t* at;
  uint32_t fragment[HELD ? K / 16 : 1][4];
  __device__ __forceinline__ explicit Operand(const act_t* rows) {
    int lane = threadIdx.x % 32;
    at = rows + lane % 16 * Tile<K>::STRIDE + lane / 16 * 8;
    if (HELD)
#pragma unroll
      for (int k = 0; k < K / 16; k++) ldmatrix_x4(fragment[HELD ? k : 0], at + k * 16);
  }
  __device__ __forceinline__ const uint32_t (&operator[](int k))[4] {
    if (!HELD) ldmatrix_x4(fragment[0], at + k * 16);
    return fragment[HELD ? k : 0];
  }
};

// `valid`: rows of B that exist; further ones are read up to a multiple of 16.
template <int K, int T, bool HELD>
DEVICE void products(float (&s)[T / 8][4], Operand<K, HELD>& a, const act_t* b, int valid) {
  int lane = threadIdx.x % 32;
  const act_t* at = b + (lane / 16 * 8 + lane % 8) * Tile<K>::STRIDE + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < T / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0.0f;
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    const uint32_t(&left)[4] = a[k];
#pragma unroll
    for (int n = 0; n < T / 8; n += 2)
      if (n * 8 < valid) {
        uint32_t f[4];
        ldmatrix_x4(f, at + n * 8 * Tile<K>::STRIDE + k * 16);
        const uint32_t low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
        mma_bf16(s[n], left, low);
        mma_bf16(s[n + 1], left, high);
      }
  }
}

template <int K, int T>
DEVICE void accumulate(float (&o)[K / 8][4], const float (&p)[T / 8][4], const act_t* b, int valid, float*) {
  int lane = threadIdx.x % 32;
  const act_t* at = b + lane % 16 * Tile<K>::STRIDE + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < T / 16; k++)
    if (k * 16 < valid) {
      const uint32_t left[4] = {pack_bf16(p[2 * k][0], p[2 * k][1]), pack_bf16(p[2 * k][2], p[2 * k][3]),
                                pack_bf16(p[2 * k + 1][0], p[2 * k + 1][1]), pack_bf16(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < K / 8; n += 2) {
        uint32_t f[4];
        ldmatrix_x4_trans(f, at + k * 16 * Tile<K>::STRIDE + n * 8);
        const uint32_t low[2] = {f[0], f[1]}, high[2] = {f[2], f[3]};
        mma_bf16(o[n], left, low);
        mma_bf16(o[n + 1], left, high);
      }
    }
}

#else

template <int K, bool HELD>
struct Operand {
  const float* at;
  __device__ __forceinline__ explicit Operand(const float* rows) : at(rows + fragment_row(0) * Tile<K>::STRIDE) {}
};

DEVICE float dot4(float4 a, float4 b, float sum) {
  return __fmaf_rn(a.w, b.w, __fmaf_rn(a.z, b.z, __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, sum))));
}

template <int K, int T, bool HELD>
DEVICE void products(float (&s)[T / 8][4], const Operand<K, HELD>& a, const float* b, int valid) {
  constexpr int STRIDE = Tile<K>::STRIDE;
  const float* at = b + fragment_column(0, 0) * STRIDE;
#pragma unroll
  for (int n = 0; n < T / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0.0f;
#pragma unroll 2
  for (int k = 0; k < K; k += 4) {
    float4 upper = load16<float4>(a.at + k), lower = load16<float4>(a.at + 8 * STRIDE + k);
#pragma unroll
    for (int n = 0; n < T / 8; n++)
      if (n / 2 * 16 < valid) {
        float4 left = load16<float4>(at + n * 8 * STRIDE + k), right = load16<float4>(at + (n * 8 + 1) * STRIDE + k);
        s[n][0] = dot4(upper, left, s[n][0]);
        s[n][1] = dot4(upper, right, s[n][1]);
        s[n][2] = dot4(lower, left, s[n][2]);
        s[n][3] = dot4(lower, right, s[n][3]);
      }
  }
}

template <int K, int T>
DEVICE void accumulate(float (&o)[K / 8][4], const float (&p)[T / 8][4], const float* b, int valid, float* strip) {
  constexpr int STRIDE = Tile<K>::STRIDE, WIDTH = Tile<K>::VISITED + 4;
  __syncwarp();  // the last product has been read out of the strip
#pragma unroll
  for (int n = 0; n < T / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) strip[fragment_row(e) * WIDTH + fragment_column(n, e)] = p[n][e];
  __syncwarp();
  const float* row = strip + fragment_row(0) * WIDTH;
  const float* at = b + fragment_column(0, 0);
  for (int j = 0; j < valid; j++) {
    float upper = row[j], lower = row[8 * WIDTH + j];
#pragma unroll
    for (int n = 0; n < K / 8; n++) {
      float2 x = *reinterpret_cast<const float2*>(at + j * STRIDE + n * 8);
      o[n][0] = __fmaf_rn(upper, x.x, o[n][0]);
      o[n][1] = __fmaf_rn(upper, x.y, o[n][1]);
      o[n][2] = __fmaf_rn(lower, x.x, o[n][2]);
      o[n][3] = __fmaf_rn(lower, x.y, o[n][3]);
    }
  }
}

#endif

// The warp's 16 rows of results, times a factor per row half, to rows `token` of `out` of `stride` elements; the first `valid`
// exist. `slab`: the warp's own 16 rows of shared memory, whose content is no longer needed; through it stores are 16 bytes.
template <int K>
DEVICE void store_rows(const float (&o)[K / 8][4], const float (&factor)[2], act_t* slab, const int* token, int valid,
                       act_t* out, int stride) {
  constexpr int CHUNK = 16 / sizeof(act_t), CHUNKS = K / CHUNK, STRIDE = Tile<K>::STRIDE;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < K / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      slab[fragment_row(e) * STRIDE + fragment_column(n, e)] = from_float<act_t>(o[n][e] * factor[e / 2]);
  __syncwarp();
  for (int i = threadIdx.x % 32; i < 16 * CHUNKS; i += 32) {
    int row = i / CHUNKS, column = i % CHUNKS * CHUNK;
    if (row < valid) store16(out + (size_t)token[row] * stride + column, load16<uint4>(slab + row * STRIDE + column));
  }
}
