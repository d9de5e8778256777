//! The anchor: geometry of `kernels/anchor.cu`. Formula in [`crate::ops::anchor`].

use super::functions::anchor;
use super::{Buf, Cuda, Grid};
use crate::error::Result;
use crate::ops::anchor::{Anchor, Dims};

/// A warp per row.
const WARPS: usize = 8;

impl Anchor for Cuda {
    fn anchor(
        &self,
        dims: Dims,
        z: &Buf<f32>,
        z0: &Buf<f32>,
        loss: &mut Buf<f32>,
        dz: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, width, scale } = dims;
        let grid = Grid::line(rows.div_ceil(WARPS), 32 * WARPS as u32);
        anchor(self, grid, z, z0, loss, dz, scale, rows as i32, width as i32)
    }
}
