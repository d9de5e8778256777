//! Residual + dropout + LayerNorm, a row at a time: the row stays in the first-level cache from load to store.
//!
//! Formula in [`crate::ops::layernorm`]. The variance is that of the centred row (two passes over cached values), so it
//! does not cancel. Parameter gradients are summed per block of [`ROWS`] rows and the blocks in order.

use crate::cpu::simd::{sum_by, vectorized};
use crate::cpu::{Cpu, dropout, scratch};
use crate::device::{Act, Dropout};
use crate::error::Result;
use crate::ops::layernorm::{BackwardIn, Dims, Gradients, In, LayerNorm, Out};
use rayon::prelude::*;

/// Rows per task: enough to hide the cost of a task, few enough that 4,096 tokens keep 64 threads busy.
const ROWS: usize = 64;

/// `y = (x - mean) · rstd · weight + bias`; returns (mean, rstd).
#[inline(always)]
pub(super) fn normalize_row<A: Act>(
    x: &[f32],
    weight: &[A],
    bias: &[A],
    eps: f32,
    y: impl FnMut(usize, f32),
) -> (f32, f32) {
    let width = x.len();
    let mean = sum_by(width, |i| x[i]) / width as f32;
    let variance = sum_by(width, |i| (x[i] - mean) * (x[i] - mean)) / width as f32;
    let rstd = 1.0 / (variance + eps).sqrt();
    let (weight, bias) = (&weight[..width], &bias[..width]);
    let mut y = y;
    for i in 0..width {
        y(i, (x[i] - mean) * rstd * weight[i].to_f32() + bias[i].to_f32());
    }
    (mean, rstd)
}

vectorized! {
    /// One block of rows; `row` and `factor` are (D) scratch.
    fn forward_rows[A: Act](eps: f32, residual: Option<&[A]>, weight: &[A], bias: &[A], dropout: Dropout, first: usize,
        x: &mut [A], y: &mut [A], mean: &mut [f32], rstd: &mut [f32], row: &mut [f32], factor: &mut [f32]) {
        let width = row.len();
        let dropped = dropout.probability > 0.0;
        for (r, (x, y)) in x.chunks_exact_mut(width).zip(y.chunks_exact_mut(width)).enumerate() {
            if dropped {
                dropout::row_factors(dropout, first + r, width, factor);
            }
            let residual = residual.map(|s| &s[r * width..(r + 1) * width]);
            match (residual, dropped) {
                (Some(s), true) => for i in 0..width { row[i] = s[i].to_f32() + factor[i] * x[i].to_f32() },
                (Some(s), false) => for i in 0..width { row[i] = s[i].to_f32() + x[i].to_f32() },
                (None, true) => for i in 0..width { row[i] = factor[i] * x[i].to_f32() },
                (None, false) => for i in 0..width { row[i] = x[i].to_f32() },
            }
            if residual.is_some() || dropped {
                for i in 0..width { x[i] = A::from_f32(row[i]) }
            }
            (mean[r], rstd[r]) = normalize_row(row, weight, bias, eps, |i, v| y[i] = A::from_f32(v));
        }
    }
}

/// `dsum = rstd · (g - mean(g) - n · mean(g·n))` with g = dy·weight, n = (sum - mean)·rstd, and the row's share of the
/// parameter gradients. `n` and `g` are (D) scratch; `n` holds dsum afterwards.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // a kernel's argument list
fn backward_row<A: Act>(
    dy: impl Fn(usize) -> f32,
    sum: impl Fn(usize) -> f32,
    mean: f32,
    rstd: f32,
    weight: &[A],
    n: &mut [f32],
    g: &mut [f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let width = n.len();
    let (g, weight, dweight, dbias) =
        (&mut g[..width], &weight[..width], &mut dweight[..width], &mut dbias[..width]);
    for i in 0..width {
        let (d, normal) = (dy(i), (sum(i) - mean) * rstd);
        dweight[i] += d * normal;
        dbias[i] += d;
        n[i] = normal;
        g[i] = d * weight[i].to_f32();
    }
    let mean_g = sum_by(width, |i| g[i]) / width as f32;
    let mean_gn = sum_by(width, |i| g[i] * n[i]) / width as f32;
    for i in 0..width {
        n[i] = rstd * (g[i] - mean_g - n[i] * mean_gn);
    }
}

vectorized! {
    /// One block of rows; `partial` (2, D) receives its sums for dweight and dbias; `work` is (3, D) scratch.
    fn backward_rows[A: Act](dy: &[A], sum: &[A], mean: &[f32], rstd: &[f32], weight: &[A], dropout: Dropout, relu_input: bool,
        first: usize, dx: &mut [A], dresidual: Option<&mut [A]>, partial: &mut [f32], work: &mut [f32]) {
        let width = partial.len() / 2;
        let (dweight, dbias) = partial.split_at_mut(width);
        dweight.fill(0.0);
        dbias.fill(0.0);
        let (n, rest) = work.split_at_mut(width);
        let (g, factor) = rest.split_at_mut(width);
        let mut dresidual = dresidual;
        for (r, dx) in dx.chunks_exact_mut(width).enumerate() {
            let at = r * width..(r + 1) * width;
            let (dy, sum) = (&dy[at.clone()], &sum[at.clone()]);
            backward_row(|i| dy[i].to_f32(), |i| sum[i].to_f32(), mean[r], rstd[r], weight, n, g, dweight, dbias);
            if let Some(dresidual) = &mut dresidual {
                for (d, n) in dresidual[at].iter_mut().zip(&*n) { *d = A::from_f32(*n) }
            }
            if dropout.probability > 0.0 {
                dropout::row_factors(dropout, first + r, width, factor);
                for i in 0..width { dx[i] = A::from_f32(n[i] * factor[i]) }
            } else if relu_input {
                for i in 0..width { dx[i] = if sum[i].to_f32() > 0.0 { A::from_f32(n[i]) } else { A::default() } }
            } else {
                for i in 0..width { dx[i] = A::from_f32(n[i]) }
            }
        }
    }
}

/// `total[i] += Σ_b partial[b, i]`, blocks in order.
pub(super) fn add_partials(partial: &[f32], total: &mut [f32], offset: usize, stride: usize) {
    for block in partial.chunks_exact(stride) {
        for (t, p) in total.iter_mut().zip(&block[offset..]) {
            *t += p;
        }
    }
}

impl<A: Act> LayerNorm<A> for Cpu {
    fn layernorm_forward(&self, dims: Dims, input: In<'_, Self, A>, out: Out<'_, Self, A>) -> Result<()> {
        let Dims { rows, width, eps } = dims;
        if rows * width == 0 {
            return Ok(());
        }
        let (weight, bias): (&[A], &[A]) = (input.weight, input.bias);
        let residual: Option<&[A]> = input.residual.map(|r| &r[..rows * width]);
        (
            out.x_then_sum[..rows * width].par_chunks_mut(ROWS * width),
            out.y[..rows * width].par_chunks_mut(ROWS * width),
            out.mean[..rows].par_chunks_mut(ROWS),
            out.rstd[..rows].par_chunks_mut(ROWS),
        )
            .into_par_iter()
            .enumerate()
            .for_each(|(block, (x, y, mean, rstd))| {
                let mut work = scratch::take(2 * width * 4);
                let (row, factor) = work.slice::<f32>(2 * width).split_at_mut(width);
                let first = block * ROWS;
                let residual = residual.map(|r| &r[first * width..first * width + x.len()]);
                forward_rows(
                    eps,
                    residual,
                    weight,
                    bias,
                    input.dropout,
                    first,
                    x,
                    y,
                    mean,
                    rstd,
                    row,
                    factor,
                );
            });
        Ok(())
    }

    fn layernorm_backward(
        &self,
        dims: Dims,
        input: BackwardIn<'_, Self, A>,
        grads: Gradients<'_, Self, A>,
    ) -> Result<()> {
        let Dims { rows, width, .. } = dims;
        if rows * width == 0 {
            return Ok(());
        }
        let len = rows * width;
        let (dy, sum, weight): (&[A], &[A], &[A]) = (&input.dy[..len], &input.sum[..len], input.weight);
        let (mean, rstd): (&[f32], &[f32]) = (&input.mean[..rows], &input.rstd[..rows]);
        let mut partials = scratch::take(rows.div_ceil(ROWS) * 2 * width * 4);
        let partials = partials.slice::<f32>(rows.div_ceil(ROWS) * 2 * width);
        let run = |block: usize, dx: &mut [A], dresidual: Option<&mut [A]>, partial: &mut [f32]| {
            let first = block * ROWS;
            let (at, tokens) = (first * width..first * width + dx.len(), first..first + dx.len() / width);
            let mut work = scratch::take(3 * width * 4);
            backward_rows(
                &dy[at.clone()],
                &sum[at],
                &mean[tokens.clone()],
                &rstd[tokens],
                weight,
                input.dropout,
                input.relu_input,
                first,
                dx,
                dresidual,
                partial,
                work.slice(3 * width),
            );
        };
        let blocks =
            grads.dx[..len].par_chunks_mut(ROWS * width).zip(partials.par_chunks_mut(2 * width)).enumerate();
        match grads.dresidual {
            Some(dresidual) => blocks
                .zip(dresidual[..len].par_chunks_mut(ROWS * width))
                .for_each(|((block, (dx, partial)), dresidual)| run(block, dx, Some(dresidual), partial)),
            None => blocks.for_each(|(block, (dx, partial))| run(block, dx, None, partial)),
        }
        add_partials(partials, &mut grads.dweight[..width], 0, 2 * width);
        add_partials(partials, &mut grads.dbias[..width], width, 2 * width);
        Ok(())
    }
}
