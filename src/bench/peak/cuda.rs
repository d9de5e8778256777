//! Ceilings of a GPU: a large matrix product through cuBLASLt on random numbers, and a copy within its memory.
//!
//! Random, because products of zeros draw less power and run faster than any real data will. Both are short against the start
//! of a run, which waits for them; `bench` calls them often enough beforehand for the clocks to settle.

use super::Peak;
use crate::bench::clock::per_call;
use crate::bench::random;
use crate::cuda::Cuda;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::ops::linear::{self, Activation};
use half::bf16;

/// Rows, columns and depth of the product.
const SIDE: usize = 8192;
/// The same in f32, at a tenth of the rate.
const F32_SIDE: usize = 4096;
/// Bytes copied at once: many times the L2 cache.
const COPIED: usize = 1 << 30;
const SAMPLES: usize = 10;

/// Median rate of the product; `None` where the device has no clock.
pub(super) fn peak(dev: &Cuda, bf16_products: bool) -> Result<Option<Peak>> {
    let (side, type_name) = if bf16_products { (SIDE, bf16::NAME) } else { (F32_SIDE, f32::NAME) };
    if dev.facts()?.is_none() {
        return Ok(None);
    }
    let ms = if bf16_products { product_ms::<bf16>(dev, side)? } else { product_ms::<f32>(dev, side)? };
    let flop = 2.0 * (side as f64).powi(3);
    let source = format!("{side}³ {type_name} product by cuBLASLt on random numbers, same run");
    Ok(ms.map(|ms| Peak { gflop_per_s: flop / ms / 1e6, source }))
}

fn product_ms<A: Act>(dev: &Cuda, side: usize) -> Result<Option<f64>> {
    let (x, weight) = (random::buffer::<Cuda, A>(dev, side * side, 1)?, random::buffer(dev, side * side, 2)?);
    let mut y = dev.zeros::<A>(side * side)?;
    let dims = linear::Dims { rows: side, inputs: side, outputs: side };
    per_call(dev, SAMPLES, 2, &mut || {
        let input = linear::In { x: &x, weight: &weight, bias: None, activation: Activation::None };
        linear::forward::<A, Cuda>(dev, dims, input, &mut y)
    })
}

/// Median rate of a copy, reads and writes both counted.
pub(super) fn copy_gb_per_s(dev: &Cuda) -> Result<Option<f64>> {
    if dev.facts()?.is_none() {
        return Ok(None);
    }
    let words = COPIED / 4;
    let (from, mut to) = (random::buffer::<Cuda, f32>(dev, words, 3)?, dev.zeros::<f32>(words)?);
    let ms = per_call(dev, SAMPLES, 4, &mut || dev.copy(&from, &mut to, words))?;
    Ok(ms.map(|ms| 2.0 * COPIED as f64 / ms / 1e6))
}
