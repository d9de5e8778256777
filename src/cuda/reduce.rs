//! Sums in f64: geometry of `kernels/reduce.cu`. Formula in [`crate::ops::reduce`].

use super::functions::{reduce_blocks, reduce_first_bad, reduce_total};
use super::workspace::bytes;
use super::{Cuda, Grid};
use crate::error::Result;
use crate::ops::reduce::{Reduce, Sum};

/// Elements per block: SPAN of the kernel.
const SPAN: usize = 16 * 1024;

/// Bytes of workspace for at most so many elements.
pub(super) fn most_bytes(len: usize) -> usize {
    bytes::<f64>(&[len.div_ceil(SPAN)])
}

impl Reduce for Cuda {
    fn reduce(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        sum: Sum,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        let blocks = len.div_ceil(SPAN);
        let mut workspace = self.workspace();
        let mut sums = workspace.one::<f64>(blocks)?;
        reduce_blocks(self, Grid::line(blocks, 256), x, &mut sums, len as u64, i32::from(sum.squared))?;
        let (blocks, slot, add) = (blocks as i32, slot as i32, i32::from(sum.add));
        reduce_total(self, Grid::line(1, 256), &sums, scalars, blocks, slot, add)
    }

    fn reduce_first_bad(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        when: usize,
        slot: usize,
    ) -> Result<()> {
        reduce_first_bad(self, Grid::line(1, 256), x, scalars, len as u64, when as i32, slot as i32)
    }
}
