//! Packing: operands in the order in which the tile reads them, as 32-bit words: an f32, or a pair of bf16 that are
//! neighbours in k. Columns past the edge are zero, so that the tile needs no masks.
//!
//! ```text
//! panels:  for each 48 columns: for each step of k: 48 words (fewer, in whole vectors of 16, in the last panel)
//! rows:    a chunk's columns row by row, widened and filled up to whole vectors; only where they do not lie so already
//! ```

use super::Layout;
use super::tile::TILE_COLUMNS;
use crate::cpu::scratch::{self, Scratch};
use crate::cpu::simd::vectorized;
use crate::device::Act;
use rayon::prelude::*;

/// Bits of a value as the tile wants it alone.
#[inline(always)]
fn word<A: Act>(x: A) -> u32 {
    x.to_f32().to_bits()
}

/// Two bf16 values as one word, the first in the low half: what `vdpbf16ps` multiplies.
#[inline(always)]
fn pair<A: Act>(first: A, second: A) -> u32 {
    // The high half of the widened value is the bf16 itself.
    word(first) >> 16 | (word(second) & 0xFFFF_0000)
}

/// All of B as panels, a task per panel.
pub fn panels<A: Act>(b: &[A], layout: Layout, n: usize, k: usize, pairs: bool, out: &mut [u32]) {
    let steps = if pairs { k.div_ceil(2) } else { k };
    if steps == 0 {
        return;
    }
    out.par_chunks_mut(TILE_COLUMNS * steps).enumerate().for_each(|(p, panel)| {
        let column = p * TILE_COLUMNS;
        let columns = TILE_COLUMNS.min(n - column);
        match layout {
            Layout::Rows => panel_of_rows(&b[column..], n, columns, k, pairs, panel),
            Layout::Columns => panel_of_columns(&b[column * k..(column + columns) * k], k, pairs, panel),
        }
    });
}

vectorized! {
    /// A panel from rows of k: `b` starts at the panel's first column, rows lie `stride` apart.
    fn panel_of_rows[A: Act](b: &[A], stride: usize, columns: usize, k: usize, pairs: bool, panel: &mut [u32]) {
        let steps = if pairs { k.div_ceil(2) } else { k };
        let width = panel.len() / steps;
        for (s, out) in panel.chunks_exact_mut(width).enumerate() {
            let (out, edge) = out.split_at_mut(columns);
            edge.fill(0);
            if pairs {
                let first = &b[2 * s * stride..][..columns];
                if 2 * s + 1 < k {
                    let second = &b[(2 * s + 1) * stride..][..columns];
                    for c in 0..columns { out[c] = pair(first[c], second[c]) }
                } else {
                    for c in 0..columns { out[c] = pair(first[c], A::default()) }
                }
            } else {
                for (o, x) in out.iter_mut().zip(&b[s * stride..][..columns]) { *o = word(*x) }
            }
        }
    }
}

vectorized! {
    /// A panel from columns of B, each `k` contiguous values: a transposition, in blocks of 16 × 16 words.
    fn panel_of_columns[A: Act](b: &[A], k: usize, pairs: bool, panel: &mut [u32]) {
        let steps = if pairs { k.div_ceil(2) } else { k };
        let width = panel.len() / steps;
        let columns = b.len() / k;
        for vector in 0..width / 16 {
            for s0 in (0..steps).step_by(16) {
                let depth = 16.min(steps - s0);
                let mut block = [[0u32; 16]; 16];
                for (c, block) in block.iter_mut().enumerate() {
                    let column = vector * 16 + c;
                    if column >= columns {
                        break;
                    }
                    let column = &b[column * k..(column + 1) * k];
                    if !pairs {
                        for (w, x) in block.iter_mut().zip(&column[s0..s0 + depth]) { *w = word(*x) }
                    } else {
                        let (whole, last) = column[2 * s0..k.min(2 * (s0 + depth))].as_chunks::<2>();
                        for (w, x) in block.iter_mut().zip(whole) { *w = pair(x[0], x[1]) }
                        if let [x] = last { block[whole.len()] = pair(*x, A::default()) }
                    }
                }
                for s in 0..depth {
                    let out = &mut panel[(s0 + s) * width + vector * 16..][..16];
                    for c in 0..16 { out[c] = block[c][s] }
                }
            }
        }
    }
}

vectorized! {
    /// Rows of A as words, widened or in pairs with an odd k padded.
    pub fn stage[A: Act](a: &[A], k: usize, pairs: bool, out: &mut [u32]) {
        if !pairs {
            for (o, x) in out.iter_mut().zip(a) { *o = word(*x) }
            return;
        }
        for (row, out) in a.chunks_exact(k).zip(out.chunks_exact_mut(k.div_ceil(2))) {
            let (whole, last) = row.as_chunks::<2>();
            for (o, x) in out.iter_mut().zip(whole) { *o = pair(x[0], x[1]) }
            if let [x] = last { out[whole.len()] = pair(*x, A::default()) }
        }
    }
}

/// Rows of f32, `step` apart.
#[derive(Clone, Copy)]
pub struct Rows {
    /// The first row.
    pub pointer: *const f32,
    /// Floats from a row to the next.
    pub step: usize,
}

/// Columns `first..first + count` of the rows of `x` (each `stride` long) as f32 rows of a multiple of `width` floats: where
/// they lie if they are that already, otherwise widened and filled up with zeros in `block`.
pub fn in_place<A: Act>(
    x: &[A],
    stride: usize,
    first: usize,
    count: usize,
    width: usize,
    block: &mut Scratch,
) -> Rows {
    if A::IS_F32 && count.is_multiple_of(width) {
        return Rows { pointer: x[first..].as_ptr().cast(), step: stride };
    }
    let step = count.next_multiple_of(width);
    let len = x.len() / stride * step;
    if block.bytes() < len * 4 {
        *block = scratch::take(len * 4);
    }
    let out = block.slice::<f32>(len);
    widen_rows(x, stride, first, count, out);
    Rows { pointer: out.as_ptr(), step }
}

vectorized! {
    fn widen_rows[A: Act](x: &[A], stride: usize, first: usize, count: usize, out: &mut [f32]) {
        let step = out.len() / (x.len() / stride);
        for (row, out) in x.chunks_exact(stride).zip(out.chunks_exact_mut(step)) {
            let (out, edge) = out.split_at_mut(count);
            for (o, x) in out.iter_mut().zip(&row[first..first + count]) { *o = x.to_f32() }
            edge.fill(0.0);
        }
    }
}
