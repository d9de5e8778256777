//! Gather rows by index, and add rows back. Formula in [`crate::ops::rows`].
//!
//! The scatter runs on one thread: the masked tokens are a sixth of the batch and pass through memory once, which one core
//! does in the time that cutting the indices into disjoint ranges would take.

use crate::cpu::Cpu;
use crate::cpu::simd::vectorized;
use crate::device::Act;
use crate::error::Result;
use crate::ops::rows::{Dims, Rows};
use rayon::prelude::*;

/// Rows per task.
const ROWS: usize = 64;

vectorized! {
    /// `dx[index_m] += dy_m`.
    fn scatter[A: Act](width: usize, dy: &[A], index: &[u32], dx: &mut [A]) {
        for (dy, &row) in dy.chunks_exact(width).zip(index) {
            for (x, y) in dx[row as usize * width..][..width].iter_mut().zip(dy) {
                *x = A::from_f32(x.to_f32() + y.to_f32());
            }
        }
    }
}

impl<A: Act> Rows<A> for Cpu {
    fn rows_gather(
        &self,
        dims: Dims,
        x: &Self::Buf<A>,
        index: &Self::Buf<u32>,
        y: &mut Self::Buf<A>,
    ) -> Result<()> {
        let width = dims.width;
        if dims.gathered * width == 0 {
            return Ok(());
        }
        let (x, index): (&[A], &[u32]) = (x, &index[..dims.gathered]);
        y[..dims.gathered * width].par_chunks_mut(ROWS * width).zip(index.par_chunks(ROWS)).for_each(
            |(y, index)| {
                for (y, &row) in y.chunks_exact_mut(width).zip(index) {
                    y.copy_from_slice(&x[row as usize * width..][..width]);
                }
            },
        );
        Ok(())
    }

    fn rows_scatter_add(
        &self,
        dims: Dims,
        dy: &Self::Buf<A>,
        index: &Self::Buf<u32>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        if dims.gathered * dims.width > 0 {
            scatter(dims.width, &dy[..dims.gathered * dims.width], &index[..dims.gathered], dx);
        }
        Ok(())
    }
}
