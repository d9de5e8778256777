//! AdamW (Loshchilov & Hutter, 2019) over a range of a flat store, clipping by the global norm included.
//!
//! ```text
//! c = min(1, max_norm / (sqrt(scalars[norm_slot]) + 1e-6))        no step at all when that scalar is not finite
//! g = c · grad;  m = β1 m + (1-β1) g;  v = β2 v + (1-β2) g²
//! w = w - lr · ( (m / (1-β1^t)) / (sqrt(v / (1-β2^t)) + ε) + weight_decay · w )
//! ```
//! Master weights and moments are f32; the activation-type copy, where there is one, is written in the same pass.

use super::check_all;
use crate::device::{Act, Device, Len};
use crate::error::{Error, Result};

/// Hyperparameters of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// β1.
    pub beta1: f32,
    /// β2.
    pub beta2: f32,
    /// ε.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// t, from 1.
    pub step: u32,
    /// Clip threshold of the global gradient norm; infinity = no clipping.
    pub max_norm: f32,
    /// Slot of the global Σ grad².
    pub norm_slot: usize,
}

/// The arrays of one call.
pub struct State<'a, B: Device, A: Act> {
    /// Master weights.
    pub weight: &'a mut B::Buf<f32>,
    /// Gradient.
    pub grad: &'a B::Buf<f32>,
    /// First moment.
    pub m: &'a mut B::Buf<f32>,
    /// Second moment.
    pub v: &'a mut B::Buf<f32>,
    /// Activation-type copy of the weights; absent where activations are f32.
    pub copy: Option<&'a mut B::Buf<A>>,
    /// Scalars with the global Σ grad².
    pub scalars: &'a B::Buf<f64>,
}

/// A backend's AdamW.
pub trait AdamW<A: Act>: Device {
    /// Updates elements `range`.
    fn adamw(&self, range: std::ops::Range<usize>, hyper: Hyper, state: State<'_, Self, A>) -> Result<()>;
    /// The activation-type copy of f32 weights, all of it (after loading).
    fn round(&self, weight: &Self::Buf<f32>, copy: &mut Self::Buf<A>) -> Result<()>;
}

/// Checked update of `range`.
pub fn step<A: Act, B: AdamW<A>>(
    dev: &B,
    range: std::ops::Range<usize>,
    hyper: Hyper,
    state: State<'_, B, A>,
) -> Result<()> {
    check_all!("adamw", weight: state.weight, range.end; grad: state.grad, range.end; m: state.m, range.end;
        v: state.v, range.end);
    if let Some(c) = &state.copy {
        check_all!("adamw", copy: *c, range.end);
    }
    if hyper.norm_slot >= state.scalars.len() {
        return Err(Error::bug("adamw: no such norm slot").found(hyper.norm_slot));
    }
    let _range = crate::trace::range("adamw");
    dev.adamw(range, hyper, state)
}
