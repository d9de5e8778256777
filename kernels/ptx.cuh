// ptx.cuh: every instruction that C++ cannot say, once for the device and once as its host twin.
//
//   cp_async<B>, cp_async_zero<B>    cp.async of 4, 8 or 16 bytes from global to shared memory; the second reads nothing and
//                                    stores zeros where its condition is false
//   cp_async_commit, cp_async_wait<N>   close a group of copies; wait until at most N groups of this thread are open
//   ldmatrix_x1/x2/x4(_trans)        8x8 matrices of 16-bit elements from shared memory to fragments
//   mma_bf16                         D (16x8, f32) += A (16x16, bf16, row) · B (16x8, bf16, column)
//   mma_tf32                         D (16x8, f32) += A (16x8, tf32, row) · B (8x8, tf32, column)
//   exp2_approx                      2^x by the special-function unit, 2 ulp
//   named_barrier_sync, _arrive      a barrier for some of the block's warps
//
// Fragments, with g = lane / 4 and t = lane % 4 (a pair of bf16 in one register, the lower column in the lower half):
//   mma_bf16  a[0] (g, 2t), a[1] (g+8, 2t), a[2] (g, 2t+8), a[3] (g+8, 2t+8);  b[0] (k = 2t, n = g), b[1] (k = 2t+8, n = g)
//   mma_tf32  a[0] (g, t), a[1] (g+8, t), a[2] (g, t+4), a[3] (g+8, t+4);      b[0] (k = t, n = g), b[1] (k = t+4, n = g)
//   both      d[0], d[1] (g, 2t and 2t+1), d[2], d[3] (g+8, 2t and 2t+1)
//
// A host twin checks what the hardware faults on (alignment, all 32 lanes present). Sums of an mma are exact to f32 rounding
// here and of the hardware's own order there: compare by tolerance.
#pragma once
#include "common.cuh"

#if defined(__CUDACC__)

DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

template <int BYTES>
DEVICE void cp_async_zero(void* shared, const void* global, bool read) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async moves 4, 8 or 16 bytes");
  int bytes = read ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES),
                 "r"(bytes)
                 : "memory");
}
template <int BYTES>
DEVICE void cp_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async moves 4, 8 or 16 bytes");
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#define LDMATRIX(name, form)                                                                                   \
  DEVICE void ldmatrix_x1##name(uint32_t (&r)[1], const void* row) {                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" form ".shared.b16 {%0}, [%1];"                                \
                 : "=r"(r[0])                                                                                  \
                 : "r"(shared_address(row))                                                                    \
                 : "memory");                                                                                  \
  }                                                                                                            \
  DEVICE void ldmatrix_x2##name(uint32_t (&r)[2], const void* row) {                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" form ".shared.b16 {%0,%1}, [%2];"                             \
                 : "=r"(r[0]), "=r"(r[1])                                                                      \
                 : "r"(shared_address(row))                                                                    \
                 : "memory");                                                                                  \
  }                                                                                                            \
  DEVICE void ldmatrix_x4##name(uint32_t (&r)[4], const void* row) {                                           \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" form ".shared.b16 {%0,%1,%2,%3}, [%4];"                       \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                              \
                 : "r"(shared_address(row))                                                                    \
                 : "memory");                                                                                  \
  }
LDMATRIX(, "")
LDMATRIX(_trans, ".trans")
#undef LDMATRIX

DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// x rounded to tf32's 10 bits of mantissa, as mma_tf32 wants it.
DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
DEVICE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Barrier `id` (1 to 15) for `threads` threads, a multiple of 32; `arrive` counts this thread in and goes on.
DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else  // ---- host twins

template <int BYTES>
DEVICE void cp_async_zero(void* shared, const void* global, bool read, CUHOST_HERE) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async moves 4, 8 or 16 bytes");
  cuhost::copy_async(shared, global, BYTES, read ? BYTES : 0, CUHOST_SITE("cp.async"));
}
template <int BYTES>
DEVICE void cp_async(void* shared, const void* global, CUHOST_HERE) {
  cp_async_zero<BYTES>(shared, global, true, file, line);
}
DEVICE void cp_async_commit() { cuhost::copy_commit(); }
template <int GROUPS>
DEVICE void cp_async_wait() {
  cuhost::copy_wait(GROUPS);
}

// Lane l of a fragment holds row l/4, columns 2·(l%4) and the next, of each matrix; lanes 8m to 8m+7 give the rows of matrix m.
struct LdmatrixOperands {
  const uint16_t* row;
  uint32_t* result;
};
static void all_lanes(const char* what, uint32_t lanes) {
  if (lanes != FULL_WARP) cuhost::fault({what, nullptr, 0}, "lanes %08x of the warp take part, not all 32", lanes);
}
template <int MATRICES, bool TRANSPOSED>
static void ldmatrix_warp(void* const* data, uint32_t lanes) {
  all_lanes("ldmatrix", lanes);
  const LdmatrixOperands* lane[32];
  for (int l = 0; l < 32; l++) lane[l] = static_cast<const LdmatrixOperands*>(data[l]);
  for (int l = 0; l < 8 * MATRICES; l++)
    if (reinterpret_cast<uintptr_t>(lane[l]->row) & 15)
      cuhost::fault({"ldmatrix", nullptr, 0}, "lane %d's row %p is not aligned to 16 bytes", l, (const void*)lane[l]->row);
  for (int m = 0; m < MATRICES; m++)
    for (int l = 0; l < 32; l++) {
      int i = l / 4, j = l % 4 * 2;
      const LdmatrixOperands* const* rows = lane + m * 8;
      lane[l]->result[m] = TRANSPOSED ? rows[j]->row[i] | (uint32_t)rows[j + 1]->row[i] << 16
                                      : rows[i]->row[j] | (uint32_t)rows[i]->row[j + 1] << 16;
    }
}
#define LDMATRIX(count, name, transposed)                                                         \
  DEVICE void ldmatrix_x##count##name(uint32_t (&r)[count], const void* row, CUHOST_HERE) {       \
    LdmatrixOperands operands{static_cast<const uint16_t*>(row), r};                              \
    cuhost::collective(FULL_WARP, &operands, ldmatrix_warp<count, transposed>, CUHOST_SITE("ldmatrix")); \
  }
LDMATRIX(1, , false)
LDMATRIX(2, , false)
LDMATRIX(4, , false)
LDMATRIX(1, _trans, true)
LDMATRIX(2, _trans, true)
LDMATRIX(4, _trans, true)
#undef LDMATRIX

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};
// D += A · B over the warp's fragments, gathered into plain matrices.
template <int K>
static void mma_multiply(void* const* data, float (&a)[16][K], float (&b)[K][8]) {
  float d[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaOperands& lane = *static_cast<const MmaOperands*>(data[l]);
    for (int i = 0; i < 4; i++) d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = lane.d[i];
  }
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      for (int c = 0; c < 8; c++) d[r][c] += a[r][k] * b[k][c];
  for (int l = 0; l < 32; l++) {
    const MmaOperands& lane = *static_cast<const MmaOperands*>(data[l]);
    for (int i = 0; i < 4; i++) lane.d[i] = d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}
static void mma_bf16_warp(void* const* data, uint32_t lanes) {
  all_lanes("mma", lanes);
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaOperands& lane = *static_cast<const MmaOperands*>(data[l]);
    int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 4; i++) {
      a[g + i % 2 * 8][t + i / 2 * 8] = bf16_low(lane.a[i]);
      a[g + i % 2 * 8][t + i / 2 * 8 + 1] = bf16_high(lane.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      b[t + i * 8][g] = bf16_low(lane.b[i]);
      b[t + i * 8 + 1][g] = bf16_high(lane.b[i]);
    }
  }
  mma_multiply<16>(data, a, b);
}
static void mma_tf32_warp(void* const* data, uint32_t lanes) {
  all_lanes("mma", lanes);
  float a[16][8], b[8][8];
  // The hardware reads the upper 19 bits alone.
  auto tf32 = [](uint32_t bits) { return __uint_as_float(bits & 0xFFFFE000u); };
  for (int l = 0; l < 32; l++) {
    const MmaOperands& lane = *static_cast<const MmaOperands*>(data[l]);
    int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = tf32(lane.a[i]);
    for (int i = 0; i < 2; i++) b[t + i * 4][g] = tf32(lane.b[i]);
  }
  mma_multiply<8>(data, a, b);
}
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUHOST_HERE) {
  MmaOperands operands{d, a, b};
  cuhost::collective(FULL_WARP, &operands, mma_bf16_warp, CUHOST_SITE("mma"));
}
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUHOST_HERE) {
  MmaOperands operands{d, a, b};
  cuhost::collective(FULL_WARP, &operands, mma_tf32_warp, CUHOST_SITE("mma"));
}
// Round to nearest, ties away from zero.
DEVICE uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xFFFFE000u; }
DEVICE float exp2_approx(float x) {
  float r = exp2f(x);
  return fabsf(r) < 1.17549435e-38f ? 0.0f : r;  // .ftz
}
DEVICE void named_barrier_sync(int id, int threads, CUHOST_HERE) {
  cuhost::barrier((unsigned)id, (unsigned)threads, false, CUHOST_SITE("bar.sync"));
}
DEVICE void named_barrier_arrive(int id, int threads, CUHOST_HERE) {
  cuhost::barrier_arrive((unsigned)id, (unsigned)threads, CUHOST_SITE("bar.arrive"));
}

#endif
