//! Which pairs are kept, for sixteen queries at a time.
//!
//! Element (row, key) of the probabilities is lane `key % 8` of Philox block `row · 8192 + key / 8`
//! ([`crate::ops::gene_attention`]), so one block per query decides on eight consecutive keys. The sixteen blocks of a
//! vector of queries are drawn together, and the answer is one bit mask per key with a bit per query.

use super::BLOCK;
use super::panel::{Order, Run};
use crate::cpu::simd_vector::{LANES, Vector};
use crate::device::Dropout;
use crate::rng::{dropout_scale, dropout_threshold};

/// Blocks per row: [`ATTENTION_ROW_STRIDE`](crate::rng::ATTENTION_ROW_STRIDE) / 8.
const ROW_BLOCKS: u64 = crate::rng::ATTENTION_ROW_STRIDE / 8;

/// The draws of one tile of queries.
pub struct Draws {
    dropout: Dropout,
    /// Lowest and highest word of each row's first block number.
    low: [u32; super::TILE],
    high: [u32; super::TILE],
    /// What kept probabilities are multiplied by.
    pub scale: f32,
}

impl Draws {
    /// `row(lane)` is the dropout row of a query of the tile: (first_row + token) · H + head.
    pub fn new(dropout: Dropout, row: impl Fn(usize) -> u64) -> Draws {
        let block = |lane| row(lane) * ROW_BLOCKS;
        Draws {
            dropout,
            low: std::array::from_fn(|lane| block(lane) as u32),
            high: std::array::from_fn(|lane| (block(lane) >> 32) as u32),
            scale: dropout_scale(dropout.probability),
        }
    }

    /// Kept queries among lanes 16·v … 16·v + 15 for each of the keys `8·block … 8·block + 7` of the cell.
    ///
    /// # Safety
    /// The instruction set of V is present.
    #[inline(always)]
    pub unsafe fn keys<V: Vector>(&self, block: u32, v: usize) -> [u16; 8] {
        let (mut low, mut high) = ([0u32; LANES], [0u32; LANES]);
        for i in 0..LANES {
            // A row starts at a multiple of 8192, so this cannot carry into the high word.
            low[i] = self.low[v * LANES + i] | block;
            high[i] = self.high[v * LANES + i];
        }
        let Dropout { seed, step, site, .. } = self.dropout;
        // SAFETY: the caller vouches for the instruction set.
        let mut words = unsafe { V::philox(&low, &high, step, site, [seed as u32, (seed >> 32) as u32]) };
        let threshold = dropout_threshold(self.dropout.probability) << 16;
        let mut bits = [0; 8];
        for (w, words) in words.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the instruction set.
            unsafe {
                // A half compared in the upper 16 bits: what lies below cannot lift it over the threshold.
                bits[2 * w + 1] = V::at_least(words, threshold);
                for word in words.iter_mut() {
                    *word <<= 16;
                }
                bits[2 * w] = V::at_least(words, threshold);
            }
        }
        bits
    }

    /// Kept queries for each panel row of a block.
    ///
    /// # Safety
    /// The instruction set of V is present.
    #[inline(always)]
    pub unsafe fn block<V: Vector, const N: usize>(
        &self,
        order: &Order<'_>,
        block: Run,
        bits: &mut [[u16; N]; BLOCK],
    ) {
        let step = if block.consecutive { 8 } else { 1 };
        for group in (0..block.count).step_by(step) {
            let key = order.keys[block.begin + group];
            for v in 0..N {
                // SAFETY: the caller vouches for the instruction set.
                let drawn = unsafe { self.keys::<V>(key / 8, v) };
                for (t, bits) in bits[group..block.count].iter_mut().take(step).enumerate() {
                    bits[v] = drawn[(key as usize + t) % 8];
                }
            }
        }
    }
}
