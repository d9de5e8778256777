//! Linear layer with fused epilogues. Weights are (out, in), as in Hugging Face checkpoints.
//!
//! ```text
//! y  = act(x · Wᵀ + b)                       act = none or ReLU
//! dx = (dy · W) ∘ 1[relu_output > 0]          (or dx += …)
//! dW += dyᵀ · x,  db += Σ_rows dy             (f32)
//! ```

use super::check_all;
use crate::device::{Act, Device};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// Rows of x and y.
    pub rows: usize,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
}

/// Applied to the output in the same pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// Nothing.
    None,
    /// max(0, ·).
    Relu,
}

/// What the forward pass reads.
pub struct In<'a, B: Device, A: Act> {
    /// (rows, inputs).
    pub x: &'a B::Buf<A>,
    /// (outputs, inputs).
    pub weight: &'a B::Buf<A>,
    /// (outputs).
    pub bias: Option<&'a B::Buf<A>>,
    /// Epilogue.
    pub activation: Activation,
}

/// What the input gradient reads.
pub struct BackwardInput<'a, B: Device, A: Act> {
    /// (rows, outputs).
    pub dy: &'a B::Buf<A>,
    /// (outputs, inputs).
    pub weight: &'a B::Buf<A>,
    /// (rows, inputs): where x came out of a ReLU, x itself; dx is zeroed where it is 0.
    pub relu_output: Option<&'a B::Buf<A>>,
    /// `dx += …` instead of `dx = …`.
    pub accumulate: bool,
}

/// What the weight gradient reads.
pub struct BackwardWeight<'a, B: Device, A: Act> {
    /// (rows, inputs).
    pub x: &'a B::Buf<A>,
    /// (rows, outputs).
    pub dy: &'a B::Buf<A>,
}

/// A backend's linear layer.
pub trait Linear<A: Act>: Device {
    /// y (rows, outputs) is set.
    fn linear_forward(&self, dims: Dims, input: In<'_, Self, A>, y: &mut Self::Buf<A>) -> Result<()>;
    /// dx (rows, inputs) is set, or added to when `accumulate`.
    fn linear_backward_input(
        &self,
        dims: Dims,
        input: BackwardInput<'_, Self, A>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()>;
    /// dweight (outputs, inputs) += and dbias (outputs) +=.
    fn linear_backward_weight(
        &self,
        dims: Dims,
        input: BackwardWeight<'_, Self, A>,
        dweight: &mut Self::Buf<f32>,
        dbias: Option<&mut Self::Buf<f32>>,
    ) -> Result<()>;
}

/// Checked forward pass.
pub fn forward<A: Act, B: Linear<A>>(
    dev: &B,
    dims: Dims,
    input: In<'_, B, A>,
    y: &mut B::Buf<A>,
) -> Result<()> {
    check_all!("linear", x: input.x, dims.rows * dims.inputs; weight: input.weight, dims.outputs * dims.inputs;
        y: y, dims.rows * dims.outputs);
    if let Some(b) = input.bias {
        check_all!("linear", bias: b, dims.outputs);
    }
    let _range = crate::trace::range("linear_forward");
    dev.linear_forward(dims, input, y)
}

/// Checked input gradient.
pub fn backward_input<A: Act, B: Linear<A>>(
    dev: &B,
    dims: Dims,
    input: BackwardInput<'_, B, A>,
    dx: &mut B::Buf<A>,
) -> Result<()> {
    check_all!("linear input gradient", dy: input.dy, dims.rows * dims.outputs;
        weight: input.weight, dims.outputs * dims.inputs; dx: dx, dims.rows * dims.inputs);
    if let Some(r) = input.relu_output {
        check_all!("linear input gradient", relu_output: r, dims.rows * dims.inputs);
    }
    let _range = crate::trace::range("linear_backward_input");
    dev.linear_backward_input(dims, input, dx)
}

/// Checked weight gradient.
pub fn backward_weight<A: Act, B: Linear<A>>(
    dev: &B,
    dims: Dims,
    input: BackwardWeight<'_, B, A>,
    dweight: &mut B::Buf<f32>,
    dbias: Option<&mut B::Buf<f32>>,
) -> Result<()> {
    check_all!("linear weight gradient", x: input.x, dims.rows * dims.inputs; dy: input.dy, dims.rows * dims.outputs;
        dweight: dweight, dims.outputs * dims.inputs);
    if let Some(b) = &dbias {
        check_all!("linear weight gradient", dbias: *b, dims.outputs);
    }
    let _range = crate::trace::range("linear_backward_weight");
    dev.linear_backward_weight(dims, input, dweight, dbias)
}
