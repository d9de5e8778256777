// Cases of kernels/emulator/hopper.cpp: what Hopper's instructions do, and what of their misuse is reported.
#include "ptx_sm90.cuh"

static __nv_bfloat16 matrix[200][192];
static TensorMap map_of(int rows, int box_rows) {
  TensorMap map = {};
  map.address = (uint64_t)matrix;
  map.rows = rows, map.columns = 192, map.row_bytes = sizeof matrix[0];
  map.box_rows = box_rows, map.box_columns = 64, map.mark = TensorMap::MARK;
  return map;
}
static float value(int row, int column) { return (float)((row * 7 + column * 3) % 13 - 6); }
static void fill() {
  for (int r = 0; r < 200; r++)
    for (int c = 0; c < 192; c++) matrix[r][c] = from_float<__nv_bfloat16>(value(r, c));
}

// A box at the matrix's corner: what exists, swizzled, and zeros. Bits as in `copies`.
static void boxes(void* const*) {
  DYNAMIC_SHARED(unsigned char, shared);
  Mbarrier* landed = (Mbarrier*)(shared + 16384);
  auto at = [&](int row, int column) {
    return bf16_low(*(uint16_t*)(shared + swizzle128(row * 128 + column * 2)));
  };
  if (threadIdx.x == 0) {
    fill();
    mbarrier_init(landed, 1);
    mbarrier_init_fence();
    TensorMap map = map_of(150, 128);
    mbarrier_arrive_expect(landed, 128 * 128);
    tma_load(shared, &map, 100, 160, landed);
    bool there = at(0, 0) == value(100, 160);
    result[0] = there ? 2 : 1;
  }
  __syncthreads();
  mbarrier_wait(landed, 0);
  bool good = true;
  for (int r = 0; r < 128; r++)
    for (int c = 0; c < 64; c++) good = good && at(r, c) == (100 + r < 150 && 160 + c < 192 ? value(100 + r, 160 + c) : 0.0f);
  if (!__syncthreads_and(good)) result[0] = 100;
}

// D = A · Bᵀ, D = A · B, D = Aᵀ · B and fragments · B, 64 x 128 (or 64) x 64, from tiles in shared memory; twice, to add.
template <bool TRANSPOSED_A, bool TRANSPOSED_B, int N>
static bool product(unsigned char* left, unsigned char* right) {
  float d[N / 8][4];
  wgmma_fence();
  for (int pass = 0; pass < 2; pass++)
    for (int k = 0; k < 4; k++) {
      uint64_t a = shared_matrix(left) + (TRANSPOSED_A ? k * 128 : k * 2);
      uint64_t b = shared_matrix(right, TRANSPOSED_B ? 8192 : 16) + (TRANSPOSED_B ? k * 128 : k * 2);
      wgmma_shared<TRANSPOSED_A, TRANSPOSED_B>(d, a, b, pass + k > 0);
    }
  wgmma_commit();
  wgmma_wait<0>();
  bool good = true;
  for (int n = 0; n < N / 8; n++)
    for (int e = 0; e < 4; e++) {
      int r = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8, c = n * 8 + threadIdx.x % 4 * 2 + e % 2;
      float want = 0;
      for (int k = 0; k < 64; k++) {
        // A transposed operand lies by rows of k; its columns from 64 on are the next tile, 64 rows further in the matrix.
        float a = TRANSPOSED_A ? value(k, r) : value(r, k);
        float b = TRANSPOSED_B ? value(c / 64 * 64 + k, 64 + c % 64) : value(c, 64 + k);
        want += 2 * a * b;
      }
      good = good && d[n][e] == want;
    }
  return good;
}
static void products(void* const*) {
  DYNAMIC_SHARED(unsigned char, shared);
  unsigned char *left = shared, *right = shared + 8192;
  if (threadIdx.x == 0) fill();
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 64; i += 128)
    *(__nv_bfloat16*)(left + swizzle128(i / 64 * 128 + i % 64 * 2)) = matrix[i / 64][i % 64];
  for (int i = threadIdx.x; i < 128 * 64; i += 128)
    *(__nv_bfloat16*)(right + swizzle128(i / 64 * 128 + i % 64 * 2)) = matrix[i / 64][64 + i % 64];
  async_fence();
  __syncthreads();
  int good = product<false, false, 128>(left, right) + 2 * product<false, true, 128>(left, right) +
             4 * product<true, true, 64>(left, right);
  // Fragments of A: rows of mma_bf16.
  float d[8][4];
  uint32_t a[4][4];
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < 4; i++) {
      int r = row + i % 2 * 8, c = k * 16 + column + i / 2 * 8;
      a[k][i] = pack_bf16(value(r, c), value(r, c + 1));
    }
  wgmma_fence();
  for (int k = 0; k < 4; k++) wgmma_fragment<true>(d, a[k], shared_matrix(right) + k * 128, k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  bool same = true;
  for (int n = 0; n < 8; n++)
    for (int e = 0; e < 4; e++) {
      float want = 0;
      for (int k = 0; k < 64; k++) want += value(row + e / 2 * 8, k) * value(k, 64 + n * 8 + column + e % 2);
      same = same && d[n][e] == want;
    }
  result[0] = __syncthreads_and(good == 7 && same) ? 15 : good;
}

// Blocks of a cooperative launch hand a number round, twice; adds of the copy engine come in that order.
static float total[8];
static unsigned turn;
static void round_robin(void* const*) {
  DYNAMIC_SHARED(float, share);
  if (threadIdx.x) return;
  unsigned own = gridDim.x - 1 - blockIdx.x;
  for (unsigned step = 0; step < 2; step++) {
    for (int i = 0; i < 8; i++) share[i] = 1 + own;
    async_fence();
    wait_until(&turn, step * gridDim.x + own);
    if (step + own == 0) bulk_store(total, share, 32);
    else bulk_add(total, share, 32);
    bulk_commit();
    bulk_wait_read<0>();
    bulk_wait<0>();
    signal(&turn);
  }
  if (turn == 2 * gridDim.x) result[0] = total[7];
}

// ---- what is reported
static void wrong_phase(void* const*) {
  DYNAMIC_SHARED(Mbarrier, barrier);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1), mbarrier_arrive(barrier);
  __syncthreads();
  mbarrier_wait(barrier, 1);  // phase 0 is over: parity 1 is the one that runs
}
static void bytes_that_never_land(void* const*) {
  DYNAMIC_SHARED(Mbarrier, barrier);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1), mbarrier_arrive_expect(barrier, 16);
  __syncthreads();
  mbarrier_wait(barrier, 0);
}
static void too_many_arrivals(void* const*) {
  DYNAMIC_SHARED(Mbarrier, barrier);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1), mbarrier_arrive_expect(barrier, 16), mbarrier_arrive(barrier);
}
static void no_mbarrier(void* const*) {
  DYNAMIC_SHARED(Mbarrier, barrier);
  mbarrier_wait(barrier, 0);
}
static void no_fence(void* const*) {
  DYNAMIC_SHARED(unsigned char, shared);
  float d[8][4];
  wgmma_shared<false, false>(d, shared_matrix(shared), shared_matrix(shared), 0);
}
static void beyond_shared(void* const*) {
  DYNAMIC_SHARED(unsigned char, shared);
  float d[16][4];
  wgmma_fence();
  wgmma_shared<false, false>(d, shared_matrix(shared), shared_matrix(shared), 0);  // 128 rows of B, where 64 are
  wgmma_commit();
  wgmma_wait<0>();
}
static void left_in_flight(void* const*) {
  DYNAMIC_SHARED(unsigned char, shared);
  float d[8][4];
  wgmma_fence();
  wgmma_shared<false, false>(d, shared_matrix(shared), shared_matrix(shared), 0);
  wgmma_commit();
}
static void box_off_its_boundary(void* const*) {
  DYNAMIC_SHARED(unsigned char, shared);
  Mbarrier* landed = (Mbarrier*)shared;
  TensorMap map = map_of(150, 8);
  if (threadIdx.x) return;
  mbarrier_init(landed, 1);
  tma_load(shared + 512, &map, 0, 0, landed);
}
static void waits_alone(void* const*) { wait_until(&turn, 77); }
