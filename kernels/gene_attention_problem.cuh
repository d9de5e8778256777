// gene_attention_problem.cuh: what every attention kernel computes with, whatever its tiles: the sizes, which pairs of a visited
// tile attend, which of those dropout keeps, and where a lane's elements lie in a fragment.
#pragma once
#include "ptx.cuh"

struct KERNEL_ARGUMENT AttentionShape {
  int tokens;   // N
  int cells;    // C
  int heads;    // H
  int window;   // half-width in ranks, at most N; with `order` alone
  float scale;  // 1 / sqrt(K)
};

// What all kernels of a call read, apart from activations.
struct Batch {
  const unsigned* cell_start;
  const unsigned* order;    // null: dense
  const unsigned* globals;  // with `order`
  AttentionShape shape;
  Dropout dropout;
  int head;  // of this block, or of what it works on now
  __device__ __forceinline__ int token(int position) const { return order ? (int)order[position] : position; }
  // (token, head) of the (N, H) arrays.
  __device__ __forceinline__ size_t row(int token) const { return (size_t)token * shape.heads + head; }
};

// A tile of a cell. `start`: the cell's first position; `tile`: the tile's first position within the cell.
struct Visit {
  int start, length, globals, tile;
};

// Where the lane's element e (0..3) of column block n lies in a 16 x 8n fragment.
DEVICE int fragment_row(int e) { return (int)(threadIdx.x % 32 / 4) + e / 2 * 8; }
DEVICE int fragment_column(int n, int e) { return n * 8 + (int)(threadIdx.x % 4) * 2 + e % 2; }
// Over the four lanes that share a row.
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(FULL_WARP, x, 1);
  return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// s = -inf for the pairs of the tile that do not attend. `row_token`: of the lane's two rows; `token`: of the tile, shared.
template <int T>
DEVICE void mask(float (&s)[T / 8][4], const Batch& batch, const Visit& visit, int row, const int (&row_token)[2],
                 const int* token) {
  if (!batch.order && row >= 0 && row + 16 <= visit.length && visit.tile + T <= visit.length) return;
#pragma unroll
  for (int n = 0; n < T / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int c = fragment_column(n, e), i = row + fragment_row(e), j = visit.tile + c;
      bool attends = i >= 0 && i < visit.length && j < visit.length;
      if (batch.order && attends && i >= visit.globals && j >= visit.globals) {
        int distance = row_token[e / 2] - token[c];
        attends = distance <= batch.shape.window && -distance <= batch.shape.window;
      }
      if (!attends) s[n][e] = -INFINITY;
    }
}

// ---- dropout
// Element (token, head, key): lane key % 8 of Philox block ((first_row + token) · H + head) · 8192 + key / 8, where key is the
// key's rank in its cell. A lane draws for one query and eight keys at a time, one block where the keys are eight consecutive
// ranks from a multiple of 8 on, and hands the answers round as bits.

// Tokens of a tile that follow one another, where others have an array of them.
struct Consecutive {
  int first;
  __device__ __forceinline__ int operator[](int i) const { return first + i; }
  __device__ __forceinline__ Consecutive operator+(int i) const { return Consecutive{first + i}; }
};

// Bit k: is the pair (query, key[k]) kept? Ranks before or behind the cell are drawn like others, and masked elsewhere.
template <class Tokens>
DEVICE unsigned keep_byte(const Batch& batch, int query, Tokens key, int start) {
  unsigned long long row = (batch.dropout.first_row + query) * batch.shape.heads + batch.head;
  unsigned bits = 0;
  for (int k = 0; k < 8;) {
    int block = (key[k] - start) >> 3;
    uint4 words = stream_block(batch.dropout.seed, batch.dropout.step, batch.dropout.site, row * 8192 + (long long)block);
    do {
      bits |= (unsigned)(lane16(words, (key[k] - start) & 7) >= batch.dropout.threshold) << k;
      k++;
    } while (k < 8 && (key[k] - start) >> 3 == block);
  }
  return bits;
}

// Which elements of a 16 x T fragment are kept; bit e of nibble n. Rows are queries and columns keys.
template <int T>
struct Kept {
  unsigned nibble[T / 8];
  __device__ __forceinline__ bool operator()(int n, int e) const { return nibble[n] >> e & 1; }
};
template <int T, class Queries, class Keys>
DEVICE Kept<T> keep_by_row(const Batch& batch, Queries query, Keys key, int start) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned mine = 0;  // byte m: query lane % 16, keys 8·(2m + lane / 16) ...
#pragma unroll
  for (int m = 0; m < T / 16; m++)
    mine |= keep_byte(batch, query[lane % 16], key + (2 * m + lane / 16) * 8, start) << (8 * m);
  Kept<T> kept = {};
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned bytes = __shfl_sync(FULL_WARP, mine, g + 8 * half + 16 * odd);
#pragma unroll
      for (int m = 0; m < T / 16; m++) kept.nibble[2 * m + odd] |= (bytes >> (8 * m + 2 * t) & 3) << (2 * half);
    }
  return kept;
}
// The transposed fragment: rows are keys and columns queries.
template <int T, class Keys, class Queries>
DEVICE Kept<T> keep_by_column(const Batch& batch, Keys key, Queries query, int start) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned mine = 0;  // byte m: query lane % 16 + 16·m, the eight keys of half lane / 16
#pragma unroll
  for (int m = 0; m < T / 16; m++)
    mine |= keep_byte(batch, query[lane % 16 + 16 * m], key + lane / 16 * 8, start) << (8 * m);
  Kept<T> kept = {};
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      unsigned bytes = __shfl_sync(FULL_WARP, mine, odd * 8 + 2 * t + e % 2 + 16 * (e / 2));
#pragma unroll
      for (int m = 0; m < T / 16; m++) kept.nibble[2 * m + odd] |= (bytes >> (8 * m + g) & 1) << e;
    }
  return kept;
}
