// gene_attention.cuh: which tiles of a packed batch meet, and how they are loaded. (Which pairs in them attend:
// gene_attention_problem.cuh.)
//
// A block owns 64 rows of the packed batch and one head, whatever cells the rows belong to, and visits the tiles of those
// cells one after the other. A cell's tiles are counted from its own first row, so its results have the same bits in any batch:
//
//     packed rows   |  cell 0  |c1|     cell 2      |      cell 3 ...           a block's rows [====] may hold several short
//     blocks        [======][======][======][======][======]                   cells or parts of two long ones; there is no
//                            ^^                                                padding and no block without rows
//     visits of the marked block:  cell 0: [tile][tile]  c1: [t]  cell 2: [tile][tile][ti]   (tiles start where a cell does)
//
// A warp owns 16 of the rows and skips the visits that hold nothing for them; keys beyond a cell's end cost no product.
//
// Marker-sparse: `order` lists the tokens of each cell with the global ones first and the others in rank order. Then the keys
// that all rows attend to are the first tiles of a cell, side by side, and those of a window are consecutive too: two ordinary
// tokens are never further apart in `order` than in rank.
//
//     key tiles of a cell, in order   [G][G][o][o][o][o][o][o][o][o]      G: holds global tokens, o: ordinary ones alone
//     visits of ordinary rows          x  x        x  x  x                front tiles, then those that the window meets
//     visits of rows with a global one x  x  x  x  x  x  x  x  x  x
//
// The pattern is symmetric, so the same walk serves query tiles that visit keys and key tiles that visit queries. A `position`
// is a place in `order` (dense: the token itself), local to the cell where it is compared with `globals`.
#pragma once
#include "gene_attention_tile.cuh"

// The last cell that starts at or before `position`; 32 probes at a time, by a whole warp.
DEVICE int cell_of(const Batch& batch, int position) {
  int first = 0, count = batch.shape.cells;
  while (count > 1) {
    int step = ceil_div(count, 32), probe = (int)(threadIdx.x % 32) * step;
    bool before = probe < count && (int)batch.cell_start[first + probe] <= position;
    int last = __popc(__ballot_sync(FULL_WARP, before)) - 1;
    first += last * step;
    count = min(step, count - last * step);
  }
  return first;
}

// The tiles of T positions that rows [first, end) attend to. Every thread walks alike, with addresses of its own warp alone.
template <int T>
struct Walk {
  const Batch& batch;
  int first, end;
  int cell, next_tile, front, middle, last;
  Visit visit;

  __device__ __forceinline__ Walk(const Batch& batch, int first, int end)
      : batch(batch), first(first), end(end), cell(cell_of(batch, first) - 1), next_tile(0), front(0), middle(0), last(0),
        visit{} {}

  // Sets `visit`; false when there is no tile left.
  __device__ __forceinline__ bool next() {
    while (next_tile >= last) {
      if (++cell == batch.shape.cells) return false;
      visit.start = (int)batch.cell_start[cell];
      if (visit.start >= end) return false;
      visit.length = (int)batch.cell_start[cell + 1] - visit.start;
      enter();
    }
    visit.tile = next_tile * T;
    next_tile = next_tile + 1 == front ? middle : next_tile + 1;
    return true;
  }

  // Tiles [0, front) and [middle, last) of a new cell.
  __device__ __forceinline__ void enter() {
    front = middle = next_tile = 0;
    last = ceil_div(visit.length, T);
    visit.globals = 0;
    if (!batch.order) return;
    visit.globals = (int)batch.globals[cell];
    int a = max(first - visit.start, 0), b = min(end - visit.start, visit.length) - 1;  // own first and last position
    if (a < visit.globals) return;
    int window = batch.shape.window;
    front = ceil_div(visit.globals, T);
    middle = max(front, max(a - window, 0) / T);
    last = min(last, (b + window) / T + 1);
    // Positions lie closer together than ranks: what the window does not reach after all goes, at either end.
    const unsigned* token = batch.order + visit.start;
    int lowest = (int)token[a] - window, highest = (int)token[b] + window;
    while (middle < last && (int)token[min((middle + 1) * T, visit.length) - 1] < lowest) middle++;
    while (middle < last && (int)token[max((last - 1) * T, visit.globals)] > highest) last--;
    next_tile = front ? 0 : middle;
  }
};

// The warp's 16 rows start at position `row` of the visited cell, before it or behind its end too. Do they have nothing to do
// with the tile?
template <int T>
DEVICE bool idle(const Batch& batch, const Visit& visit, int row) {
  if (row + 16 <= 0 || row >= visit.length) return true;
  if (!batch.order || row < visit.globals || visit.tile < visit.globals) return false;
  int window = batch.shape.window;
  return visit.tile > row + 15 + window || visit.tile + T - 1 < row - window;
}

// ---- loads
// `rows` rows of K elements to shared memory, those from `valid` on as zeros: zeros add nothing to a product, NaN would.
template <int K>
DEVICE void load_rows(act_t* to, const act_t* from, int stride, const Batch& batch, int position, int valid, int rows) {
  constexpr int CHUNK = 16 / sizeof(act_t), CHUNKS = K / CHUNK;
  for (int i = threadIdx.x; i < rows * CHUNKS; i += THREADS) {
    int row = i / CHUNKS, column = i % CHUNKS * CHUNK;
    bool read = row < valid;
    size_t token = read ? batch.token(position + row) : 0;
    cp_async_zero<16>(to + row * Tile<K>::STRIDE + column, from + token * stride + column, read);
  }
}
// Their tokens; 0 from `valid` on.
DEVICE void load_tokens(int* to, const Batch& batch, int position, int valid, int rows) {
  for (int i = threadIdx.x; i < rows; i += THREADS) to[i] = i < valid ? batch.token(position + i) : 0;
}
// Rows of a visited tile that exist, and those that products read.
template <int T>
DEVICE int visited(const Visit& visit) {
  return min(T, visit.length - visit.tile);
}
DEVICE int round_up16(int x) { return (x + 15) & ~15; }
