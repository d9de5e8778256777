// mask_tokens.cu: which genes are hidden, what stands in their place, and the list of them in ascending order.
//
// Token t of this call draws the four words of Philox block first_row + t of stream (seed, step, mask):
//   chosen:  gene ≥ first_gene and w0 < chosen_below
//   fate:    w1 < masked_below -> <mask>;  w1 < random_below -> first_gene + ((w2 | w3 << 32) · genes >> 64);  else itself
// The thresholds are share · 2^32 rounded up, from the host: the same bits as src/cpu/mask_tokens.rs.
//
// Two launches instead of a chain of dependent blocks: mask_choose leaves the chosen tokens of 32 neighbours as the bits of a
// word, and their number per block of 256; mask_compact adds up the numbers of the blocks before it, counts the bits before its
// own, and so knows each chosen token's place. No atomics.
//
// Bytes: 4·N in, 4·N out and 8·M of list; the work is ten Philox rounds a token, about 100 integer instructions, which hide
// the memory. Compaction reads blocks²/2 numbers from the second-level cache: 0.5 MB for 131,072 tokens. A lane keeps one token,
// for the vote that makes the word; 4 bytes a lane are whole lines, and 16 would save instructions that the Philox rounds dwarf.
#include "common.cuh"

struct KERNEL_ARGUMENT MaskRule {
  unsigned long long seed;
  unsigned long long first_row;
  unsigned long long chosen_below;
  unsigned long long masked_below;
  unsigned long long random_below;
  unsigned int step;
  unsigned int site;
  unsigned int first_gene;
  unsigned int genes;
  unsigned int mask_id;
};

extern "C" __global__ void __launch_bounds__(256) mask_choose(
    const unsigned* gene,   // (N)
    unsigned* masked_gene,  // (N)
    unsigned* chosen,       // (N / 32 rounded up) bit l of word i: token 32·i + l
    unsigned* count,        // (blocks)
    MaskRule rule, int tokens) {
  int t = blockIdx.x * 256 + threadIdx.x;
  unsigned original = t < tokens ? gene[t] : 0, now = original;
  bool is_chosen = false;
  if (t < tokens && original >= rule.first_gene) {
    uint4 w = stream_block(rule.seed, rule.step, rule.site, rule.first_row + t);
    is_chosen = w.x < rule.chosen_below;
    if (is_chosen && w.y < rule.masked_below)
      now = rule.mask_id;
    else if (is_chosen && w.y < rule.random_below)
      now = rule.first_gene + (unsigned)__umul64hi((unsigned long long)w.w << 32 | w.z, rule.genes);
  }
  if (t < tokens) masked_gene[t] = now;
  unsigned bits = __ballot_sync(FULL_WARP, is_chosen);
  if (threadIdx.x % 32 == 0 && t < tokens) chosen[t / 32] = bits;
  int in_block = __syncthreads_count(is_chosen);
  if (threadIdx.x == 0) count[blockIdx.x] = in_block;
}

extern "C" __global__ void __launch_bounds__(256) mask_compact(
    const unsigned* gene,    // (N)
    const unsigned* chosen,  // (N / 32 rounded up)
    const unsigned* count,   // (blocks)
    unsigned* index,         // (N)
    int* target,             // (N)
    int tokens) {
  SHARED(unsigned, sums, [8]);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = blockIdx.x * 256 + threadIdx.x;
  unsigned earlier = 0;
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += 256) earlier += count[b];
  earlier = __reduce_add_sync(FULL_WARP, earlier);
  if (lane == 0) sums[warp] = earlier;
  __syncthreads();
  unsigned place = 0;
  for (int w = 0; w < 8; w++) place += sums[w];
  if (t >= tokens) return;
  for (int w = 0; w < warp; w++) place += __popc(chosen[blockIdx.x * 8 + w]);
  unsigned bits = chosen[t / 32];
  if (!(bits >> lane & 1)) return;
  place += __popc(bits & ((1u << lane) - 1));
  index[place] = t;
  target[place] = (int)gene[t];
}
