// ptx_sm90.cuh: what Hopper adds to ptx.cuh: tensor copies, barriers in shared memory, products of a whole warpgroup. Files named
// *_sm90.cu alone include it; they are compiled for sm_90a and for the emulator.
//
//   mbarrier_init, _arrive, _arrive_expect, _wait   a barrier that counts arrivals and bytes; phases alternate between parity 0 and 1
//   tma_load                  a box of a matrix (TensorMap) to shared memory, swizzled, zeros beyond its edge; bytes land on an mbarrier
//   bulk_store, bulk_add      contiguous shared memory to global memory, or f32 added to it, by the copy engine
//   bulk_commit, bulk_wait_read<N>, bulk_wait<N>    at most N groups of this thread still read shared memory; are not yet visible
//   async_fence               this thread's writes to shared memory become visible to tensor cores and copy engine
//   wgmma<N>(d, a, b)         D (64, N; f32) (+)= A (64, 16) · B (16, N), bf16; A a matrix in shared memory or fragments
//   wgmma_fence, _commit, _wait<N>, _hold           before the first product that uses a register; close a group; wait; see below
//   set_more_registers<R>, set_fewer_registers<R>   of each thread of the warpgroup
//   wait_until, signal        counters in global memory, between blocks of a cooperative launch
//
// Matrices of shared memory are tiles of 64 columns of bf16, 128 bytes a row, at 1024-byte boundaries, with the 128-byte swizzle:
// 16-byte chunk c of row r lies at chunk c ^ (r % 8). A shared_matrix names one by its first element; its 16 columns of K are
// either along a row (the other operand's rows are its rows: no flag) or down the rows (TRANSPOSED).
//
//   row-wise operand       K along the row          next 16 of K: + 32 bytes       rows 8..15: + 1024 bytes (`stride`)
//   TRANSPOSED operand     K down the rows          next 16 of K: + 2048 bytes     columns 64..127: + `leading` bytes
//
// Fragments of warp w of the warpgroup: rows 16·w + those of mma_bf16, for A as for D (d[n][e]: columns 8n + 2t + e % 2).
#pragma once
#include "ptx.cuh"

typedef unsigned long long Mbarrier;

// In a signature: `GRID_CONSTANT TensorMap name,  // (rows, columns)`. Written by the host; opaque.
#if defined(__CUDACC__)
#define GRID_CONSTANT const __grid_constant__
struct alignas(64) TensorMap {
  unsigned long long word[16];
};
#else
#define GRID_CONSTANT const
typedef cuhost::TensorMap TensorMap;
#endif

// Offset of byte `at` of a swizzled tile.
DEVICE unsigned swizzle128(unsigned at) { return at ^ (at >> 3 & 0x70); }

#if defined(__CUDACC__)

// ---- barriers in shared memory
DEVICE void mbarrier_init(Mbarrier* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After the last mbarrier_init, by the thread that did them; then a __syncthreads.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(Mbarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and holds the phase until so many bytes have landed.
DEVICE void mbarrier_arrive_expect(Mbarrier* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete. The first phase has parity 0; waiting for parity 1 passes on a fresh barrier.
DEVICE void mbarrier_wait(Mbarrier* b, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(
          shared_address(b)),
      "r"(parity)
      : "memory");
}

// ---- the copy engine
DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box whose first element is (row, column).
DEVICE void tma_load(void* to, const TensorMap* map, int row, int column, Mbarrier* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
               : "memory");
}
DEVICE void bulk_store(float* to, const float* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
DEVICE void bulk_add(float* to, const float* from, unsigned bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int GROUPS>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
}
template <int GROUPS>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(GROUPS) : "memory");
}
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void async_fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- counters in global memory
// Until *counter is `value`; what other blocks wrote before their signal is visible then, to the copy engine too.
DEVICE void wait_until(const unsigned* counter, unsigned value) {
  unsigned now;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  while (now != value);
  async_fence_global();
}
// Adds 1, behind all writes of this thread, those of the copy engine that were waited for included.
DEVICE void signal(unsigned* counter) {
  async_fence_global();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// ---- registers
template <int REGISTERS>
DEVICE void set_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void set_fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- products of a warpgroup
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
// Keeps the compiler from moving uses of accumulators across the fence or wait beside it.
template <int TILES>
DEVICE void wgmma_hold(float (&d)[TILES][4]) {
#pragma unroll
  for (int n = 0; n < TILES; n++)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

#define D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D16(n) D4(n), D4(n + 1), D4(n + 2), D4(n + 3)
#define D32(n) D16(n), D16(n + 4)
#define D64(n) D32(n), D32(n + 8)
#define D96(n) D64(n), D32(n + 16)
#define D128(n) D64(n), D64(n + 16)
#define R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define FIRST32 R8(0, 1, 2, 3, 4, 5, 6, 7) "," R8(8, 9, 10, 11, 12, 13, 14, 15) "," R8(16, 17, 18, 19, 20, 21, 22, 23) "," \
  R8(24, 25, 26, 27, 28, 29, 30, 31)
#define NEXT32 R8(32, 33, 34, 35, 36, 37, 38, 39) "," R8(40, 41, 42, 43, 44, 45, 46, 47) "," \
  R8(48, 49, 50, 51, 52, 53, 54, 55) "," R8(56, 57, 58, 59, 60, 61, 62, 63)
#define FIRST16 R8(0, 1, 2, 3, 4, 5, 6, 7) "," R8(8, 9, 10, 11, 12, 13, 14, 15)
#define THIRD32 R8(64, 65, 66, 67, 68, 69, 70, 71) "," R8(72, 73, 74, 75, 76, 77, 78, 79) "," \
  R8(80, 81, 82, 83, 84, 85, 86, 87) "," R8(88, 89, 90, 91, 92, 93, 94, 95)
#define LAST32 R8(96, 97, 98, 99, 100, 101, 102, 103) "," R8(104, 105, 106, 107, 108, 109, 110, 111) "," \
  R8(112, 113, 114, 115, 116, 117, 118, 119) "," R8(120, 121, 122, 123, 124, 125, 126, 127)
// `D` +f operands of d, then a, b, whether to add, and the immediates.
#define WGMMA(N, D, NAMES, A, B, ADD, TA, TB)                                                                              \
  template <bool TRANSPOSED_A, bool TRANSPOSED_B>                                                                          \
  DEVICE void wgmma_shared(float(&d)[N / 8][4], uint64_t a, uint64_t b, int add) {                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" #A ", %" #B ", p, 1, 1, %" #TA  \
                 ", %" #TB ";\n}"                                                                                          \
                 : D                                                                                                       \
                 : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED_A ? 1 : 0), "n"(TRANSPOSED_B ? 1 : 0));                        \
  }
#define WGMMA_FRAGMENT(N, D, NAMES, A0, A1, A2, A3, B, ADD, TB)                                                            \
  template <bool TRANSPOSED_B>                                                                                             \
  DEVICE void wgmma_fragment(float(&d)[N / 8][4], const uint32_t(&a)[4], uint64_t b, int add) {                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 \
                 "}, %" #B ", p, 1, 1, %" #TB ";\n}"                                                                       \
                 : D                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED_B ? 1 : 0));               \
  }
WGMMA(32, D16(0), FIRST16, 16, 17, 18, 19, 20)
WGMMA(64, D32(0), FIRST32, 32, 33, 34, 35, 36)
WGMMA(128, D64(0), FIRST32 "," NEXT32, 64, 65, 66, 67, 68)
WGMMA(192, D96(0), FIRST32 "," NEXT32 "," THIRD32, 96, 97, 98, 99, 100)
WGMMA(256, D128(0), FIRST32 "," NEXT32 "," THIRD32 "," LAST32, 128, 129, 130, 131, 132)
WGMMA_FRAGMENT(64, D32(0), FIRST32, 32, 33, 34, 35, 36, 37, 38)
WGMMA_FRAGMENT(128, D64(0), FIRST32 "," NEXT32, 64, 65, 66, 67, 68, 69, 70)
#undef WGMMA
#undef WGMMA_FRAGMENT

#else  // ---- host twins: kernels/emulator/hopper.cpp

static inline uint32_t shared_address(const void* p) { return cuhost::shared_address(p); }
DEVICE void mbarrier_init(Mbarrier* b, unsigned arrivals, CUHOST_HERE) {
  cuhost::mbarrier_init(b, arrivals, CUHOST_SITE("mbarrier.init"));
}
DEVICE void mbarrier_init_fence() {}
DEVICE void mbarrier_arrive(Mbarrier* b, CUHOST_HERE) {
  cuhost::mbarrier_arrive(b, 0, CUHOST_SITE("mbarrier.arrive"));
}
DEVICE void mbarrier_arrive_expect(Mbarrier* b, unsigned bytes, CUHOST_HERE) {
  cuhost::mbarrier_arrive(b, bytes, CUHOST_SITE("mbarrier.arrive.expect_tx"));
}
DEVICE void mbarrier_wait(Mbarrier* b, unsigned parity, CUHOST_HERE) {
  cuhost::mbarrier_wait(b, parity, CUHOST_SITE("mbarrier.try_wait"));
}
DEVICE void tma_prefetch(const TensorMap*) {}
DEVICE void tma_load(void* to, const TensorMap* map, int row, int column, Mbarrier* b, CUHOST_HERE) {
  cuhost::tma_load(to, *map, row, column, b, CUHOST_SITE("cp.async.bulk.tensor"));
}
DEVICE void bulk_store(float* to, const float* from, unsigned bytes, CUHOST_HERE) {
  cuhost::bulk_store(to, from, bytes, false, CUHOST_SITE("cp.async.bulk"));
}
DEVICE void bulk_add(float* to, const float* from, unsigned bytes, CUHOST_HERE) {
  cuhost::bulk_store(to, from, bytes, true, CUHOST_SITE("cp.reduce.async.bulk"));
}
DEVICE void bulk_commit() { cuhost::bulk_commit(); }
template <int GROUPS>
DEVICE void bulk_wait_read() {
  cuhost::bulk_wait(GROUPS);
}
template <int GROUPS>
DEVICE void bulk_wait() {
  cuhost::bulk_wait(GROUPS);
}
DEVICE void async_fence() {}
DEVICE void wait_until(const unsigned* counter, unsigned value, CUHOST_HERE) {
  cuhost::wait_until(counter, value, CUHOST_SITE("wait_until"));
}
DEVICE void signal(unsigned* counter) { __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE); }
template <int REGISTERS>
DEVICE void set_more_registers(CUHOST_HERE) {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 240, "setmaxnreg");
  cuhost::set_registers(REGISTERS, CUHOST_SITE("setmaxnreg.inc"));
}
template <int REGISTERS>
DEVICE void set_fewer_registers(CUHOST_HERE) {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 240, "setmaxnreg");
  cuhost::set_registers(REGISTERS, CUHOST_SITE("setmaxnreg.dec"));
}
DEVICE void wgmma_fence(CUHOST_HERE) { cuhost::wgmma_fence(CUHOST_SITE("wgmma.fence")); }
DEVICE void wgmma_commit(CUHOST_HERE) { cuhost::wgmma_commit(CUHOST_SITE("wgmma.commit_group")); }
template <int GROUPS>
DEVICE void wgmma_wait(CUHOST_HERE) {
  cuhost::wgmma_wait(GROUPS, CUHOST_SITE("wgmma.wait_group"));
}
template <int TILES>
DEVICE void wgmma_hold(float (&)[TILES][4]) {}
template <bool TRANSPOSED_A, bool TRANSPOSED_B, int TILES>
DEVICE void wgmma_shared(float (&d)[TILES][4], uint64_t a, uint64_t b, int add, CUHOST_HERE) {
  cuhost::wgmma(&d[0][0], TILES, nullptr, a, TRANSPOSED_A, b, TRANSPOSED_B, add, CUHOST_SITE("wgmma"));
}
template <bool TRANSPOSED_B, int TILES>
DEVICE void wgmma_fragment(float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b, int add, CUHOST_HERE) {
  cuhost::wgmma(&d[0][0], TILES, a, 0, false, b, TRANSPOSED_B, add, CUHOST_SITE("wgmma"));
}

#endif

// The descriptor of a swizzled matrix in shared memory (PTX ISA, "Matrix Descriptor Format"): where its first element is, the
// bytes from one 64-column tile to the next (TRANSPOSED operands of more than 64 columns alone), and from 8 rows to the next 8.
DEVICE uint64_t shared_matrix(const void* first, unsigned leading = 16, unsigned stride = 1024) {
  return (uint64_t)(shared_address(first) >> 4 & 0x3FFF) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
         1ull << 62;
}
