//! Unit rows: geometry of `kernels/normalize.cu`. Formula in [`crate::ops::normalize`].

use super::functions::{normalize_backward, normalize_forward};
use super::{Buf, Cuda, Grid};
use crate::error::Result;
use crate::ops::normalize::{Dims, Normalize};

/// A warp per row.
const WARPS: usize = 8;

impl Normalize for Cuda {
    fn normalize_forward(
        &self,
        dims: Dims,
        h: &Buf<f32>,
        center: Option<&Buf<f32>>,
        z: &mut Buf<f32>,
        inverse_norm: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, width } = dims;
        let grid = Grid::line(rows.div_ceil(WARPS), 32 * WARPS as u32);
        normalize_forward(self, grid, h, center, z, inverse_norm, rows as i32, width as i32)
    }

    fn normalize_backward(
        &self,
        dims: Dims,
        dz: &Buf<f32>,
        z: &Buf<f32>,
        inverse_norm: &Buf<f32>,
        accumulate: bool,
        dh: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { rows, width } = dims;
        let grid = Grid::line(rows.div_ceil(WARPS), 32 * WARPS as u32);
        let accumulate = i32::from(accumulate);
        normalize_backward(self, grid, dz, z, inverse_norm, dh, accumulate, rows as i32, width as i32)
    }
}
