// prototype_loss_wgmma.cuh: the loop of the streaming softmax loss on Hopper, D ≤ 256: tensor copies, mbarriers, wgmma.
//
// A block of three warpgroups keeps 128 rows of one operand and walks over the other in tiles of 64 rows, four of them on their way.
//
//   producer, warp 0    one thread: boxes of (64, 64) to the stage that is free, 128-byte swizzle, zeros beyond the matrix
//             warp 1    what softmax needs of each streamed index (16 bytes), and in the second pass zeros over rows that take
//                       no part, whatever they hold: their weight is 0, and 0 · NaN is NaN
//   consumers           64 resident rows each:  S (64, 64) = resident · streamedᵀ     both operands in shared memory
//                                               W = softmax and target made of S      registers, rounded to bf16
//                                               O (64, D) += W · streamed             W from registers, the tile TRANSPOSED
//
//   tensor cores  | S0 | S1  O0 | S2  O1 | S3  O2 |       S of the next tile and O of this one are issued together;
//   consumer      |    W0 |    W1 |    W2 |    W3 |       W is made of S while O runs, and the other warpgroup fills the rest
//
//   landed[s]   1 arrival and the bytes of a tile      producer to consumers (and to warp 1)
//   ready[s]    32 arrivals: warp 1                    parameters are there, dead rows are zero
//   vacant[s]   8 arrivals: a lane of each consumer warp, behind the products that read the stage
//
// Shared memory: resident 128·D'·2, four stages of 64·D'·2, D' = 128 or 256 in tiles of 64 columns; parameters; barriers: 196 KB at
// D' = 256. Registers: O 32·D'/64, S 32, W twice 16; 232 for consumers, 40 for the producer: 504 of 512 a lane.
//
// Per tile and block at D' = 256, in clocks of an SM: products 2·2·128·64·256 / 4096 = 2048. Shared memory at 128 B a clock: S reads
// both operands, 2·(32 + 32) KB; O one, 2·32 KB; the copy writes 32 KB: 1792. From the second-level cache 32 KB: 16 B a clock.
// W: 8192 elements of some 12 instructions at 128 a clock: 768, exponentials at 16 a clock 512, both beside the products.
#pragma once
#include "prototype_loss_weights.cuh"

#define RESIDENT 128  // rows of a block
#define OWN 64        // rows of a consumer
#define STREAMED 64   // rows of a streamed tile
#define NTILES (STREAMED / 8)
#define STAGES 4
#define LOSS_THREADS 384

// Bytes of 64 columns of a tile.
#define RESIDENT_BYTES (RESIDENT * 128)
#define STREAMED_BYTES (STREAMED * 128)

// A block's shared memory; TILES: 64-column tiles of D'.
template <int TILES>
struct Stage {
  static const int BYTES = TILES * STREAMED_BYTES;
  unsigned char *resident, *streamed;
  float* parameter;
  Mbarrier *landed, *ready, *vacant, *resident_landed;

  __device__ __forceinline__ explicit Stage(unsigned char* shared) {
    resident = shared;
    streamed = resident + TILES * RESIDENT_BYTES;
    parameter = reinterpret_cast<float*>(streamed + STAGES * BYTES);
    landed = reinterpret_cast<Mbarrier*>(parameter + STAGES * PARAMETERS * STREAMED);
    ready = landed + STAGES, vacant = ready + STAGES, resident_landed = vacant + STAGES;
  }
  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < STAGES; s++) {
        mbarrier_init(landed + s, 1);
        mbarrier_init(ready + s, 32);
        mbarrier_init(vacant + s, 8);
      }
      mbarrier_init(resident_landed, 1);
      mbarrier_init_fence();
    }
    __syncthreads();
  }
  __device__ __forceinline__ unsigned char* tile(int stage) const { return streamed + stage * BYTES; }
  __device__ __forceinline__ float* parameters(int stage) const { return parameter + stage * PARAMETERS * STREAMED; }

  // One thread: the resident rows from `first`, then `count` tiles from row `from` on.
  __device__ __forceinline__ void copy(const TensorMap* residents, int first, const TensorMap* streams, int from, int count) const {
    mbarrier_arrive_expect(resident_landed, TILES * RESIDENT_BYTES);
#pragma unroll
    for (int c = 0; c < TILES; c++) tma_load(resident + c * RESIDENT_BYTES, residents, first, c * 64, resident_landed);
    for (int t = 0; t < count; t++) {
      int s = t % STAGES;
      mbarrier_wait(vacant + s, (t / STAGES & 1) ^ 1);
      mbarrier_arrive_expect(landed + s, BYTES);
#pragma unroll
      for (int c = 0; c < TILES; c++)
        tma_load(tile(s) + c * STREAMED_BYTES, streams, from + t * STREAMED, c * 64, landed + s);
    }
  }
};

// S (64, 64) = own rows · tileᵀ. Descriptors of the first elements; others are so many 16-byte units away, which never carry out of
// the address field.
template <int TILES>
DEVICE void logit_products(float (&s)[NTILES][4], uint64_t own, uint64_t tile) {
#pragma unroll
  for (int c = 0; c < TILES; c++)
#pragma unroll
    for (int k = 0; k < 4; k++)
      wgmma_shared<false, false>(s, own + (c * RESIDENT_BYTES + k * 32) / 16, tile + (c * STREAMED_BYTES + k * 32) / 16, c + k > 0);
}

// O (64, D') += W (64, 64) · tile, TRANSPOSED. Halves of 128 columns.
template <int TILES>
DEVICE void weighted_rows(float (&o)[TILES / 2][16][4], const uint32_t (&w)[NTILES / 2][4], uint64_t tile) {
#pragma unroll
  for (int k = 0; k < NTILES / 2; k++)
#pragma unroll
    for (int h = 0; h < TILES / 2; h++) wgmma_fragment<true>(o[h], w[k], tile + (2 * h * STREAMED_BYTES + k * 2048) / 16, 1);
}

template <int HALVES>
DEVICE void hold(float (&o)[HALVES][16][4]) {
#pragma unroll
  for (int h = 0; h < HALVES; h++) wgmma_hold(o[h]);
}

// Weights, rounded to bf16 already, as fragments. Their registers are written behind the wait for the products that read them before:
// a write between issue and wait makes ptxas serialize the products.
DEVICE void fragments(const float (&s)[NTILES][4], uint32_t (&w)[NTILES / 2][4]) {
#pragma unroll
  for (int n = 0; n < NTILES; n++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      w[n / 2][n % 2 * 2 + r] = __byte_perm(__float_as_uint(s[n][2 * r]), __float_as_uint(s[n][2 * r + 1]), 0x7632);
}

// The loop of one consumer. `make(s, stage, t)` turns the dot products of tile t into weights rounded to bf16; `rescale(o)` is
// called before those weights are used, with no product under way.
template <int TILES, class Make, class Rescale>
DEVICE void consume(const Stage<TILES>& stage, int group, int count, float (&o)[TILES / 2][16][4], Make make,
                    Rescale rescale) {
  // One descriptor serves both products: `leading` is read of TRANSPOSED operands alone.
  uint64_t own = shared_matrix(stage.resident + group * OWN * 128), first = shared_matrix(stage.streamed, STREAMED_BYTES);
  float s[NTILES][4] = {};
  uint32_t w[NTILES / 2][4];
  bool leader = threadIdx.x % 32 == 0;
  mbarrier_wait(stage.resident_landed, 0);
  mbarrier_wait(stage.landed, 0);
  mbarrier_wait(stage.ready, 0);
  wgmma_hold(s);
  wgmma_fence();
  logit_products<TILES>(s, own, first);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(s);
  make(s, 0, 0);
  fragments(s, w);
  for (int t = 1; t < count; t++) {
    int now = t % STAGES, before = (t - 1) % STAGES;
    mbarrier_wait(stage.landed + now, t / STAGES & 1);
    mbarrier_wait(stage.ready + now, t / STAGES & 1);
    wgmma_hold(s);
    hold(o);
    wgmma_fence();
    logit_products<TILES>(s, own, first + now * (Stage<TILES>::BYTES / 16));
    wgmma_commit();
    weighted_rows<TILES>(o, w, first + before * (Stage<TILES>::BYTES / 16));
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_hold(s);
    make(s, now, t);
    wgmma_wait<0>();
    hold(o);
    if (leader) mbarrier_arrive(stage.vacant + before);
    rescale(o);
    fragments(s, w);
  }
  hold(o);
  wgmma_fence();
  weighted_rows<TILES>(o, w, first + (count - 1) % STAGES * (Stage<TILES>::BYTES / 16));
  wgmma_commit();
  wgmma_wait<0>();
  hold(o);
}
