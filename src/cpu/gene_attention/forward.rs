//! One work item of the forward pass: a block of queries of one cell and head against all their keys.
//!
//! Scores are kept transposed, Sᵀ (keys, queries): a lane is a query, so the softmax needs no sum across lanes, K and V are
//! broadcast from where they lie, and Oᵀ (W, queries) grows in place. Per tile of 48 queries and block of 64 keys:
//! ```text
//! Sᵀ = K Qᵀ                          8 keys × 48 queries in registers
//! if some s·c > m + 8: m = max(m, s·c), l and Oᵀ shrink by 2^(m_old - m)      c = log2(e)/√K
//! Pᵀ = 2^(c·Sᵀ - m),  l += Σ Pᵀ
//! Oᵀ += Vᵀ Pᵀ                        8 columns of V × 48 queries in registers
//! ```
//! The running maximum m may lag by a factor of 2^8, which f32 has room for; so Oᵀ is rescaled once or twice per tile
//! rather than in every block. Only the quotient O/l and m + log2 l leave the tile, and neither depends on m.

use super::dropout::Draws;
use super::panel::{Job, Order, Run, pack_columns, pack_rows, panel_width, positions, unpack_columns};
use super::tile::{Scalars, Vectors, accumulate_rows, multiply};
use super::{BLOCK, MASKED, Shared, TILE};
use crate::cpu::scratch;
use crate::cpu::simd_vector::{LANES, Vector};
use crate::device::Act;
use std::f32::consts::{LN_2, LOG2_E};

/// Scores may exceed the running maximum by this power of two before everything is rescaled.
const SLACK: f32 = 8.0;

/// Where the results go.
pub struct Out<A> {
    /// (N, D)
    pub o: Shared<A>,
    /// (N, H)
    pub lse: Shared<f32>,
}

/// Memory of an item, cut from one block.
struct Panels {
    k: *const f32,
    v: *const f32,
    qt: *mut f32,
    ot: *mut f32,
    s: *mut f32,
}

/// Queries `first .. end` (in [`Order`]) of a cell and head.
///
/// # Safety
/// The instruction set of V is present; no other item writes these queries' rows of this head; `out` covers the batch.
#[inline(always)]
pub unsafe fn item<V: Vector, A: Act>(
    job: &Job<'_, A>,
    out: &Out<A>,
    cell: usize,
    head: usize,
    first: usize,
    end: usize,
) {
    let (start, len) = job.cell(cell);
    let (rows, width) = (job.panel_rows(cell), panel_width(job.head_width));
    let mut numbers = scratch::take(4 * (rows + len));
    let (keys, queries) = numbers.slice::<u32>(rows + len).split_at_mut(rows);
    let mut flags = scratch::take(rows);
    let order = job.order(cell, keys, flags.slice::<u8>(rows), queries);
    let mut floats = scratch::take(4 * (2 * rows * width + (2 * width + BLOCK) * TILE));
    let (k, rest) =
        floats.slice::<f32>(2 * rows * width + (2 * width + BLOCK) * TILE).split_at_mut(rows * width);
    let (v, rest) = rest.split_at_mut(rows * width);
    let (qt, rest) = rest.split_at_mut(width * TILE);
    let (ot, s) = rest.split_at_mut(width * TILE);
    // SAFETY: panels hold `rows` rows; `order.keys` names tokens of the cell; the caller vouches for the rest.
    unsafe {
        let source = |third| {
            let keys = &*order.keys;
            move |row: usize| job.token(start + keys[row] as usize, third, head)
        };
        pack_rows::<V, A>(k.as_mut_ptr(), rows, job.head_width, source(1));
        pack_rows::<V, A>(v.as_mut_ptr(), rows, job.head_width, source(2));
        let panels = Panels {
            k: k.as_ptr(),
            v: v.as_ptr(),
            qt: qt.as_mut_ptr(),
            ot: ot.as_mut_ptr(),
            s: s.as_mut_ptr(),
        };
        let mut at = first;
        while at < end {
            let count = order.tile(at, end);
            match count.div_ceil(LANES) {
                1 => tile::<V, A, 1>(job, &order, out, &panels, head, at, count),
                2 => tile::<V, A, 2>(job, &order, out, &panels, head, at, count),
                _ => tile::<V, A, 3>(job, &order, out, &panels, head, at, count),
            }
            at += count;
        }
    }
}

/// `count` queries from `first` on, at most 16·N.
#[inline(always)]
unsafe fn tile<V: Vector, A: Act, const N: usize>(
    job: &Job<'_, A>,
    order: &Order<'_>,
    out: &Out<A>,
    p: &Panels,
    head: usize,
    first: usize,
    count: usize,
) {
    let (h, d, kw) = (job.heads, job.width(), job.head_width);
    let (width, stride) = (panel_width(kw), N * LANES);
    let queries = &order.queries[first..first + count];
    let token = |lane: usize| order.start + queries[lane] as usize;
    // SAFETY: every pointer below stays inside the panels and buffers that `item` laid out.
    unsafe {
        pack_columns::<V, A, N>(p.qt, count, kw, |lane| job.token(token(lane), 0, head));
        for c in 0..width * N {
            V::splat(0.0).store(p.ot.add(c * LANES));
        }
        let draws = (job.dropout.probability > 0.0).then(|| {
            Draws::new(job.dropout, |lane| {
                let token = job.dropout.first_row + token(lane.min(count - 1)) as u64;
                token * h as u64 + head as u64
            })
        });
        let position = positions::<V, N>(queries);
        let scale = V::splat(LOG2_E / (kw as f32).sqrt());
        let mut bits = [[0u16; N]; BLOCK];
        let mut m = [V::splat(MASKED); N];
        let mut l = [V::splat(0.0); N];
        let (runs, run_count) = order.runs(first, count);
        for run in &runs[..run_count] {
            for begin in (0..run.count).step_by(BLOCK) {
                let block = Run {
                    begin: run.begin + begin,
                    count: (run.count - begin).min(BLOCK),
                    banded: run.banded,
                    consecutive: run.consecutive,
                };
                let top = match V::ROWS {
                    8 => scores::<V, 8, N>(order, p, width, block, queries, &position),
                    2 => scores::<V, 2, N>(order, p, width, block, queries, &position),
                    _ => scores::<V, 1, N>(order, p, width, block, queries, &position),
                };
                let mut above = 0;
                for v in 0..N {
                    above |= top[v].mul(scale).greater(m[v].add(V::splat(SLACK)));
                }
                if above != 0 {
                    let mut shrink = [V::splat(0.0); N];
                    for v in 0..N {
                        let new = m[v].max(top[v].mul(scale));
                        shrink[v] = m[v].sub(new).exp2();
                        l[v] = l[v].mul(shrink[v]);
                        m[v] = new;
                    }
                    for c in 0..width {
                        for (v, shrink) in shrink.iter().enumerate() {
                            let at = p.ot.add((c * N + v) * LANES);
                            V::load(at).mul(*shrink).store(at);
                        }
                    }
                }
                if let Some(draws) = &draws {
                    draws.block::<V, N>(order, block, &mut bits);
                }
                for (j, bits) in bits.iter().enumerate().take(block.count) {
                    for v in 0..N {
                        let at = p.s.add(j * stride + v * LANES);
                        let e = V::load(at).mul_add(scale, V::splat(0.0).sub(m[v])).exp2();
                        l[v] = l[v].add(e);
                        if draws.is_some() { e.keep(bits[v]) } else { e }.store(at);
                    }
                }
                let a = Scalars { pointer: p.v.add(block.begin * width), row: 1, step: width };
                let b = Vectors { pointer: p.s, step: stride };
                accumulate_rows::<V, N>(p.ot, stride, width, block.count, a, b);
            }
        }
        let mut inverse = [V::splat(0.0); N];
        let kept_scale = draws.as_ref().map_or(1.0, |d| d.scale);
        let (mut sum, mut top) = ([0f32; TILE], [0f32; TILE]);
        for v in 0..N {
            l[v].store(sum.as_mut_ptr().add(v * LANES));
            m[v].store(top.as_mut_ptr().add(v * LANES));
        }
        for lane in 0..count {
            *out.lse.at(token(lane) * h + head) = (top[lane] + sum[lane].log2()) * LN_2;
            sum[lane] = kept_scale / sum[lane];
        }
        for (v, inverse) in inverse.iter_mut().enumerate() {
            *inverse = V::load(sum.as_ptr().add(v * LANES));
        }
        unpack_columns::<V, A, N>(p.ot, inverse, count, kw, |lane| out.o.at(token(lane) * d + head * kw));
    }
}

/// Writes Sᵀ of a block; returns the greatest score per query.
#[inline(always)]
unsafe fn scores<V: Vector, const R: usize, const N: usize>(
    order: &Order<'_>,
    p: &Panels,
    width: usize,
    block: Run,
    queries: &[u32],
    position: &[V; N],
) -> [V; N] {
    let stride = N * LANES;
    // SAFETY: block rows rounded up to 8 lie inside the panels, whose parts are padded to multiples of 8.
    unsafe {
        let mut top = [V::splat(MASKED); N];
        let b = Vectors { pointer: p.qt, step: stride };
        for group in (0..block.count).step_by(R) {
            let row = block.begin + group;
            let a = Scalars { pointer: p.k.add(row * width), row: width, step: 1 };
            let mut acc = multiply::<V, R, N>([[V::splat(0.0); N]; R], width, a, b);
            if block.banded && order.crosses_window(queries, row, R) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let bits = order.window_bits(row + r, position);
                    for v in 0..N {
                        acc[v] = acc[v].select(bits[v], V::splat(MASKED));
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (v, acc) in acc.iter().enumerate() {
                    acc.store(p.s.add((group + r) * stride + v * LANES));
                    if group + r < block.count {
                        top[v] = top[v].max(*acc);
                    }
                }
            }
        }
        top
    }
}
