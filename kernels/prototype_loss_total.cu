// prototype_loss_total.cu: what stands before and after the streaming kernels of prototype_loss.cu, a warp per row.
//
//   positives    share_i = 1 / |{k ≠ own : label_k = label_i}|, or 0                              bytes: 4·R·P, from the caches
//   lse_total    lse_i = M + ln Σ_s l_s e^(m_s - M),  M = max_s m_s                               16·splits·R
//   rows_total   dz_i = g κ_i (Σ_s e^(m_s - M) O_s / l' - Σ_m mass scale p_column), loss_i         4·splits·R·D in, R·D·a out
//
// lse_total uses 8 of the 16 bytes of a row and split, 0.3 MB for 4,096 rows in 8 splits, so it loads 8 at a time.
// A split that saw only excluded columns has m = -1e30 and counts e^(-1e30 - M) = 0. Splits are added up in order.
#include "softmax_problem.cuh"

extern "C" __global__ void __launch_bounds__(256) prototype_loss_positives(
    const int* row_label,     // (R)
    const int* column_label,  // (P)
    float* share,             // (R)
    int rows, int columns, int first_self) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  int label = row_label[row], count = 0;
  if (label >= 0)
    for (int k = lane; k < columns; k += 32) count += column_label[k] == label && k != first_self + row;
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) count += __shfl_xor_sync(FULL_WARP, count, bit);
  if (lane == 0) share[row] = count > 0 ? 1.0f / count : 0.0f;
}

// Statistics of a row over its splits. In every lane.
struct Total {
  float max, sum, rounded_sum, target;
};
DEVICE Total row_total(const float* stats, int row, int rows, int splits) {
  Total t = {EXCLUDED, 0.0f, 0.0f, 0.0f};
  for (int s = threadIdx.x % 32; s < splits; s += 32) t.max = fmaxf(t.max, stats[((size_t)s * rows + row) * 4]);
  t.max = warp_max(t.max);
  for (int s = threadIdx.x % 32; s < splits; s += 32) {
    float4 part = load16<float4>(stats + ((size_t)s * rows + row) * 4);
    float factor = exponential(part.x - t.max);
    t.sum += part.y * factor;
    t.rounded_sum += part.z * factor;
    t.target += part.w;
  }
  t.sum = warp_sum(t.sum);
  t.rounded_sum = warp_sum(t.rounded_sum);
  t.target = warp_sum(t.target);
  return t;
}

extern "C" __global__ void __launch_bounds__(256) prototype_loss_lse_total(
    const float* stats,  // (splits, R, 4)
    float* lse,          // (R)
    int rows, int splits) {
  int row = blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  Total t = row_total(stats, row, rows, splits);
  if (threadIdx.x % 32 == 0) lse[row] = t.max + logf(t.sum);
}

extern "C" __global__ void __launch_bounds__(256) prototype_loss_rows_total(
    const act_t* column,                // (P, D)
    const float* OPTIONAL scale,        // (P)
    const float* row_weight,            // (R)
    const int* OPTIONAL target_column,  // (R, entries)
    const float* OPTIONAL target_mass,  // (R, entries)
    const int* OPTIONAL row_label,      // (R)
    const float* OPTIONAL share,        // (R)
    const float* stats,                 // (splits, R, 4)
    const float* o,                     // (splits, R, D)
    float* loss,                        // (R)
    float* lse,                         // (R): set when online, read and cleared in rows that take no part otherwise
    act_t* dz,                          // (R, D): set, or +=
    int splits, int online, int accumulate, SoftmaxCall call) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, width = call.width;
  if (row >= call.rows) return;
  Problem p = {};
  p.row_weight = row_weight, p.target_column = target_column, p.target_mass = target_mass;
  p.row_label = row_label, p.share = share, p.call = call;
  Row r = load_row(p, row);
  bool whole = width % PACK == 0;
  act_t* to = dz + (size_t)row * width;
  if (r.weight == 0.0f) {
    if (lane == 0) loss[row] = lse[row] = 0.0f;
    if (!accumulate)
      for (int c = lane * PACK; c < width; c += 32 * PACK) store_pack(to + c, Pack{}, min(PACK, width - c), whole);
    return;
  }

  Total t = row_total(stats, row, call.rows, splits);
  if (lane == 0) {
    if (online) {
      // max - target first: both are large, their difference and the logarithm are not.
      loss[row] = r.weight * ((t.max - t.target) + logf(t.sum));
      lse[row] = t.max + logf(t.sum);
    } else {
      loss[row] = r.weight * (lse[row] - t.target);
    }
  }
  float factor = r.weight * call.gradient_scale, inverse = online ? 1.0f / t.rounded_sum : 1.0f;
  for (int c = lane * PACK; c < width; c += 32 * PACK) {
    int count = min(PACK, width - c);
    Pack sum = {};
    for (int s = 0; s < splits; s++) {
      float shrink = online ? exponential(stats[((size_t)s * call.rows + row) * 4] - t.max) : 1.0f;
      Pack part = load_pack(o + ((size_t)s * call.rows + row) * width + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) sum.v[i] += shrink * part.v[i];
    }
#pragma unroll
    for (int i = 0; i < PACK; i++) sum.v[i] *= inverse;
    for (int m = 0; online && m < call.entries; m++) {
      int k = target_column[(size_t)row * call.entries + m];
      if (k < 0) continue;
      float mass = target_mass ? target_mass[(size_t)row * call.entries + m] : 1.0f;
      float weight = mass * (scale ? scale[k] : call.scale);
      Pack value = load_pack(column + (size_t)k * width + c, count, whole);
#pragma unroll
      for (int i = 0; i < PACK; i++) sum.v[i] -= weight * value.v[i];
    }
    Pack before = accumulate ? load_pack(to + c, count, whole) : Pack{};
#pragma unroll
    for (int i = 0; i < PACK; i++) sum.v[i] = before.v[i] + factor * sum.v[i];
    store_pack(to + c, sum, count, whole);
  }
}
