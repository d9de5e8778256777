// adamw.cu: AdamW over a range of the flat store in one launch, clipping by the global norm included; rounding of weights.
//
//   c = min(1, max_norm / (sqrt(scalars[norm_slot]) + 1e-6)),  g = c · grad
//   m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²
//   w = keep · w - rate · m / (sqrt(v) · root_correction + ε)
//   with rate = lr / (1-β1^t), root_correction = 1 / sqrt(1-β2^t), keep = 1 - lr · weight decay, from the host in f64
//
// A thread owns 8 neighbours: eight 16-byte loads are on their way while the block's first thread turns the norm, which never
// left the device, into the clip factor. Where the norm is not finite nothing is written. Master weights and moments are f32;
// the copy in the activation type is written in the same pass.
//
// Bytes a parameter: 16 in (weight, grad, m, v), 12 out, and 2 for a bf16 copy: 28 or 30. About 15 FLOPs: bound by memory.
#include "common.cuh"

struct KERNEL_ARGUMENT AdamWStep {
  float beta1;
  float beta2;
  float rate;
  float root_correction;
  float eps;
  float keep;
  float max_norm;
  unsigned int norm_slot;
};

DEVICE void adamw_element(const AdamWStep& s, float clip, float grad, float& weight, float& m, float& v) {
  float g = clip * grad;
  m = s.beta1 * m + (1.0f - s.beta1) * g;
  v = s.beta2 * v + (1.0f - s.beta2) * g * g;
  weight = s.keep * weight - s.rate * m / (sqrtf(v) * s.root_correction + s.eps);
}

extern "C" __global__ void __launch_bounds__(256) adamw_update(
    float* weight,          // (end)
    const float* grad,      // (end)
    float* m,               // (end)
    float* v,               // (end)
    act_t* OPTIONAL copy,   // (end)
    const double* scalars,  // (slots)
    AdamWStep step, unsigned long long start, unsigned long long end) {
  SHARED(float, clip_factor, [1]);
  double squares = scalars[step.norm_slot];
  if (!(squares < INFINITY)) return;  // NaN as well; the same in every thread of the grid
  // Groups of 8 start at multiples of 8 of the whole array, which lies at a 16-byte address; the range's ends cut some.
  unsigned long long first = (start / PACK + (unsigned long long)blockIdx.x * 256 + threadIdx.x) * PACK;
  bool whole = first >= start && first + PACK <= end;
  Pack w, g, m1, m2;
  if (whole) {
    w = load_pack(weight + first);
    g = load_pack(grad + first);
    m1 = load_pack(m + first);
    m2 = load_pack(v + first);
  }
  if (threadIdx.x == 0) clip_factor[0] = (float)fmin(1.0, step.max_norm / (sqrt(squares) + 1e-6));
  __syncthreads();
  float clip = clip_factor[0];
  if (whole) {
#pragma unroll
    for (int i = 0; i < PACK; i++) adamw_element(step, clip, g.v[i], w.v[i], m1.v[i], m2.v[i]);
    store_pack(weight + first, w);
    store_pack(m + first, m1);
    store_pack(v + first, m2);
    if (copy) store_pack(copy + first, w);
    return;
  }
  unsigned long long last = min(first + PACK, end);
  for (unsigned long long i = max(first, start); i < last; i++) {
    float one_w = weight[i], one_m = m[i], one_v = v[i];
    adamw_element(step, clip, grad[i], one_w, one_m, one_v);
    weight[i] = one_w;
    m[i] = one_m;
    v[i] = one_v;
    if (copy) copy[i] = from_float<act_t>(one_w);
  }
}

// copy = weight, rounded. Bytes: 4 in and a (2 or 4) out an element.
extern "C" __global__ void __launch_bounds__(256) adamw_round(
    const float* weight,  // (n)
    act_t* copy,          // (n)
    unsigned long long n) {
  unsigned long long first = ((unsigned long long)blockIdx.x * 256 + threadIdx.x) * PACK;
  if (first >= n) return;
  int count = (int)min((unsigned long long)PACK, n - first);
  store_pack(copy + first, load_pack(weight + first, count, count == PACK), count, count == PACK);
}
