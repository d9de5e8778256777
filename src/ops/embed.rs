//! Input embedding: gather, sum, LayerNorm, dropout in one pass.
//!
//! ```text
//! s = E_word[gene] + E_pos[position] + E_type[0] (+ E_value[value_bin])
//! x = dropout( (s - mean(s)) · rstd(s) · weight + bias )
//! ```
//! Backward recomputes `s` from the tables instead of keeping it, and sums the rows of equal genes in ascending token order
//! (a stable sort by gene), so the gradient is deterministic without atomics.

use super::check_all;
use crate::device::{Act, Device, Dropout};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// N: packed tokens.
    pub tokens: usize,
    /// D.
    pub width: usize,
    /// V: rows of the word table.
    pub vocab: usize,
    /// Rows of the position table.
    pub positions: usize,
    /// Rows of the value table; 0 = the model has no value embedding.
    pub value_bins: usize,
    /// Added to the variance.
    pub eps: f32,
}

/// What both directions read.
pub struct Tables<'a, B: Device, A: Act> {
    /// (N) gene ids, < V.
    pub gene: &'a B::Buf<u32>,
    /// (N) position within the cell, < positions.
    pub position: &'a B::Buf<u32>,
    /// (N) value bin, < value_bins; absent when value_bins = 0.
    pub value_bin: Option<&'a B::Buf<u32>>,
    /// (V, D).
    pub word: &'a B::Buf<A>,
    /// (positions, D).
    pub position_table: &'a B::Buf<A>,
    /// (2, D); row 0 is used, as in BERT with one segment.
    pub type_table: &'a B::Buf<A>,
    /// (value_bins, D).
    pub value_table: Option<&'a B::Buf<A>>,
    /// (D) LayerNorm weight.
    pub weight: &'a B::Buf<A>,
    /// (D) LayerNorm bias.
    pub bias: &'a B::Buf<A>,
    /// Applied after the LayerNorm.
    pub dropout: Dropout,
}

/// Results of the forward pass.
pub struct Out<'a, B: Device, A: Act> {
    /// (N, D).
    pub x: &'a mut B::Buf<A>,
    /// (N).
    pub mean: &'a mut B::Buf<f32>,
    /// (N).
    pub rstd: &'a mut B::Buf<f32>,
}

/// What the backward pass reads besides the tables.
pub struct BackwardIn<'a, B: Device, A: Act> {
    /// (N, D) gradient of x.
    pub dx: &'a B::Buf<A>,
    /// (N).
    pub mean: &'a B::Buf<f32>,
    /// (N).
    pub rstd: &'a B::Buf<f32>,
}

/// Parameter gradients; all `+=`.
pub struct Gradients<'a, B: Device> {
    /// (V, D) +=.
    pub word: &'a mut B::Buf<f32>,
    /// (positions, D) +=.
    pub position_table: &'a mut B::Buf<f32>,
    /// (2, D) +=, row 0 alone.
    pub type_table: &'a mut B::Buf<f32>,
    /// (value_bins, D) +=.
    pub value_table: Option<&'a mut B::Buf<f32>>,
    /// (D) +=.
    pub weight: &'a mut B::Buf<f32>,
    /// (D) +=.
    pub bias: &'a mut B::Buf<f32>,
}

/// A backend's embedding.
pub trait Embed<A: Act>: Device {
    /// See the module's formula.
    fn embed_forward(&self, dims: Dims, tables: Tables<'_, Self, A>, out: Out<'_, Self, A>) -> Result<()>;
    /// Gradients of every table and of the LayerNorm.
    fn embed_backward(
        &self,
        dims: Dims,
        tables: Tables<'_, Self, A>,
        input: BackwardIn<'_, Self, A>,
        grads: Gradients<'_, Self>,
    ) -> Result<()>;
}

fn check_tables<B: Device, A: Act>(d: Dims, t: &Tables<'_, B, A>) -> Result<()> {
    check_all!("embed", gene: t.gene, d.tokens; position: t.position, d.tokens; word: t.word, d.vocab * d.width;
        position_table: t.position_table, d.positions * d.width; type_table: t.type_table, 2 * d.width;
        weight: t.weight, d.width; bias: t.bias, d.width);
    if d.value_bins > 0 {
        let missing = || crate::error::Error::bug("embed: value_bins > 0 without value buffers");
        check_all!("embed", value_bin: t.value_bin.ok_or_else(missing)?, d.tokens;
            value_table: t.value_table.ok_or_else(missing)?, d.value_bins * d.width);
    }
    Ok(())
}

/// Checked forward pass.
pub fn forward<A: Act, B: Embed<A>>(
    dev: &B,
    dims: Dims,
    tables: Tables<'_, B, A>,
    out: Out<'_, B, A>,
) -> Result<()> {
    check_tables(dims, &tables)?;
    check_all!("embed", x: out.x, dims.tokens * dims.width; mean: out.mean, dims.tokens; rstd: out.rstd, dims.tokens);
    let _range = crate::trace::range("embed_forward");
    dev.embed_forward(dims, tables, out)
}

/// Checked backward pass.
pub fn backward<A: Act, B: Embed<A>>(
    dev: &B,
    dims: Dims,
    tables: Tables<'_, B, A>,
    input: BackwardIn<'_, B, A>,
    grads: Gradients<'_, B>,
) -> Result<()> {
    check_tables(dims, &tables)?;
    check_all!("embed backward", dx: input.dx, dims.tokens * dims.width; mean: input.mean, dims.tokens;
        rstd: input.rstd, dims.tokens; dword: grads.word, dims.vocab * dims.width;
        dposition: grads.position_table, dims.positions * dims.width; dtype: grads.type_table, dims.width;
        dweight: grads.weight, dims.width; dbias: grads.bias, dims.width);
    let _range = crate::trace::range("embed_backward");
    dev.embed_backward(dims, tables, input, grads)
}
