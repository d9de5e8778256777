//! Rows gathered and added back: geometry of `kernels/rows.cu`. Formula in [`crate::ops::rows`].

use super::functions::{rows_gather, rows_scatter_add};
use super::{Cuda, Grid};
use crate::device::Act;
use crate::error::Result;
use crate::ops::rows::{Dims, Rows};

/// A thread for each `elements` of a row.
fn grid(dims: Dims, elements: usize) -> Grid {
    Grid::line((dims.gathered * dims.width.div_ceil(elements)).div_ceil(256), 256)
}

impl<A: Act> Rows<A> for Cuda {
    fn rows_gather(
        &self,
        dims: Dims,
        x: &Self::Buf<A>,
        index: &Self::Buf<u32>,
        y: &mut Self::Buf<A>,
    ) -> Result<()> {
        let grid = grid(dims, 16 / size_of::<A>());
        rows_gather(self, grid, x, index, y, dims.gathered as i32, dims.width as i32)
    }

    fn rows_scatter_add(
        &self,
        dims: Dims,
        dy: &Self::Buf<A>,
        index: &Self::Buf<u32>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        rows_scatter_add(self, grid(dims, 8), dy, index, dx, dims.gathered as i32, dims.width as i32)
    }
}
