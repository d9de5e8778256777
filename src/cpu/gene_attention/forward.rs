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
//!
//! bf16 with AVX512_BF16 runs the same lines on pairs: `vdpbf16ps` takes two features of K Qᵀ, then two keys of Vᵀ Pᵀ, per
//! step, P rounded to bf16; sums, maxima and l stay f32. Without it bf16 is widened when the panels are packed.

use super::dropout::Draws;
use super::panel::{
    Job, Order, Run, pack_columns, pack_row_pairs, pack_rows, panel_width, positions, unpack_columns,
};
use super::tile::{Product, Scalars, Vectors, accumulate_rows, multiply};
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
pub unsafe fn item<V: Vector, P: Product<V>, A: Act>(
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
    // Elements of a query, key or value row: f32, or pairs of bf16 as they lie in memory.
    let score_width = if P::PAIRS { panel_width(job.head_width / 2) } else { width };
    let floats = rows * (score_width + width) + (score_width + width + BLOCK) * TILE;
    let mut block = scratch::take(4 * floats);
    let (k, rest) = block.slice::<f32>(floats).split_at_mut(rows * score_width);
    let (v, rest) = rest.split_at_mut(rows * width);
    let (qt, rest) = rest.split_at_mut(score_width * TILE);
    let (ot, s) = rest.split_at_mut(width * TILE);
    // SAFETY: panels hold `rows` rows; `order.keys` names tokens of the cell; the caller vouches for the rest.
    unsafe {
        let token = |row: usize| start + order.keys[row] as usize;
        if P::PAIRS {
            let key = |row| job.token(token(row), 1, head).cast::<f32>();
            pack_rows::<V, f32>(k.as_mut_ptr(), rows, job.head_width / 2, key);
            pack_row_pairs::<A>(v.as_mut_ptr(), rows, job.head_width, |row| job.token(token(row), 2, head));
        } else {
            pack_rows::<V, A>(k.as_mut_ptr(), rows, job.head_width, |row| job.token(token(row), 1, head));
            pack_rows::<V, A>(v.as_mut_ptr(), rows, job.head_width, |row| job.token(token(row), 2, head));
        }
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
                1 => tile::<V, P, A, 1>(job, &order, out, &panels, head, at, count),
                2 => tile::<V, P, A, 2>(job, &order, out, &panels, head, at, count),
                _ => tile::<V, P, A, 3>(job, &order, out, &panels, head, at, count),
            }
            at += count;
        }
    }
}

/// `count` queries from `first` on, at most 16·N.
#[inline(always)]
unsafe fn tile<V: Vector, P: Product<V>, A: Act, const N: usize>(
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
    let score_width = if P::PAIRS { panel_width(kw / 2) } else { width };
    let queries = &order.queries[first..first + count];
    let token = |lane: usize| order.start + queries[lane] as usize;
    // SAFETY: every pointer below stays inside the panels and buffers that `item` laid out.
    unsafe {
        if P::PAIRS {
            pack_columns::<V, f32, N>(p.qt, count, kw / 2, |lane| job.token(token(lane), 0, head).cast());
        } else {
            pack_columns::<V, A, N>(p.qt, count, kw, |lane| job.token(token(lane), 0, head));
        }
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
            let run = run.aligned(if P::PAIRS { 2 } else { 1 });
            for begin in (0..run.count).step_by(BLOCK) {
                let block = Run {
                    begin: run.begin + begin,
                    count: (run.count - begin).min(BLOCK),
                    skip: if begin == 0 { run.skip } else { 0 },
                    ..run
                };
                let top = match V::ROWS {
                    8 => scores::<V, P, 8, N>(order, p, score_width, block, queries, &position),
                    2 => scores::<V, P, 2, N>(order, p, score_width, block, queries, &position),
                    _ => scores::<V, P, 1, N>(order, p, score_width, block, queries, &position),
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
                let together = if P::PAIRS { 2 } else { 1 };
                for j in (0..block.count).step_by(together) {
                    for v in 0..N {
                        let at = p.s.add(j * stride + v * LANES);
                        let mut e = V::load(at).mul_add(scale, V::splat(0.0).sub(m[v])).exp2();
                        if P::PAIRS && j < block.skip {
                            e = V::splat(0.0);
                        }
                        l[v] = l[v].add(e);
                        if draws.is_some() {
                            e = e.keep(bits[j][v]);
                        }
                        if P::PAIRS {
                            let mut odd = V::splat(0.0);
                            if j + 1 < block.count {
                                odd = V::load(at.add(stride)).mul_add(scale, V::splat(0.0).sub(m[v])).exp2();
                                l[v] = l[v].add(odd);
                                if draws.is_some() {
                                    odd = odd.keep(bits[j + 1][v]);
                                }
                            }
                            P::pair(e, odd).store(p.s.add(j / 2 * stride + v * LANES));
                        } else {
                            e.store(at);
                        }
                    }
                }
                let first_row = block.begin / together;
                let a = Scalars { pointer: p.v.add(first_row * width), row: 1, step: width };
                let b = Vectors { pointer: p.s, step: stride };
                accumulate_rows::<V, P, N>(p.ot, stride, width, block.count.div_ceil(together), a, b);
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
unsafe fn scores<V: Vector, P: Product<V>, const R: usize, const N: usize>(
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
            let mut acc = multiply::<V, P, R, N>([[V::splat(0.0); N]; R], width, a, b);
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
                    if (block.skip..block.count).contains(&(group + r)) {
                        top[v] = top[v].max(*acc);
                    }
                }
            }
        }
        top
    }
}
