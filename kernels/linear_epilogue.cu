// linear_epilogue.cu: what the matrix products of a linear layer's backward pass leave to do.
//
//   linear_relu_mask:       dx = product ∘ 1[x > 0]   or   dx += product ∘ 1[x > 0]
//   linear_bias_gradient:   partial = Σ_rows dy, block by block of rows; reduce_columns (reduce.cu) adds the blocks in order
//
// The product may stand in dx itself. The forward pass needs nothing from here: bias and ReLU are epilogues of the product.
//
// Bytes at activation size a: mask 3·N·F·a (4 with +=); bias gradient N·F·a in and 4·F per block out. A FLOP an element:
// bound by memory.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) linear_relu_mask(
    const act_t* OPTIONAL product,  // (n); null: it stands in dx
    const act_t* x,                 // (n) the ReLU's output
    act_t* dx,                      // (n)
    unsigned long long n, int accumulate) {
  unsigned long long start = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
  if (start >= n) return;
  int count = (int)min((unsigned long long)PACK, n - start);
  const act_t* from = product ? product : dx;
  bool whole = count == PACK && aligned16(from) && aligned16(x) && aligned16(dx);
  Pack p = load_pack(from + start, count, whole), live = load_pack(x + start, count, whole), before = Pack{};
  if (accumulate) before = load_pack(dx + start, count, whole);
#pragma unroll
  for (int i = 0; i < PACK; i++) p.v[i] = before.v[i] + (live.v[i] > 0.0f ? p.v[i] : 0.0f);
  store_pack(dx + start, p, count, whole);
}

// Block (bx, by) sums rows by·rows_per_block and on, of columns bx·256 and on: a lane owns a pack of 8 columns, a warp every
// 8th row, and the warps are added in order.
extern "C" __global__ void __launch_bounds__(256) linear_bias_gradient(
    const act_t* dy,  // (rows, columns)
    float* partial,   // (row blocks, columns)
    int rows, int rows_per_block, int columns) {
  SHARED(float, sums, [8][256]);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 256 + lane * PACK;
  int count = max(0, min(PACK, columns - c));
  bool whole = columns % PACK == 0 && count == PACK;
  int first = blockIdx.y * rows_per_block, end = min(rows, first + rows_per_block);
  Pack sum = Pack{};
  for (int row = first + warp; row < end && count > 0; row += 8) {
    Pack d = load_pack(dy + (size_t)row * columns + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum.v[i] += d.v[i];
  }
  store_pack(sums[warp] + lane * PACK, sum);
  __syncthreads();
  int column = blockIdx.x * 256 + threadIdx.x;
  if (column >= columns) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < 8; w++) total += sums[w][threadIdx.x];
  partial[(size_t)blockIdx.y * columns + column] = total;
}
