// prototype_loss_wide.cuh: the loop of the streaming softmax loss on Hopper for 256 < D ≤ 768.
//
// O (64, D) fills most of the registers, so whoever holds it has none left for a softmax: one warpgroup makes the weights, and two
// others hold 256 columns of O each, or 192 of a half of D, in which case two blocks make the same weights.
//
//   group 0        S (64, BN) = resident · streamedᵀ over all of D; W of S, rounded to bf16, to shared memory, with the factors that O
//                  shrinks by; one thread of it sends for the next tile when the stage is free
//   groups 1, 2    O (64, 8·NO) += W · streamed[:, own columns], both operands in shared memory
//
//   group 0   | S0 | W0 | S1 | W1 | S2 | W2 |          made[s]     128 arrivals: W, factors
//   others    |         | O0      | O1      |          vacant[s]   a lane of each of their warps: tile, W and factors are free
//                                                      landed[s]   1 arrival and the bytes of a tile
//
//            blocks a tile   BN   8·NO   shared memory: residents, two tiles, two W      registers of O
//   D ≤ 512              1   64    256   64 + 2·64 + 2·8 KB and 3 of parameters: 211 KB  128
//   D ≤ 768              2   32    192   96 + 2·48 + 2·8 KB and 2:               210 KB  96
//
// All threads have 168 registers. Three groups of 256 columns do not go: ptxas wants 154 registers for such a product (C7602), and
// 3·160 of a lane's 512 leave 32 for group 0. Two groups of 384 nearly do: from 224 registers on (C7512 below), which leaves 56 for group
// 0; the first pass then spills 56 bytes. That would make S once for D = 768: 1536 clocks of products, 2144 of shared memory.
//
// Per tile and block, in clocks of an SM (products at 4096 FLOP; shared memory at 128 B: S's operands, O's, the copy, W):
//   D = 512   2·2·64·64·512 FLOP: 2048;             (32·4 + 2·4·10 + 64 + 8) KB: 2240;  64 KB from the second-level cache: 29 B a clock
//   D = 768   2·64·32·(768 + 384) FLOP: 1152, twice; (48·3 + 2·2·8 + 48 + 4) KB: 1824;  48 KB: 26 B a clock
// 64 resident rows are what fits, so the second-level cache is as much the limit as shared memory. Blocks of a cluster that own a
// stretch of D each and exchange S would have 128 and no product twice, and reach D = 1152, whose O (64, 1152) no multiprocessor holds.
#pragma once
#include "prototype_loss_weights.cuh"

#define WIDE_RESIDENT 64
#define WIDE_STAGES 2
#define WIDE_THREADS 384
#define WIDE_BYTES (WIDE_RESIDENT * 128)  // of 64 columns of the residents; of W

// TILES: 64-column tiles of D.
template <int TILES, int NT>
struct WideStage {
  static const int BN = 8 * NT, BOX = BN * 128, BYTES = TILES * BOX;
  unsigned char *resident, *streamed, *weights;
  float *parameter, *factors;
  Mbarrier *landed, *made, *vacant, *resident_landed;

  __device__ __forceinline__ explicit WideStage(unsigned char* shared) {
    resident = shared;
    streamed = resident + TILES * WIDE_BYTES;
    weights = streamed + WIDE_STAGES * BYTES;
    parameter = reinterpret_cast<float*>(weights + WIDE_STAGES * WIDE_BYTES);
    factors = parameter + WIDE_STAGES * PARAMETERS * BN;
    landed = reinterpret_cast<Mbarrier*>(factors + WIDE_STAGES * WIDE_RESIDENT);
    made = landed + WIDE_STAGES, vacant = made + WIDE_STAGES, resident_landed = vacant + WIDE_STAGES;
  }
  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < WIDE_STAGES; s++) {
        mbarrier_init(landed + s, 1);
        mbarrier_init(made + s, 128);
        mbarrier_init(vacant + s, 8);
      }
      mbarrier_init(resident_landed, 1);
      mbarrier_init_fence();
    }
    __syncthreads();
  }
  __device__ __forceinline__ unsigned char* tile(int stage) const { return streamed + stage * BYTES; }
  __device__ __forceinline__ float* parameters(int stage) const { return parameter + stage * PARAMETERS * BN; }

  __device__ __forceinline__ void load_resident(const TensorMap* map, int first) const {
    mbarrier_arrive_expect(resident_landed, TILES * WIDE_BYTES);
#pragma unroll 1
    for (int c = 0; c < TILES; c++) tma_load(resident + c * WIDE_BYTES, map, first, c * 64, resident_landed);
  }
  // Tile t to its stage, once that is free.
  __device__ __forceinline__ void load(const TensorMap* map, int from, int t) const {
    int s = t % WIDE_STAGES;
    mbarrier_wait(vacant + s, (t / WIDE_STAGES & 1) ^ 1);
    mbarrier_arrive_expect(landed + s, BYTES);
#pragma unroll 1
    for (int c = 0; c < TILES; c++) tma_load(tile(s) + c * BOX, map, from + t * BN, c * 64, landed + s);
  }
};

// Group 0. `prepare(t, stage)` writes the parameters of tile t; `make(s, t, stage, shrink)` turns dot products into weights rounded to
// bf16 and says what O of its two rows shrinks by.
template <int TILES, int NT, class Prepare, class Make>
DEVICE void make_weights(const WideStage<TILES, NT>& stage, const TensorMap* residents, int first, const TensorMap* streams, int from,
                         int count, Prepare prepare, Make make) {
  typedef WideStage<TILES, NT> W;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    stage.load_resident(residents, first);
    stage.load(streams, from, 0);
  }
  __syncwarp();
  uint64_t own = shared_matrix(stage.resident), tile = shared_matrix(stage.streamed);
  float s[NT][4] = {};
  mbarrier_wait(stage.resident_landed, 0);
  for (int t = 0; t < count; t++) {
    int now = t % WIDE_STAGES;
    prepare(t, now);
    mbarrier_wait(stage.landed + now, t / WIDE_STAGES & 1);
    named_barrier_sync(1, 128);  // parameters, and zeros over dead rows, are there for all
    wgmma_hold(s);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < TILES; c++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        wgmma_shared<false, false>(s, own + (c * WIDE_BYTES + k * 32) / 16, tile + (now * W::BYTES + c * W::BOX + k * 32) / 16,
                                   c + k > 0);
    wgmma_commit();
    if (threadIdx.x == 0 && t + 1 < count) stage.load(streams, from, t + 1);
    __syncwarp();
    wgmma_wait<0>();
    wgmma_hold(s);
    float shrink[2] = {1.0f, 1.0f};
    make(s, t, now, shrink);
    // W and factors of tile t - 2 were read: this tile came to where that one was.
    unsigned char* to = stage.weights + now * WIDE_BYTES;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int row = warp * 16 + lane / 4 + 8 * r;
      if (lane % 4 == 0) stage.factors[now * WIDE_RESIDENT + row] = shrink[r];
#pragma unroll
      for (int n = 0; n < NT; n++)
        *reinterpret_cast<uint32_t*>(to + swizzle128(row * 128 + n * 16 + lane % 4 * 4)) =
            __byte_perm(__float_as_uint(s[n][2 * r]), __float_as_uint(s[n][2 * r + 1]), 0x7632);
    }
    async_fence();
    mbarrier_arrive(stage.made + now);
  }
}

// Groups 1 and 2: columns of O from 64·`box` on. SHRINKS: O shrinks when a maximum moves.
template <bool SHRINKS, int TILES, int NT, int NO>
DEVICE void add_weighted(const WideStage<TILES, NT>& stage, int box, int count, float (&o)[NO][4]) {
  typedef WideStage<TILES, NT> W;
  int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  uint64_t weights = shared_matrix(stage.weights), tile = shared_matrix(stage.streamed + box * W::BOX, W::BOX);
  for (int t = 0; t < count; t++) {
    int now = t % WIDE_STAGES, parity = t / WIDE_STAGES & 1;
    mbarrier_wait(stage.landed + now, parity);
    mbarrier_wait(stage.made + now, parity);
    if (SHRINKS) {
      float upper = stage.factors[now * WIDE_RESIDENT + row], lower = stage.factors[now * WIDE_RESIDENT + row + 8];
      if (__any_sync(FULL_WARP, upper != 1.0f || lower != 1.0f))
#pragma unroll
        for (int n = 0; n < NO; n++) o[n][0] *= upper, o[n][1] *= upper, o[n][2] *= lower, o[n][3] *= lower;
    }
    wgmma_hold(o);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < NT / 2; k++)
      wgmma_shared<false, true>(o, weights + (now * WIDE_BYTES + k * 32) / 16, tile + (now * W::BYTES + k * 2048) / 16, 1);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(o);
    if (lane == 0) mbarrier_arrive(stage.vacant + now);
  }
}
