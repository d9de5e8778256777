//! Sums into a small device array of scalars, in a fixed order: loss values, the gradient norm.
//!
//! The value stays on the device (`slot` of `scalars`), so that a step needs no read-back; clipping reads it there.
//! A NaN or infinity anywhere makes the sum non-finite, which is how a bad step is detected.

use super::check_all;
use crate::device::{Device, Len};
use crate::error::{Error, Result};

/// A backend's sums. f64 accumulation over fixed blocks.
pub trait Reduce: Device {
    /// `scalars[slot] = Σ x[..len]`.
    fn reduce_sum(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()>;
    /// `scalars[slot] = Σ x[..len]²`.
    fn reduce_sum_squares(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()>;
}

fn check<B: Device>(x: &B::Buf<f32>, len: usize, scalars: &B::Buf<f64>, slot: usize) -> Result<()> {
    check_all!("reduce", x: x, len);
    if slot >= scalars.len() {
        return Err(Error::bug("reduce: no such slot")
            .found(slot)
            .wanted(format!("below {}", scalars.len())));
    }
    Ok(())
}

/// Checked sum.
pub fn sum<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    check::<B>(x, len, scalars, slot)?;
    dev.reduce_sum(x, len, scalars, slot)
}

/// Checked sum of squares.
pub fn sum_squares<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    check::<B>(x, len, scalars, slot)?;
    dev.reduce_sum_squares(x, len, scalars, slot)
}
