//! Cell embedding from token rows. Formula in [`crate::ops::pool`].
//!
//! Forward: a task per cell; a mean is summed over blocks of [`BLOCK`] tokens, so that its error does not grow with the cell.
//! Backward: a task per block of tokens, which finds its first cell by bisection.

use crate::cpu::simd::vectorized;
use crate::cpu::{Cpu, scratch};
use crate::device::Act;
use crate::error::Result;
use crate::ops::pool::{Dims, Pool, Pooling};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens summed before their sum is added to the cell's; also tokens per task of the backward pass.
const BLOCK: usize = 64;

/// The tokens that make cell `c`.
fn pooled(dims: Dims, cell_start: &[u32], c: usize) -> Range<usize> {
    let (start, end) = (cell_start[c] as usize, cell_start[c + 1] as usize);
    match dims.pooling {
        Pooling::Cls => start..start + 1,
        Pooling::Mean if start + dims.prefix + dims.suffix < end => start + dims.prefix..end - dims.suffix,
        Pooling::Mean => start..end,
    }
}

vectorized! {
    /// `h = mean of the rows of x`; `partial` is (D) scratch.
    fn mean_rows[A: Act](x: &[A], h: &mut [f32], partial: &mut [f32]) {
        let width = h.len();
        let partial = &mut partial[..width];
        h.fill(0.0);
        for block in x.chunks(BLOCK * width) {
            partial.fill(0.0);
            for row in block.chunks_exact(width) {
                for i in 0..width { partial[i] += row[i].to_f32() }
            }
            for i in 0..width { h[i] += partial[i] }
        }
        let scale = 1.0 / (x.len() / width) as f32;
        for h in h { *h *= scale }
    }
}

vectorized! {
    /// `dx = scale · dh`.
    fn spread_row[A: Act](dh: &[f32], scale: f32, dx: &mut [A]) {
        for (d, h) in dx.iter_mut().zip(dh) { *d = A::from_f32(scale * h) }
    }
}

impl<A: Act> Pool<A> for Cpu {
    fn pool_forward(
        &self,
        dims: Dims,
        x: &Self::Buf<A>,
        cell_start: &Self::Buf<u32>,
        h: &mut Self::Buf<f32>,
    ) -> Result<()> {
        let width = dims.width;
        if dims.cells * width == 0 {
            return Ok(());
        }
        let (x, cell_start): (&[A], &[u32]) = (x, cell_start);
        h[..dims.cells * width].par_chunks_mut(width).enumerate().for_each(|(c, h)| {
            let tokens = pooled(dims, cell_start, c);
            let mut partial = scratch::take(width * 4);
            mean_rows(&x[tokens.start * width..tokens.end * width], h, partial.slice(width));
        });
        Ok(())
    }

    fn pool_backward(
        &self,
        dims: Dims,
        dh: &Self::Buf<f32>,
        cell_start: &Self::Buf<u32>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        let width = dims.width;
        if dims.tokens * width == 0 {
            return Ok(());
        }
        let (dh, cell_start): (&[f32], &[u32]) = (dh, &cell_start[..=dims.cells]);
        dx[..dims.tokens * width].par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, dx)| {
            // The cell of the block's first token: the last one that starts at or before it.
            let mut c = cell_start.partition_point(|&s| s as usize <= block * BLOCK).saturating_sub(1);
            for (r, dx) in dx.chunks_exact_mut(width).enumerate() {
                let t = block * BLOCK + r;
                while c + 1 < cell_start.len() && cell_start[c + 1] as usize <= t {
                    c += 1;
                }
                let tokens = if c < dims.cells { pooled(dims, cell_start, c) } else { 0..0 };
                if tokens.contains(&t) {
                    spread_row(&dh[c * width..(c + 1) * width], 1.0 / tokens.len() as f32, dx);
                } else {
                    dx.fill(A::from_f32(0.0));
                }
            }
        });
        Ok(())
    }
}
