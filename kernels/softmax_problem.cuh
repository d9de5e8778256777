// softmax_problem.cuh: one call of the streaming softmax loss, and what becomes of one dot product z_i·p_k.
//
//   s_ik = scale_k · (z_i·p_k - margin_k 1[k = label_i]) + bias_k          (same_bias_k where labels are equal)
//   t_ik = sparse_share Σ_m mass_im 1[k = column_im] + ε Σ_m mass_im mix[column_im, k] + δ e^(teacher logit - teacher lse)
//        or 1 / |positives of i| where labels are equal
//
// Tiles differ (prototype_loss_fma.cuh, prototype_loss_mma.cuh), elements do not: a thread holds RES resident indices by STR
// streamed ones and hands its dot products to one of the functions below, which leave the weights of the second product.
// A row takes part when its weight is not 0 and it has a target; others count as rows of zeros, whatever they hold.
#pragma once
#include "ptx.cuh"

// Logits below this count as excluded: e^(s - m) is 0 for every m that occurs, and 0 · s stays 0.
#define EXCLUDED -1e30f

// Sizes and factors of one call.
struct KERNEL_ARGUMENT SoftmaxCall {
  int rows;
  int columns;
  int width;
  int entries;              // of a sparse target; -1: no target at all, and every row takes part
  int first_self;           // row i's own column is first_self + i
  int bias_in_target;       // whether the target's logit holds its bias
  int tiles_per_split;      // streamed tiles that a block walks over
  float scale;              // of all columns, where there is no array of scales
  float gradient_scale;     // factor of every gradient
  float sparse_share;       // 1 - ε - δ
  float mix_share;          // ε
  float teacher_share;      // δ
  float teacher_scale;      // 1/τ of the teacher
};

struct Problem {
  const act_t *z, *column;                              // (R, D), (P, D)
  const float *scale, *bias, *margin, *row_weight;      // (P), (P), (P), (R), or null
  const int* target_column;                             // (R, entries)
  const float *target_mass, *mix;                       // (R, entries), (P, P), or null
  const float *teacher_z, *teacher_column, *teacher_lse;  // (R, D), (P, D), (R), or null
  const int *row_label, *column_label;                  // (R), (P), or null
  const float *same_bias, *share;                       // (P) or null, (R): 1 / positives, 0 = none; null: the caller counts
  const float* lse;                                     // (R), or null while it is being found
  SoftmaxCall call;
};

// e^x by the special-function unit. The product's rounding costs 6e-8 |x|: 1e-6 where e^x is still 1e-5 of the largest.
DEVICE float exponential(float x) { return exp2_approx(x * 1.4426950408889634f); }

struct Row {
  int index, target, label;  // target: first entry, where the margin sits; -1 = none
  float weight, mass, share, lse, teacher_lse;
};
struct Column {
  int index, label;
  float scale, bias, same_bias, margin;
};

// weight 0 for rows that take no part.
DEVICE Row load_row(const Problem& p, int i) {
  Row row = {i, -1, -1, 0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
  if (i >= p.call.rows) return row;
  row.weight = p.row_weight ? p.row_weight[i] : 1.0f;
  if (p.row_label) {
    row.label = p.row_label[i];
    if (p.share) row.share = p.share[i];
    if (p.share && row.share == 0.0f) row.weight = 0.0f;
  } else if (p.call.entries >= 0) {
    const int* entry = p.target_column + (size_t)i * p.call.entries;
    bool any = false;
    for (int m = 0; m < p.call.entries; m++) any |= entry[m] >= 0;
    if (!any) row.weight = 0.0f;
    if (any) row.target = entry[0];
    if (any && p.target_mass) row.mass = p.target_mass[(size_t)i * p.call.entries];
  }
  if (row.weight == 0.0f) return row;
  if (p.lse) row.lse = p.lse[i];
  if (p.teacher_lse) row.teacher_lse = p.teacher_lse[i];
  return row;
}

DEVICE Column load_column(const Problem& p, int k) {
  Column c = {k, -1, 0.0f, 0.0f, 0.0f, 0.0f};
  if (k >= p.call.columns) return c;
  c.scale = p.scale ? p.scale[k] : p.call.scale;
  if (p.bias) c.bias = p.bias[k];
  if (p.margin) c.margin = p.margin[k];
  if (p.row_label) {
    c.label = p.column_label[k];
    c.same_bias = p.same_bias ? p.same_bias[k] : c.bias;
  }
  return c;
}

// The logit, with the margin taken off `dot` on the way; -infinity beyond P. One rounding, so that both passes, and a lone
// column's target, have the same bits.
DEVICE float logit(const Problem& p, const Row& row, const Column& c, float& dot) {
  if (c.index >= p.call.columns) return -INFINITY;
  if (c.index == row.target) dot -= c.margin;
  if (p.row_label && c.index == p.call.first_self + row.index) return EXCLUDED;
  float s = __fmaf_rn(dot, c.scale, p.row_label && row.label == c.label ? c.same_bias : c.bias);
  return s < EXCLUDED ? EXCLUDED : s;  // not fmaxf, which would drop a NaN
}

// t_ik of a column below P; `teacher_dot` is z⁰_i·p⁰_k.
DEVICE float target(const Problem& p, const Row& row, const Column& c, float teacher_dot) {
  const SoftmaxCall& call = p.call;
  if (p.row_label) {
    return row.label == c.label && c.index != call.first_self + row.index ? row.share : 0.0f;
  }
  float t = c.index == row.target ? call.sparse_share * row.mass : 0.0f;
  if (p.mix && row.target >= 0) t += call.mix_share * row.mass * p.mix[(size_t)row.target * call.columns + c.index];
  for (int m = 1; m < call.entries; m++) {
    int k = p.target_column[(size_t)row.index * call.entries + m];
    if (k < 0 || (k != c.index && !p.mix)) continue;
    float mass = p.target_mass[(size_t)row.index * call.entries + m];
    if (k == c.index) t += call.sparse_share * mass;
    if (p.mix) t += call.mix_share * mass * p.mix[(size_t)k * call.columns + c.index];
  }
  if (p.teacher_z) t += call.teacher_share * exponential(call.teacher_scale * teacher_dot - row.teacher_lse);
  return t;
}

// t_ik s'_ik: with or without the bias in the target's logit.
DEVICE float target_term(const Problem& p, const Column& c, float t, float s, float dot) {
  return t == 0.0f ? 0.0f : t * (p.call.bias_in_target ? s : dot * c.scale);
}

// Running statistics of RES rows. Sums are this thread's own part until the end; the maxima are the row's.
template <int RES>
struct RowState {
  Row row[RES];
  float max[RES], sum[RES], rounded_sum[RES], target[RES];
};
template <int RES>
DEVICE void start_rows(const Problem& p, const int (&index)[RES], RowState<RES>& state) {
#pragma unroll
  for (int r = 0; r < RES; r++) {
    state.row[r] = load_row(p, index[r]);
    state.max[r] = EXCLUDED;
    state.sum[r] = state.rounded_sum[r] = state.target[r] = 0.0f;
  }
}

// Forward, lse unknown: x (dot products) becomes scale_k e^(s - max), and `shrink` what the sums so far were multiplied by.
// LANES lanes with consecutive numbers share a row. The second product sees x rounded to act_t: `rounded_sum` adds up what it
// sees, so that the p̂ it is divided by sum to 1, and O - T does not cancel to noise where the target has nearly all mass.
template <int LANES, int RES, int STR>
DEVICE void online(const Problem& p, const int (&column)[STR], float (&x)[RES][STR], RowState<RES>& state,
                   float (&shrink)[RES]) {
  bool named = p.call.entries > 0 && !p.mix && !p.teacher_z;  // others are met when lse is known
  float top[RES];
#pragma unroll
  for (int r = 0; r < RES; r++) top[r] = state.max[r];
#pragma unroll
  for (int j = 0; j < STR; j++) {
    Column c = load_column(p, column[j]);
#pragma unroll
    for (int r = 0; r < RES; r++) {
      float dot = x[r][j], s = logit(p, state.row[r], c, dot);
      if (named && c.index < p.call.columns && state.row[r].weight != 0.0f)
        state.target[r] += target_term(p, c, target(p, state.row[r], c, 0.0f), s, dot);
      x[r][j] = s;
      top[r] = fmaxf(top[r], s);
    }
  }
#pragma unroll
  for (int r = 0; r < RES; r++) {
#pragma unroll
    for (int bit = LANES / 2; bit > 0; bit >>= 1) top[r] = fmaxf(top[r], __shfl_xor_sync(FULL_WARP, top[r], bit));
    shrink[r] = exponential(state.max[r] - top[r]);
    state.max[r] = top[r];
    state.sum[r] *= shrink[r];
    state.rounded_sum[r] *= shrink[r];
  }
#pragma unroll
  for (int j = 0; j < STR; j++) {
    float scale = column[j] < p.call.columns && p.scale ? p.scale[column[j]] : p.call.scale;
    float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
#pragma unroll
    for (int r = 0; r < RES; r++) {
      float e = exponential(x[r][j] - state.max[r]);
      state.sum[r] += e;
      x[r][j] = e * scale;
      state.rounded_sum[r] += sizeof(act_t) == 2 ? to_float(from_float<act_t>(x[r][j])) * inverse : e;
    }
  }
}

// Forward, lse known: x becomes (p̂ - t) scale_k.
template <int RES, int STR>
DEVICE void against_lse(const Problem& p, const int (&column)[STR], const float (&teacher)[RES][STR], float (&x)[RES][STR],
                        RowState<RES>& state) {
#pragma unroll
  for (int j = 0; j < STR; j++) {
    Column c = load_column(p, column[j]);
#pragma unroll
    for (int r = 0; r < RES; r++) {
      const Row& row = state.row[r];
      float dot = x[r][j], s = logit(p, row, c, dot);
      x[r][j] = 0.0f;
      if (c.index >= p.call.columns || row.weight == 0.0f) continue;
      float t = target(p, row, c, teacher[r][j]);
      state.target[r] += target_term(p, c, t, s, dot);
      x[r][j] = (exponential(s - row.lse) - t) * c.scale;
    }
  }
}

// Sums over the rows for RES columns; this thread's own part until the end.
template <int RES>
struct ColumnState {
  Column column[RES];
  float bias[RES], scale[RES];
};
template <int RES>
DEVICE void start_columns(const Problem& p, const int (&index)[RES], ColumnState<RES>& state) {
#pragma unroll
  for (int r = 0; r < RES; r++) {
    state.column[r] = load_column(p, index[r]);
    state.bias[r] = state.scale[r] = 0.0f;
  }
}

// Backward: x becomes g κ_i (p̂ - t).
template <int RES, int STR>
DEVICE void column_gradient(const Problem& p, const int (&index)[STR], const float (&teacher)[RES][STR],
                            float (&x)[RES][STR], ColumnState<RES>& state) {
#pragma unroll
  for (int j = 0; j < STR; j++) {
    Row row = load_row(p, index[j]);
#pragma unroll
    for (int r = 0; r < RES; r++) {
      const Column& c = state.column[r];
      float dot = x[r][j], s = logit(p, row, c, dot);
      x[r][j] = 0.0f;
      if (c.index >= p.call.columns || row.weight == 0.0f) continue;
      float g = row.weight * p.call.gradient_scale * (exponential(s - row.lse) - target(p, row, c, teacher[r][j]));
      state.bias[r] += g;
      state.scale[r] += g * dot;
      x[r][j] = g;
    }
  }
}

// Sum over `LANES` lanes with consecutive numbers, in each of them.
template <int LANES>
DEVICE float lane_sum(float x) {
#pragma unroll
  for (int bit = LANES / 2; bit > 0; bit >>= 1) x += __shfl_xor_sync(FULL_WARP, x, bit);
  return x;
}
