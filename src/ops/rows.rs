//! Gather rows by index, and add rows back: the masked tokens on their way into and out of the masked-gene head.
//!
//! `y_m = x[index_m]` and `dx[index_m] += dy_m`; the indices of one call are distinct.

use super::check_all;
use crate::device::{Act, Device};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Rows of x.
    pub rows: usize,
    /// M: indices.
    pub gathered: usize,
    /// D.
    pub width: usize,
}

/// A backend's gather and scatter.
pub trait Rows<A: Act>: Device {
    /// y (M, D) is set from x (rows, D).
    fn rows_gather(
        &self,
        dims: Dims,
        x: &Self::Buf<A>,
        index: &Self::Buf<u32>,
        y: &mut Self::Buf<A>,
    ) -> Result<()>;
    /// dx (rows, D) +=, at distinct rows.
    fn rows_scatter_add(
        &self,
        dims: Dims,
        dy: &Self::Buf<A>,
        index: &Self::Buf<u32>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()>;
}

/// Checked gather.
pub fn gather<A: Act, B: Rows<A>>(
    dev: &B,
    dims: Dims,
    x: &B::Buf<A>,
    index: &B::Buf<u32>,
    y: &mut B::Buf<A>,
) -> Result<()> {
    check_all!("rows gather", x: x, dims.rows * dims.width; index: index, dims.gathered; y: y, dims.gathered * dims.width);
    let _range = crate::trace::range("rows_gather");
    dev.rows_gather(dims, x, index, y)
}

/// Checked scatter.
pub fn scatter_add<A: Act, B: Rows<A>>(
    dev: &B,
    dims: Dims,
    dy: &B::Buf<A>,
    index: &B::Buf<u32>,
    dx: &mut B::Buf<A>,
) -> Result<()> {
    check_all!("rows scatter", dx: dx, dims.rows * dims.width; index: index, dims.gathered;
        dy: dy, dims.gathered * dims.width);
    let _range = crate::trace::range("rows_scatter_add");
    dev.rows_scatter_add(dims, dy, index, dx)
}
