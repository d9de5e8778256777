//! Cell embedding from token rows: the first token, or the mean over the tokens without the special ones.
//!
//! ```text
//! cls :  h_c = x[cell_start[c]]
//! mean:  h_c = mean of x[t],  cell_start[c] + prefix ≤ t < cell_start[c+1] - suffix
//! ```
//! A cell with nothing between prefix and suffix takes all its tokens. The result is f32: losses start here.

use super::check_all;
use crate::device::{Act, Device};
use crate::error::Result;

/// Which tokens make the cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The first token.
    Cls,
    /// The mean over all tokens but the special ones.
    Mean,
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// N.
    pub tokens: usize,
    /// C.
    pub cells: usize,
    /// D.
    pub width: usize,
    /// Rule.
    pub pooling: Pooling,
    /// Special tokens at each cell's start.
    pub prefix: usize,
    /// Special tokens at each cell's end.
    pub suffix: usize,
}

/// A backend's pooling.
pub trait Pool<A: Act>: Device {
    /// h (C, D) is set from x (N, D).
    fn pool_forward(
        &self,
        dims: Dims,
        x: &Self::Buf<A>,
        cell_start: &Self::Buf<u32>,
        h: &mut Self::Buf<f32>,
    ) -> Result<()>;
    /// dx (N, D) is set from dh (C, D), zeros included.
    fn pool_backward(
        &self,
        dims: Dims,
        dh: &Self::Buf<f32>,
        cell_start: &Self::Buf<u32>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()>;
}

/// Checked forward pass.
pub fn forward<A: Act, B: Pool<A>>(
    dev: &B,
    dims: Dims,
    x: &B::Buf<A>,
    cell_start: &B::Buf<u32>,
    h: &mut B::Buf<f32>,
) -> Result<()> {
    check_all!("pool", x: x, dims.tokens * dims.width; cell_start: cell_start, dims.cells + 1; h: h, dims.cells * dims.width);
    let _range = crate::trace::range("pool_forward");
    dev.pool_forward(dims, x, cell_start, h)
}

/// Checked backward pass.
pub fn backward<A: Act, B: Pool<A>>(
    dev: &B,
    dims: Dims,
    dh: &B::Buf<f32>,
    cell_start: &B::Buf<u32>,
    dx: &mut B::Buf<A>,
) -> Result<()> {
    check_all!("pool backward", dh: dh, dims.cells * dims.width; cell_start: cell_start, dims.cells + 1;
        dx: dx, dims.tokens * dims.width);
    let _range = crate::trace::range("pool_backward");
    dev.pool_backward(dims, dh, cell_start, dx)
}
