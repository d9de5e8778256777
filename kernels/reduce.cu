// reduce.cu: sums of long arrays in f64 and of the columns of small matrices in f32, each in an order that the shape decides.
//
//   reduce_blocks, then reduce_total:  scalars[slot] = Σ x  or  Σ x², or onto it
//   reduce_first_bad:                  scalars[slot] = place of the first NaN or infinity, where scalars[when] is one
//   reduce_columns:                    first ++ second += Σ_rows partial
//
// A block adds up SPAN elements, a thread every 256th group of 4 of them, in f64; one more block adds up the blocks. The
// result stays on the device: the optimiser reads the gradient norm there.
//
// Bytes: 4·n in, 8·n/SPAN between the launches. FLOPs: n (2·n for squares), in f64 at half of f32's rate or less (1/2 on
// A100 and H100), still far below the memory's time. reduce_columns: 4·rows·columns in.
#include "common.cuh"

// Elements per block. 16,384 · 4 bytes keep 256 threads busy for 16 loads each; 100 million parameters give 6,104 blocks.
#define SPAN 16384

extern "C" __global__ void __launch_bounds__(256) reduce_blocks(
    const float* x,  // (n)
    double* sums,    // (blocks)
    unsigned long long n, int squared) {
  SHARED(double, partial, [8]);
  unsigned long long start = (unsigned long long)blockIdx.x * SPAN;
  int count = (int)min((unsigned long long)SPAN, n - start);
  double sum = 0.0;
  for (int i = threadIdx.x * 4; i < count; i += 256 * 4) {
    float4 v;
    if (i + 4 <= count && aligned16(x)) {
      v = load16<float4>(x + start + i);
    } else {
      v.x = x[start + i];
      v.y = i + 1 < count ? x[start + i + 1] : 0.0f;
      v.z = i + 2 < count ? x[start + i + 2] : 0.0f;
      v.w = i + 3 < count ? x[start + i + 3] : 0.0f;
    }
    double a = v.x, b = v.y, c = v.z, d = v.w;
    sum += squared ? a * a + b * b + (c * c + d * d) : a + b + (c + d);
  }
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) reduce_total(
    const double* sums,  // (blocks)
    double* scalars,     // (slots)
    int blocks, int slot, int add) {
  SHARED(double, partial, [8]);
  double sum = 0.0;
  for (int i = threadIdx.x; i < blocks; i += 256) sum += sums[i];
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) scalars[slot] = add ? scalars[slot] + sum : sum;
}

// One block looks for the place, and only where the sum says that there is one: in a good step this reads 8 bytes, so its
// accesses are 4 bytes wide. It stops at the first 1,024 elements that hold a bad one.
extern "C" __global__ void __launch_bounds__(256) reduce_first_bad(
    const float* x,   // (n)
    double* scalars,  // (slots) [slot] = the place, or n
    unsigned long long n, int when, int slot) {
  SHARED(int, bad_of, [256]);
  if (fabs(scalars[when]) < INFINITY) return;  // the same in every thread
  for (unsigned long long start = 0; start < n; start += 4 * 256) {
    int bad = 4;  // the first of this thread's four
    for (int i = 3; i >= 0; i--) {
      unsigned long long place = start + 4 * threadIdx.x + i;
      if (place < n && !(fabsf(x[place]) < INFINITY)) bad = i;
    }
    bad_of[threadIdx.x] = bad;
    if (__syncthreads_count(bad < 4) == 0) continue;
    if (threadIdx.x == 0) {
      int thread = 0;
      while (bad_of[thread] == 4) thread++;
      scalars[slot] = (double)(start + 4 * thread + bad_of[thread]);
    }
    return;
  }
  if (threadIdx.x == 0) scalars[slot] = (double)n;
}

// A block owns 32 columns; its 8 warps take the rows in turn, and warp 0 adds up the warps in order.
extern "C" __global__ void __launch_bounds__(256) reduce_columns(
    const float* partial,    // (rows, columns)
    float* first,            // (split) +=
    float* OPTIONAL second,  // (columns - split) +=
    int rows, int columns, int split) {
  SHARED(float, sums, [8][32]);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (c < columns)
    for (int row = warp; row < rows; row += 8) sum += partial[(size_t)row * columns + c];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= columns) return;
  for (int w = 1; w < 8; w++) sum += sums[w][lane];
  if (c < split)
    first[c] += sum;
  else
    second[c - split] += sum;
}
