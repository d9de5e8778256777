// rows.cu: rows gathered by an index, and rows added back: masked tokens on their way into and out of the masked-gene head.
//
//   rows_gather:       y[m] = x[index[m]]           bits are moved, not numbers
//   rows_scatter_add:  dx[index[m]] += dy[m]         the indices of one call are distinct, so no two threads meet
//
// A thread owns 16 bytes (gather) or a pack of 8 elements (scatter) of one row. Neighbours read neighbouring places, so a row
// of 128 bytes or more is read in whole sectors wherever it lies.
//
// Bytes at activation size a: gather 2·M·D·a, scatter 3·M·D·a; 4·M of indices. No FLOPs to speak of: bound by memory.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) rows_gather(
    const act_t* x,         // (rows, D)
    const unsigned* index,  // (M)
    act_t* y,               // (M, D)
    int gathered, int width) {
  const int size = 16 / (int)sizeof(act_t);
  int pieces = ceil_div(width, size);
  unsigned item = blockIdx.x * 256 + threadIdx.x;
  int m = (int)(item / pieces), c = (int)(item % pieces) * size;
  if (m >= gathered) return;
  const act_t* from = x + (size_t)index[m] * width + c;
  act_t* to = y + (size_t)m * width + c;
  if (width % size == 0) {
    store16(to, load16<uint4>(from));
  } else {
    for (int i = 0; i < min(size, width - c); i++) to[i] = from[i];
  }
}

extern "C" __global__ void __launch_bounds__(256) rows_scatter_add(
    const act_t* dy,        // (M, D)
    const unsigned* index,  // (M)
    act_t* dx,              // (rows, D) +=
    int gathered, int width) {
  int packs = ceil_div(width, PACK);
  unsigned item = blockIdx.x * 256 + threadIdx.x;
  int m = (int)(item / packs), c = (int)(item % packs) * PACK;
  if (m >= gathered) return;
  bool whole = width % PACK == 0;
  int count = min(PACK, width - c);
  act_t* to = dx + (size_t)index[m] * width + c;
  Pack sum = load_pack(to, count, whole), add = load_pack(dy + (size_t)m * width + c, count, whole);
#pragma unroll
  for (int i = 0; i < PACK; i++) sum.v[i] += add.v[i];
  store_pack(to, sum, count, whole);
}
