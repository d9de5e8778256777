// prototype_loss_sm90.cu: the streaming softmax loss on Hopper, bf16, D ≤ 256 and a multiple of 8, targets of one column a row:
// prototypes and masked genes. Formulas, passes and totals: prototype_loss.cu, which also serves other
// targets and widths and f32. The loop, its pipeline and what a tile costs: prototype_loss_wgmma.cuh.
//
//   rows      resident z, streamed columns: W = scale_k e^(s - max), O rescaled when a maximum moves; then prototype_loss_rows_total
//   columns   resident columns, streamed z: W = g κ_i (p̂ - t); adds to the gradients itself where nothing was split
//
// Work that few elements need stands beside the hot path: the target's logit is looked up in the one tile that holds it, and the
// second pass subtracts t only in warps whose 16 columns a row of the tile names.
//
// Bytes: (R + P)·D·2 from memory and ceil(R/128)·P·D·2 (second pass: ceil(P/128)·R·D·2) from the second-level cache;
// out 4·splits·R·D, second pass 8·P·D. FLOPs: 4·R·P·D a pass; R·P exponentials.
#include "prototype_loss_wgmma.cuh"

// ---- first pass

// Scale, bias and 1/scale of the columns of a tile; bias -∞ beyond P. Bias as the logits are clamped elsewhere.
DEVICE void column_parameters(const Problem& p, int tile, float* parameter) {
#pragma unroll
  for (int i = threadIdx.x % 32; i < STREAMED; i += 32) {
    Column c = load_column(p, tile + i);
    float bias = c.bias < EXCLUDED ? EXCLUDED : c.bias;  // not fmaxf, which would drop a NaN
    parameter[i] = c.scale;
    parameter[STREAMED + i] = c.index < p.call.columns ? bias : -INFINITY;
    parameter[2 * STREAMED + i] = c.scale == 0.0f ? 0.0f : 1.0f / c.scale;
  }
}

// A consumer thread's two rows: RowState of softmax_problem.cuh without what one-column targets do not need.
struct OwnRows {
  int label[2];
  float mass[2], max[2], sum[2], rounded_sum[2], target[2];
};

// Takes the margin off the label's dot product, and picks up the target's logit, in the thread that has it. `label`: -1 = none.
DEVICE void meet_label(const Problem& p, int label, float mass, int tile, const float* parameter, int r, float (&s)[NTILES][4],
                       float& target) {
  unsigned at = (unsigned)(label - tile);
  if (at >= STREAMED || at % 8 / 2 != threadIdx.x % 4) return;
  float margin = p.margin ? p.margin[label] : 0.0f, dot = 0.0f;
#pragma unroll
  for (int n = 0; n < NTILES; n++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (at == n * 8 + threadIdx.x % 4 * 2 + e) dot = s[n][2 * r + e] -= margin;
  target = mass * (p.call.bias_in_target ? __fmaf_rn(dot, parameter[at], parameter[STREAMED + at]) : dot * parameter[at]);
}

// Dot products to scale_k e^(s - max), rounded to bf16, as `online` of softmax_problem.cuh.
DEVICE void online_weights(const Problem& p, int tile, const float* parameter, float (&s)[NTILES][4], OwnRows& state,
                           float (&shrink)[2]) {
  meet_label(p, state.label[0], state.mass[0], tile, parameter, 0, s, state.target[0]);
  meet_label(p, state.label[1], state.mass[1], tile, parameter, 1, s, state.target[1]);
  const float* own = parameter + threadIdx.x % 4 * 2;
  float top[2] = {state.max[0], state.max[1]};
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
    float2 scale = *reinterpret_cast<const float2*>(own + n * 8);
    float2 bias = *reinterpret_cast<const float2*>(own + STREAMED + n * 8);
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
  for (int n = 0; n < NTILES; n++) {
    float2 scale = *reinterpret_cast<const float2*>(own + n * 8);
    float2 inverse = *reinterpret_cast<const float2*>(own + 2 * STREAMED + n * 8);
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

template <int TILES>
DEVICE void stream_columns(const Problem& p, const TensorMap* z_tiles, const TensorMap* column_tiles, float* stats, float* o_out) {
  DYNAMIC_SHARED(unsigned char, shared);
  const SoftmaxCall& call = p.call;
  Stage<TILES> stage(shared);
  stage.start();
  int first = blockIdx.x * RESIDENT, split = blockIdx.y, lane = threadIdx.x % 32;
  int group = __shfl_sync(FULL_WARP, (int)threadIdx.x / 128, 0);  // the same in a warp, and seen to be so
  int from = split * call.tiles_per_split * STREAMED;
  int count = min(call.tiles_per_split, ceil_div(call.columns - from, STREAMED));

  if (group == 0) {
    set_fewer_registers<24>();
    if (threadIdx.x == 0) stage.copy(z_tiles, first, column_tiles, from, count);
    if (threadIdx.x / 32 == 1)
      for (int t = 0; t < count; t++) {
        int s = t % STAGES;
        mbarrier_wait(stage.vacant + s, (t / STAGES & 1) ^ 1);
        column_parameters(p, from + t * STREAMED, stage.parameters(s));
        mbarrier_arrive(stage.ready + s);
      }
  } else {
    set_more_registers<240>();
    int row = first + (group - 1) * OWN + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int own[2] = {row, row + 8};
    OwnRows state;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      Row row = load_row(p, own[r]);
      bool named = row.weight != 0.0f && row.mass != 0.0f;
      state.label[r] = named ? row.target : -1, state.mass[r] = row.mass, state.max[r] = EXCLUDED;
      state.sum[r] = state.rounded_sum[r] = state.target[r] = 0.0f;
    }
    float o[TILES / 2][16][4] = {}, shrink[2];
    consume<TILES>(
        stage, group - 1, count, o,
        [&](float(&s)[NTILES][4], int at, int t) {
          online_weights(p, from + t * STREAMED, stage.parameters(at), s, state, shrink);
        },
        [&](float(&o)[TILES / 2][16][4]) {
          if (!__any_sync(FULL_WARP, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
          for (int h = 0; h < TILES / 2; h++)
#pragma unroll
            for (int n = 0; n < 16; n++)
              o[h][n][0] *= shrink[0], o[h][n][1] *= shrink[0], o[h][n][2] *= shrink[1], o[h][n][3] *= shrink[1];
        });
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = lane_sum<4>(state.sum[r]), rounded = lane_sum<4>(state.rounded_sum[r]);
      float target = lane_sum<4>(state.target[r]);
      if (lane % 4 == 0 && own[r] < call.rows)
        store16(stats + ((size_t)split * call.rows + own[r]) * 4, make_float4(state.max[r], sum, rounded, target));
    }
    int mine = lane % 2 ? own[1] : own[0];
    float* to = o_out + ((size_t)split * call.rows + mine) * call.width;
    store_rows(o, call.width, [&](int column, float4 value) {
      if (mine < call.rows) store16(to + column, value);
    });
  }
}

extern "C" __global__ void __launch_bounds__(LOSS_THREADS, 1) prototype_loss_rows_sm90(
    GRID_CONSTANT TensorMap z_tiles,       // (R, D)
    GRID_CONSTANT TensorMap column_tiles,  // (P, D)
    const float* OPTIONAL scale,           // (P)
    const float* OPTIONAL bias,            // (P)
    const float* OPTIONAL margin,          // (P)
    const float* row_weight,               // (R)
    const int* target_column,              // (R)
    const float* OPTIONAL target_mass,     // (R)
    float* stats,                          // (splits, R, 4): max, sum, sum of the rounded, Σ t s
    float* o,                              // (splits, R, D)
    SoftmaxCall call) {
  Problem p = {};
  p.scale = scale, p.bias = bias, p.margin = margin, p.row_weight = row_weight;
  p.target_column = target_column, p.target_mass = target_mass, p.call = call;
  if (call.width <= 128)
    stream_columns<2>(p, &z_tiles, &column_tiles, stats, o);
  else
    stream_columns<4>(p, &z_tiles, &column_tiles, stats, o);
}

// ---- second pass

// lse, g κ, label and its mass of the rows of a tile; zeros over those that take no part.
template <int TILES>
DEVICE void row_parameters(const Problem& p, int tile, float* parameter, unsigned char* streamed, Mbarrier* landed, int parity) {
  int lane = threadIdx.x % 32;
  for (int half = 0; half < STREAMED; half += 32) {
    Row row = load_row(p, tile + half + lane);
    bool live = row.weight != 0.0f;
    parameter[half + lane] = live ? row.lse : INFINITY;
    parameter[STREAMED + half + lane] = live ? row.weight * p.call.gradient_scale : 0.0f;
    parameter[2 * STREAMED + half + lane] = __int_as_float(live ? row.target : -1);
    parameter[3 * STREAMED + half + lane] = row.mass;
    unsigned dead = __ballot_sync(FULL_WARP, !live && row.index < p.call.rows);
    if (!dead) continue;
    mbarrier_wait(landed, parity);
    for (; dead; dead &= dead - 1) {
      int r = half + __ffs((int)dead) - 1;
      if (lane < TILES * 8)
        store16(streamed + lane / 8 * STREAMED_BYTES + r * 128 + lane % 8 * 16, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
    async_fence();
  }
}

// Dot products to g κ (p̂ - t), rounded to bf16. NAMED: labels of this tile's rows are among this warp's columns.
template <bool NAMED>
DEVICE void gradient_weights(const float* parameter, float (&s)[NTILES][4], ColumnState<2>& state) {
#pragma unroll
  for (int n = 0; n < NTILES; n++) {
    const float* own = parameter + n * 8 + threadIdx.x % 4 * 2;
    float2 lse = *reinterpret_cast<const float2*>(own), factor = *reinterpret_cast<const float2*>(own + STREAMED);
    float2 mass = {};
    int label[2] = {};
    if (NAMED) {
      label[0] = __float_as_int(own[2 * STREAMED]), label[1] = __float_as_int(own[2 * STREAMED + 1]);
      mass = *reinterpret_cast<const float2*>(own + 3 * STREAMED);
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
DEVICE bool names(const float* parameter, int columns) {
  int lane = threadIdx.x % 32;
  bool any = false;
#pragma unroll
  for (int i = 0; i < STREAMED; i += 32) any |= (unsigned)(__float_as_int(parameter[2 * STREAMED + i + lane]) - columns) < 16;
  return __any_sync(FULL_WARP, any);
}

template <int TILES>
DEVICE void stream_rows(const Problem& p, const TensorMap* z_tiles, const TensorMap* column_tiles, float* dcolumn, float* dbias,
                        float* dscale, float* sums, int bias_slot, int scale_slot, int slots) {
  DYNAMIC_SHARED(unsigned char, shared);
  const SoftmaxCall& call = p.call;
  Stage<TILES> stage(shared);
  stage.start();
  int first = blockIdx.x * RESIDENT, split = blockIdx.y, lane = threadIdx.x % 32;
  int group = __shfl_sync(FULL_WARP, (int)threadIdx.x / 128, 0);  // the same in a warp, and seen to be so
  int from = split * call.tiles_per_split * STREAMED;
  int count = min(call.tiles_per_split, ceil_div(call.rows - from, STREAMED));

  if (group == 0) {
    set_fewer_registers<40>();
    if (threadIdx.x == 0) stage.copy(column_tiles, first, z_tiles, from, count);
    if (threadIdx.x / 32 == 1)
      for (int t = 0; t < count; t++) {
        int s = t % STAGES;
        mbarrier_wait(stage.vacant + s, (t / STAGES & 1) ^ 1);
        row_parameters<TILES>(p, from + t * STREAMED, stage.parameters(s), stage.tile(s), stage.landed + s, t / STAGES & 1);
        mbarrier_arrive(stage.ready + s);
      }
  } else {
    set_more_registers<232>();
    int columns = first + (group - 1) * OWN + threadIdx.x % 128 / 32 * 16;
    const int own[2] = {columns + lane / 4, columns + lane / 4 + 8};
    ColumnState<2> state;
    start_columns(p, own, state);
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (state.column[r].bias < EXCLUDED) state.column[r].bias = EXCLUDED;
    float o[TILES / 2][16][4] = {};
    consume<TILES>(
        stage, group - 1, count, o,
        [&](float(&s)[NTILES][4], int at, int) {
          const float* parameter = stage.parameters(at);
          if (names(parameter, columns))
            gradient_weights<true>(parameter, s, state);
          else
            gradient_weights<false>(parameter, s, state);
        },
        [](float(&)[TILES / 2][16][4]) {});
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float bias = lane_sum<4>(state.bias[r]), scale = lane_sum<4>(state.scale[r]);
      if (lane % 4 != 0 || own[r] >= call.columns) continue;
      float* to = sums + (size_t)split * slots * call.columns + own[r];
      if (bias_slot >= 0) to[(size_t)bias_slot * call.columns] = bias;
      if (scale_slot >= 0) to[(size_t)scale_slot * call.columns] = scale;
      if (dbias) dbias[own[r]] += bias;
      if (dscale) dscale[own[r]] += scale;
    }
    bool add = gridDim.y == 1;
    int mine = lane % 2 ? own[1] : own[0];
    float scale = lane % 2 ? state.column[1].scale : state.column[0].scale;
    float* to = dcolumn + ((size_t)split * call.columns + mine) * call.width;
    store_rows(o, call.width, [&](int column, float4 value) {
      if (mine >= call.columns) return;
      float4 before = add ? load16<float4>(to + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      store16(to + column, make_float4(before.x + scale * value.x, before.y + scale * value.y, before.z + scale * value.z,
                                       before.w + scale * value.w));
    });
  }
}

extern "C" __global__ void __launch_bounds__(LOSS_THREADS, 1) prototype_loss_columns_sm90(
    GRID_CONSTANT TensorMap z_tiles,       // (R, D)
    GRID_CONSTANT TensorMap column_tiles,  // (P, D)
    const float* OPTIONAL scale,           // (P)
    const float* OPTIONAL bias,            // (P)
    const float* OPTIONAL margin,          // (P)
    const float* row_weight,               // (R)
    const int* target_column,              // (R)
    const float* OPTIONAL target_mass,     // (R)
    const float* lse,                      // (R)
    float* dcolumn,                        // (P, D) +=; (splits, P, D) where there are several
    float* OPTIONAL dbias,                 // (P) +=, of a single split
    float* OPTIONAL dscale,                // (P) +=, of a single split
    float* OPTIONAL sums,                  // (splits, slots, P): of the gradients of bias and scale, of several
    int bias_slot, int scale_slot, int slots, SoftmaxCall call) {
  Problem p = {};
  p.scale = scale, p.bias = bias, p.margin = margin, p.row_weight = row_weight;
  p.target_column = target_column, p.target_mass = target_mass, p.lse = lse, p.call = call;
  if (call.width <= 128)
    stream_rows<2>(p, &z_tiles, &column_tiles, dcolumn, dbias, dscale, sums, bias_slot, scale_slot, slots);
  else
    stream_rows<4>(p, &z_tiles, &column_tiles, dcolumn, dbias, dscale, sums, bias_slot, scale_slot, slots);
}
