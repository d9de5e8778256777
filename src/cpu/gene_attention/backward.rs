//! One work item of the backward pass: a chunk of queries of one cell and head against all their keys.
//!
//! P is recomputed from the scores and `lse`. As in the forward pass everything is transposed, a lane is a query, so `lse`
//! and `delta` are lanes and no product needs its operands turned; per tile of 48 queries and block of 64 keys:
//! ```text
//! Sᵀ = K Qᵀ,   Pᵀ = 2^(c·Sᵀ - lse·log2 e)        8 keys × 48 queries in registers
//! dPᵀ = V dOᵀ, dSᵀ = Pᵀ ∘ (dropout'(dPᵀ) - delta)
//! dV += dropout(Pᵀ) dO,  dK += dSᵀ Q             4 keys × 64 columns in registers
//! dQᵀ += Kᵀ dSᵀ                                  8 columns × 48 queries in registers
//! ```
//! dK and dV of the chunk grow in panels; the constant factors (1/√K, the dropout scale) are applied once, at the end.

use super::dropout::Draws;
use super::panel::{
    Job, Order, Run, load_lanes, pack_columns, pack_rows, panel_width, positions, store_lanes, unpack_columns,
};
use super::tile::{Plain, Scalars, Vectors, accumulate_panel, accumulate_rows, multiply};
use super::{BLOCK, Shared, TILE};
use crate::cpu::scratch;
use crate::cpu::simd_vector::{LANES, Vector};
use crate::device::Act;
use std::f32::consts::LOG2_E;

/// What the backward pass reads and writes besides q, k, v.
pub struct Gradients<'a, A> {
    /// (N, D)
    pub do_: &'a [A],
    /// (N, D)
    pub o: &'a [A],
    /// (N, H)
    pub lse: &'a [f32],
    /// (N, 3·D)
    pub dqkv: Shared<A>,
    /// (N, H)
    pub delta: Shared<f32>,
}

/// Memory of an item, cut from one block.
struct Panels {
    k: *const f32,
    v: *const f32,
    dk: *mut f32,
    dv: *mut f32,
    qt: *mut f32,
    dot: *mut f32,
    dqt: *mut f32,
    q: *mut f32,
    do_: *mut f32,
    s: *mut f32,
    ds: *mut f32,
}

/// Floats of one chunk's dK and dV.
pub fn partial_len<A: Act>(job: &Job<'_, A>, cell: usize) -> usize {
    2 * job.panel_rows(cell) * panel_width(job.head_width)
}

/// Queries `first .. end` (in [`Order`]) of a cell and head: sets their dq and delta. Their share of dK and dV goes to
/// `partial` ([`partial_len`] floats), or to dqkv at once when it is the cell's only chunk and `partial` is null.
///
/// # Safety
/// The instruction set of V is present; no other item writes these queries' rows of this head (nor, without `partial`, the
/// rest of the cell's); the buffers cover the batch.
#[inline(always)]
pub unsafe fn item<V: Vector, A: Act>(
    job: &Job<'_, A>,
    g: &Gradients<'_, A>,
    cell: usize,
    head: usize,
    first: usize,
    end: usize,
    partial: *mut f32,
) {
    let (start, len) = job.cell(cell);
    let (rows, width) = (job.panel_rows(cell), panel_width(job.head_width));
    let mut numbers = scratch::take(4 * (rows + len));
    let (keys, queries) = numbers.slice::<u32>(rows + len).split_at_mut(rows);
    let mut flags = scratch::take(rows);
    let order = job.order(cell, keys, flags.slice::<u8>(rows), queries);
    let floats = 4 * rows * width + (5 * width + 2 * BLOCK) * TILE;
    let mut floats_block = scratch::take(4 * floats);
    let mut rest = floats_block.slice::<f32>(floats);
    let mut cut = |len: usize| {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
        rest = tail;
        part
    };
    let (k, v) = (cut(rows * width), cut(rows * width));
    let (dk, dv) = if partial.is_null() {
        (cut(rows * width).as_mut_ptr(), cut(rows * width).as_mut_ptr())
    } else {
        (partial, partial.wrapping_add(rows * width))
    };
    // SAFETY: panels hold `rows` rows; `order.keys` names tokens of the cell; the caller vouches for the rest.
    unsafe {
        std::slice::from_raw_parts_mut(dk, rows * width).fill(0.0);
        std::slice::from_raw_parts_mut(dv, rows * width).fill(0.0);
        let source = |third| {
            let keys = &*order.keys;
            move |row: usize| job.token(start + keys[row] as usize, third, head)
        };
        pack_rows::<V, A>(k.as_mut_ptr(), rows, job.head_width, source(1));
        pack_rows::<V, A>(v.as_mut_ptr(), rows, job.head_width, source(2));
        let panels = Panels {
            k: k.as_ptr(),
            v: v.as_ptr(),
            dk,
            dv,
            qt: cut(width * TILE).as_mut_ptr(),
            dot: cut(width * TILE).as_mut_ptr(),
            dqt: cut(width * TILE).as_mut_ptr(),
            q: cut(width * TILE).as_mut_ptr(),
            do_: cut(width * TILE).as_mut_ptr(),
            s: cut(BLOCK * TILE).as_mut_ptr(),
            ds: cut(BLOCK * TILE).as_mut_ptr(),
        };
        let mut at = first;
        while at < end {
            let count = order.tile(at, end);
            match count.div_ceil(LANES) {
                1 => tile::<V, A, 1>(job, &order, g, &panels, head, at, count),
                2 => tile::<V, A, 2>(job, &order, g, &panels, head, at, count),
                _ => tile::<V, A, 3>(job, &order, g, &panels, head, at, count),
            }
            at += count;
        }
        // Global tokens have two panel rows: the one in the cell's run collects both.
        let gathered = len.next_multiple_of(8);
        for row in 0..len - order.ordinary {
            let to = order.keys[gathered + row] as usize;
            for panel in [dk, dv] {
                let (to, from) = (panel.add(to * width), panel.add((gathered + row) * width));
                for at in (0..width).step_by(LANES) {
                    V::load(to.add(at)).add(V::load(from.add(at))).store(to.add(at));
                }
            }
        }
        if partial.is_null() {
            store_keys::<V, A>(job, g, cell, head, &[dk]);
        }
    }
}

/// Writes dk and dv of a cell and head: the sum of its chunks' panels, in chunk order, times the constant factors.
///
/// # Safety
/// The instruction set of V is present; each chunk points to [`partial_len`] floats, dK's panel first (or apart from dV's by
/// the same distance); no one else writes these columns of dqkv.
#[inline(always)]
pub unsafe fn store_keys<V: Vector, A: Act>(
    job: &Job<'_, A>,
    g: &Gradients<'_, A>,
    cell: usize,
    head: usize,
    chunks: &[*mut f32],
) {
    let (start, len) = job.cell(cell);
    let (kw, d) = (job.head_width, job.width());
    let (rows, width) = (job.panel_rows(cell), panel_width(kw));
    let kept =
        if job.dropout.probability > 0.0 { crate::rng::dropout_scale(job.dropout.probability) } else { 1.0 };
    // SAFETY: the caller vouches for panels, buffers and the instruction set.
    unsafe {
        for (third, factor) in [(1, 1.0 / (kw as f32).sqrt()), (2, kept)] {
            let factor = V::splat(factor);
            for row in 0..len {
                let at_panel = (third - 1) * rows * width + row * width;
                let target = g.dqkv.at((start + row) * 3 * d + third * d + head * kw);
                for at in (0..width).step_by(LANES) {
                    let mut sum = V::splat(0.0);
                    for chunk in chunks {
                        sum = sum.add(V::load(chunk.add(at_panel + at)));
                    }
                    store_lanes::<V, A>(sum.mul(factor), target, at, kw);
                }
            }
        }
    }
}

/// `count` queries from `first` on, at most 16·N.
#[inline(always)]
unsafe fn tile<V: Vector, A: Act, const N: usize>(
    job: &Job<'_, A>,
    order: &Order<'_>,
    g: &Gradients<'_, A>,
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
        let column = |lane: usize| token(lane) * d + head * kw;
        let q = |lane: usize| job.token(token(lane), 0, head);
        let do_ = |lane: usize| g.do_[column(lane)..column(lane) + kw].as_ptr();
        pack_columns::<V, A, N>(p.qt, count, kw, q);
        pack_columns::<V, A, N>(p.dot, count, kw, do_);
        pack_rows::<V, A>(p.q, count, kw, q);
        pack_rows::<V, A>(p.do_, count, kw, do_);
        for c in 0..width * N {
            V::splat(0.0).store(p.dqt.add(c * LANES));
        }
        let (mut lse, mut delta) = ([0f32; TILE], [0f32; TILE]);
        for lane in 0..count {
            let o = g.o[column(lane)..column(lane) + kw].as_ptr();
            let mut sum = V::splat(0.0);
            for at in (0..width).step_by(LANES) {
                sum = V::load(p.do_.add(lane * width + at)).mul_add(load_lanes::<V, A>(o, at, kw), sum);
            }
            let mut lanes = [0f32; LANES];
            sum.store(lanes.as_mut_ptr());
            delta[lane] = crate::cpu::simd::lane_sum(lanes);
            *g.delta.at(token(lane) * h + head) = delta[lane];
            lse[lane] = g.lse[token(lane) * h + head] * LOG2_E;
        }
        let draws = (job.dropout.probability > 0.0).then(|| {
            Draws::new(job.dropout, |lane| {
                let token = job.dropout.first_row + token(lane.min(count - 1)) as u64;
                token * h as u64 + head as u64
            })
        });
        let mut rows = RowValues {
            lse: [V::splat(0.0); N],
            delta: [V::splat(0.0); N],
            position: positions::<V, N>(queries),
            scale: V::splat(LOG2_E / (kw as f32).sqrt()),
            kept: draws.as_ref().map(|draws| V::splat(draws.scale)),
        };
        for v in 0..N {
            rows.lse[v] = V::load(lse.as_ptr().add(v * LANES));
            rows.delta[v] = V::load(delta.as_ptr().add(v * LANES));
        }
        let mut bits = [[0u16; N]; BLOCK];
        let (runs, run_count) = order.runs(first, count);
        for run in &runs[..run_count] {
            for begin in (0..run.count).step_by(BLOCK) {
                let block = Run { begin: run.begin + begin, count: (run.count - begin).min(BLOCK), ..*run };
                if let Some(draws) = &draws {
                    draws.block::<V, N>(order, block, &mut bits);
                }
                match V::ROWS {
                    8 => differentiate::<V, 8, N>(order, p, width, block, queries, &rows, &bits),
                    2 => differentiate::<V, 2, N>(order, p, width, block, queries, &rows, &bits),
                    _ => differentiate::<V, 1, N>(order, p, width, block, queries, &rows, &bits),
                }
                let keys = block.count.next_multiple_of(8);
                let at = block.begin * width;
                for (sum, weights, vectors) in [(p.dv, p.s, p.do_), (p.dk, p.ds, p.q)] {
                    let a = Scalars { pointer: weights, row: stride, step: 1 };
                    let b = Vectors { pointer: vectors, step: width };
                    accumulate_panel::<V>(sum.add(at), width, keys, count, a, b);
                }
                let a = Scalars { pointer: p.k.add(at), row: 1, step: width };
                let b = Vectors { pointer: p.ds, step: stride };
                accumulate_rows::<V, Plain, N>(p.dqt, stride, width, block.count, a, b);
            }
        }
        let factor = [V::splat(1.0 / (kw as f32).sqrt()); N];
        unpack_columns::<V, A, N>(p.dqt, factor, count, kw, |lane| {
            g.dqkv.at(token(lane) * 3 * d + head * kw)
        });
    }
}

/// What stands beside each query of a tile.
struct RowValues<V, const N: usize> {
    /// lse · log2 e; 0 in lanes without a query, where q = do = 0 make P = 1 and dS = 0.
    lse: [V; N],
    delta: [V; N],
    position: [V; N],
    scale: V,
    /// Inverse keep probability, where there is dropout.
    kept: Option<V>,
}

/// Writes dropout(Pᵀ) and dSᵀ of a block, zero in rows beyond its count.
#[inline(always)]
unsafe fn differentiate<V: Vector, const R: usize, const N: usize>(
    order: &Order<'_>,
    p: &Panels,
    width: usize,
    block: Run,
    queries: &[u32],
    rows: &RowValues<V, N>,
    bits: &[[u16; N]; BLOCK],
) {
    let stride = N * LANES;
    // SAFETY: block rows rounded up to 8 lie inside the panels, whose parts are padded to multiples of 8.
    unsafe {
        let zero = V::splat(0.0);
        for group in (0..block.count.next_multiple_of(8)).step_by(R) {
            let row = block.begin + group;
            let a = Scalars { pointer: p.k.add(row * width), row: width, step: 1 };
            let acc =
                multiply::<V, Plain, R, N>([[zero; N]; R], width, a, Vectors { pointer: p.qt, step: stride });
            let crosses = block.banded && order.crosses_window(queries, row, R);
            for (r, acc) in acc.iter().enumerate() {
                let mut attends = [if group + r < block.count { u16::MAX } else { 0 }; N];
                if crosses && group + r < block.count {
                    attends = order.window_bits(row + r, &rows.position);
                }
                for v in 0..N {
                    let e = acc[v].mul_add(rows.scale, zero.sub(rows.lse[v])).exp2().keep(attends[v]);
                    e.store(p.s.add((group + r) * stride + v * LANES));
                }
            }
            let a = Scalars { pointer: p.v.add(row * width), row: width, step: 1 };
            let acc = multiply::<V, Plain, R, N>(
                [[zero; N]; R],
                width,
                a,
                Vectors { pointer: p.dot, step: stride },
            );
            for (r, acc) in acc.iter().enumerate() {
                for v in 0..N {
                    let at = p.s.add((group + r) * stride + v * LANES);
                    let e = V::load(at);
                    let mut dp = acc[v];
                    if let Some(kept) = rows.kept {
                        let bits = bits[group + r][v];
                        dp = dp.mul(kept).keep(bits);
                        e.keep(bits).store(at);
                    }
                    e.mul(dp.sub(rows.delta[v])).store(p.ds.add((group + r) * stride + v * LANES));
                }
            }
        }
    }
}
