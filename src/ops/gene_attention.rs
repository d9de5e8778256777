//! Multi-head self-attention over packed cells of any length, without padding and without an L×L matrix.
//!
//! For every cell and head, with q, k, v the columns of `qkv` (head h occupies columns h·K … (h+1)·K of each third):
//! ```text
//! s_ij = q_i · k_j / sqrt(K)     for the pairs (i, j) that the pattern holds
//! p_ij = exp(s_ij - lse_i),      lse_i = log Σ_j exp(s_ij)
//! o_i  = Σ_j dropout(p_ij) v_j
//! ```
//! Streaming softmax in both directions: memory is O(N), `lse` (N, H) is all that backward needs besides q, k, v, o.
//! Backward: `delta_i = do_i · o_i`, `dp_ij = dropout'(do_i · v_j)`, `ds_ij = p_ij (dp_ij - delta_i)`,
//! `dq_i = Σ_j ds_ij k_j / sqrt(K)`, `dk_j = Σ_i ds_ij q_i / sqrt(K)`, `dv_j = Σ_i dropout(p_ij) do_i`.
//!
//! Dropout element of (token i of the batch, head h, key j of its cell): row `(first_row + i)·H + h`, element
//! `row · 65536 + j` ([`ATTENTION_ROW_STRIDE`](crate::rng::ATTENTION_ROW_STRIDE)).

use super::check_all;
use crate::device::{Act, Device, Dropout};
use crate::error::Result;

/// Which pairs of tokens of a cell attend to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// All pairs.
    Dense,
    /// Pair (i, j) when i or j is global (a marker gene or a special token) or |i - j| ≤ window (in ranks). Symmetric.
    MarkerSparse {
        /// Half-width of the rank window.
        window: usize,
    },
}

/// Sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// N: packed tokens.
    pub tokens: usize,
    /// C: cells.
    pub cells: usize,
    /// H.
    pub heads: usize,
    /// K: 32, 64 or 128 on every backend; others where the backend says so.
    pub head_width: usize,
    /// Longest cell of the batch.
    pub max_len: usize,
    /// Pairs that attend.
    pub pattern: Pattern,
}

impl Dims {
    /// D = H·K.
    pub fn width(&self) -> usize {
        self.heads * self.head_width
    }
}

/// What both directions read.
pub struct In<'a, B: Device, A: Act> {
    /// (N, 3·D): q, k, v side by side.
    pub qkv: &'a B::Buf<A>,
    /// (C + 1) token offsets; cells are not empty.
    pub cell_start: &'a B::Buf<u32>,
    /// (N) 1 = global token; read by `MarkerSparse` alone.
    pub global: Option<&'a B::Buf<u8>>,
    /// On the probabilities.
    pub dropout: Dropout,
}

/// What the backward pass reads besides.
pub struct BackwardIn<'a, B: Device, A: Act> {
    /// (N, D) gradient of o.
    pub do_: &'a B::Buf<A>,
    /// (N, D) of the forward pass.
    pub o: &'a B::Buf<A>,
    /// (N, H) of the forward pass.
    pub lse: &'a B::Buf<f32>,
}

/// A backend's attention.
pub trait GeneAttention<A: Act>: Device {
    /// Sets o (N, D) and lse (N, H).
    fn gene_attention_forward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        o: &mut Self::Buf<A>,
        lse: &mut Self::Buf<f32>,
    ) -> Result<()>;
    /// Sets dqkv (N, 3·D); `delta` (N, H) is scratch.
    fn gene_attention_backward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        backward: BackwardIn<'_, Self, A>,
        dqkv: &mut Self::Buf<A>,
        delta: &mut Self::Buf<f32>,
    ) -> Result<()>;
}

fn check_in<B: Device, A: Act>(d: Dims, i: &In<'_, B, A>) -> Result<()> {
    check_all!("gene_attention", qkv: i.qkv, 3 * d.tokens * d.width(); cell_start: i.cell_start, d.cells + 1);
    if let Pattern::MarkerSparse { .. } = d.pattern {
        let missing = || crate::error::Error::bug("gene_attention: marker-sparse without the `global` flags");
        check_all!("gene_attention", global: i.global.ok_or_else(missing)?, d.tokens);
    }
    Ok(())
}

/// Checked forward pass.
pub fn forward<A: Act, B: GeneAttention<A>>(
    dev: &B,
    dims: Dims,
    input: In<'_, B, A>,
    o: &mut B::Buf<A>,
    lse: &mut B::Buf<f32>,
) -> Result<()> {
    check_in(dims, &input)?;
    check_all!("gene_attention", o: o, dims.tokens * dims.width(); lse: lse, dims.tokens * dims.heads);
    let _range = crate::trace::range("gene_attention_forward");
    dev.gene_attention_forward(dims, input, o, lse)
}

/// Checked backward pass.
pub fn backward<A: Act, B: GeneAttention<A>>(
    dev: &B,
    dims: Dims,
    input: In<'_, B, A>,
    backward: BackwardIn<'_, B, A>,
    dqkv: &mut B::Buf<A>,
    delta: &mut B::Buf<f32>,
) -> Result<()> {
    check_in(dims, &input)?;
    let n = dims.tokens * dims.width();
    check_all!("gene_attention backward", do_: backward.do_, n; o: backward.o, n;
        lse: backward.lse, dims.tokens * dims.heads; dqkv: dqkv, 3 * n; delta: delta, dims.tokens * dims.heads);
    let _range = crate::trace::range("gene_attention_backward");
    dev.gene_attention_backward(dims, input, backward, dqkv, delta)
}

/// Pairs (i, j) that attend, over all cells: Σ len² when dense.
pub fn pairs(pattern: Pattern, cell_start: &[u32], global: &[u8]) -> u64 {
    let cells = cell_start.windows(2).map(|c| c[0] as usize..c[1] as usize);
    match pattern {
        Pattern::Dense => cells.map(|c| (c.len() as u64).pow(2)).sum(),
        Pattern::MarkerSparse { window } => cells
            .map(|cell| {
                let (global, len) = (&global[cell.clone()], cell.len());
                let globals = global.iter().filter(|g| **g != 0).count() as u64;
                // An ordinary token attends to the ordinary ones of its window and to every global one.
                let mut ordinary_before = vec![0u64; len + 1];
                for (i, g) in global.iter().enumerate() {
                    ordinary_before[i + 1] = ordinary_before[i] + u64::from(*g == 0);
                }
                let ordinary: u64 = (0..len)
                    .filter(|i| global[*i] == 0)
                    .map(|i| {
                        let end = i.saturating_add(window).saturating_add(1).min(len);
                        ordinary_before[end] - ordinary_before[i.saturating_sub(window)] + globals
                    })
                    .sum();
                ordinary + globals * len as u64
            })
            .sum(),
    }
}

/// FLOPs of the forward and of the backward pass over `pairs` ([`pairs`]): 4·D a pair (two products) and 10·D (five).
pub fn flops(dims: Dims, pairs: u64) -> (f64, f64) {
    let forward = 4.0 * dims.width() as f64 * pairs as f64;
    (forward, 2.5 * forward)
}
