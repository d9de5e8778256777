// prototype_loss_wide_sm90.cu: prototype_loss_sm90.cu for 256 < D ≤ 768: the gene vocabulary of the larger models. The loop, its
// pipeline and what a tile costs: prototype_loss_wide.cuh; elements: prototype_loss_weights.cuh.
//
// Bytes: (R + P)·D·2 from memory and ceil(R/64)·P·D·2 (second pass: ceil(P/64)·R·D·2) from the second-level cache;
// out 4·splits·R·D, second pass 8·P·D. FLOPs: 4·R·P·D a pass; R·P exponentials.
#include "prototype_loss_wide.cuh"

// ---- first pass

// BLOCKS: of one resident tile, each with its part of O's columns.
template <int TILES, int NT, int NO, int BLOCKS>
DEVICE void stream_columns(const Problem& p, const TensorMap* z_tiles, const TensorMap* column_tiles, float* stats, float* o_out) {
  DYNAMIC_SHARED(unsigned char, shared);
  const SoftmaxCall& call = p.call;
  WideStage<TILES, NT> stage(shared);
  stage.start();
  const int BN = 8 * NT;
  int first = blockIdx.x / BLOCKS * WIDE_RESIDENT, part = blockIdx.x % BLOCKS, from = blockIdx.y * call.tiles_per_split * BN, lane = threadIdx.x % 32;
  int count = min(call.tiles_per_split, ceil_div(call.columns - from, BN));
  int group = __shfl_sync(FULL_WARP, (int)threadIdx.x / 128, 0);  // the same in a warp, and seen to be so
  int row = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int own[2] = {row, row + 8};

  if (group == 0) {
    OwnRows state(p, own);
    make_weights<TILES, NT>(
        stage, z_tiles, first, column_tiles, from, count,
        [&](int t, int at) {
          if (threadIdx.x < BN) column_parameters<BN>(p, from + t * BN, threadIdx.x, stage.parameters(at));
        },
        [&](float(&s)[NT][4], int t, int at, float(&shrink)[2]) {
          online_weights(p, from + t * BN, stage.parameters(at), s, state, shrink);
        });
    if (part == 0) state.store(stats, own, call);
  } else {
    int box = (part * 2 + group - 1) * NO / 8;
    float o[NO][4] = {};
    add_weighted<true>(stage, box, count, o);
    store_weighted(o, box * 64, lane % 2 ? own[1] : own[0], call, o_out);
  }
}

extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) prototype_loss_rows_wide_sm90(
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
  if (call.width <= 512)
    stream_columns<8, 8, 32, 1>(p, &z_tiles, &column_tiles, stats, o);
  else
    stream_columns<12, 4, 24, 2>(p, &z_tiles, &column_tiles, stats, o);
}

// ---- second pass

template <int TILES, int NT, int NO, int BLOCKS>
DEVICE void stream_rows(const Problem& p, const TensorMap* z_tiles, const TensorMap* column_tiles, float* dcolumn, float* dbias,
                        float* dscale, float* sums, int bias_slot, int scale_slot, int slots) {
  DYNAMIC_SHARED(unsigned char, shared);
  const SoftmaxCall& call = p.call;
  WideStage<TILES, NT> stage(shared);
  stage.start();
  const int BN = 8 * NT;
  int first = blockIdx.x / BLOCKS * WIDE_RESIDENT, part = blockIdx.x % BLOCKS, from = blockIdx.y * call.tiles_per_split * BN, lane = threadIdx.x % 32;
  int count = min(call.tiles_per_split, ceil_div(call.rows - from, BN));
  int group = __shfl_sync(FULL_WARP, (int)threadIdx.x / 128, 0), warp = threadIdx.x % 128 / 32;
  int columns = first + warp * 16;
  const int own[2] = {columns + lane / 4, columns + lane / 4 + 8};

  if (group == 0) {
    OwnColumns state(p, own);
    make_weights<TILES, NT>(
        stage, column_tiles, first, z_tiles, from, count,
        [&](int t, int at) {
          if (warp * 32 < BN)
            row_parameters<TILES, BN>(p, from + t * BN, warp * 32, stage.parameters(at), stage.tile(at), stage.landed + at,
                                         t / WIDE_STAGES & 1);
        },
        [&](float(&s)[NT][4], int, int at, float(&)[2]) {
          const float* parameter = stage.parameters(at);
          if (names<NT>(parameter, columns))
            gradient_weights<true>(parameter, s, state);
          else
            gradient_weights<false>(parameter, s, state);
        });
    if (part == 0) state.store(sums, dbias, dscale, bias_slot, scale_slot, slots, call.columns);
  } else {
    int box = (part * 2 + group - 1) * NO / 8;
    float o[NO][4] = {};
    add_weighted<false>(stage, box, count, o);
    int k = lane % 2 ? own[1] : own[0];
    store_gradient(o, box * 64, k, load_column(p, k).scale, call, dcolumn);
  }
}

extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1) prototype_loss_columns_wide_sm90(
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
  if (call.width <= 512)
    stream_rows<8, 8, 32, 1>(p, &z_tiles, &column_tiles, dcolumn, dbias, dscale, sums, bias_slot, scale_slot, slots);
  else
    stream_rows<12, 4, 24, 2>(p, &z_tiles, &column_tiles, dcolumn, dbias, dscale, sums, bias_slot, scale_slot, slots);
}
