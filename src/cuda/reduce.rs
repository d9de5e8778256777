//! Sums in f64: geometry of `kernels/reduce.cu`. Formula in [`crate::ops::reduce`].

use super::functions::{reduce_blocks, reduce_total};
use super::{Buf, Cuda, Grid};
use crate::error::Result;
use crate::ops::reduce::Reduce;

/// Elements per block: SPAN of the kernel.
const SPAN: usize = 16 * 1024;

fn total(
    cuda: &Cuda,
    x: &Buf<f32>,
    len: usize,
    squared: bool,
    scalars: &mut Buf<f64>,
    slot: usize,
) -> Result<()> {
    let blocks = len.div_ceil(SPAN);
    let mut workspace = cuda.workspace();
    let mut sums = workspace.one::<f64>(blocks)?;
    reduce_blocks(cuda, Grid::line(blocks, 256), x, &mut sums, len as u64, i32::from(squared))?;
    reduce_total(cuda, Grid::line(1, 256), &sums, scalars, blocks as i32, slot as i32)
}

impl Reduce for Cuda {
    fn reduce_sum(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        total(self, x, len, false, scalars, slot)
    }

    fn reduce_sum_squares(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        total(self, x, len, true, scalars, slot)
    }
}
