//! Attention over the batch, over cells of one length each, and with the marker-sparse pattern.
//!
//! Checked for a few rows of a few cells and heads. The oracle of the backward pass takes o and lse as the forward pass of the
//! same device left them, which its own rows check: one row of a gradient then costs one pass over the cell.

use super::{About, Expected, Kernel, KernelCase, Make, check, spread, starts, wide};
use crate::bench::random;
use crate::device::{Act, Device, Dropout};
use crate::error::Result;
use crate::ops::Backend;
use crate::ops::gene_attention::{self, BackwardIn, Dims, In, Pattern, flops, pairs};
use std::ops::Range;

/// Of the marker-sparse pattern: every so many tokens is global, and this half-width of the window.
const GLOBAL_EVERY: usize = 40;
const WINDOW: usize = 128;
/// Cells, heads, and rows of each that are checked.
const CELLS: usize = 3;
const HEADS: usize = 2;
const ROWS: usize = 4;

struct Attention<B: Device, A: Act> {
    dev: B,
    dims: Dims,
    starts: Vec<u32>,
    backward: bool,
    qkv: B::Buf<A>,
    do_: B::Buf<A>,
    cell_start: B::Buf<u32>,
    global: B::Buf<u8>,
    host_qkv: Vec<A>,
    host_do: Vec<A>,
    host_global: Vec<u8>,
    o: B::Buf<A>,
    lse: B::Buf<f32>,
    dqkv: B::Buf<A>,
    delta: B::Buf<f32>,
}

/// Both directions: dense over the batch and over the sweep, sparse over the batch and the longest of the sweep.
pub(super) fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let mut batches = vec![(case.lengths.clone(), Pattern::Dense)];
    batches.extend(case.sweep.attention.iter().map(|lengths| (lengths.clone(), Pattern::Dense)));
    if let Some(longest) = case.sweep.attention.last() {
        let pattern = Pattern::MarkerSparse { window: WINDOW.min(longest[0] / 4) };
        batches.extend([(case.lengths.clone(), pattern), (longest.clone(), pattern)]);
    }
    let (heads, head_width, seed) = (case.preset.heads, case.preset.width / case.preset.heads, case.seed);
    let mut makes: Vec<Make<B>> = Vec::new();
    for (lengths, pattern) in batches {
        for backward in [false, true] {
            let lengths = lengths.clone();
            let label = format!("{} {}", name(backward), cells(&lengths, pattern));
            makes.push(Make::new(label, move |dev| {
                let dims = Dims {
                    tokens: lengths.iter().sum(),
                    cells: lengths.len(),
                    heads,
                    head_width,
                    max_len: lengths.iter().copied().max().unwrap_or(0),
                    pattern,
                };
                Attention::<B, A>::new(dev, dims, starts(&lengths), backward, seed)
            }));
        }
    }
    makes
}

fn name(backward: bool) -> &'static str {
    if backward { "gene_attention_backward" } else { "gene_attention_forward" }
}

/// `22 cells of 1442, dense`.
fn cells(lengths: &[usize], pattern: Pattern) -> String {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let of = if lengths.iter().all(|len| *len == longest) { "of" } else { "up to" };
    let pattern = match pattern {
        Pattern::Dense => "dense".into(),
        Pattern::MarkerSparse { window } => format!("marker-sparse {window}"),
    };
    format!("{} cells {of} {longest}, {pattern}", lengths.len())
}

impl<B: Backend<A>, A: Act> Attention<B, A> {
    fn new(dev: &B, dims: Dims, starts: Vec<u32>, backward: bool, seed: u64) -> Result<Self> {
        let n = dims.tokens * dims.width();
        let nan = |len: usize| vec![A::from_f32(f32::NAN); len];
        let host_qkv = random::numbers::<A>(seed + 4, 3 * n, 1.0);
        let host_do = random::numbers::<A>(seed + 5, n, 1.0);
        let host_global: Vec<u8> = (0..dims.tokens).map(|i| u8::from(i % GLOBAL_EVERY == 0)).collect();
        let mut kernel = Attention {
            dims,
            backward,
            qkv: dev.upload(&host_qkv)?,
            do_: dev.upload(&host_do)?,
            cell_start: dev.upload(&starts)?,
            global: dev.upload(&host_global)?,
            starts,
            host_qkv,
            host_do,
            host_global,
            o: dev.upload(&nan(n))?,
            lse: dev.upload(&vec![f32::NAN; dims.tokens * dims.heads])?,
            dqkv: dev.upload(&nan(if backward { 3 * n } else { 0 }))?,
            delta: dev.zeros(dims.tokens * dims.heads)?,
            dev: dev.clone(),
        };
        if backward {
            kernel.forward()?;
        }
        Ok(kernel)
    }

    fn forward(&mut self) -> Result<()> {
        let input = In {
            qkv: &self.qkv,
            cell_start: &self.cell_start,
            global: Some(&self.global),
            dropout: Dropout::NONE,
        };
        gene_attention::forward::<A, B>(&self.dev, self.dims, input, &mut self.o, &mut self.lse)
    }

    /// A few cells, heads and rows: (token range of the cell, head, token).
    fn checked(&self) -> Vec<(Range<usize>, usize, usize)> {
        let mut all = Vec::new();
        for cell in spread(self.dims.cells, CELLS) {
            let tokens = self.starts[cell] as usize..self.starts[cell + 1] as usize;
            for head in spread(self.dims.heads, HEADS) {
                all.extend(
                    spread(tokens.len(), ROWS).into_iter().map(|r| (tokens.clone(), head, tokens.start + r)),
                );
            }
        }
        all
    }

    /// Column `head·K` of third `third` (q, k, v) of token `i`.
    fn row(&self, third: usize, head: usize, i: usize) -> &[A] {
        let (d, k) = (self.dims.width(), self.dims.head_width);
        &self.host_qkv[i * 3 * d + third * d + head * k..][..k]
    }

    fn pair(&self, i: usize, j: usize) -> bool {
        match self.dims.pattern {
            Pattern::Dense => true,
            Pattern::MarkerSparse { window } => {
                self.host_global[i] | self.host_global[j] != 0 || i.abs_diff(j) <= window
            }
        }
    }

    fn score(&self, head: usize, i: usize, j: usize) -> f64 {
        dot(self.row(0, head, i), self.row(1, head, j)) / (self.dims.head_width as f64).sqrt()
    }

    fn expected_forward(&self) -> Vec<Expected> {
        let (d, k, heads) = (self.dims.width(), self.dims.head_width, self.dims.heads);
        let (mut o, mut lse) = (Vec::new(), Vec::new());
        for (tokens, head, i) in self.checked() {
            let keys: Vec<usize> = tokens.filter(|j| self.pair(i, *j)).collect();
            let scores: Vec<f64> = keys.iter().map(|j| self.score(head, i, *j)).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
            lse.push((i * heads + head, log_sum));
            let mut row = vec![0.0; k];
            for (j, s) in keys.iter().zip(&scores) {
                add_scaled(&mut row, (s - log_sum).exp(), self.row(2, head, *j));
            }
            o.extend(row.into_iter().enumerate().map(|(c, x)| (i * d + head * k + c, x)));
        }
        let of = |output, what, elements| Expected { output, what, elements };
        vec![of(0, "o", o), of(1, "lse", lse)]
    }

    fn expected_backward(&self) -> Result<Vec<Expected>> {
        let (d, k, heads) = (self.dims.width(), self.dims.head_width, self.dims.heads);
        let (o, lse) = (self.dev.download(&self.o)?, self.dev.download(&self.lse)?);
        let scale = 1.0 / (k as f64).sqrt();
        let of_head = |x: &[A], head: usize, i: usize| -> Vec<A> { x[i * d + head * k..][..k].to_vec() };
        // p_ij and ds_ij / sqrt(K).
        let slope = |head: usize, i: usize, j: usize| {
            let p = (self.score(head, i, j) - f64::from(lse[i * heads + head])).exp();
            let do_ = of_head(&self.host_do, head, i);
            let dp = dot(&do_, self.row(2, head, j));
            (p, p * (dp - dot(&do_, &of_head(&o, head, i))) * scale)
        };
        let mut thirds = [Vec::new(), Vec::new(), Vec::new()];
        for (tokens, head, at) in self.checked() {
            let mut rows = [vec![0.0; k], vec![0.0; k], vec![0.0; k]];
            for other in tokens.filter(|j| self.pair(at, *j)) {
                let (_, ds) = slope(head, at, other);
                add_scaled(&mut rows[0], ds, self.row(1, head, other));
                let (p, ds) = slope(head, other, at);
                add_scaled(&mut rows[1], ds, self.row(0, head, other));
                add_scaled(&mut rows[2], p, &of_head(&self.host_do, head, other));
            }
            for (third, row) in rows.into_iter().enumerate() {
                let start = at * 3 * d + third * d + head * k;
                thirds[third].extend(row.into_iter().enumerate().map(|(c, x)| (start + c, x)));
            }
        }
        let names = ["dq", "dk", "dv"];
        Ok(names
            .into_iter()
            .zip(thirds)
            .map(|(what, elements)| Expected { output: 0, what, elements })
            .collect())
    }
}

fn dot<A: Act>(a: &[A], b: &[A]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
}

fn add_scaled<A: Act>(sum: &mut [f64], factor: f64, row: &[A]) {
    for (s, x) in sum.iter_mut().zip(row) {
        *s += factor * f64::from(x.to_f32());
    }
}

impl<B: Backend<A>, A: Act> Kernel for Attention<B, A> {
    fn about(&self) -> About {
        let d = self.dims;
        let (forward, backward) = flops(d, pairs(d.pattern, &self.starts, &self.host_global));
        let nd = (size_of::<A>() * d.tokens * d.width()) as f64;
        let lengths: Vec<usize> = self.starts.windows(2).map(|c| (c[1] - c[0]) as usize).collect();
        About {
            name: name(self.backward).into(),
            shape: format!(
                "{} tokens, {}, {}x{}",
                d.tokens,
                cells(&lengths, d.pattern),
                d.heads,
                d.head_width
            ),
            flop: if self.backward { backward } else { forward },
            bytes: if self.backward { 8.0 } else { 4.0 } * nd,
            act: A::NAME,
            bound: check::rounded_inside::<A>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        if !self.backward {
            return self.forward();
        }
        let input = In {
            qkv: &self.qkv,
            cell_start: &self.cell_start,
            global: Some(&self.global),
            dropout: Dropout::NONE,
        };
        let saved = BackwardIn { do_: &self.do_, o: &self.o, lse: &self.lse };
        gene_attention::backward::<A, B>(&self.dev, self.dims, input, saved, &mut self.dqkv, &mut self.delta)
    }

    fn outputs(&self) -> Result<Vec<(&'static str, Vec<f64>)>> {
        if self.backward {
            return Ok(vec![("dqkv", wide(&self.dev.download(&self.dqkv)?))]);
        }
        Ok(vec![("o", wide(&self.dev.download(&self.o)?)), ("lse", wide(&self.dev.download(&self.lse)?))])
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        if self.backward { self.expected_backward() } else { Ok(self.expected_forward()) }
    }
}
