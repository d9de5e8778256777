//! Philox 4x32-10, a counter-based generator: the bits at a counter depend on (key, counter) alone.
//!
//! Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Dropout, token masking, weight initialisation,
//! splits and sampling all draw from here. A stream is named by `(seed, step, site)`; nothing depends on how work is cut
//! into batches, threads or devices. The CUDA kernels hold the same ten rounds.

use std::convert::Infallible;

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// The four words at `counter` under `key`.
#[inline(always)]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = counter[0] as u64 * M0 as u64;
        let p1 = counter[2] as u64 * M1 as u64;
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
    }
    counter
}

/// The words of block `block` of stream `(seed, step, site)`: counter `[block low, block high, step, site]`.
#[inline(always)]
pub fn stream_block(seed: u64, step: u32, site: u32, block: u64) -> [u32; 4] {
    philox4x32([block as u32, (block >> 32) as u32, step, site], [seed as u32, (seed >> 32) as u32])
}

/// 16-bit lane `element % 8` of block `element / 8`: even lanes are the low halves of the words. Dropout compares it with
/// [`dropout_threshold`].
#[inline(always)]
pub fn lane16(block: [u32; 4], element: u64) -> u32 {
    let lane = (element & 7) as usize;
    (block[lane >> 1] >> ((lane & 1) * 16)) & 0xFFFF
}

/// An element is dropped when its 16-bit lane is below this.
#[inline]
pub fn dropout_threshold(probability: f32) -> u32 {
    (probability as f64 * 65536.0).round() as u32
}

/// What a kept element is multiplied by: the inverse of the keep probability that the 16-bit threshold realises.
#[inline]
pub fn dropout_scale(probability: f32) -> f32 {
    (65536.0 / (65536.0 - dropout_threshold(probability) as f64)) as f32
}

/// Stride between the dropout elements of two (token, head) rows of attention probabilities: longer than any context, so
/// that an element's index does not depend on the batch.
pub const ATTENTION_ROW_STRIDE: u64 = 1 << 16;

/// A sequential generator over one stream; also a [`rand::Rng`], so `rand`'s shuffles and ranges work on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Philox {
    seed: u64,
    step: u32,
    site: u32,
    block: u64,
    words: [u32; 4],
    used: usize,
}

/// Named sites of the sequential streams, so that no two purposes share numbers. Dropout sites are small numbers given by
/// the model; these sit far above.
pub mod site {
    /// Weight initialisation; one step number per tensor.
    pub const INIT: u32 = 0x8000_0001;
    /// Train/test splits.
    pub const SPLIT: u32 = 0x8000_0002;
    /// Order of cells; the step number is the epoch.
    pub const ORDER: u32 = 0x8000_0003;
    /// Masked-gene selection and replacement.
    pub const MASK: u32 = 0x8000_0004;
    /// Choice of labelled cells in few-label runs.
    pub const LABELS: u32 = 0x8000_0005;
    /// Sampled vocabulary of a sampled softmax.
    pub const CANDIDATES: u32 = 0x8000_0006;
    /// k-means, silhouette sampling and other evaluation.
    pub const EVAL: u32 = 0x8000_0007;
    /// Random weights and inputs of benchmarks.
    pub const BENCH: u32 = 0x8000_0008;
}

impl Philox {
    /// The stream `(seed, step, site)` from its start.
    pub fn new(seed: u64, step: u32, site: u32) -> Self {
        Philox { seed, step, site, block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 bits.
    #[inline]
    pub fn u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = stream_block(self.seed, self.step, self.site, self.block);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next 64 bits.
    #[inline]
    pub fn u64(&mut self) -> u64 {
        self.u32() as u64 | (self.u32() as u64) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    #[inline]
    pub fn uniform(&mut self) -> f64 {
        (self.u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..n without bias (Lemire's rejection). `n` is at least 1.
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        loop {
            let product = self.u64() as u128 * n as u128;
            if (product as u64) >= n.wrapping_neg() % n {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box–Muller, one of the pair).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Fisher–Yates shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

impl rand::rand_core::TryRng for Philox {
    type Error = Infallible;
    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.u32())
    }
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.u64())
    }
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for chunk in bytes.chunks_mut(4) {
            chunk.copy_from_slice(&self.u32().to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's kat_vectors, philox4x32 with 10 rounds.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn below_is_uniform_and_in_range() {
        let mut r = Philox::new(1, 2, 3);
        let mut count = [0u32; 7];
        for _ in 0..70_000 {
            count[r.below(7) as usize] += 1;
        }
        assert!(count.iter().all(|c| (9_500..10_500).contains(c)), "{count:?}");
    }

    #[test]
    fn dropout_scale_inverts_the_realised_probability() {
        let p = dropout_threshold(0.02) as f64 / 65536.0;
        assert!((p - 0.02).abs() < 1e-5 && (dropout_scale(0.02) as f64 * (1.0 - p) - 1.0).abs() < 1e-6);
        assert_eq!(dropout_scale(0.0), 1.0);
    }
}
