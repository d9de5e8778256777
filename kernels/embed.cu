// embed.cu: gather of table rows, their sum, LayerNorm and dropout in one pass; backward by sorted segments.
//
//   s = E_word[gene] + E_pos[position] + E_type[0] (+ E_value[value_bin])
//   x = ((s - mean) · rstd · weight + bias) · dropout factor
//
//   d = dx · dropout factor, g = d · weight, n = (s - mean) · rstd
//   ds = rstd · (g - mean_D(g) - n · mean_D(g·n)):  each table's row k += Σ ds over the tokens whose key is k
//   dweight += Σ d·n,  dbias += Σ d
//
// s is gathered again in each pass rather than kept: the tables stay in the second-level cache, an (N, D) buffer does not.
//
// embed_forward, embed_backward_tokens: a warp owns a token, a lane every 32nd pack of 8 columns, as in layernorm.cu. The
// second leaves mean(g) and mean(g·n) of each token, with which any element of ds follows without a sum over the row.
// embed_backward_rows, once per table: tokens come sorted by key (sort.cu). A warp takes a chunk of 32 of them and 256 columns
// and adds up runs of equal keys in registers. A run inside its chunk goes straight to the table: it has no other writer. A run
// that crosses into other chunks leaves its share in `edge`, and embed_backward_edges adds up the shares in order of chunk. So
// a gene that stands in every cell costs no more than one that stands in one, and nothing depends on who comes first.
// The type row has one key; its gradient is the sum of all ds and falls out of one of those sweeps.
//
// Bytes at activation size a: forward N·D·a out, 3 or 4 rows a token from tables that fit the second-level cache (V·D·a once);
// backward N·D·a of dx in per pass (tokens, word, position, value), 8·D·(touched rows) of tables, N·D/4 of edges. About 10 FLOPs
// an element and pass, 20 with dropout: bound by memory.
#include "common.cuh"

#define WARPS 8
// Places of a warp in the sweep over sorted tokens.
#define CHUNK 32

// What a row is summed from.
struct Tables {
  const act_t *word, *position, *type, *value;
};
DEVICE Pack table_sum(const Tables& tables, unsigned gene, unsigned position, unsigned bin, int width, int c, bool whole) {
  int count = min(PACK, width - c);
  Pack s = load_pack(tables.word + (size_t)gene * width + c, count, whole);
  Pack p = load_pack(tables.position + (size_t)position * width + c, count, whole);
  Pack t = load_pack(tables.type + c, count, whole);
#pragma unroll
  for (int i = 0; i < PACK; i++) s.v[i] += p.v[i] + t.v[i];
  if (tables.value) {
    Pack v = load_pack(tables.value + (size_t)bin * width + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) s.v[i] += v.v[i];
  }
  return s;
}
// dx · dropout factor.
DEVICE Pack dropped_pack(const act_t* dx, const Dropout& dropout, int token, int width, int c, bool whole) {
  Pack d = load_pack(dx + (size_t)token * width + c, min(PACK, width - c), whole);
  if (dropout.threshold) {
    Pack factor = dropout_pack(dropout, token, width, c);
#pragma unroll
    for (int i = 0; i < PACK; i++) d.v[i] *= factor.v[i];
  }
  return d;
}

extern "C" __global__ void __launch_bounds__(256) embed_forward(
    const unsigned* gene,                // (N)
    const unsigned* position,            // (N)
    const unsigned* OPTIONAL value_bin,  // (N)
    const act_t* word,                   // (V, D)
    const act_t* position_table,         // (positions, D)
    const act_t* type_table,             // (2, D)
    const act_t* OPTIONAL value_table,   // (bins, D)
    const act_t* weight,                 // (D)
    const act_t* bias,                   // (D)
    act_t* x,                            // (N, D)
    float* mean,                         // (N)
    float* rstd,                         // (N)
    Dropout dropout, int tokens, int width, float eps) {
  DYNAMIC_SHARED(float, rows_of_block);  // (warps, D rounded up to packs)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int t = blockIdx.x * (blockDim.x / 32) + warp;
  if (t >= tokens) return;
  bool whole = width % PACK == 0;
  float* row = rows_of_block + (size_t)warp * (ceil_div(width, PACK) * PACK);
  Tables tables = {word, position_table, type_table, value_table};
  unsigned g = gene[t], p = position[t], v = value_bin ? value_bin[t] : 0;

  float sum = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    Pack s = table_sum(tables, g, p, v, width, c, whole);
    store_pack(row + c, s);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum += s.v[i];
  }
  float m = warp_sum(sum) / width;

  float squares = 0.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    Pack s = load_pack(row + c);
    int count = min(PACK, width - c);
#pragma unroll
    for (int i = 0; i < PACK; i++) squares += i < count ? (s.v[i] - m) * (s.v[i] - m) : 0.0f;
  }
  float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);

  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack s = load_pack(row + c), w = load_pack(weight + c, count, whole), b = load_pack(bias + c, count, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) s.v[i] = (s.v[i] - m) * r * w.v[i] + b.v[i];
    if (dropout.threshold) {
      Pack factor = dropout_pack(dropout, t, width, c);
#pragma unroll
      for (int i = 0; i < PACK; i++) s.v[i] *= factor.v[i];
    }
    store_pack(x + (size_t)t * width + c, s, count, whole);
  }
  if (lane == 0) {
    mean[t] = m;
    rstd[t] = r;
  }
}

extern "C" __global__ void __launch_bounds__(256) embed_backward_tokens(
    const unsigned* gene,                // (N)
    const unsigned* position,            // (N)
    const unsigned* OPTIONAL value_bin,  // (N)
    const act_t* word,                   // (V, D)
    const act_t* position_table,         // (positions, D)
    const act_t* type_table,             // (2, D)
    const act_t* OPTIONAL value_table,   // (bins, D)
    const act_t* weight,                 // (D)
    const act_t* dx,                     // (N, D)
    const float* mean,                   // (N)
    const float* rstd,                   // (N)
    float* mean_g,                       // (N)
    float* mean_gn,                      // (N)
    float* partial,                      // (blocks, 2, D): sums over the block's tokens for dweight and dbias
    Dropout dropout, int tokens, int tokens_per_block, int width) {
  DYNAMIC_SHARED(float, columns);  // (warps, 2, D rounded up to packs)
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  bool whole = width % PACK == 0;
  int padded = ceil_div(width, PACK) * PACK;
  float* dweight = columns + (size_t)warp * 2 * padded;
  float* dbias = dweight + padded;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    store_pack(dweight + c, Pack{});
    store_pack(dbias + c, Pack{});
  }
  Tables tables = {word, position_table, type_table, value_table};
  int first = blockIdx.x * tokens_per_block, end = min(tokens, first + tokens_per_block);
  for (int t = first + warp; t < end; t += warps) {
    float m = mean[t], r = rstd[t], sum_g = 0.0f, sum_gn = 0.0f;
    unsigned g = gene[t], p = position[t], v = value_bin ? value_bin[t] : 0;
    for (int c = lane * PACK; c < width; c += 32 * PACK) {
      Pack s = table_sum(tables, g, p, v, width, c, whole), d = dropped_pack(dx, dropout, t, width, c, whole);
      Pack w = load_pack(weight + c, min(PACK, width - c), whole), dw = load_pack(dweight + c), db = load_pack(dbias + c);
#pragma unroll
      for (int i = 0; i < PACK; i++) {
        float n = (s.v[i] - m) * r;
        dw.v[i] += d.v[i] * n;
        db.v[i] += d.v[i];
        sum_g += d.v[i] * w.v[i];
        sum_gn += d.v[i] * w.v[i] * n;
      }
      store_pack(dweight + c, dw);
      store_pack(dbias + c, db);
    }
    sum_g = warp_sum(sum_g);
    sum_gn = warp_sum(sum_gn);
    if (lane == 0) {
      mean_g[t] = sum_g / width;
      mean_gn[t] = sum_gn / width;
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < 2 * width; c += blockDim.x) {
    const float* column = columns + (c < width ? c : padded + c - width);
    float total = 0.0f;
    for (int w = 0; w < warps; w++) total += column[(size_t)w * 2 * padded];
    partial[(size_t)blockIdx.x * 2 * width + c] = total;
  }
}

// Adds to columns c and following of a row of gradients.
DEVICE void add_to_row(float* row, const Pack& add, int count, bool whole) {
  Pack sum = load_pack(row, count, whole);
#pragma unroll
  for (int i = 0; i < PACK; i++) sum.v[i] += add.v[i];
  store_pack(row, sum, count, whole);
}

extern "C" __global__ void __launch_bounds__(256) embed_backward_rows(
    const unsigned* order,               // (N) tokens in ascending order of key
    const unsigned* key,                 // (N) of each token: its row of the table
    const unsigned* gene,                // (N)
    const unsigned* position,            // (N)
    const unsigned* OPTIONAL value_bin,  // (N)
    const act_t* word,                   // (V, D)
    const act_t* position_table,         // (positions, D)
    const act_t* type_table,             // (2, D)
    const act_t* OPTIONAL value_table,   // (bins, D)
    const act_t* weight,                 // (D)
    const act_t* dx,                     // (N, D)
    const float* mean,                   // (N)
    const float* rstd,                   // (N)
    const float* mean_g,                 // (N)
    const float* mean_gn,                // (N)
    float* table,                        // (keys, D) +=
    float* edge,                         // (chunks, 2, D): shares of runs that began in an earlier chunk; that go on in a later one
    float* OPTIONAL total,               // (blocks, D): Σ ds over the block's tokens
    Dropout dropout, int tokens, int width) {
  SHARED(float, totals, [WARPS][32 * PACK]);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int chunk = blockIdx.x * WARPS + warp, first = chunk * CHUNK, count = max(0, min(CHUNK, tokens - first));
  int first_column = blockIdx.y * 32 * PACK, c = first_column + lane * PACK, columns = min(PACK, width - c);
  bool whole = width % PACK == 0;
  Tables tables = {word, position_table, type_table, value_table};

  // Lane i knows all about place i; the others ask it.
  bool some = lane < count;
  unsigned my_token = some ? order[first + lane] : 0, my_key = some ? key[my_token] : 0;
  unsigned my_gene = some ? gene[my_token] : 0, my_position = some ? position[my_token] : 0;
  unsigned my_bin = some && value_bin ? value_bin[my_token] : 0;
  float my_mean = some ? mean[my_token] : 0, my_rstd = some ? rstd[my_token] : 0;
  float my_mean_g = some ? mean_g[my_token] : 0, my_mean_gn = some ? mean_gn[my_token] : 0;
  // Does the run of this place end with it, in this chunk; does the first run begin, and the last go on, in another one?
  unsigned next_key = __shfl_down_sync(FULL_WARP, my_key, 1);
  unsigned ends = __ballot_sync(FULL_WARP, some && (lane + 1 == count || next_key != my_key));
  bool same_before = lane == 0 && some && first > 0 && key[order[first - 1]] == my_key;
  bool same_after = lane + 1 == count && first + count < tokens && key[order[first + count]] == my_key;
  bool began_before = __any_sync(FULL_WARP, same_before), goes_on = __any_sync(FULL_WARP, same_after);

  Pack w = {}, sum = {}, all = {};
  if (c < width) w = load_pack(weight + c, columns, whole);
  for (int i = 0; i < count; i++) {
    unsigned t = __shfl_sync(FULL_WARP, my_token, i), g = __shfl_sync(FULL_WARP, my_gene, i);
    unsigned p = __shfl_sync(FULL_WARP, my_position, i), v = __shfl_sync(FULL_WARP, my_bin, i);
    unsigned k = __shfl_sync(FULL_WARP, my_key, i);
    float m = __shfl_sync(FULL_WARP, my_mean, i), r = __shfl_sync(FULL_WARP, my_rstd, i);
    float mg = __shfl_sync(FULL_WARP, my_mean_g, i), mgn = __shfl_sync(FULL_WARP, my_mean_gn, i);
    if (c >= width) continue;
    Pack s = table_sum(tables, g, p, v, width, c, whole), d = dropped_pack(dx, dropout, (int)t, width, c, whole);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      float ds = r * (d.v[j] * w.v[j] - mg - (s.v[j] - m) * r * mgn);
      sum.v[j] += ds;
      all.v[j] += ds;
    }
    if (!(ends >> i & 1)) continue;
    bool first_run = !(ends & ((1u << i) - 1)), last_run = i + 1 == count;
    if (first_run && began_before)
      store_pack(edge + ((size_t)chunk * 2 + 0) * width + c, sum, columns, whole);
    else if (last_run && goes_on)
      store_pack(edge + ((size_t)chunk * 2 + 1) * width + c, sum, columns, whole);
    else
      add_to_row(table + (size_t)k * width + c, sum, columns, whole);
    sum = Pack{};
  }
  if (!total) return;
  store_pack(&totals[warp][lane * PACK], all);
  __syncthreads();
  c = first_column + threadIdx.x;
  if (c >= width) return;
  float column = 0.0f;
  for (int i = 0; i < WARPS; i++) column += totals[i][threadIdx.x];
  total[(size_t)blockIdx.x * width + c] = column;
}

// A warp per chunk and 256 columns: where the chunk's last run begins in it and goes on, the shares of all chunks it crosses.
extern "C" __global__ void __launch_bounds__(256) embed_backward_edges(
    const unsigned* order,  // (N)
    const unsigned* key,    // (N)
    const float* edge,      // (chunks, 2, D)
    float* table,           // (keys, D) +=
    int tokens, int width) {
  int lane = threadIdx.x % 32, chunk = blockIdx.x * WARPS + threadIdx.x / 32;
  int first = chunk * CHUNK, next = first + CHUNK, c = (blockIdx.y * 32 + lane) * PACK, columns = min(PACK, width - c);
  bool whole = width % PACK == 0;
  if (c >= width || next >= tokens) return;
  unsigned last = key[order[next - 1]];
  if (key[order[next]] != last) return;
  bool begins_here = key[order[first]] != last || first == 0 || key[order[first - 1]] != last;
  if (!begins_here) return;
  Pack sum = load_pack(edge + ((size_t)chunk * 2 + 1) * width + c, columns, whole);
  bool goes_on = true;
  while (goes_on) {
    chunk++;
    next += CHUNK;
    goes_on = next < tokens && key[order[next]] == last;
    Pack share = load_pack(edge + (size_t)chunk * 2 * width + c, columns, whole);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum.v[i] += share.v[i];
  }
  add_to_row(table + (size_t)last * width + c, sum, columns, whole);
}
