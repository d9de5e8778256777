// common.cuh: what every kernel shares: the activation type, 16-byte packs of 8 elements, sums in a fixed order, dropout.
//
// A kernel file is compiled twice, with ACT_F32 and with ACT_BF16; `act_t` is the type of activations and of the weights
// that multiply them. All arithmetic is f32: a value is widened when it is loaded and rounded once, when it is stored.
// The same file is compiled a third and fourth time as host C++ for the emulator (kernels/emulator/), so a kernel uses
// SHARED and DYNAMIC_SHARED for shared memory and ptx.cuh for anything that C++ cannot say.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <stdint.h>
#define SHARED(T, name, dims) __shared__ __align__(16) T name dims
#define DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)
#endif

#define DEVICE static __device__ __forceinline__
// In a kernel's parameter list: the pointer may be null (`Option` in Rust).
#define OPTIONAL
// struct KERNEL_ARGUMENT Name { ... }: passed by value to a kernel; build.rs writes the same struct in Rust.
#define KERNEL_ARGUMENT

#if defined(ACT_BF16)
typedef __nv_bfloat16 act_t;
#elif defined(ACT_F32)
typedef float act_t;
#else
#error "compile with -DACT_F32 or -DACT_BF16"
#endif

// Elements that a thread handles at once: one Philox block, 16 bytes of bf16 or twice 16 bytes of f32.
#define PACK 8
#define FULL_WARP 0xFFFFFFFFu

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- widening and rounding
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
DEVICE T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- 16-byte accesses
template <class T>
DEVICE bool aligned16(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}
#if defined(__CUDACC__)
#define CHECK_ALIGNED16(p)
#else
#define CHECK_ALIGNED16(p) \
  if (!aligned16(p)) cuhost::fault({"16-byte access", __FILE__, __LINE__}, "address %p is not aligned", (const void*)(p))
#endif
// A register image of 16 bytes of memory.
template <class T>
DEVICE T load16(const void* p) {
  static_assert(sizeof(T) == 16, "16 bytes");
  CHECK_ALIGNED16((const char*)p);
  return *reinterpret_cast<const T*>(p);
}
template <class T>
DEVICE void store16(void* p, T value) {
  static_assert(sizeof(T) == 16, "16 bytes");
  CHECK_ALIGNED16((const char*)p);
  *reinterpret_cast<T*>(p) = value;
}

// 8 consecutive elements as f32.
struct Pack {
  float v[PACK];
};
DEVICE unsigned pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
DEVICE float bf16_low(unsigned pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }
DEVICE Pack load_pack(const float* p) {
  float4 a = load16<float4>(p), b = load16<float4>(p + 4);
  return Pack{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
DEVICE Pack load_pack(const __nv_bfloat16* p) {
  uint4 a = load16<uint4>(p);
  return Pack{{bf16_low(a.x), bf16_high(a.x), bf16_low(a.y), bf16_high(a.y), bf16_low(a.z), bf16_high(a.z), bf16_low(a.w),
               bf16_high(a.w)}};
}
DEVICE void store_pack(float* p, const Pack& x) {
  store16(p, make_float4(x.v[0], x.v[1], x.v[2], x.v[3]));
  store16(p + 4, make_float4(x.v[4], x.v[5], x.v[6], x.v[7]));
}
DEVICE void store_pack(__nv_bfloat16* p, const Pack& x) {
  store16(p, make_uint4(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]), pack_bf16(x.v[4], x.v[5]),
                        pack_bf16(x.v[6], x.v[7])));
}
// The first `count` of 8 elements, 0 beyond. `whole`: all rows start at 16-byte addresses and `count` is 8.
template <class T>
DEVICE Pack load_pack(const T* p, int count, bool whole) {
  if (whole) return load_pack(p);
  Pack x;
#pragma unroll
  for (int i = 0; i < PACK; i++) x.v[i] = i < count ? to_float(p[i]) : 0.0f;
  return x;
}
template <class T>
DEVICE void store_pack(T* p, const Pack& x, int count, bool whole) {
  if (whole) return store_pack(p, x);
#pragma unroll
  for (int i = 0; i < PACK; i++)
    if (i < count) p[i] = from_float<T>(x.v[i]);
}

// ---- sums over a warp and a block, in an order that the shape alone decides
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) x += __shfl_xor_sync(FULL_WARP, x, bit);
  return x;
}
DEVICE double warp_sum(double x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) x += __shfl_xor_sync(FULL_WARP, x, bit);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, bit));
  return x;
}
// The sum over all threads of the block (a multiple of 32), in every thread. `partial` is shared memory, one element per warp,
// and is free again when the call returns.
template <class T>
DEVICE T block_sum(T x, T* partial) {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[warp] = x;
  __syncthreads();
  T total = partial[0];
  for (int w = 1; w < warps; w++) total += partial[w];
  __syncthreads();
  return total;
}

// ---- dropout: the bits of src/rng.rs
// An element is dropped when the 16-bit lane `element % 8` of Philox block `element / 8` is below `threshold`.
struct KERNEL_ARGUMENT Dropout {
  unsigned long long seed;
  unsigned long long first_row;  // index within the logical batch of this call's first row
  unsigned int step;
  unsigned int site;
  unsigned int threshold;  // of 65536; 0 = no dropout
  float scale;             // of a kept element
};
// Philox 4x32-10 (Salmon et al., SC 2011) at counter (x, y, z, w).
DEVICE uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    unsigned high0 = __umulhi(counter.x, 0xD2511F53u), low0 = counter.x * 0xD2511F53u;
    unsigned high1 = __umulhi(counter.z, 0xCD9E8D57u), low1 = counter.z * 0xCD9E8D57u;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}
// Block `block` of stream (seed, step, site).
DEVICE uint4 stream_block(unsigned long long seed, unsigned step, unsigned site, unsigned long long block) {
  return philox4x32(make_uint4((unsigned)block, (unsigned)(block >> 32), step, site),
                    make_uint2((unsigned)seed, (unsigned)(seed >> 32)));
}
// Even lanes are the low halves of the words.
DEVICE unsigned lane16(uint4 block, int lane) {
  unsigned word = lane < 4 ? (lane < 2 ? block.x : block.y) : (lane < 6 ? block.z : block.w);
  return word >> (lane % 2 * 16) & 0xFFFFu;
}
DEVICE float dropout_factor(const Dropout& d, unsigned long long element) {
  uint4 block = stream_block(d.seed, d.step, d.site, element / 8);
  return lane16(block, (int)(element % 8)) < d.threshold ? 0.0f : d.scale;
}
// Factors of the 8 elements from `column` on of row `row` of this call, whose rows have `width` elements. Where 8 divides the
// width they are one Philox block; elsewhere they straddle two.
DEVICE Pack dropout_pack(const Dropout& d, int row, int width, int column) {
  unsigned long long element = (d.first_row + row) * width + column;
  int skip = (int)(element % 8);
  uint4 a = stream_block(d.seed, d.step, d.site, element / 8);
  uint4 b = skip ? stream_block(d.seed, d.step, d.site, element / 8 + 1) : a;
  Pack factor;
#pragma unroll
  for (int i = 0; i < PACK; i++) {
    int lane = skip + i;
    unsigned bits = lane < 8 ? lane16(a, lane) : lane16(b, lane - 8);
    factor.v[i] = bits < d.threshold ? 0.0f : d.scale;
  }
  return factor;
}
