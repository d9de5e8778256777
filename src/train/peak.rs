//! What this machine's matrix product reaches, measured once at the start of a run: the yardstick of `fraction_of_peak`.
//!
//! Best of several products of a size that fills every cache level and thread, in the run's own activation type, by the very
//! kernel that the encoder uses. A fraction of it says what attention, norms, losses and the optimiser leave of it.

use crate::device::Act;
use crate::error::Result;
use crate::ops::{Backend, linear};
use std::time::Instant;

/// Rows, inputs and outputs of the product: 1 GFLOP.
const SHAPE: linear::Dims = linear::Dims { rows: 1024, inputs: 512, outputs: 1024 };
/// The first ones warm caches, clocks and threads.
const RUNS: usize = 8;

/// FLOP/s of the best product.
pub fn matmul_flop_per_s<A: Act, B: Backend<A>>(dev: &B) -> Result<f64> {
    let ones = |len: usize| dev.upload(&vec![A::from_f32(0.5); len]);
    let (x, weight) = (ones(SHAPE.rows * SHAPE.inputs)?, ones(SHAPE.outputs * SHAPE.inputs)?);
    let mut y = dev.zeros::<A>(SHAPE.rows * SHAPE.outputs)?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let started = Instant::now();
        let input = linear::In { x: &x, weight: &weight, bias: None, activation: linear::Activation::None };
        linear::forward::<A, B>(dev, SHAPE, input, &mut y)?;
        // Reading a number waits for the device.
        dev.read(&y, &mut [A::default()])?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SHAPE.rows * SHAPE.inputs * SHAPE.outputs) as f64 / best)
}
