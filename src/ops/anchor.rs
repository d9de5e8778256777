//! Anchor: hold unit rows near where they were.
//!
//! `loss_i = 1 - z_i · z⁰_i` (unscaled), `dz_i += -scale · z⁰_i`. The same op holds cells to the teacher and prototypes to
//! their start (method: L_anchor).

use super::check_all;
use crate::device::Device;
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Rows.
    pub rows: usize,
    /// D.
    pub width: usize,
    /// Factor of the gradient: weight / rows.
    pub scale: f32,
}

/// A backend's anchor. All f32.
pub trait Anchor: Device {
    /// Sets loss (rows); dz (rows, D) +=.
    fn anchor(
        &self,
        dims: Dims,
        z: &Self::Buf<f32>,
        z0: &Self::Buf<f32>,
        loss: &mut Self::Buf<f32>,
        dz: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// Checked call.
pub fn forward_backward<B: Anchor>(
    dev: &B,
    dims: Dims,
    z: &B::Buf<f32>,
    z0: &B::Buf<f32>,
    loss: &mut B::Buf<f32>,
    dz: &mut B::Buf<f32>,
) -> Result<()> {
    let n = dims.rows * dims.width;
    check_all!("anchor", z: z, n; z0: z0, n; loss: loss, dims.rows; dz: dz, n);
    let _range = crate::trace::range("anchor");
    dev.anchor(dims, z, z0, loss, dz)
}
