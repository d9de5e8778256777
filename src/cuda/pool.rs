//! Cell vectors: geometry of `kernels/pool.cu`. Formula in [`crate::ops::pool`].

use super::functions::{pool_backward, pool_forward};
use super::{Cuda, Grid};
use crate::device::Act;
use crate::error::Result;
use crate::ops::pool::{Dims, Pool, Pooling};

/// Warps of a block.
const WARPS: usize = 8;
/// Columns of a block of the forward pass: a pack of 8 for each lane of a warp.
const COLUMNS: usize = 256;

impl<A: Act> Pool<A> for Cuda {
    fn pool_forward(
        &self,
        dims: Dims,
        x: &Self::Buf<A>,
        cell_start: &Self::Buf<u32>,
        h: &mut Self::Buf<f32>,
    ) -> Result<()> {
        pool_forward(
            self,
            Grid::plane(dims.cells, dims.width.div_ceil(COLUMNS), 256),
            x,
            cell_start,
            h,
            i32::from(dims.pooling == Pooling::Mean),
            dims.prefix as i32,
            dims.suffix as i32,
            dims.width as i32,
        )
    }

    fn pool_backward(
        &self,
        dims: Dims,
        dh: &Self::Buf<f32>,
        cell_start: &Self::Buf<u32>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        pool_backward(
            self,
            Grid::line(dims.tokens.div_ceil(WARPS), 256),
            dh,
            cell_start,
            dx,
            dims.tokens as i32,
            dims.cells as i32,
            i32::from(dims.pooling == Pooling::Mean),
            dims.prefix as i32,
            dims.suffix as i32,
            dims.width as i32,
        )
    }
}
