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
        for (int i = lane; i < STREAMED; i += 32) column_parameters<STREAMED>(p, from + t * STREAMED, i, stage.parameters(s));
        mbarrier_arrive(stage.ready + s);
      }
  } else {
    set_more_registers<240>();
    int row = first + (group - 1) * OWN + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int own[2] = {row, row + 8};
    OwnRows state(p, own);
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
    state.store(stats, own, call);
#pragma unroll
    for (int h = 0; h < TILES / 2; h++) store_weighted(o[h], h * 128, lane % 2 ? own[1] : own[0], call, o_out);
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
        for (int part = 0; part < STREAMED; part += 32)
          row_parameters<TILES, STREAMED>(p, from + t * STREAMED, part, stage.parameters(s), stage.tile(s), stage.landed + s,
                                          t / STAGES & 1);
        mbarrier_arrive(stage.ready + s);
      }
  } else {
    set_more_registers<232>();
    int columns = first + (group - 1) * OWN + threadIdx.x % 128 / 32 * 16;
    const int own[2] = {columns + lane / 4, columns + lane / 4 + 8};
    OwnColumns state(p, own);
    float o[TILES / 2][16][4] = {};
    consume<TILES>(
        stage, group - 1, count, o,
        [&](float(&s)[NTILES][4], int at, int) {
          const float* parameter = stage.parameters(at);
          if (names<NTILES>(parameter, columns))
            gradient_weights<true>(parameter, s, state);
          else
            gradient_weights<false>(parameter, s, state);
        },
        [](float(&)[TILES / 2][16][4]) {});
    state.store(sums, dbias, dscale, bias_slot, scale_slot, slots, call.columns);
    float scale = lane % 2 ? state.column[1].scale : state.column[0].scale;
#pragma unroll
    for (int h = 0; h < TILES / 2; h++) store_gradient(o[h], h * 128, lane % 2 ? own[1] : own[0], scale, call, dcolumn);
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
