// prototype_loss.cu: the streaming softmax loss: prototypes, masked genes, classes and cell-cell contrast are the same kernels.
//
//   s_ik  = scale_k (z_i·p_k - margin_k 1[k = label_i]) + bias_k,   lse_i = log Σ_k e^(s_ik),   p̂_ik = e^(s_ik - lse_i)
//   loss_i = κ_i (lse_i - Σ_k t_ik s_ik)
//   dz_i  = g κ_i Σ_k (p̂_ik - t_ik) scale_k p_k                          first pass
//   dp_k += g scale_k Σ_i κ_i (p̂_ik - t_ik) z_i,   dbias_k, dscale_k     second pass, p̂ anew from lse
//
// No (R, P) matrix exists. A block keeps a tile of one operand (rows in the first pass, columns in the second), walks over the
// other, and per tile does S = resident · streamedᵀ, W = what softmax and target make of S (softmax_problem.cuh), O += W · streamed:
// attention, with the values scale_k p_k. The two passes are one loop with the operands exchanged.
//
//   one-hot, few entries   rows (online: S, max, sum, target, O), rows_total                        2 products
//   dense targets          rows (max and sum alone), lse_total, rows (against lse), rows_total      3 products
//     (class overlap, teacher, same label)                                       the teacher: 1 more, of its own operands
//   second pass            columns, and reduce_columns where the rows were split                    2 products
//
// Why dense targets take lse first: (p̂ - t) is then one weight with one O; online, O and T would each fill the registers. Few
// resident tiles leave multiprocessors idle, so the streamed tiles are split over blockIdx.y; `rows_total` and `reduce_columns`
// (reduce.cu) add up the splits in order. No atomics: the same bits for every schedule.
//
// prototype_loss_rows and _columns: D ≤ 256; the _wide ones: D ≤ 1152, with smaller tiles. Tiles and what they need: f32
// prototype_loss_fma.cuh (35 KB of static shared memory), bf16 prototype_loss_mma.cuh ((BM + 2 BN)(D + 8)·2 bytes: 99 KB at D = 256,
// 153 KB at D = 1152). P small enough for one block's shared memory: prototype_loss_small.cu.
//
// Bytes at activation size a, by compulsory traffic: first pass (R·D + P·D)·a in, R·D·a out, and between the launches
// 4·splits·R·(D + 4); from the second-level cache ceil(R/BM)·P·D·a. Second pass the same with R and P exchanged and 8·P·D of dp.
// FLOPs: 2·R·P·D per product, R·P exponentials per pass.
#if defined(ACT_BF16)
#include "prototype_loss_mma.cuh"
#define ROWS_NARROW stream_columns<1, 4, 32>
#define ROWS_WIDE stream_columns<4, 2, 36>
#define COLUMNS_NARROW stream_rows<1, 4, 32>
#define COLUMNS_WIDE stream_rows<4, 2, 36>
#else
#include "prototype_loss_fma.cuh"
#define ROWS_NARROW stream_columns<4, 2>
#define ROWS_WIDE stream_columns<2, 9>
#define COLUMNS_NARROW stream_rows<4, 2>
#define COLUMNS_WIDE stream_rows<2, 9>
#endif

extern "C" __global__ void __launch_bounds__(256) prototype_loss_rows(
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
    const float* OPTIONAL share,           // (R)
    const float* OPTIONAL lse,             // (R): weights against it; absent: online
    float* stats,                          // (splits, R, 4): max, sum, sum of the rounded, Σ t s
    float* OPTIONAL o,                     // (splits, R, D)
    SoftmaxCall call) {
  Problem p = {z,         column,         scale,       bias,      margin,       row_weight, target_column, target_mass, mix,
               teacher_z, teacher_column, teacher_lse, row_label, column_label, same_bias,  share,         lse,         call};
  ROWS_NARROW(p, stats, o);
}

extern "C" __global__ void __launch_bounds__(256) prototype_loss_rows_wide(
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
    const float* OPTIONAL share,           // (R)
    const float* OPTIONAL lse,             // (R): weights against it; absent: online
    float* stats,                          // (splits, R, 4): max, sum, sum of the rounded, Σ t s
    float* OPTIONAL o,                     // (splits, R, D)
    SoftmaxCall call) {
  Problem p = {z,         column,         scale,       bias,      margin,       row_weight, target_column, target_mass, mix,
               teacher_z, teacher_column, teacher_lse, row_label, column_label, same_bias,  share,         lse,         call};
  ROWS_WIDE(p, stats, o);
}

extern "C" __global__ void __launch_bounds__(256) prototype_loss_columns(
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
    const float* OPTIONAL share,           // (R)
    const float* lse,                      // (R)
    float* dcolumn,                        // (P, D) +=, or (splits, P, D)
    float* OPTIONAL sums,                  // (splits, slots, P): of the gradients of bias and scale
    int add, int bias_slot, int scale_slot, int slots, SoftmaxCall call) {
  Problem p = {z,         column,         scale,       bias,      margin,       row_weight, target_column, target_mass, mix,
               teacher_z, teacher_column, teacher_lse, row_label, column_label, same_bias,  share,         lse,         call};
  COLUMNS_NARROW(p, dcolumn, sums, add, bias_slot, scale_slot, slots);
}

extern "C" __global__ void __launch_bounds__(256) prototype_loss_columns_wide(
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
    const float* OPTIONAL share,           // (R)
    const float* lse,                      // (R)
    float* dcolumn,                        // (P, D) +=, or (splits, P, D)
    float* OPTIONAL sums,                  // (splits, slots, P): of the gradients of bias and scale
    int add, int bias_slot, int scale_slot, int slots, SoftmaxCall call) {
  Problem p = {z,         column,         scale,       bias,      margin,       row_weight, target_column, target_mass, mix,
               teacher_z, teacher_column, teacher_lse, row_label, column_label, same_bias,  share,         lse,         call};
  COLUMNS_WIDE(p, dcolumn, sums, add, bias_slot, scale_slot, slots);
}
