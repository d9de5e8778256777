//! Centre and scale rows to unit length: where cosines come from.
//!
//! ```text
//! z = (h - center) · r,   r = rsqrt(max(‖h - center‖², 1e-24))
//! dh = r · (dz - (dz · z) z)
//! ```
//! `center` is the teacher's mean embedding: post-LN encoders are strongly anisotropic, and cosines mean little before it
//! is taken off.

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
}

/// A backend's normalisation. All f32.
pub trait Normalize: Device {
    /// Sets z (rows, D) and inverse_norm (rows) from h (rows, D) and center (D).
    fn normalize_forward(
        &self,
        dims: Dims,
        h: &Self::Buf<f32>,
        center: Option<&Self::Buf<f32>>,
        z: &mut Self::Buf<f32>,
        inverse_norm: &mut Self::Buf<f32>,
    ) -> Result<()>;
    /// dh (rows, D) is set, or added to when `accumulate` (prototypes are parameters).
    fn normalize_backward(
        &self,
        dims: Dims,
        dz: &Self::Buf<f32>,
        z: &Self::Buf<f32>,
        inverse_norm: &Self::Buf<f32>,
        accumulate: bool,
        dh: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

/// Checked forward pass.
pub fn forward<B: Normalize>(
    dev: &B,
    dims: Dims,
    h: &B::Buf<f32>,
    center: Option<&B::Buf<f32>>,
    z: &mut B::Buf<f32>,
    inverse_norm: &mut B::Buf<f32>,
) -> Result<()> {
    let n = dims.rows * dims.width;
    check_all!("normalize", h: h, n; z: z, n; inverse_norm: inverse_norm, dims.rows);
    if let Some(c) = center {
        check_all!("normalize", center: c, dims.width);
    }
    let _range = crate::trace::range("normalize_forward");
    dev.normalize_forward(dims, h, center, z, inverse_norm)
}

/// Checked backward pass.
pub fn backward<B: Normalize>(
    dev: &B,
    dims: Dims,
    dz: &B::Buf<f32>,
    z: &B::Buf<f32>,
    inverse_norm: &B::Buf<f32>,
    accumulate: bool,
    dh: &mut B::Buf<f32>,
) -> Result<()> {
    let n = dims.rows * dims.width;
    check_all!("normalize backward", dz: dz, n; z: z, n; inverse_norm: inverse_norm, dims.rows; dh: dh, n);
    let _range = crate::trace::range("normalize_backward");
    dev.normalize_backward(dims, dz, z, inverse_norm, accumulate, dh)
}
