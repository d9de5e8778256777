// gene_attention_order.cu: the tokens of each cell with the global ones first, for marker-sparse attention.
//
//   order[start .. start + G] = global tokens of the cell, order[start + G .. end] = the others, both in rank order
//   globals[cell] = G
//
// A stable partition: the place of a token is the number of tokens of its kind before it (and G in front of the others). One
// block per cell; 256 tokens at a time, a ballot per warp and a sum over the warps before it. The flags are read twice.
// Must move: N bytes in, 4·N out. Costs little beside the attention that follows it.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) gene_attention_order(
    const unsigned* cell_start,   // (C + 1)
    const unsigned char* global,  // (N) 1 = global token
    unsigned* order,              // (N)
    unsigned* globals             // (C)
) {
  SHARED(int, in_warp, [8]);
  int start = (int)cell_start[blockIdx.x], length = (int)cell_start[blockIdx.x + 1] - start;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = 0;
  for (int i = 0; i < length; i += 256) {
    int rank = i + threadIdx.x;
    count += __syncthreads_count(rank < length && global[start + rank]);
  }
  if (threadIdx.x == 0) globals[blockIdx.x] = (unsigned)count;

  int before = 0;  // global tokens of ranks below i
  for (int i = 0; i < length; i += 256) {
    int rank = i + threadIdx.x;
    bool is_global = rank < length && global[start + rank];
    unsigned votes = __ballot_sync(FULL_WARP, is_global);
    if (lane == 0) in_warp[warp] = __popc(votes);
    __syncthreads();
    int place = before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < 8; w++) {
      place += w < warp ? in_warp[w] : 0;
      before += in_warp[w];
    }
    if (rank < length) order[start + (is_global ? place : count + rank - place)] = start + rank;
    __syncthreads();  // before the next round's counts
  }
}
