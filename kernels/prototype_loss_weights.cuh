// prototype_loss_weights.cuh: from dot products to weights of the second product, for the softmax loss on Hopper: what
// softmax_problem.cuh says, for targets of one column a row, in few instructions an element.
//
// A warpgroup's thread holds rows l/4 and l/4 + 8 of its warp's 16, columns 8n + 2(l%4) and the next of S (64, BN). What an element
// needs of its streamed index comes from shared memory, four arrays of BN for a tile:
//
//   first pass    scale, bias, 1/scale of the columns; bias -∞ beyond P
//   second pass   lse, g κ, label, mass of the rows; those that take no part have lse = ∞ and g κ = 0: weight 0
//
// Weights are rounded to bf16, and stay f32 registers until the product before is over (`fragments`). Instructions an element, from
// SASS: 12 in the first pass, 13 in the second. Labels and margins stand beside this path: the target's logit is picked up in the
// one tile that holds it, and the second pass subtracts t only in warps whose 16 columns are some row's label.
#pragma once
#include "ptx_sm90.cuh"
#include "softmax_problem.cuh"

// Floats of a streamed index.
#define PARAMETERS 4

// ---- first pass

// Those of column i of a tile. The bias is clamped as logits are elsewhere.
template <int BN>
DEVICE void column_parameters(const Problem& p, int tile, int i, float* parameter) {
  Column c = load_column(p, tile + i);
  float bias = c.bias < EXCLUDED ? EXCLUDED : c.bias;  // not fmaxf, which would drop a NaN
  parameter[i] = c.scale;
  parameter[BN + i] = c.index < p.call.columns ? bias : -INFINITY;
  parameter[2 * BN + i] = c.scale == 0.0f ? 0.0f : 1.0f / c.scale;
}

// A thread's two rows: RowState of softmax_problem.cuh without what one-column targets do not need.
struct OwnRows {
  int label[2];
  float mass[2], max[2], sum[2], rounded_sum[2], target[2];

  __device__ __forceinline__ OwnRows(const Problem& p, const int (&index)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      Row row = load_row(p, index[r]);
      label[r] = row.weight != 0.0f ? row.target : -1, mass[r] = row.mass, max[r] = EXCLUDED;
      sum[r] = rounded_sum[r] = target[r] = 0.0f;
    }
  }
  // Statistics of this split; lanes of a row share them.
  __device__ __forceinline__ void store(float* stats, const int (&index)[2], const SoftmaxCall& call) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float4 all = make_float4(max[r], lane_sum<4>(sum[r]), lane_sum<4>(rounded_sum[r]), lane_sum<4>(target[r]));
      if (threadIdx.x % 4 == 0 && index[r] < call.rows)
        store16(stats + ((size_t)blockIdx.y * call.rows + index[r]) * 4, all);
    }
  }
};

// Takes the margin off the label's dot product, and picks up the target's logit, in the thread that has it. `label`: -1 = none.
template <int NT>
DEVICE void meet_label(const Problem& p, int label, float mass, int tile, const float* parameter, int r, float (&s)[NT][4],
                       float& target) {
  unsigned at = (unsigned)(label - tile);
  if (at >= NT * 8 || at % 8 / 2 != threadIdx.x % 4) return;
  float margin = p.margin ? p.margin[label] : 0.0f, dot = 0.0f;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (at == n * 8 + threadIdx.x % 4 * 2 + e) dot = s[n][2 * r + e] -= margin;
  float logit = p.call.bias_in_target ? __fmaf_rn(dot, parameter[at], parameter[NT * 8 + at]) : dot * parameter[at];
  target = mass == 0.0f ? 0.0f : mass * logit;
}

// Dot products to scale_k e^(s - max), rounded to bf16, as `online` of softmax_problem.cuh.
template <int NT>
DEVICE void online_weights(const Problem& p, int tile, const float* parameter, float (&s)[NT][4], OwnRows& state,
                           float (&shrink)[2]) {
  meet_label(p, state.label[0], state.mass[0], tile, parameter, 0, s, state.target[0]);
  meet_label(p, state.label[1], state.mass[1], tile, parameter, 1, s, state.target[1]);
  const float* own = parameter + threadIdx.x % 4 * 2;
  float top[2] = {state.max[0], state.max[1]};
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float2 scale = *reinterpret_cast<const float2*>(own + n * 8);
    float2 bias = *reinterpret_cast<const float2*>(own + NT * 8 + n * 8);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[n][e] = e % 2 ? __fmaf_rn(s[n][e], scale.y, bias.y) : __fmaf_rn(s[n][e], scale.x, bias.x);
      top[e / 2] = fmaxf(top[e / 2], s[n][e]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(FULL_WARP, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(FULL_WARP, top[r], 2));
    shrink[r] = exponential(state.max[r] - top[r]);
    state.max[r] = top[r];
    state.sum[r] *= shrink[r];
    state.rounded_sum[r] *= shrink[r];
  }
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float2 scale = *reinterpret_cast<const float2*>(own + n * 8);
    float2 inverse = *reinterpret_cast<const float2*>(own + 2 * NT * 8 + n * 8);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float low = exponential(s[n][2 * r] - top[r]), high = exponential(s[n][2 * r + 1] - top[r]);
      state.sum[r] += low;
      state.sum[r] += high;
      uint32_t pair = pack_bf16(low * scale.x, high * scale.y);
      s[n][2 * r] = bf16_low(pair), s[n][2 * r + 1] = bf16_high(pair);
      state.rounded_sum[r] += s[n][2 * r] * inverse.x;
      state.rounded_sum[r] += s[n][2 * r + 1] * inverse.y;
    }
  }
}

// ---- second pass

// Those of 32 rows of a tile, from row `part` on, by one warp; zeros over rows that take no part, which may hold NaN: 0 · NaN is NaN.
template <int TILES, int BN>
DEVICE void row_parameters(const Problem& p, int tile, int part, float* parameter, unsigned char* streamed, Mbarrier* landed,
                           int parity) {
  int lane = threadIdx.x % 32, i = part + lane;
  Row row = load_row(p, tile + i);
  bool live = row.weight != 0.0f;
  parameter[i] = live ? row.lse : INFINITY;
  parameter[BN + i] = live ? row.weight * p.call.gradient_scale : 0.0f;
  parameter[2 * BN + i] = __int_as_float(live ? row.target : -1);
  parameter[3 * BN + i] = row.mass;
  unsigned dead = __ballot_sync(FULL_WARP, !live && row.index < p.call.rows);
  if (!dead) return;
  mbarrier_wait(landed, parity);
  for (; dead; dead &= dead - 1) {
    int r = part + __ffs((int)dead) - 1;
    for (int c = lane; c < TILES * 8; c += 32)
      store16(streamed + c / 8 * BN * 128 + r * 128 + c % 8 * 16, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  async_fence();
}

// Dot products to g κ (p̂ - t), rounded to bf16. NAMED: labels of this tile's rows are among this warp's columns.
template <bool NAMED, int NT>
DEVICE void gradient_weights(const float* parameter, float (&s)[NT][4], ColumnState<2>& state) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float* own = parameter + n * 8 + threadIdx.x % 4 * 2;
    float2 lse = *reinterpret_cast<const float2*>(own), factor = *reinterpret_cast<const float2*>(own + NT * 8);
    float2 mass = {};
    int label[2] = {};
    if (NAMED) {
      label[0] = __float_as_int(own[2 * NT * 8]), label[1] = __float_as_int(own[2 * NT * 8 + 1]);
      mass = *reinterpret_cast<const float2*>(own + 3 * NT * 8);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const Column& c = state.column[e / 2];
      float dot = s[n][e];
      if (NAMED && label[e % 2] == c.index) dot -= c.margin;
      float x = exponential(__fmaf_rn(dot, c.scale, c.bias) - (e % 2 ? lse.y : lse.x));
      if (NAMED && label[e % 2] == c.index) x -= e % 2 ? mass.y : mass.x;
      x *= e % 2 ? factor.y : factor.x;
      state.bias[e / 2] += x;
      state.scale[e / 2] += x * dot;
      s[n][e] = x;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint32_t pair = pack_bf16(s[n][2 * r], s[n][2 * r + 1]);
      s[n][2 * r] = bf16_low(pair), s[n][2 * r + 1] = bf16_high(pair);
    }
  }
}

// Does a row of the tile have its label among the 16 columns from `columns` on?
template <int NT>
DEVICE bool names(const float* parameter, int columns) {
  int lane = threadIdx.x % 32;
  bool any = false;
#pragma unroll
  for (int i = 0; i < NT * 8; i += 32) any |= (unsigned)(__float_as_int(parameter[2 * NT * 8 + i + lane]) - columns) < 16;
  return __any_sync(FULL_WARP, any);
}


// A thread's two columns.
struct OwnColumns : ColumnState<2> {
  __device__ __forceinline__ OwnColumns(const Problem& p, const int (&index)[2]) {
    start_columns(p, index, *this);
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (column[r].bias < EXCLUDED) column[r].bias = EXCLUDED;
  }
  // Sums over this split's rows: to (splits, slots, P), or added where there is one split.
  __device__ __forceinline__ void store(float* sums, float* dbias, float* dscale, int bias_slot, int scale_slot, int slots,
                                        int columns) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float b = lane_sum<4>(bias[r]), s = lane_sum<4>(scale[r]);
      int k = column[r].index;
      if (threadIdx.x % 4 != 0 || k >= columns) continue;
      float* to = sums + (size_t)blockIdx.y * slots * columns + k;
      if (bias_slot >= 0) to[(size_t)bias_slot * columns] = b;
      if (scale_slot >= 0) to[(size_t)scale_slot * columns] = s;
      if (dbias) dbias[k] += b;
      if (dscale) dscale[k] += s;
    }
  }
};

// ---- results

// Stores the part of 8·NT columns of O that lies inside the matrix, 16 bytes at a time: lanes 2l and 2l + 1 hold columns 4l.. of rows
// r and r + 8 between them, and trade: an even lane gets four columns of row r, an odd one of r + 8. `store(column, value)`.
template <int NT, class Store>
DEVICE void store_rows(const float (&o)[NT][4], int first, int width, Store store) {
  int lane = threadIdx.x % 32;
  bool upper = lane % 2;  // of the rows
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float(&x)[4] = o[n];
    float give0 = upper ? x[0] : x[2], give1 = upper ? x[1] : x[3];
    float got0 = __shfl_xor_sync(FULL_WARP, give0, 1), got1 = __shfl_xor_sync(FULL_WARP, give1, 1);
    int column = first + n * 8 + lane % 4 / 2 * 4;
    if (column < width) store(column, upper ? make_float4(got0, got1, x[2], x[3]) : make_float4(x[0], x[1], got0, got1));
  }
}

// Of weighted columns: (splits, R, D).
template <int NT>
DEVICE void store_weighted(const float (&o)[NT][4], int first, int row, const SoftmaxCall& call, float* out) {
  float* to = out + ((size_t)blockIdx.y * call.rows + row) * call.width;
  store_rows(o, first, call.width, [&](int column, float4 value) {
    if (row < call.rows) store16(to + column, value);
  });
}

// Of column gradients, scaled: (splits, P, D), or added to (P, D) where there is one split.
template <int NT>
DEVICE void store_gradient(const float (&o)[NT][4], int first, int k, float scale, const SoftmaxCall& call, float* out) {
  bool add = gridDim.y == 1;
  float* to = out + ((size_t)blockIdx.y * call.columns + k) * call.width;
  store_rows(o, first, call.width, [&](int column, float4 value) {
    if (k >= call.columns) return;
    float4 before = add ? load16<float4>(to + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    store16(to + column, make_float4(before.x + scale * value.x, before.y + scale * value.y, before.z + scale * value.z,
                                     before.w + scale * value.w));
  });
}
