// gene_attention_sm90.cuh: the pipeline that forward and backward share on Hopper: who takes which work, and how tiles of 64-column
// rows come into shared memory.
//
// A block has one producer warpgroup, which only loads, and consumer warpgroups of 64 rows each, which only compute; blocks stay
// and take entries of the list (gene_attention_items_sm90.cu) in turn, a multiprocessor each, longest cells first. Entry i goes to
// block i mod G: no block does more than one entry's work more than another, since entries shrink along the list.
//
// A ring of stages holds the visited tiles of 128 rows. The producer alone walks over them: it writes beside each tile what it is
// (`visit`), so consumers never look at cells or markers. Two barriers a stage: `full` counts the bytes that the copy engine lands
// (dense), or the threads that gather (marker-sparse: rows lie in `order`, one cp.async of 16 bytes per chunk); `empty` counts the
// consumer warpgroups that are done.
#pragma once
#include "gene_attention_problem.cuh"
#include "ptx_sm90.cuh"

constexpr int K = 64;                  // head width: one swizzled row of 128 bytes
constexpr int SLOT = 64;               // rows of a consumer warpgroup
constexpr int T = 128;                 // rows of a visited tile
constexpr int SLOT_BYTES = SLOT * K * 2, TILE_BYTES = T * K * 2;

// What an entry of the list says.
struct Entry {
  const unsigned* at;
  int cells, parts, first;
  __device__ __forceinline__ Entry(const unsigned* entries, int i) : at(entries + (size_t)i * 8) {
    const uint4 a = load16<uint4>(at);
    cells = a.x, parts = a.y, first = a.z;
  }
  __device__ __forceinline__ int cell(int c) const { return (int)at[4 + c]; }
};
// Work item `i` of entries × heads: entries of one cell and head follow one another.
struct Work {
  Entry entry;
  int head, part;
  __device__ __forceinline__ Work(const unsigned* entries, int i, int heads) : entry(entries, i / heads) {
    int within = i - entry.first * heads;
    head = within / entry.parts;
    part = within % entry.parts;
  }
};

// Beside a visited tile: its first row within the cell, which slot it is for, whether it is the last of its cell or of the item, and
// (marker-sparse) whether all of its pairs with the item's rows attend.
struct TileMark {
  unsigned bits;
  __device__ __forceinline__ int tile() const { return bits & 0xFFFFF; }
  __device__ __forceinline__ bool is_for(int slot) const { return (bits >> 20 & 0xF) == 0 || (int)(bits >> 20 & 0xF) == slot + 1; }
  __device__ __forceinline__ bool last_of_cell() const { return bits >> 24 & 1; }
  __device__ __forceinline__ bool last_of_item() const { return bits >> 25 & 1; }
  __device__ __forceinline__ bool whole() const { return bits >> 26 & 1; }
};
// `slot` -1: for all of them.
DEVICE unsigned tile_mark(int tile, int slot, bool last_of_cell, bool last_of_item, bool whole) {
  return tile | (slot + 1) << 20 | (unsigned)last_of_cell << 24 | (unsigned)last_of_item << 25 | (unsigned)whole << 26;
}

// A place in a ring of STAGES: its stage, and the parity of the phase that fills it.
template <int STAGES>
struct Place {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Marker-sparse: may rows [a, a_end) of a cell's order meet rows [b, b_end)? Global tokens stand first and meet all; the others lie
// in rank order, so the nearest two decide.
DEVICE bool meet(const Batch& batch, int start, int globals, int a, int a_end, int b, int b_end) {
  if (a < globals || b < globals) return true;
  const unsigned* token = batch.order + start;
  int window = batch.shape.window;
  return (int)token[b] - window <= (int)token[a_end - 1] && (int)token[a] - window <= (int)token[b_end - 1];
}

// Do all pairs of rows [a, a_end) with the tile [b, b + T) attend? It is full, and they are global, or so near that the farthest two
// attend.
DEVICE bool meet_all(const Batch& batch, int start, int length, int globals, int a, int a_end, int b) {
  if (b + T > length) return false;
  if (a_end <= globals || b + T <= globals) return true;
  if (a < globals || b < globals) return false;
  const unsigned* token = batch.order + start;
  int window = batch.shape.window;
  return (int)token[a_end - 1] - (int)token[b] <= window && (int)token[b + T - 1] - (int)token[a] <= window;
}

// Marker-sparse: a lane's two rows as ranges of tokens, so that a pair costs a subtraction and a comparison: token - lowest, without
// sign, is at most `reach`. Columns behind the cell's end are NO_TOKEN, which no row reaches.
constexpr unsigned NO_TOKEN = 0x40000000u;
struct Reach {
  unsigned lowest[2], reach[2];
  __device__ __forceinline__ Reach(const Batch& batch, int start, int length, int globals, int row) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int r = row + fragment_row(2 * h);
      lowest[h] = r < globals || r >= length ? 0 : batch.token(start + r) - batch.shape.window;
      reach[h] = r < globals ? NO_TOKEN - 1 : 2 * batch.shape.window;
    }
  }
  __device__ __forceinline__ void mask(float (&s)[T / 8][4], int globals, const int* token) const {
#pragma unroll
    for (int n = 0; n < T / 8; n++) {
      const int2 pair = *reinterpret_cast<const int2*>(token + fragment_column(n, 0));
#pragma unroll
      for (int e = 0; e < 4; e++) {
        bool near = (unsigned)(e % 2 ? pair.y : pair.x) - lowest[e / 2] <= reach[e / 2];
        if (!near && fragment_column(n, e) >= globals) s[n][e] = -INFINITY;
      }
    }
  }
};

// Dense: keys behind the cell's end.
DEVICE void mask_columns(float (&s)[T / 8][4], int valid) {
#pragma unroll
  for (int n = 0; n < T / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (fragment_column(n, e) >= valid) s[n][e] = -INFINITY;
}

// What consumers have to know of an item; the producer writes it.
struct Slot {
  int start, length, first, globals;  // of its cell; the slot's first row in it; length 0: nothing to do
};
struct Item {
  Slot slot[3];
  int head, active, cells, unused;  // slots with work; cells they belong to
};

// Tokens of positions [first, last], as an array.
struct Positions {
  const Batch& batch;
  int first, last;
  __device__ __forceinline__ int operator[](int i) const { return batch.token(min(first + i, last)); }
  __device__ __forceinline__ Positions operator+(int i) const { return Positions{batch, first + i, last}; }
};

// A consumer hands something back to the producer: a warp at a time, when all its lanes are done.
DEVICE void release(Mbarrier* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

// Gathers `rows` rows of 64 columns to a swizzled tile by the 128 threads of the producer warpgroup: positions from `position` on,
// zeros from `valid` on. `from`: column 0 of token 0.
DEVICE void gather_rows(unsigned char* to, const __nv_bfloat16* from, size_t stride, const Batch& batch, int position, int valid,
                        int rows) {
#pragma unroll 2
  for (int i = threadIdx.x % 128; i < rows * 8; i += 128) {
    int row = i / 8, chunk = i % 8;
    bool read = row < valid;
    size_t token = read ? batch.token(position + row) : 0;
    cp_async_zero<16>(to + swizzle128(row * 128 + chunk * 16), from + token * stride + chunk * 8, read);
  }
}
