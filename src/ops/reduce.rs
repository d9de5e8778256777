//! Sums into a small device array of scalars, in a fixed order: loss values, the gradient norm.
//!
//! The value stays on the device (`slot` of `scalars`), so that a step needs no read-back; clipping reads it there.
//! A NaN or infinity anywhere makes the sum non-finite, which is how a bad step is detected; [`first_bad`] then finds its place.

use super::check_all;
use crate::device::{Device, Len};
use crate::error::{Error, Result};

/// What is summed, and what becomes of the slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// Σ x² instead of Σ x.
    pub squared: bool,
    /// Onto what the slot holds.
    pub add: bool,
}

/// A backend's sums. f64 accumulation over fixed blocks.
pub trait Reduce: Device {
    /// `scalars[slot] = Σ x[..len]`, or what `sum` makes of it.
    fn reduce(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        sum: Sum,
        scalars: &mut Self::Buf<f64>,
        slot: usize,
    ) -> Result<()>;
    /// Where `scalars[when]` is not finite: `scalars[slot]` = index of the first element of `x[..len]` that is not, or `len`.
    fn reduce_first_bad(
        &self,
        x: &Self::Buf<f32>,
        len: usize,
        scalars: &mut Self::Buf<f64>,
        when: usize,
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

fn checked<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    sum: Sum,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    check::<B>(x, len, scalars, slot)?;
    let _range = crate::trace::range("reduce");
    dev.reduce(x, len, sum, scalars, slot)
}

/// Checked sum.
pub fn sum<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    checked(dev, x, len, Sum::default(), scalars, slot)
}

/// Checked sum onto what the slot holds.
pub fn add_sum<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    checked(dev, x, len, Sum { squared: false, add: true }, scalars, slot)
}

/// Checked sum of squares.
pub fn sum_squares<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    checked(dev, x, len, Sum { squared: true, add: false }, scalars, slot)
}

/// Checked sum of squares onto what the slot holds.
pub fn add_sum_squares<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    slot: usize,
) -> Result<()> {
    checked(dev, x, len, Sum { squared: true, add: true }, scalars, slot)
}

/// Checked search for the first element that is not finite: only where `scalars[when]` is not finite, and else `slot` stays
/// as it is. `len` where all elements are finite (their sum overflowed).
pub fn first_bad<B: Reduce>(
    dev: &B,
    x: &B::Buf<f32>,
    len: usize,
    scalars: &mut B::Buf<f64>,
    when: usize,
    slot: usize,
) -> Result<()> {
    check::<B>(x, len, scalars, slot.max(when))?;
    let _range = crate::trace::range("reduce_first_bad");
    dev.reduce_first_bad(x, len, scalars, when, slot)
}
