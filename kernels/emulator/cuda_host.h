// cuda_host.h: what a kernel sees of CUDA C++ when it is compiled as host C++17 (g++ or clang++).
//
// Included before any kernel file, at global scope. Only what kernels here use exists: an unknown intrinsic is a compile
// error, never a silent stand-in. Float atomics are left out on purpose (architecture.md, convention 6), and so is
// `__shared__`: kernels write SHARED and DYNAMIC_SHARED, whose memory is poisoned before each block.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

#define threadIdx (cuhost::block->current->thread)
#define blockIdx (cuhost::block->index)
#define blockDim (cuhost::block->dim)
#define gridDim (cuhost::block->grid)
static constexpr int warpSize = 32;

// SHARED(float, tile, [4][32]); one array per declaration and block, whichever thread meets it first.
#define SHARED(T, name, dims)                     \
  using name##_shared_type = T dims;              \
  static const char name##_shared_declaration = 0; \
  auto& name = *static_cast<name##_shared_type*>( \
      cuhost::static_shared(&name##_shared_declaration, sizeof(name##_shared_type), {"SHARED", __FILE__, __LINE__}))
// DYNAMIC_SHARED(float, row): the launch's dynamic shared memory, aligned to 1024 bytes.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuhost::block->dynamic_shared)

// Where the caller stands, for reports. Last parameter of every function that can wait or fault.
#define CUHOST_SITE(what) \
  cuhost::Site { what, file, line }
#define CUHOST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- vector types
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- bits
template <class To, class From>
static inline To cuhost_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
// The bytes of (low, high) that the nibbles of `selector` number, from the lowest on.
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  unsigned long long both = (unsigned long long)high << 32 | low;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return r;
}
static inline int __float_as_int(float x) { return cuhost_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return cuhost_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return cuhost_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return cuhost_bits<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// ---- bfloat16: storage only, as in cuda_bf16.h; arithmetic goes through float
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
static inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  unsigned u = __float_as_uint(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};  // CUDA's canonical NaN
  return {(uint16_t)((u + 0x7FFFu + (u >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }

// ---- mathematics
template <class T>
static inline typename std::enable_if<std::is_arithmetic<T>::value, T>::type max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
static inline typename std::enable_if<std::is_arithmetic<T>::value, T>::type min(T a, T b) {
  return b < a ? b : a;
}
// fmaxf and fminf drop a NaN, on the device as in C.
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline int __float2int_rn(float x) { return (int)lrintf(x); }
// glibc declares these two as functions of its own.
#define __expf(x) expf(x)
#define __logf(x) logf(x)

// ---- memory: cache hints mean nothing here
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
static inline void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
static inline void __stcg(T* p, T value) {
  *p = value;
}
static inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// ---- barriers
static inline void __syncthreads(CUHOST_HERE) { cuhost::barrier(0, 0, false, CUHOST_SITE("__syncthreads")); }
static inline int __syncthreads_or(int p, CUHOST_HERE) {
  return cuhost::barrier(0, 0, p, CUHOST_SITE("__syncthreads_or")).yes > 0;
}
static inline int __syncthreads_and(int p, CUHOST_HERE) {
  cuhost::Votes v = cuhost::barrier(0, 0, p, CUHOST_SITE("__syncthreads_and"));
  return v.yes == v.threads;
}
static inline int __syncthreads_count(int p, CUHOST_HERE) {
  return (int)cuhost::barrier(0, 0, p, CUHOST_SITE("__syncthreads_count")).yes;
}
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, CUHOST_HERE) {
  cuhost::collective(mask, nullptr, nullptr, CUHOST_SITE("__syncwarp"));
}

// ---- shuffles and votes
namespace cuhost {
struct Exchange {
  uint64_t value, result;
  int source;
};
inline void exchange(void* const* data, uint32_t lanes) {
  for (int l = 0; l < WARP; l++) {
    if (!(lanes >> l & 1)) continue;
    Exchange& e = *static_cast<Exchange*>(data[l]);
    if (!(lanes >> e.source & 1))
      fault(Site{"shuffle", nullptr, 0}, "lane %d reads lane %d, which takes no part (lanes %08x do)", l, e.source, lanes);
    e.result = static_cast<Exchange*>(data[e.source])->value;
  }
}
template <class T>
static inline T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  Exchange e{0, 0, source};
  memcpy(&e.value, &value, sizeof value);
  collective(mask, &e, exchange, site);
  memcpy(&value, &e.result, sizeof value);
  return value;
}
struct Vote {
  uint32_t yes, result, lanes;
};
inline void vote(void* const* data, uint32_t lanes) {
  uint32_t yes = 0;
  for (int l = 0; l < WARP; l++)
    if ((lanes >> l & 1) && static_cast<Vote*>(data[l])->yes) yes |= 1u << l;
  for (int l = 0; l < WARP; l++)
    if (lanes >> l & 1) static_cast<Vote*>(data[l])->result = yes, static_cast<Vote*>(data[l])->lanes = lanes;
}
static inline Vote ask(unsigned mask, bool yes, Site site) {
  Vote v{yes, 0, 0};
  collective(mask, &v, vote, site);
  return v;
}
template <class T, class F>
static inline T reduce(unsigned mask, T value, F combine, Site site) {
  // One lane's value after another, by shuffles: `__reduce_*_sync` exists for integers alone, where order does not matter.
  T total = value;
  for (int l = 0, first = 1; l < WARP; l++) {
    if (!(mask >> l & 1)) continue;
    T other = shuffle(mask, value, l, site);
    total = first ? other : combine(total, other);
    first = 0;
  }
  return total;
}
}  // namespace cuhost
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUHOST_HERE) {
  int l = cuhost::lane();
  return cuhost::shuffle(mask, value, (l & ~(width - 1)) | (source & (width - 1)), CUHOST_SITE("__shfl_sync"));
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUHOST_HERE) {
  int l = cuhost::lane(), source = l ^ bits;
  // A lane of a later group of `width` is out of reach, and one of an earlier group is not.
  if (source / width > l / width) source = l;
  return cuhost::shuffle(mask, value, source, CUHOST_SITE("__shfl_xor_sync"));
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUHOST_HERE) {
  int l = cuhost::lane();
  return cuhost::shuffle(mask, value, (l & (width - 1)) + (int)delta < width ? l + (int)delta : l,
                         CUHOST_SITE("__shfl_down_sync"));
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUHOST_HERE) {
  int l = cuhost::lane();
  return cuhost::shuffle(mask, value, (l & (width - 1)) >= (int)delta ? l - (int)delta : l,
                         CUHOST_SITE("__shfl_up_sync"));
}
static inline unsigned __ballot_sync(unsigned mask, int p, CUHOST_HERE) {
  return cuhost::ask(mask, p, CUHOST_SITE("__ballot_sync")).result;
}
static inline int __any_sync(unsigned mask, int p, CUHOST_HERE) {
  return cuhost::ask(mask, p, CUHOST_SITE("__any_sync")).result != 0;
}
static inline int __all_sync(unsigned mask, int p, CUHOST_HERE) {
  cuhost::Vote v = cuhost::ask(mask, p, CUHOST_SITE("__all_sync"));
  return v.result == v.lanes;
}
static inline unsigned __activemask() {
  cuhost::fault({"__activemask", nullptr, 0}, "what it returns is not defined; pass the mask that is meant");
}
static inline unsigned __reduce_add_sync(unsigned mask, unsigned v, CUHOST_HERE) {
  return cuhost::reduce(mask, v, [](unsigned a, unsigned b) { return a + b; }, CUHOST_SITE("__reduce_add_sync"));
}
static inline int __reduce_add_sync(unsigned mask, int v, CUHOST_HERE) {
  return (int)cuhost::reduce(mask, (unsigned)v, [](unsigned a, unsigned b) { return a + b; }, CUHOST_SITE("__reduce_add_sync"));
}
template <class T>
static inline T __reduce_max_sync(unsigned mask, T v, CUHOST_HERE) {
  static_assert(std::is_integral<T>::value, "integers only");
  return cuhost::reduce(mask, v, [](T a, T b) { return a < b ? b : a; }, CUHOST_SITE("__reduce_max_sync"));
}
template <class T>
static inline T __reduce_min_sync(unsigned mask, T v, CUHOST_HERE) {
  static_assert(std::is_integral<T>::value, "integers only");
  return cuhost::reduce(mask, v, [](T a, T b) { return b < a ? b : a; }, CUHOST_SITE("__reduce_min_sync"));
}

// ---- atomics on integers: relaxed, since blocks run on several OS threads
template <class T>
using cuhost_integer = typename std::enable_if<std::is_integral<T>::value, T>::type;
template <class T>
static inline cuhost_integer<T> atomicAdd(T* p, T v) {
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T>
static inline cuhost_integer<T> atomicAnd(T* p, T v) {
  return __atomic_fetch_and(p, v, __ATOMIC_RELAXED);
}
template <class T>
static inline cuhost_integer<T> atomicOr(T* p, T v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
static inline cuhost_integer<T> atomicExch(T* p, T v) {
  return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}
template <class T>
static inline cuhost_integer<T> atomicCAS(T* p, T expected, T v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
static inline cuhost_integer<T> atomicMax(T* p, T v) {
  T now = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (now < v && !__atomic_compare_exchange_n(p, &now, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return now;
}
template <class T>
static inline cuhost_integer<T> atomicMin(T* p, T v) {
  T now = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (v < now && !__atomic_compare_exchange_n(p, &now, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return now;
}
