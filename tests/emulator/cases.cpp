// Small kernels that show what the emulator does and what it refuses. `cases NAME SCHEDULE` runs one and prints its result, or
// the error of the launch; tests/emulator.rs holds what is wanted.
#define ACT_BF16
#include "emulator/cuda_host.h"

#include "ptx.cuh"

#include <string>

// The same numbers stand in src/cuda/emulated.rs, against the Rust side.
using cuhost::Launch;
static_assert(offsetof(Launch, grid) == 16 && offsetof(Launch, shared_bytes) == 40 && offsetof(Launch, failed) == 52 &&
                  offsetof(Launch, fault_address) == 64 && offsetof(Launch, cooperative) == 72 && offsetof(Launch, error) == 80 && sizeof(Launch) == 1616 &&
                  sizeof(cuhost::Kernel) == 24,
              "a launch lies in memory as Rust sees it");

static double result[256];

// ---- what holds

static void exchange(void* const*) {
  int l = threadIdx.x % 32;
  float down = __shfl_down_sync(FULL_WARP, (float)l, 3, 8), up = __shfl_up_sync(FULL_WARP, (float)l, 1, 16);
  int from = __shfl_sync(FULL_WARP, l, 5, 8), butterfly = __shfl_xor_sync(FULL_WARP, l, 9, 16);
  unsigned long long wide = __shfl_sync(FULL_WARP, (1ull << 40) + l, 31);
  // Two halves of a warp go their own ways.
  unsigned votes = l < 16 ? __ballot_sync(0x0000FFFFu, l % 3 == 0) : __ballot_sync(0xFFFF0000u, l % 5 == 0);
  int sum = l < 16 ? __reduce_add_sync(0x0000FFFFu, l) : __reduce_max_sync(0xFFFF0000u, -l);
  bool good = down == (l % 8 + 3 < 8 ? l + 3 : l) && up == (l % 16 ? l - 1 : l) && from == l / 8 * 8 + 5 &&
              butterfly == (l ^ 9) && wide == (1ull << 40) + 31 && votes == (l < 16 ? 0x9249u & 0xFFFFu : 0x42100000u) &&
              sum == (l < 16 ? 120 : -16);
  if (!good) result[0] = 1 + l;
  if (__all_sync(FULL_WARP, good) && !__any_sync(FULL_WARP, !good) && l == 0) result[1] = 1;
}
static unsigned counter, largest;
static void atomics(void* const*) {
  atomicAdd(&counter, 1u);
  atomicMax(&largest, blockIdx.x * 1000 + threadIdx.x);
  result[0] = counter == gridDim.x * blockDim.x ? largest : 0;
}
static void early_exit(void* const*) {
  // Threads that have left are not waited for.
  SHARED(int, count, [1]);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  if (threadIdx.x >= 40) return;
  atomicAdd(count, 1);
  __syncthreads();
  if (threadIdx.x == 0) result[0] = count[0] + __popc(__ballot_sync(FULL_WARP, 1) & 1);
  else if (threadIdx.x < 32) __ballot_sync(FULL_WARP, 1);
}
static void votes(void* const*) {
  int n = __syncthreads_count(threadIdx.x % 3 == 0), any = __syncthreads_or(threadIdx.x == 77);
  int all = __syncthreads_and(threadIdx.x < 256), not_all = __syncthreads_and(threadIdx.x != 9);
  if (threadIdx.x == 5) result[0] = n * 1000 + any * 100 + all * 10 + not_all;
}
static void poison(void* const*) {
  SHARED(float, fixed, [64]);
  DYNAMIC_SHARED(float, dynamic);
  __syncthreads();
  bool clean = fixed[threadIdx.x % 64] != fixed[threadIdx.x % 64] && dynamic[threadIdx.x] != dynamic[threadIdx.x];
  __syncthreads();
  fixed[threadIdx.x % 64] = dynamic[threadIdx.x] = 1;
  if (!clean) result[0] = 1 + blockIdx.x;
}
static void two_teams(void* const*) {
  // Each half of the block has a barrier of its own.
  SHARED(int, stage, [2]);
  int team = threadIdx.x / 128;
  if (threadIdx.x % 128 == 0) stage[team] = 7;
  named_barrier_sync(1 + team, 128);
  if (stage[team] != 7) result[0] = 1;
  __syncthreads();
}
// C (16, 8) = A (16, 16) · B (16, 8), with B stored by rows of k, and by rows of n.
static void matrices(void* const*) {
  SHARED(__nv_bfloat16, a, [16][24]);
  SHARED(__nv_bfloat16, by_k, [16][8]);
  SHARED(__nv_bfloat16, by_n, [8][24]);
  int l = threadIdx.x;
  auto value_a = [](int r, int k) { return (float)((r * 7 + k * 3) % 13 - 6); };
  auto value_b = [](int k, int c) { return (float)((k * 5 + c * 11) % 9 - 4); };
  for (int i = l; i < 256; i += 32) a[i / 16][i % 16] = from_float<__nv_bfloat16>(value_a(i / 16, i % 16));
  for (int i = l; i < 128; i += 32) {
    by_k[i / 8][i % 8] = from_float<__nv_bfloat16>(value_b(i / 8, i % 8));
    by_n[i % 8][i / 8] = by_k[i / 8][i % 8];
  }
  __syncwarp();
  uint32_t fa[4], fb[2], fb_trans[2];
  ldmatrix_x4(fa, &a[l % 16][l / 16 * 8]);
  ldmatrix_x2(fb, &by_n[l % 8][l / 8 % 2 * 8]);
  ldmatrix_x2_trans(fb_trans, &by_k[l % 16][0]);
  if (fb[0] != fb_trans[0] || fb[1] != fb_trans[1]) result[0] = 1;
  float d[4] = {1, 1, 1, 1};
  mma_bf16(d, fa, fb);
  for (int i = 0; i < 4; i++) {
    int r = l / 4 + i / 2 * 8, c = l % 4 * 2 + i % 2;
    float want = 1;
    for (int k = 0; k < 16; k++) want += value_a(r, k) * value_b(k, c);
    if (d[i] != want) result[0] = 2;
  }
  // The same values as tf32: two products of k = 8.
  float e[4] = {1, 1, 1, 1};
  for (int k = 0; k < 16; k += 8) {
    uint32_t ta[4], tb[2];
    for (int i = 0; i < 4; i++) ta[i] = to_tf32(value_a(l / 4 + i % 2 * 8, k + l % 4 + i / 2 * 4));
    for (int i = 0; i < 2; i++) tb[i] = to_tf32(value_b(k + l % 4 + i * 4, l / 4));
    mma_tf32(e, ta, tb);
  }
  for (int i = 0; i < 4; i++)
    if (e[i] != d[i]) result[0] = 3;
}
static float global[256];
// 1: nothing has landed before the wait (late); 2: it has (eager); 4: it has after the wait; 8: zero fill.
static void copies(void* const*) {
  SHARED(float, tile, [256]);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) global[i] = i;
  __syncthreads();
  if (threadIdx.x < 32) {
    cp_async<16>(tile + threadIdx.x * 4, global + threadIdx.x * 4);
    cp_async_commit();
    cp_async_zero<4>(tile + 128 + threadIdx.x, global, false);
    cp_async_commit();
    float early = tile[threadIdx.x * 4];
    int seen = early == threadIdx.x * 4 ? 2 : early != early ? 1 : 0;
    cp_async_wait<1>();
    seen |= tile[threadIdx.x * 4 + 3] == threadIdx.x * 4 + 3 ? 4 : 0;
    cp_async_wait<0>();
    seen |= tile[128 + threadIdx.x] == 0 ? 8 : 0;
    if (threadIdx.x == 9) result[0] = seen;
  }
}
static void order(void* const*) {
  if (threadIdx.x == 0 && blockIdx.x == 0) result[1] = 0;
  if (threadIdx.x == 64) result[0] = threadIdx.x;
  if (threadIdx.x == 0) result[1] = result[0];  // 64 only where warp 2 went first
}

// ---- what is refused

static void deadlock(void* const*) {
  if (threadIdx.x < 16) __syncwarp();
  else if (threadIdx.x < 32) __syncthreads();
}
static void two_barriers(void* const*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
static void missing_team(void* const*) {
  if (threadIdx.x < 64) named_barrier_sync(3, 128);
}
static void misaligned(void* const*) { load16<float4>(global + 1 + threadIdx.x); }
static void misaligned_copy(void* const*) {
  SHARED(float, tile, [64]);
  cp_async<8>(tile + 1, global);
}
static void misaligned_matrix(void* const*) {
  SHARED(__nv_bfloat16, tile, [32][9]);
  uint32_t r[1];
  ldmatrix_x1(r, tile[threadIdx.x % 8]);
}
static void half_a_warp_of_mma(void* const*) {
  float d[4] = {};
  uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x % 32 < 16) return;
  mma_bf16(d, a, b);
}
static void absent_lane(void* const*) {
  if (threadIdx.x % 32 < 8) __shfl_sync(0xFFu, 1, 20);
}
static void wrong_mask(void* const*) {
  if (threadIdx.x % 32 < 4) __shfl_sync(0xF0u, 1, 0);
}
static void overlapping_masks(void* const*) { __shfl_sync(threadIdx.x % 2 ? FULL_WARP : 0x55555555u | 1u << 31, 1, 0); }
static void mixed_collectives(void* const*) {
  if (threadIdx.x % 2)
    __shfl_sync(FULL_WARP, 1, 0);
  else
    __ballot_sync(FULL_WARP, 1);
}
static void outside(void* const*) {
  __syncthreads();
  if (threadIdx.x == 37) *(volatile float*)16 = 1;
}
static void stack(void* const*) {
  volatile char large[80000];
  large[threadIdx.x] = 1;
  large[79999] = large[threadIdx.x];
  __syncthreads();
}
static void overrun(void* const*) {
  SHARED(float, tile, [30]);
  float* p = tile;
  asm("" : "+r"(p));
  p[threadIdx.x % 31] = 1;
}
static void dynamic_overrun(void* const*) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1;
}
static void nothing(void* const*) {}

#include "hopper_cases.h"

struct Case {
  const char* name;
  void (*body)(void* const*);
  unsigned blocks = 8, threads = 256;
  size_t shared = 1024;
  int bounds = 0;
  bool cooperative = false;
};
static const Case CASES[] = {
    {"exchange", exchange}, {"atomics", atomics}, {"early_exit", early_exit, 1}, {"votes", votes}, {"poison", poison},
    {"two_teams", two_teams}, {"matrices", matrices, 1, 32}, {"copies", copies, 1}, {"order", order, 1},
    {"deadlock", deadlock}, {"two_barriers", two_barriers}, {"missing_team", missing_team}, {"misaligned", misaligned},
    {"misaligned_copy", misaligned_copy}, {"misaligned_matrix", misaligned_matrix},
    {"half_a_warp_of_mma", half_a_warp_of_mma}, {"absent_lane", absent_lane}, {"wrong_mask", wrong_mask},
    {"overlapping_masks", overlapping_masks}, {"mixed_collectives", mixed_collectives}, {"outside", outside},
    {"stack", stack}, {"overrun", overrun}, {"dynamic_overrun", dynamic_overrun, 8, 250, 1000}, {"dynamic_outside", dynamic_overrun}, {"bounds", nothing, 1, 256, 0, 128},
    {"boxes", boxes, 1, 128, 17 << 10}, {"products", products, 1, 128, 24 << 10},
    {"round_robin", round_robin, 4, 32, 1024, 0, true}, {"wrong_phase", wrong_phase, 1, 32},
    {"bytes_that_never_land", bytes_that_never_land, 1, 32}, {"too_many_arrivals", too_many_arrivals, 1, 32},
    {"no_mbarrier", no_mbarrier, 1, 32}, {"no_fence", no_fence, 1, 128, 8192}, {"beyond_shared", beyond_shared, 1, 128, 8192},
    {"left_in_flight", left_in_flight, 1, 128, 8192}, {"box_off_its_boundary", box_off_its_boundary, 1, 32, 4096},
    {"waits_alone", waits_alone, 4, 32, 1024, 0, true}, {"waits_for_a_block_to_come", waits_alone, 4, 32},
    {"too_many_residents", nothing, 5, 32, 0, 0, true}, {"large_block", nothing, 1, 1056}, {"large_grid", nothing, 1u << 31, 32}, {"large_shared", nothing, 1, 32, 228 << 10},
};

int main(int, char** arguments) {
  for (const Case& c : CASES) {
    if (c.name != std::string(arguments[1])) continue;
    cuhost::Kernel kernel{c.body, cuhost::run, c.bounds};
    static cuhost::Launch launch;
    launch.kernel = &kernel;
    launch.grid[0] = c.blocks, launch.grid[1] = launch.grid[2] = 1;
    launch.block[0] = c.threads, launch.block[1] = launch.block[2] = 1;
    launch.shared_bytes = c.shared;
    launch.cooperative = c.cooperative;
    launch.schedule = atoi(arguments[2]);
    if (cuhost::run(&launch))
      printf("%s\n", launch.error);
    else
      printf("%g %g\n", result[0], result[1]);
    return 0;
  }
  return 1;
}
