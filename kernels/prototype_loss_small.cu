// prototype_loss_small.cu: the first pass of the streaming softmax loss in one launch, where all P columns fit a block's shared
// memory. Formulas: prototype_loss.cu; the backend picks this one for up to 128 columns and batches of up to a few thousand rows.
//
// What costs there is launches and latency, not bytes: three launches and two round trips of partial sums become one launch, and
// every kind of target comes out of the same code, because a row's logits are all at hand before its gradient begins.
//
//   block    columns (P, D + 4) as f32, once; then its 8 warps take rows in turn, without barriers
//   warp     z_i in shared memory;  s: a lane owns columns l, l + 32, ..., 4 at a time;  lse by two warp reductions;
//            w = (p̂ - t) scale in shared memory;  dz: a lane owns a pack of 8 of every 256, O += w_k p_k
//
// The 4 spare floats a row put the 8 rows of a quarter warp's 16-byte loads into different banks. All in f32 for both activation
// types: no weight is rounded.
//
// Bytes: (R·D + P·D)·a in, R·D·a out; P·D·a per block from the second-level cache. FLOPs: 4·R·P·D on the FMA pipes, with 5
// shared-memory wavefronts for 4 FMA of a warp in the first product: a quarter of the rate of prototype_loss_fma.cuh, over too
// little work to matter. Shared memory: 4·(P·(D + 4) + 8·(D + P)).
#include "softmax_problem.cuh"

// Columns of a lane: 4 times 32.
#define MOST_COLUMNS 128

// Two blocks to an SM: left to itself, ptxas aims at four (64 registers) for sm_80 and spills, and three spill for sm_90a.
// 70 columns of 256 fill half of sm_80's shared memory, and up to 2,000 rows there are no two blocks for each of 132 SMs.
extern "C" __global__ void __launch_bounds__(256, 2) prototype_loss_small(
    const act_t* z,                        // (R, D)
    const act_t* column,                   // (P, D)
    const float* OPTIONAL scale,           // (P)
    const float* OPTIONAL bias,            // (P)
    const float* OPTIONAL margin,          // (P)
    const float* OPTIONAL row_weight,      // (R)
    const int* OPTIONAL target_column,     // (R, entries)
    const float* OPTIONAL target_mass,     // (R, entries)
    const float* OPTIONAL mix,             // (P, P)
    const float* OPTIONAL teacher_z,       // (R, D)
    const float* OPTIONAL teacher_column,  // (P, D)
    const float* OPTIONAL teacher_lse,     // (R)
    const int* OPTIONAL row_label,         // (R)
    const int* OPTIONAL column_label,      // (P)
    const float* OPTIONAL same_bias,       // (P)
    float* loss,                           // (R)
    float* lse,                            // (R)
    act_t* dz,                             // (R, D): set, or +=
    int accumulate, SoftmaxCall call) {
  Problem p = {z,         column,         scale,       bias,      margin,       row_weight, target_column, target_mass, mix,
               teacher_z, teacher_column, teacher_lse, row_label, column_label, same_bias,  nullptr,       nullptr,     call};
  DYNAMIC_SHARED(float, shared);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = call.width, columns = call.columns;
  int padded = ceil_div(width, PACK) * PACK, stride = padded + 4;
  bool whole = width % PACK == 0;
  float* own = shared + (size_t)columns * stride + warp * (padded + MOST_COLUMNS);  // z_i
  float* weight = own + padded;                                                    // (P)
  for (int k = warp; k < columns; k += 8)
    for (int c = lane * PACK; c < width; c += 32 * PACK)
      store_pack(shared + k * stride + c, load_pack(column + (size_t)k * width + c, min(PACK, width - c), whole));
  __syncthreads();

  for (int i = blockIdx.x * 8 + warp; i < call.rows; i += gridDim.x * 8) {
    Row row = load_row(p, i);
    if (row_label) {
      int positives = 0;
      for (int k = lane; k < columns; k += 32)
        positives += row.label >= 0 && column_label[k] == row.label && k != call.first_self + i;
#pragma unroll
      for (int bit = 16; bit > 0; bit >>= 1) positives += __shfl_xor_sync(FULL_WARP, positives, bit);
      row.share = positives > 0 ? 1.0f / positives : 0.0f;
      if (positives == 0) row.weight = 0.0f;
    }
    act_t* to = dz + (size_t)i * width;
    if (row.weight == 0.0f) {
      if (lane == 0) loss[i] = lse[i] = 0.0f;
      for (int c = lane * PACK; c < width && !accumulate; c += 32 * PACK)
        store_pack(to + c, Pack{}, min(PACK, width - c), whole);
      continue;
    }
    for (int c = lane * PACK; c < width; c += 32 * PACK)
      store_pack(own + c, load_pack(z + (size_t)i * width + c, min(PACK, width - c), whole));
    __syncwarp();

    float dot[4] = {}, s[4], max = EXCLUDED, sum = 0.0f, wanted = 0.0f;
    for (int c = 0; c < padded; c += 4) {
      float4 a = load16<float4>(own + c);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (32 * j >= columns) break;
        int k = min(lane + 32 * j, columns - 1);
        float4 b = load16<float4>(shared + k * stride + c);
        dot[j] += a.x * b.x, dot[j] += a.y * b.y, dot[j] += a.z * b.z, dot[j] += a.w * b.w;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[j] = logit(p, row, load_column(p, lane + 32 * j), dot[j]);
      max = fmaxf(max, s[j]);
    }
    max = warp_max(max);
#pragma unroll
    for (int j = 0; j < 4; j++) sum += exponential(s[j] - max);
    sum = warp_sum(sum);
    float log_sum = max + logf(sum), inverse = 1.0f / sum;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      Column c = load_column(p, lane + 32 * j);
      if (c.index >= columns) continue;
      float teacher = 0.0f;
      if (teacher_z)
        for (int d = 0; d < width; d++)
          teacher += teacher_z[(size_t)i * width + d] * teacher_column[(size_t)c.index * width + d];
      float t = target(p, row, c, teacher);
      wanted += target_term(p, c, t, s[j], dot[j]);
      weight[c.index] = (exponential(s[j] - max) * inverse - t) * c.scale;
    }
    wanted = warp_sum(wanted);
    if (lane == 0) {
      loss[i] = row.weight * ((max - wanted) + logf(sum));
      lse[i] = log_sum;
    }
    __syncwarp();

    float factor = row.weight * call.gradient_scale;
    for (int c = lane * PACK; c < width; c += 32 * PACK) {
      int count = min(PACK, width - c);
      Pack o = {};
      for (int k = 0; k < columns; k++) {
        Pack value = load_pack(shared + k * stride + c);
#pragma unroll
        for (int q = 0; q < PACK; q++) o.v[q] += weight[k] * value.v[q];
      }
      Pack before = accumulate ? load_pack(to + c, count, whole) : Pack{};
#pragma unroll
      for (int q = 0; q < PACK; q++) o.v[q] = before.v[q] + factor * o.v[q];
      store_pack(to + c, o, count, whole);
    }
    // The next row's z is not read here any more, and its weights come behind warp_max.
  }
}
