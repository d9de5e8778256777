//! A permutation of 0 .. n that is computed, not stored: a keyed bijection, in constant memory whatever n is.
//!
//! An alternating Feistel network over the ⌈log₂ n⌉ bits of an index: each half is changed by a keyed hash of the other, which can
//! be undone whatever the hash is. Its domain is the next power of two, below 2n; an index that leaves 0 .. n is sent through
//! again until it is back (cycle walking), which keeps it a bijection and takes fewer than two passes on average. The keys are
//! Philox words, so that a permutation has an address like every other random thing here.
//!
//! It is one of 2^512 permutations rather than of n!, so a list of cells small enough to be shuffled still is (see `sampler`).

use crate::rng::{site, stream_block};

/// Rounds of the network; each half is changed four times.
const ROUNDS: usize = 8;

/// A bijection of 0 .. n.
#[derive(Debug, Clone)]
pub struct Permutation {
    n: u64,
    /// Bits of the lower half, which has as many as the upper one or one more.
    low_bits: u32,
    low_mask: u64,
    high_mask: u64,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The `index`-th permutation of 0 .. `n` that the stream (`seed`, `step`) of orders holds; `n` is below 2⁶³.
    pub fn new(n: u64, seed: u64, step: u32, index: u64) -> Self {
        debug_assert!(n < 1 << 63);
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        let (low_bits, high_bits) = (bits.div_ceil(2), bits / 2);
        // Sixteen words each: four blocks of the stream.
        let keys = std::array::from_fn(|k| {
            let words = stream_block(seed, step, site::ORDER, 4 * index + k as u64 / 2);
            let at = k % 2 * 2;
            u64::from(words[at]) << 32 | u64::from(words[at + 1])
        });
        Permutation { n, low_bits, low_mask: (1 << low_bits) - 1, high_mask: (1 << high_bits) - 1, keys }
    }

    /// Where index `i`, below n, goes.
    #[inline]
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mut x = i;
        loop {
            let (mut low, mut high) = (x & self.low_mask, x >> self.low_bits);
            for keys in self.keys.chunks_exact(2) {
                low = (low ^ mix(high ^ keys[0])) & self.low_mask;
                high = (high ^ mix(low ^ keys[1])) & self.high_mask;
            }
            x = high << self.low_bits | low;
            if x < self.n {
                return x;
            }
        }
    }
}

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
#[inline]
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// An order of 0 .. n that reads storage in runs: blocks of neighbours are permuted, and the indices of each group of consecutive
/// blocks among themselves. Storage sees `GROUP` runs of `block` cells at a time; the batches of a corpus that is sorted by type
/// vary more in composition than with a full permutation (docs/scaling.md has the numbers).
#[derive(Debug, Clone)]
pub struct BlockOrder {
    n: u64,
    block: u64,
    /// Of the whole blocks; a shorter last one stays last.
    blocks: Permutation,
    whole: u64,
    group: u64,
    seed: u64,
    step: u32,
    /// The permutation within the group that was asked for last.
    within: (u64, Permutation),
}

impl BlockOrder {
    /// Blocks in one group.
    pub const GROUP: u64 = 256;

    /// An order of 0 .. `n` in blocks of `block`.
    pub fn new(n: u64, block: u64, seed: u64, step: u32) -> Self {
        let block = block.max(1);
        let whole = n / block;
        let blocks = Permutation::new(whole, seed, step, 0);
        let within = (u64::MAX, blocks.clone());
        BlockOrder { n, block, blocks, whole, group: Self::GROUP * block, seed, step, within }
    }

    /// Where index `i`, below n, goes.
    pub fn at(&mut self, i: u64) -> u64 {
        let group = i / self.group;
        let first = group * self.group;
        if self.within.0 != group {
            let rows = self.group.min(self.n - first);
            self.within = (group, Permutation::new(rows, self.seed, self.step, group + 1));
        }
        let slot = first + self.within.1.at(i - first);
        let (block, offset) = (slot / self.block, slot % self.block);
        if block < self.whole { self.blocks.at(block) * self.block + offset } else { slot }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every index comes once, for sizes around powers of two, where the halves differ and cycles are walked.
    #[test]
    fn bijections_of_every_size() {
        for n in (1..70).chain([127, 128, 129, 1000, 4095, 4096, 4097, 100_003]) {
            let p = Permutation::new(n, 7, 3, 0);
            let mut seen = vec![false; n as usize];
            (0..n).for_each(|i| seen[p.at(i) as usize] = true);
            assert!(seen.iter().all(|s| *s), "{n}");
            let mut b = BlockOrder::new(n, 4, 7, 3);
            let mut seen = vec![false; n as usize];
            (0..n).for_each(|i| seen[b.at(i) as usize] = true);
            assert!(seen.iter().all(|s| *s), "blocks of {n}");
        }
    }

    /// Over many keys, where an index goes is uniform, and independent of where its neighbour goes.
    #[test]
    fn places_are_uniform_and_neighbours_part() {
        const N: u64 = 100;
        let (mut first, mut step) = ([0u32; N as usize], [0u32; N as usize]);
        for seed in 0..20_000 {
            let p = Permutation::new(N, seed, 0, 0);
            let (a, b) = (p.at(17), p.at(18));
            first[a as usize] += 1;
            step[((b + N - a) % N) as usize] += 1;
        }
        let chi2 = |counts: &[u32]| {
            let mean = counts.iter().sum::<u32>() as f64 / counts.len() as f64;
            counts.iter().map(|&c| (c as f64 - mean).powi(2) / mean).sum::<f64>()
        };
        // 99 and 98 degrees of freedom: 160 is beyond the 0.9999 quantile.
        assert!(chi2(&first) < 160.0, "{}", chi2(&first));
        assert!(step[0] == 0 && chi2(&step[1..]) < 160.0, "{}", chi2(&step[1..]));
    }

    /// A group of the block order touches no more blocks than it says.
    #[test]
    fn blocks_are_read_in_runs() {
        let (n, block) = (1_000_000, 64);
        let mut order = BlockOrder::new(n, block, 1, 0);
        for group in [0, 3, 17] {
            let first = group * BlockOrder::GROUP * block;
            let blocks: std::collections::BTreeSet<u64> =
                (first..first + BlockOrder::GROUP * block).map(|i| order.at(i) / block).collect();
            assert!(blocks.len() as u64 <= BlockOrder::GROUP + 1, "{}", blocks.len());
            assert!(blocks.last().unwrap() - blocks.first().unwrap() > n / block / 2);
        }
    }
}
