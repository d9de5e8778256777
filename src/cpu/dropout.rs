//! Dropout factors of consecutive elements, vectorised over Philox blocks.
//!
//! `factor(e) = 0 if lane16(block e/8, e) < threshold else scale` ([`crate::rng`]). Sixteen blocks (128 elements) are drawn at
//! once: the ten rounds run on arrays of sixteen counters, which the compiler turns into vector registers.

use crate::cpu::simd::vectorized;
use crate::device::Dropout;
use crate::rng;

/// Blocks drawn at once.
const BLOCKS: usize = 16;
/// Elements in them.
const ELEMENTS: usize = BLOCKS * 8;

/// The ten rounds on sixteen counters that differ in their block number alone; `words[b]` are the words of block `first + b`.
#[inline(always)]
fn philox_blocks(seed: u64, step: u32, site: u32, first: u64) -> [[u32; 4]; BLOCKS] {
    const M: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const W: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut c0: [u32; BLOCKS] = std::array::from_fn(|b| (first + b as u64) as u32);
    let mut c1: [u32; BLOCKS] = std::array::from_fn(|b| ((first + b as u64) >> 32) as u32);
    let (mut c2, mut c3) = ([step; BLOCKS], [site; BLOCKS]);
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        for b in 0..BLOCKS {
            let p0 = c0[b] as u64 * M[0];
            let p1 = c2[b] as u64 * M[1];
            c0[b] = (p1 >> 32) as u32 ^ c1[b] ^ key[0];
            c1[b] = p1 as u32;
            c2[b] = (p0 >> 32) as u32 ^ c3[b] ^ key[1];
            c3[b] = p0 as u32;
        }
        key = [key[0].wrapping_add(W[0]), key[1].wrapping_add(W[1])];
    }
    std::array::from_fn(|b| [c0[b], c1[b], c2[b], c3[b]])
}

vectorized! {
    /// Sets `factor[i]` for elements `first + i`: 0 where dropped, the inverse keep probability elsewhere.
    pub fn factors[](dropout: Dropout, first: u64, factor: &mut [f32]) {
        let threshold = rng::dropout_threshold(dropout.probability);
        let scale = rng::dropout_scale(dropout.probability);
        let mut block = first / 8;
        let mut skip = (first % 8) as usize;
        let mut rest = factor;
        while !rest.is_empty() {
            let words = philox_blocks(dropout.seed, dropout.step, dropout.site, block);
            // Lane order is memory order on little-endian machines; elsewhere the halves are put in place one by one.
            let lanes: [u16; ELEMENTS] = if cfg!(target_endian = "little") {
                bytemuck::cast(words)
            } else {
                std::array::from_fn(|e| rng::lane16(words[e / 8], e as u64) as u16)
            };
            let now = (ELEMENTS - skip).min(rest.len());
            let (head, tail) = rest.split_at_mut(now);
            for (f, lane) in head.iter_mut().zip(&lanes[skip..]) {
                *f = if (*lane as u32) < threshold { 0.0 } else { scale };
            }
            rest = tail;
            block += BLOCKS as u64;
            skip = 0;
        }
    }
}

/// Sets `factor` for the whole row `row` of this call, whose rows have `width` elements.
#[inline]
pub fn row_factors(dropout: Dropout, row: usize, width: usize, factor: &mut [f32]) {
    factors(dropout, (dropout.first_row + row as u64) * width as u64, &mut factor[..width]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_the_generator() {
        for (first, len) in [(0u64, 1), (7, 300), (8, 128), (129, 127), ((1 << 35) - 5, 1000)] {
            let dropout =
                Dropout { probability: 0.3, seed: 0x1234_5678_9ABC, step: 5, site: 9, first_row: 0 };
            let mut factor = vec![f32::NAN; len];
            factors(dropout, first, &mut factor);
            for (i, f) in factor.iter().enumerate() {
                let element = first + i as u64;
                let block = rng::stream_block(dropout.seed, dropout.step, dropout.site, element / 8);
                let dropped = rng::lane16(block, element) < rng::dropout_threshold(0.3);
                assert_eq!(*f, if dropped { 0.0 } else { rng::dropout_scale(0.3) }, "element {element}");
            }
        }
    }
}
