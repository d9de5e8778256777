//! Residual + dropout + LayerNorm in one pass.
//!
//! ```text
//! sum = residual + dropout(x)        (kept in place of x)
//! y   = (sum - mean) · rstd · weight + bias
//! ```
//! Backward: with g = dy·weight and n = (sum - mean)·rstd,
//! `dsum = rstd · (g - mean_D(g) - n · mean_D(g·n))`, `dresidual = dsum`, `dx = dsum · dropout mask · ReLU mask`,
//! `dweight += Σ_rows dy·n`, `dbias += Σ_rows dy` (rows summed in a fixed order).

use super::check_all;
use crate::device::{Act, Device, Dropout};
use crate::error::{Error, Result};

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Rows (tokens).
    pub rows: usize,
    /// D.
    pub width: usize,
    /// Added to the variance; 1e-12 in BERT.
    pub eps: f32,
}

/// What the forward pass reads.
pub struct In<'a, B: Device, A: Act> {
    /// (N, D); absent = plain LayerNorm of x.
    pub residual: Option<&'a B::Buf<A>>,
    /// (D).
    pub weight: &'a B::Buf<A>,
    /// (D).
    pub bias: &'a B::Buf<A>,
    /// On x, before the sum.
    pub dropout: Dropout,
}

/// What the forward pass writes.
pub struct Out<'a, B: Device, A: Act> {
    /// (N, D): in, the branch x; out, `sum` (kept for backward). Left as it is when there is neither residual nor dropout.
    pub x_then_sum: &'a mut B::Buf<A>,
    /// (N, D).
    pub y: &'a mut B::Buf<A>,
    /// (N).
    pub mean: &'a mut B::Buf<f32>,
    /// (N).
    pub rstd: &'a mut B::Buf<f32>,
}

/// What the backward pass reads.
pub struct BackwardIn<'a, B: Device, A: Act> {
    /// (N, D).
    pub dy: &'a B::Buf<A>,
    /// (N, D) as the forward pass left it.
    pub sum: &'a B::Buf<A>,
    /// (N).
    pub mean: &'a B::Buf<f32>,
    /// (N).
    pub rstd: &'a B::Buf<f32>,
    /// (D).
    pub weight: &'a B::Buf<A>,
    /// As in the forward pass.
    pub dropout: Dropout,
    /// The branch x came out of a ReLU and nothing was added to it (no residual, no dropout): dx is zeroed where x is 0.
    pub relu_input: bool,
}

/// What the backward pass writes.
pub struct Gradients<'a, B: Device, A: Act> {
    /// (N, D) gradient of the branch x, set.
    pub dx: &'a mut B::Buf<A>,
    /// (N, D) gradient of the residual, set; absent where there was none.
    pub dresidual: Option<&'a mut B::Buf<A>>,
    /// (D) +=.
    pub dweight: &'a mut B::Buf<f32>,
    /// (D) +=.
    pub dbias: &'a mut B::Buf<f32>,
}

/// A backend's LayerNorm.
pub trait LayerNorm<A: Act>: Device {
    /// See the module's formula.
    fn layernorm_forward(&self, dims: Dims, input: In<'_, Self, A>, out: Out<'_, Self, A>) -> Result<()>;
    /// See the module's formula.
    fn layernorm_backward(
        &self,
        dims: Dims,
        input: BackwardIn<'_, Self, A>,
        grads: Gradients<'_, Self, A>,
    ) -> Result<()>;
}

/// Checked forward pass.
pub fn forward<A: Act, B: LayerNorm<A>>(
    dev: &B,
    dims: Dims,
    input: In<'_, B, A>,
    out: Out<'_, B, A>,
) -> Result<()> {
    let n = dims.rows * dims.width;
    check_all!("layernorm", weight: input.weight, dims.width; bias: input.bias, dims.width; x: out.x_then_sum, n;
        y: out.y, n; mean: out.mean, dims.rows; rstd: out.rstd, dims.rows);
    if let Some(r) = input.residual {
        check_all!("layernorm", residual: r, n);
    }
    let _range = crate::trace::range("layernorm_forward");
    dev.layernorm_forward(dims, input, out)
}

/// Checked backward pass.
pub fn backward<A: Act, B: LayerNorm<A>>(
    dev: &B,
    dims: Dims,
    input: BackwardIn<'_, B, A>,
    grads: Gradients<'_, B, A>,
) -> Result<()> {
    let n = dims.rows * dims.width;
    check_all!("layernorm backward", dy: input.dy, n; sum: input.sum, n; mean: input.mean, dims.rows;
        rstd: input.rstd, dims.rows; weight: input.weight, dims.width; dx: grads.dx, n;
        dweight: grads.dweight, dims.width; dbias: grads.dbias, dims.width);
    if let Some(r) = &grads.dresidual {
        check_all!("layernorm backward", dresidual: *r, n);
    }
    if input.relu_input && (grads.dresidual.is_some() || input.dropout.probability > 0.0) {
        return Err(Error::bug(
            "layernorm backward: `sum` is not the ReLU's output where something was added to it",
        ));
    }
    let _range = crate::trace::range("layernorm_backward");
    dev.layernorm_backward(dims, input, grads)
}
