//! Input embedding: gather, sum, LayerNorm and dropout in one pass over each token's row.
//!
//! Formula in [`crate::ops::embed`]. Backward needs three sweeps and no (N, D) buffer: the first goes over tokens and leaves
//! the LayerNorm's parameter gradients, the type row's gradient and two scalars per token, `mean(g)` and `mean(g·n)`, from
//! which any element of `ds` follows without a reduction. The others go over genes, positions and value bins: a stable
//! counting sort brings the tokens of equal key together in ascending order, each table row is then written by one task.

use crate::cpu::layernorm::{add_partials, normalize_row};
use crate::cpu::simd::{sum_by, vectorized};
use crate::cpu::{Cpu, dropout, scratch};
use crate::device::{Act, Dropout};
use crate::error::Result;
use crate::ops::embed::{BackwardIn, Dims, Embed, Gradients, Out, Tables};
use rayon::prelude::*;

/// Tokens per task of the sweeps over tokens.
const ROWS: usize = 64;
/// Table rows per task of the sweeps over keys.
const KEYS: usize = 64;

/// The tables as slices, so that kernels see no buffers.
#[derive(Clone, Copy)]
struct Source<'a, A> {
    gene: &'a [u32],
    position: &'a [u32],
    value_bin: Option<&'a [u32]>,
    word: &'a [A],
    position_table: &'a [A],
    type_row: &'a [A],
    value_table: Option<&'a [A]>,
    weight: &'a [A],
    bias: &'a [A],
    dropout: Dropout,
    width: usize,
}

impl<'a, A: Act> Source<'a, A> {
    fn new(dims: Dims, t: &'a Tables<'a, Cpu, A>) -> Self {
        let values = dims.value_bins > 0;
        Source {
            gene: &t.gene[..dims.tokens],
            position: &t.position[..dims.tokens],
            value_bin: t.value_bin.filter(|_| values).map(|b| &b[..dims.tokens]),
            word: t.word,
            position_table: t.position_table,
            type_row: &t.type_table[..dims.width],
            value_table: t.value_table.filter(|_| values).map(|b| &b[..]),
            weight: t.weight,
            bias: t.bias,
            dropout: t.dropout,
            width: dims.width,
        }
    }

    /// `s` of token `t`.
    #[inline(always)]
    fn sum_row(&self, t: usize, s: &mut [f32]) {
        let width = self.width;
        let s = &mut s[..width];
        let word = &self.word[self.gene[t] as usize * width..][..width];
        let position = &self.position_table[self.position[t] as usize * width..][..width];
        let type_row = &self.type_row[..width];
        for i in 0..width {
            s[i] = word[i].to_f32() + position[i].to_f32() + type_row[i].to_f32();
        }
        if let (Some(bin), Some(table)) = (self.value_bin, self.value_table) {
            for (s, v) in s.iter_mut().zip(&table[bin[t] as usize * width..][..width]) {
                *s += v.to_f32();
            }
        }
    }

    /// `g = dropout'(dx) · weight` of token `t`, in place of the dropout factors.
    #[inline(always)]
    fn dx_row(&self, dx: &[A], t: usize, d: &mut [f32]) {
        let width = self.width;
        let (d, dx) = (&mut d[..width], &dx[t * width..][..width]);
        if self.dropout.probability > 0.0 {
            dropout::row_factors(self.dropout, t, width, d);
            for i in 0..width {
                d[i] *= dx[i].to_f32();
            }
        } else {
            for i in 0..width {
                d[i] = dx[i].to_f32();
            }
        }
    }
}

vectorized! {
    /// One block of tokens; `work` is (2, D) scratch.
    fn forward_rows[A: Act](source: Source<'_, A>, eps: f32, first: usize, x: &mut [A], mean: &mut [f32], rstd: &mut [f32],
        work: &mut [f32]) {
        let width = source.width;
        let (s, factor) = work.split_at_mut(width);
        for (r, x) in x.chunks_exact_mut(width).enumerate() {
            source.sum_row(first + r, s);
            (mean[r], rstd[r]) = if source.dropout.probability > 0.0 {
                dropout::row_factors(source.dropout, first + r, width, factor);
                normalize_row(s, source.weight, source.bias, eps, |i, v| x[i] = A::from_f32(v * factor[i]))
            } else {
                normalize_row(s, source.weight, source.bias, eps, |i, v| x[i] = A::from_f32(v))
            };
        }
    }
}

/// What the sweeps over keys need of each token.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Statistics {
    mean: f32,
    rstd: f32,
    mean_g: f32,
    mean_gn: f32,
}

vectorized! {
    /// The sweep over tokens: `partial` (3, D) receives this block's sums for weight, bias and type row; `work` is (3, D).
    fn token_sweep[A: Act](source: Source<'_, A>, dx: &[A], first: usize, statistics: &mut [Statistics], partial: &mut [f32],
        work: &mut [f32]) {
        let width = source.width;
        partial.fill(0.0);
        let (dweight, rest) = partial.split_at_mut(width);
        let (dbias, dtype) = rest.split_at_mut(width);
        let (n, rest) = work.split_at_mut(width);
        let (d, g) = rest.split_at_mut(width);
        let (dtype, g, weight) = (&mut dtype[..width], &mut g[..width], &source.weight[..width]);
        for (r, token) in statistics.iter_mut().enumerate() {
            source.sum_row(first + r, n);
            source.dx_row(dx, first + r, d);
            for i in 0..width {
                n[i] = (n[i] - token.mean) * token.rstd;
                dweight[i] += d[i] * n[i];
                dbias[i] += d[i];
                g[i] = d[i] * weight[i].to_f32();
            }
            token.mean_g = sum_by(width, |i| g[i]) / width as f32;
            token.mean_gn = sum_by(width, |i| g[i] * n[i]) / width as f32;
            for i in 0..width {
                dtype[i] += token.rstd * (g[i] - token.mean_g - n[i] * token.mean_gn);
            }
        }
    }
}

vectorized! {
    /// `row += Σ ds` over `tokens`; `work` is (2, D).
    fn add_tokens[A: Act](source: Source<'_, A>, dx: &[A], statistics: &[Statistics], tokens: &[u32], row: &mut [f32],
        work: &mut [f32]) {
        let width = source.width;
        let (s, d) = work.split_at_mut(width);
        let (row, weight) = (&mut row[..width], &source.weight[..width]);
        for &t in tokens {
            let token = statistics[t as usize];
            source.sum_row(t as usize, s);
            source.dx_row(dx, t as usize, d);
            for i in 0..width {
                let n = (s[i] - token.mean) * token.rstd;
                row[i] += token.rstd * (d[i] * weight[i].to_f32() - token.mean_g - n * token.mean_gn);
            }
        }
    }
}

/// Stable counting sort of the tokens by key: `start[k]..start[k+1]` are the places in `order` of the tokens with key k.
fn sort_by_key(key: &[u32], start: &mut [u32], order: &mut [u32]) {
    start.fill(0);
    for &k in key {
        start[k as usize + 1] += 1;
    }
    for k in 1..start.len() {
        start[k] += start[k - 1];
    }
    // Each `start[k]` walks to the start of its successor while tokens are placed, and is put back afterwards.
    for (t, &k) in key.iter().enumerate() {
        order[start[k as usize] as usize] = t as u32;
        start[k as usize] += 1;
    }
    start.copy_within(..start.len() - 1, 1);
    start[0] = 0;
}

/// `table[k] += Σ ds` over the tokens with key k, for every k.
fn key_sweep<A: Act>(
    source: Source<'_, A>,
    dx: &[A],
    statistics: &[Statistics],
    key: &[u32],
    table: &mut [f32],
) {
    let width = source.width;
    let keys = table.len() / width;
    let mut places = scratch::take((keys + 1 + key.len()) * 4);
    let (start, order) = places.slice::<u32>(keys + 1 + key.len()).split_at_mut(keys + 1);
    sort_by_key(key, start, order);
    let (start, order) = (&*start, &*order);
    table.par_chunks_mut(KEYS * width).enumerate().for_each(|(chunk, rows)| {
        let mut work = scratch::take(2 * width * 4);
        let work = work.slice::<f32>(2 * width);
        for (k, row) in rows.chunks_exact_mut(width).enumerate() {
            let k = chunk * KEYS + k;
            if start[k] < start[k + 1] {
                add_tokens(
                    source,
                    dx,
                    statistics,
                    &order[start[k] as usize..start[k + 1] as usize],
                    row,
                    work,
                );
            }
        }
    });
}

impl<A: Act> Embed<A> for Cpu {
    fn embed_forward(&self, dims: Dims, tables: Tables<'_, Self, A>, out: Out<'_, Self, A>) -> Result<()> {
        let (tokens, width) = (dims.tokens, dims.width);
        if tokens * width == 0 {
            return Ok(());
        }
        let source = Source::new(dims, &tables);
        (
            out.x[..tokens * width].par_chunks_mut(ROWS * width),
            out.mean[..tokens].par_chunks_mut(ROWS),
            out.rstd[..tokens].par_chunks_mut(ROWS),
        )
            .into_par_iter()
            .enumerate()
            .for_each(|(block, (x, mean, rstd))| {
                let mut work = scratch::take(2 * width * 4);
                forward_rows(source, dims.eps, block * ROWS, x, mean, rstd, work.slice(2 * width));
            });
        Ok(())
    }

    fn embed_backward(
        &self,
        dims: Dims,
        tables: Tables<'_, Self, A>,
        input: BackwardIn<'_, Self, A>,
        grads: Gradients<'_, Self>,
    ) -> Result<()> {
        let (tokens, width) = (dims.tokens, dims.width);
        if tokens * width == 0 {
            return Ok(());
        }
        let source = Source::new(dims, &tables);
        let dx = &input.dx[..tokens * width];
        let (mean, rstd): (&[f32], &[f32]) = (&input.mean[..tokens], &input.rstd[..tokens]);
        let blocks = tokens.div_ceil(ROWS);
        let mut statistics = scratch::take(tokens * size_of::<Statistics>());
        let statistics = statistics.slice::<Statistics>(tokens);
        let mut partials = scratch::take(blocks * 3 * width * 4);
        let partials = partials.slice::<f32>(blocks * 3 * width);
        (statistics.par_chunks_mut(ROWS), partials.par_chunks_mut(3 * width))
            .into_par_iter()
            .enumerate()
            .for_each(|(block, (statistics, partial))| {
                let first = block * ROWS;
                for (r, s) in statistics.iter_mut().enumerate() {
                    *s = Statistics { mean: mean[first + r], rstd: rstd[first + r], ..Default::default() };
                }
                let mut work = scratch::take(3 * width * 4);
                token_sweep(source, dx, first, statistics, partial, work.slice(3 * width));
            });
        add_partials(partials, &mut grads.weight[..width], 0, 3 * width);
        add_partials(partials, &mut grads.bias[..width], width, 3 * width);
        add_partials(partials, &mut grads.type_table[..width], 2 * width, 3 * width);
        key_sweep(source, dx, statistics, source.gene, &mut grads.word[..dims.vocab * width]);
        key_sweep(
            source,
            dx,
            statistics,
            source.position,
            &mut grads.position_table[..dims.positions * width],
        );
        if let (Some(bin), Some(table)) = (source.value_bin, grads.value_table) {
            key_sweep(source, dx, statistics, bin, &mut table[..dims.value_bins * width]);
        }
        Ok(())
    }
}
