// gene_attention_items_sm90.cu: the work of the Hopper attention kernels as a list, longest cells first.
//
// An entry is what one block does for one head: up to `slots` tiles of 64 rows, one for each of its consumer warpgroups, of one
// cell; or, where `merge` is set, `slots` cells of at most 64 rows each. A cell of w tiles makes T = ceil(w / slots) entries side
// by side, of w/T tiles each or one more: 400 tokens are 3 + 2 + 2 tiles, not 3 + 3 + 3.
//
//   entry: cells, T, its cell's first entry, unused, cell 0, cell 1, cell 2, unused        8 numbers, 32 bytes
//
// One block. A counting sort by w; within a bin cells stand in the order in which their threads came, which no result depends on.
// Reads 4·C bytes and writes 32 per entry.
#include "common.cuh"

#define BINS 1024  // cells have at most 65,535 tokens

extern "C" __global__ void __launch_bounds__(1024) gene_attention_items(
    const unsigned* cell_start,  // (C + 1)
    unsigned* entries,           // (up to N/64 + C, 8)
    unsigned* count,             // (1)
    int cells, int slots, int merge) {
  SHARED(int, held, [BINS]);   // cells in a bin, then how many have been placed
  SHARED(int, before, [BINS]);  // entries of longer cells
  SHARED(int, warps, [32]);
  const int bin = threadIdx.x, lane = bin % 32;
  auto tiles = [&](int cell) { return ceil_div((int)(cell_start[cell + 1] - cell_start[cell]), 64); };
  auto merged = [&](int w) { return merge && w == 1; };
  held[bin] = 0;
  __syncthreads();
  for (int c = bin; c < cells; c += BINS) atomicAdd(held + BINS - tiles(c), 1);  // bin b: cells of BINS - b tiles
  __syncthreads();

  const int w = BINS - bin, mine = held[bin];
  int sum = merged(w) ? ceil_div(mine, slots) : mine * ceil_div(w, slots);
  const int own = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(FULL_WARP, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[bin / 32] = sum;
  __syncthreads();
  for (int i = 0; i < bin / 32; i++) sum += warps[i];
  before[bin] = sum - own;
  if (bin == BINS - 1) *count = sum;
  const int in_bin = mine;
  held[bin] = 0;
  SHARED(int, last, [1]);  // cells of one tile
  if (bin == BINS - 1) last[0] = in_bin;
  __syncthreads();

  for (int c = bin; c < cells; c += BINS) {
    const int w = tiles(c), rank = atomicAdd(held + BINS - w, 1), first = before[BINS - w];
    if (merged(w)) {
      unsigned* entry = entries + (size_t)(first + rank / slots) * 8;
      if (rank % slots == 0) {
        entry[0] = min(slots, last[0] - rank);
        entry[1] = 1;
        entry[2] = first + rank / slots;
      }
      entry[4 + rank % slots] = c;
    } else {
      const int parts = ceil_div(w, slots), at = first + rank * parts;
      for (int k = 0; k < parts; k++) {
        unsigned* entry = entries + (size_t)(at + k) * 8;
        entry[0] = 1;
        entry[1] = parts;
        entry[2] = at;
        entry[4] = c;
      }
    }
  }
}
