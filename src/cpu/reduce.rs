//! Sums in f64 over fixed blocks, added in block order: the same bits for any number of threads.

use crate::cpu::simd::vectorized;
use crate::cpu::{Cpu, scratch};
use crate::error::Result;
use crate::ops::reduce::{Reduce, Sum};
use rayon::prelude::*;

/// Elements per block and task.
const BLOCK: usize = 16 * 1024;
/// Partial sums within a block.
const LANES: usize = 32;

vectorized! {
    /// Σ x or Σ x² of one block.
    fn block_sum[](x: &[f32], squared: bool) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (whole, tail) = x.as_chunks::<LANES>();
        if squared {
            for chunk in whole {
                for l in 0..LANES { lanes[l] += chunk[l] as f64 * chunk[l] as f64 }
            }
            for (lane, x) in lanes.iter_mut().zip(tail) { *lane += *x as f64 * *x as f64 }
        } else {
            for chunk in whole {
                for l in 0..LANES { lanes[l] += chunk[l] as f64 }
            }
            for (lane, x) in lanes.iter_mut().zip(tail) { *lane += *x as f64 }
        }
        lanes.iter().sum()
    }
}

/// Σ over all blocks, in order.
fn total(x: &[f32], squared: bool) -> f64 {
    let blocks = x.len().div_ceil(BLOCK);
    let mut sums = scratch::take(blocks * 8);
    let sums = sums.slice::<f64>(blocks);
    sums.par_iter_mut().zip(x.par_chunks(BLOCK)).for_each(|(sum, x)| *sum = block_sum(x, squared));
    sums.iter().sum()
}

impl Reduce for Cpu {
    fn reduce(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        sum: Sum,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        let before = if sum.add { scalars[slot] } else { 0.0 };
        scalars[slot] = before + total(&x[..len], sum.squared);
        Ok(())
    }

    fn reduce_first_bad(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        when: usize,
        slot: usize,
    ) -> Result<()> {
        if !scalars[when].is_finite() {
            scalars[slot] = x[..len].iter().position(|x| !x.is_finite()).unwrap_or(len) as f64;
        }
        Ok(())
    }
}
