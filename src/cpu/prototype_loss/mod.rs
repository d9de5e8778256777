//! Streaming softmax loss on the CPU (formulas: [`crate::ops::prototype_loss`]).
//!
//! A task owns up to [`BLOCK_ROWS`] rows (forward) or one tile of columns (backward) and walks the other axis; the tile of
//! logits, (columns, rows) transposed, stays in the second-level cache:
//! ```text
//! forward, one-hot       per column tile:  S = P Zᵀ;  online softmax;  O = O · shrink + (scale e^(S-max))ᵀ P
//!                        end:              dz = gκ (O/l - Σ mass scale p)            2 products
//! forward, dense target  lse first; then   S = P Zᵀ;  G = κ(e^(S-lse) - T);  dz += (scale G)ᵀ P      3 products
//! backward               per row block:    S = P Zᵀ;  G = gκ(e^(S-lse) - T);  dP += G Z              2 products
//! ```
//! The trait keeps two passes because a device with many cores wants them: fused on one core, forward with column gradients
//! would need lse first as well, hence 1 + 1 + 2 products, the same 4 as two passes.
//!
//! Rows that take no part (κ = 0, no target) are left out before anything is computed. Every row and every column is
//! summed in an order fixed by the shapes, so results do not depend on threads.

mod kernels;
mod targets;

use super::{Buf, Cpu};
use crate::device::Act;
use crate::error::Result;
use crate::ops::prototype_loss::{ColumnGradients, Dims, In, Out, PrototypeLoss};
use kernels::{EXCLUDED, Kernels, Product, Tile};
use rayon::prelude::*;
use std::cell::Cell;
use targets::{Place, Targets, inside, logit};

/// Most rows of a tile: 8 register rows of 12, 3 panels of 32; the tile (≤ 120 × 96 × 4 = 46 KB), the packed rows and
/// their gradient (96 · D · 4 each) and the column tile share 1 MB of second-level cache up to D = 768.
const BLOCK_ROWS: usize = 96;

/// Columns of a tile: a multiple of the 12 register rows, at most 256 KB of prototypes.
fn tile_columns(width: usize) -> usize {
    (65_536 / width.max(1)).clamp(24, 120) / 12 * 12
}

/// Scratch floats of one task: never a function of R · P.
fn scratch_len(panel: usize, width: usize) -> usize {
    let (padded, columns) = (width.next_multiple_of(panel), tile_columns(width));
    let tiles = 3 * columns * BLOCK_ROWS + 2 * columns * padded;
    let rows = 2 * BLOCK_ROWS * padded.max(width) + BLOCK_ROWS * padded;
    tiles + rows + 8 * BLOCK_ROWS + 5 * columns + 32 * 16
}

thread_local! {
    /// One arena per thread. Taken while in use, so that a task that rayon nests inside another gets its own.
    static ARENA: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with `len` floats of scratch, content unspecified.
fn with_arena<T>(len: usize, work: impl FnOnce(Arena<'_>) -> T) -> T {
    let mut arena = ARENA.take();
    if arena.len() < len {
        arena = vec![0.0; len];
    }
    let result = work(Arena(&mut arena[..len]));
    ARENA.set(arena);
    result
}

/// Scratch handed out in cache-line-aligned pieces.
struct Arena<'a>(&'a mut [f32]);

impl<'a> Arena<'a> {
    fn take(&mut self, len: usize) -> &'a mut [f32] {
        let rest = std::mem::take(&mut self.0);
        let skip = rest.as_ptr().align_offset(64).min(rest.len());
        let (piece, rest) = rest[skip..].split_at_mut(len);
        self.0 = rest;
        piece
    }
}

/// One call, as slices.
struct Problem<'a, A> {
    kernels: &'static Kernels,
    dims: Dims,
    /// D rounded up to whole panels.
    padded: usize,
    z: &'a [A],
    column: &'a [A],
    scale: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    margin: Option<&'a [f32]>,
    row_weight: &'a [f32],
    targets: Targets<'a>,
}

/// A range of columns as f32: where they lie, or converted and padded into scratch.
#[derive(Clone, Copy)]
struct Columns {
    count: usize,
    at: *const f32,
    stride: usize,
}

impl Columns {
    fn new<A: Act>(
        all: &[A],
        width: usize,
        padded: usize,
        first: usize,
        count: usize,
        scratch: &mut [f32],
    ) -> Self {
        let rows = &all[first * width..(first + count) * width];
        if A::IS_F32 && width == padded {
            let rows: &[f32] = bytemuck::cast_slice(rows);
            return Columns { count, at: rows.as_ptr(), stride: width };
        }
        widen_rows(rows.chunks_exact(width), padded, scratch);
        Columns { count, at: scratch.as_ptr(), stride: padded }
    }
}

/// Rows as f32, zero-padded to `padded`.
fn widen_rows<'r, A: Act>(rows: impl Iterator<Item = &'r [A]>, padded: usize, out: &mut [f32]) {
    for (from, to) in rows.zip(out.chunks_exact_mut(padded)) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
        to[from.len()..].fill(0.0);
    }
}

/// Rows as panels (panel, D, lanes); lanes beyond `rows` are zero.
fn pack_rows<A: Act>(rows: &[u32], z: &[A], width: usize, panel: usize, out: &mut [f32]) {
    for (rows, out) in rows.chunks(panel).zip(out.chunks_mut(panel * width)) {
        if rows.len() < panel {
            out.fill(0.0);
        }
        for (lane, row) in rows.iter().enumerate() {
            let z = &z[*row as usize * width..][..width];
            for (d, z) in z.iter().enumerate() {
                out[d * panel + lane] = z.to_f32();
            }
        }
    }
}

/// The per-tile view of a per-column array, or its default.
fn column_values(from: Option<&[f32]>, default: f32, first: usize, out: &mut [f32]) {
    match from {
        Some(from) => out.copy_from_slice(&from[first..first + out.len()]),
        None => out.fill(default),
    }
}

/// Statistics of a block of rows, one per lane; idle lanes have weight 0 and an lse that silences them.
struct Rows<'s> {
    max: &'s mut [f32],
    sum: &'s mut [f32],
    shrink: &'s mut [f32],
    lse: &'s mut [f32],
    weight: &'s mut [f32],
    target: &'s mut [f32],
    teacher_lse: &'s mut [f32],
}

impl<'s> Rows<'s> {
    fn new(arena: &mut Arena<'s>) -> Self {
        let [max, sum, shrink, lse, weight, target, teacher_lse] =
            std::array::from_fn(|_| arena.take(BLOCK_ROWS));
        Rows { max, sum, shrink, lse, weight, target, teacher_lse }
    }

    fn start<A>(&mut self, problem: &Problem<A>, rows: &[u32]) {
        self.max.fill(EXCLUDED);
        self.lse.fill(-EXCLUDED);
        self.teacher_lse.fill(-EXCLUDED);
        for idle in [&mut *self.sum, self.weight, self.target] {
            idle.fill(0.0);
        }
        for (lane, row) in rows.iter().enumerate() {
            self.weight[lane] = problem.row_weight[*row as usize];
            if let Some(teacher) = problem.targets.teacher() {
                self.teacher_lse[lane] = teacher.lse[*row as usize];
            }
        }
    }
}

/// Scratch of a column tile.
struct TileScratch<'s> {
    s: &'s mut [f32],
    t: &'s mut [f32],
    teacher: &'s mut [f32],
    columns: &'s mut [f32],
    teacher_columns: &'s mut [f32],
    scale: &'s mut [f32],
    bias: &'s mut [f32],
    offset: &'s mut [f32],
}

impl<'s> TileScratch<'s> {
    fn new(arena: &mut Arena<'s>, width: usize, padded: usize) -> Self {
        let columns = tile_columns(width);
        let [s, t, teacher] = std::array::from_fn(|_| arena.take(columns * BLOCK_ROWS));
        let [of_columns, teacher_columns] = std::array::from_fn(|_| arena.take(columns * padded));
        let [scale, bias, offset] = std::array::from_fn(|_| arena.take(columns));
        TileScratch { s, t, teacher, columns: of_columns, teacher_columns, scale, bias, offset }
    }
}

impl<'a, A: Act> Problem<'a, A> {
    fn new(kernels: &'static Kernels, dims: Dims, input: &In<'a, Cpu, A>) -> Self {
        Problem {
            kernels,
            dims,
            padded: dims.width.next_multiple_of(kernels.panel),
            z: input.z,
            column: input.column,
            scale: input.scale.map(|x| &x[..]),
            bias: input.bias.map(|x| &x[..]),
            margin: input.margin.map(|x| &x[..]),
            row_weight: input.row_weight,
            targets: Targets::new(dims.columns, input),
        }
    }

    /// Rows that take part, ascending.
    fn active_rows(&self) -> Vec<u32> {
        let takes_part = |i: &u32| {
            let i = *i as usize;
            self.row_weight[i] != 0.0 && self.targets.has_target(i)
        };
        (0..self.dims.rows as u32).filter(takes_part).collect()
    }

    fn scale_of(&self, k: usize) -> f32 {
        self.scale.map_or(1.0, |s| s[k])
    }

    /// S = P Zᵀ for one tile.
    ///
    /// # Safety
    /// `panels` holds `rows` packed rows of this width, `s` a tile.
    unsafe fn dots(&self, columns: Columns, panels: &[f32], rows: usize, s: &mut [f32]) -> Tile {
        let (panel, width) = (self.kernels.panel, self.dims.width);
        debug_assert!(panels.len() >= rows * width && s.len() >= columns.count * rows);
        let product = Product {
            m: columns.count,
            n: rows,
            k: width,
            a: columns.at,
            a_m: columns.stride,
            a_k: 1,
            b: panels.as_ptr(),
            b_k: panel,
            b_panel: panel * width,
            c: s.as_mut_ptr(),
            c_m: rows,
            accumulate: false,
        };
        // SAFETY: sizes as asserted; `columns` covers its own rows by construction.
        unsafe { (self.kernels.product)(&product) };
        Tile { s: s.as_mut_ptr(), columns: columns.count, rows }
    }

    /// Margins onto the tile's label columns and, where asked, the target's logits into `target`; then logits for all.
    ///
    /// # Safety
    /// `tile` holds dot products of `place`.
    unsafe fn logits(
        &self,
        tile: Tile,
        place: Place,
        scratch: &mut TileScratch,
        mut target: Option<&mut [f32]>,
    ) {
        let n = tile.columns;
        column_values(self.scale, 1.0, place.first, &mut scratch.scale[..n]);
        column_values(self.bias, 0.0, place.first, &mut scratch.bias[..n]);
        if let Some(margin) = self.margin {
            self.labels_inside(tile, place, |p, at| {
                // SAFETY: `at` lies inside the tile.
                unsafe { *tile.s.add(at) -= margin[place.first + p] }
            });
        }
        if let Some(target) = &mut target {
            for (lane, row) in place.rows.iter().enumerate() {
                for (k, mass) in self.targets.entries(*row as usize) {
                    if let Some(p) = inside(k, place.first, n) {
                        // SAFETY: p and lane lie inside the tile.
                        let x = unsafe { *tile.s.add(p * tile.rows + lane) };
                        let bias = if self.dims.bias_in_target { scratch.bias[p] } else { 0.0 };
                        target[lane] += mass * logit(self.kernels, x, scratch.scale[p], bias);
                    }
                }
            }
        }
        if !self.targets.finish(tile, place, &scratch.scale[..n], &scratch.bias[..n]) {
            // SAFETY: the tile is whole, scale and bias hold its columns.
            unsafe { (self.kernels.finish)(tile, &scratch.scale[..n], &scratch.bias[..n]) };
        }
    }

    /// Calls `f(p, element)` for each row's label that lies in the tile.
    fn labels_inside(&self, tile: Tile, place: Place, mut f: impl FnMut(usize, usize)) {
        for (lane, row) in place.rows.iter().enumerate() {
            let label = self.targets.label(*row as usize);
            if let Some(p) = label.and_then(|k| inside(k, place.first, tile.columns)) {
                f(p, p * tile.rows + lane);
            }
        }
    }

    /// The dense target of the tile, the teacher's share included.
    ///
    /// # Safety
    /// As for [`Problem::dots`]; `teacher_panels` are the teacher's packed rows.
    unsafe fn dense_target(
        &self,
        tile: Tile,
        place: Place,
        scratch: &mut TileScratch,
        teacher_panels: &[f32],
        teacher_lse: &[f32],
    ) {
        let t = Tile { s: scratch.t.as_mut_ptr(), ..tile };
        self.targets.fill(t, place, self.dims.columns);
        if let Some(teacher) = self.targets.teacher() {
            let columns = Columns::new(
                teacher.column,
                self.dims.width,
                self.padded,
                place.first,
                tile.columns,
                scratch.teacher_columns,
            );
            // SAFETY: passed on from the caller.
            unsafe {
                let dots = self.dots(columns, teacher_panels, tile.rows, scratch.teacher);
                (self.kernels.add_softmax)(dots, teacher.scale, teacher_lse, teacher.share, t.s);
            }
        }
    }

    /// Loss, lse and dz of `rows`, which all lie in `first..first + loss.len()`.
    fn forward_rows(&self, rows: &[u32], out: &mut OutRows<A>, mut arena: Arena) {
        let Dims { width, gradient_scale, .. } = self.dims;
        let (padded, panel) = (self.padded, self.kernels.panel);
        let lanes = rows.len().next_multiple_of(panel);
        let mut stats = Rows::new(&mut arena);
        let mut scratch = TileScratch::new(&mut arena, width, padded);
        let panels = arena.take(BLOCK_ROWS * width);
        let o = arena.take(BLOCK_ROWS * padded);
        stats.start(self, rows);
        pack_rows(rows, self.z, width, panel, panels);
        let dense = self.targets.is_dense();
        let tiles = || (0..self.dims.columns).step_by(tile_columns(width));

        for first in tiles() {
            let place = Place { rows, first };
            let columns = self.columns(first, scratch.columns);
            // SAFETY: scratch is sized for a tile of BLOCK_ROWS rows, `lanes` of which are packed.
            unsafe {
                let tile = self.dots(columns, panels, lanes, scratch.s);
                let target = (!dense).then_some(&mut *stats.target);
                self.logits(tile, place, &mut scratch, target);
                (self.kernels.online)(tile, scratch.scale, stats.max, stats.sum, stats.shrink);
                if !dense {
                    if first > 0 {
                        shrink_rows(o, padded, &stats.shrink[..rows.len()]);
                    }
                    self.add_columns(tile, columns, rows.len(), o, first > 0);
                }
            }
        }
        if dense {
            for lane in 0..rows.len() {
                stats.lse[lane] = stats.max[lane] + stats.sum[lane].ln();
                stats.shrink[lane] = stats.weight[lane] * gradient_scale;
            }
            stats.shrink[rows.len()..].fill(0.0);
            let teacher_panels = arena.take(BLOCK_ROWS * width);
            if let Some(teacher) = self.targets.teacher() {
                pack_rows(rows, teacher.z, width, panel, teacher_panels);
            }
            for first in tiles() {
                let place = Place { rows, first };
                let columns = self.columns(first, scratch.columns);
                let n = columns.count;
                // SAFETY: as above.
                unsafe {
                    let tile = self.dots(columns, panels, lanes, scratch.s);
                    self.logits(tile, place, &mut scratch, None);
                    self.dense_target(tile, place, &mut scratch, teacher_panels, stats.teacher_lse);
                    self.targets.offset(
                        self.dims.bias_in_target,
                        first,
                        &scratch.bias[..n],
                        &mut scratch.offset[..n],
                    );
                    (self.kernels.target_logits)(
                        tile,
                        scratch.t.as_ptr(),
                        &scratch.offset[..n],
                        stats.target,
                    );
                    (self.kernels.gradient)(tile, Some(scratch.t.as_ptr()), stats.lse, stats.shrink);
                    if self.scale.is_some() {
                        scratch.bias[..n].fill(0.0);
                        (self.kernels.finish)(tile, &scratch.scale[..n], &scratch.bias[..n]);
                    }
                    self.add_columns(tile, columns, rows.len(), o, first > 0);
                }
            }
        }
        for (lane, row) in rows.iter().enumerate() {
            let (i, o) = (*row as usize, &mut o[lane * padded..][..width]);
            let (log_sum, weight) = (stats.sum[lane].ln(), stats.weight[lane]);
            if !dense {
                let inverse = 1.0 / stats.sum[lane];
                o.iter_mut().for_each(|o| *o *= inverse);
                for (k, mass) in self.targets.entries(i) {
                    let factor = mass * self.scale_of(k);
                    for (o, p) in o.iter_mut().zip(&self.column[k * width..][..width]) {
                        *o -= factor * p.to_f32();
                    }
                }
                let factor = weight * gradient_scale;
                o.iter_mut().for_each(|o| *o *= factor);
            }
            // max - target first: both are large, their difference and the logarithm are not.
            let loss = weight * ((stats.max[lane] - stats.target[lane]) + log_sum);
            out.set(i, loss, stats.max[lane] + log_sum, o);
        }
    }

    fn columns(&self, first: usize, scratch: &mut [f32]) -> Columns {
        let count = tile_columns(self.dims.width).min(self.dims.columns - first);
        Columns::new(self.column, self.dims.width, self.padded, first, count, scratch)
    }

    /// o (rows, padded) (+)= tileᵀ P.
    ///
    /// # Safety
    /// `tile` and `columns` have the same columns; `o` holds `rows`, at most `tile.rows`.
    unsafe fn add_columns(&self, tile: Tile, columns: Columns, rows: usize, o: &mut [f32], accumulate: bool) {
        debug_assert!(o.len() >= rows * self.padded && rows <= tile.rows);
        let product = Product {
            m: rows,
            n: self.padded,
            k: tile.columns,
            a: tile.s,
            a_m: 1,
            a_k: tile.rows,
            b: columns.at,
            b_k: columns.stride,
            b_panel: self.kernels.panel,
            c: o.as_mut_ptr(),
            c_m: self.padded,
            accumulate,
        };
        // SAFETY: passed on from the caller; columns are padded to whole panels.
        unsafe { (self.kernels.product)(&product) }
    }

    /// Adds one tile's column gradients. `block` hands out the packed rows.
    fn backward_tile(&self, packed: &PackedRows, lse: &[f32], mut out: OutColumns, mut arena: Arena) {
        let Dims { width, gradient_scale, .. } = self.dims;
        let padded = self.padded;
        let mut stats = Rows::new(&mut arena);
        let mut scratch = TileScratch::new(&mut arena, width, padded);
        let dcolumn = arena.take(tile_columns(width) * padded);
        let sums = arena.take(tile_columns(width));
        let margin_sums = arena.take(tile_columns(width));
        sums.fill(0.0);
        margin_sums.fill(0.0);
        let columns = self.columns(out.first, scratch.columns);
        let dense = self.targets.is_dense();
        for (b, rows) in packed.rows.chunks(BLOCK_ROWS).enumerate() {
            let lanes = rows.len().next_multiple_of(self.kernels.panel);
            let place = Place { rows, first: out.first };
            let panels = &packed.panels[b * BLOCK_ROWS * width..];
            stats.start(self, rows);
            for (lane, row) in rows.iter().enumerate() {
                stats.weight[lane] *= gradient_scale;
                stats.lse[lane] = lse[*row as usize];
            }
            // SAFETY: scratch is sized for a tile of BLOCK_ROWS rows; `packed` holds `lanes` rows from this block on.
            unsafe {
                let tile = self.dots(columns, panels, lanes, scratch.s);
                self.logits(tile, place, &mut scratch, None);
                if dense {
                    let teacher = packed.teacher_panels.get(b * BLOCK_ROWS * width..).unwrap_or(&[]);
                    self.dense_target(tile, place, &mut scratch, teacher, stats.teacher_lse);
                    (self.kernels.gradient)(tile, Some(scratch.t.as_ptr()), stats.lse, stats.weight);
                } else {
                    (self.kernels.gradient)(tile, None, stats.lse, stats.weight);
                    for (lane, row) in rows.iter().enumerate() {
                        for (k, mass) in self.targets.entries(*row as usize) {
                            if let Some(p) = inside(k, out.first, columns.count) {
                                *tile.s.add(p * tile.rows + lane) -= stats.weight[lane] * mass;
                            }
                        }
                    }
                }
                (self.kernels.column_sums)(tile, sums);
                self.labels_inside(tile, place, |p, at| margin_sums[p] += *tile.s.add(at));
                let product = Product {
                    m: columns.count,
                    n: padded,
                    k: rows.len(),
                    a: tile.s,
                    a_m: tile.rows,
                    a_k: 1,
                    b: packed.z[b * BLOCK_ROWS * padded..].as_ptr(),
                    b_k: padded,
                    b_panel: self.kernels.panel,
                    c: dcolumn.as_mut_ptr(),
                    c_m: padded,
                    accumulate: b > 0,
                };
                (self.kernels.product)(&product);
            }
        }
        for p in 0..columns.count {
            let (k, d) = (out.first + p, &dcolumn[p * padded..][..width]);
            let scale = self.scale_of(k);
            for (to, d) in out.column[p * width..(p + 1) * width].iter_mut().zip(d) {
                *to += scale * d;
            }
            if let Some(bias) = &mut out.bias {
                bias[p] += sums[p];
            }
            if let Some(dscale) = &mut out.scale {
                // Σ_i g_ik z_i·p_k = p_k · Σ_i g_ik z_i.
                let column = &self.column[k * width..(k + 1) * width];
                let dot: f32 = column.iter().zip(d).map(|(p, d)| p.to_f32() * d).sum();
                dscale[p] += dot - self.margin.map_or(0.0, |m| m[k] * margin_sums[p]);
            }
        }
    }
}

/// O's rows times their factor, where it is not 1.
fn shrink_rows(o: &mut [f32], padded: usize, factor: &[f32]) {
    for (o, factor) in o.chunks_exact_mut(padded).zip(factor) {
        if *factor != 1.0 {
            o.iter_mut().for_each(|o| *o *= factor);
        }
    }
}

/// A range of rows of the outputs.
struct OutRows<'a, A> {
    first: usize,
    loss: &'a mut [f32],
    lse: &'a mut [f32],
    dz: &'a mut [A],
    width: usize,
    accumulate: bool,
}

impl<A: Act> OutRows<'_, A> {
    fn clear(&mut self) {
        self.loss.fill(0.0);
        self.lse.fill(0.0);
        if !self.accumulate {
            self.dz.fill(A::default());
        }
    }

    fn set(&mut self, row: usize, loss: f32, lse: f32, dz: &[f32]) {
        let i = row - self.first;
        self.loss[i] = loss;
        self.lse[i] = lse;
        let to = &mut self.dz[i * self.width..(i + 1) * self.width];
        for (to, dz) in to.iter_mut().zip(dz) {
            *to = A::from_f32(if self.accumulate { to.to_f32() + dz } else { *dz });
        }
    }
}

/// A tile of the column gradients.
struct OutColumns<'a> {
    first: usize,
    column: &'a mut [f32],
    bias: Option<&'a mut [f32]>,
    scale: Option<&'a mut [f32]>,
}

/// All active rows, packed once for every column tile: panels for S, plain rows for dP.
struct PackedRows<'s> {
    rows: &'s [u32],
    panels: &'s [f32],
    teacher_panels: &'s [f32],
    z: &'s [f32],
}

/// Cuts `rows` into blocks of whole panels, at most [`BLOCK_ROWS`] each, as even as may be and an even number of them, so
/// that two threads end together. A row's result does not depend on its block.
fn row_blocks(rows: usize, panel: usize) -> Vec<usize> {
    let groups = rows.div_ceil(panel);
    let blocks = groups.div_ceil(BLOCK_ROWS / panel).next_multiple_of(2).clamp(1, groups.max(1));
    let ends = (1..=blocks).map(|b| (groups * b / blocks * panel).min(rows));
    ends.collect()
}

/// Runs the tasks over rayon's pool, each alone; a single task on this thread.
fn run_all<T: Send>(mut tasks: Vec<T>, run: impl Fn(T) + Send + Sync) {
    match tasks.len() {
        0 => {}
        1 => run(tasks.remove(0)),
        _ => tasks.into_par_iter().with_max_len(1).for_each(run),
    }
}

fn forward<A: Act>(kernels: &'static Kernels, dims: Dims, input: In<Cpu, A>, out: Out<Cpu, A>) {
    let problem = Problem::new(kernels, dims, &input);
    let active = problem.active_rows();
    let (mut loss, mut lse) = (&mut out.loss[..dims.rows], &mut out.lse[..dims.rows]);
    let mut dz = &mut out.dz[..dims.rows * dims.width];
    let (mut tasks, mut start, mut first) = (Vec::new(), 0, 0);
    let blocks = row_blocks(active.len(), kernels.panel);
    for (b, end) in blocks.iter().enumerate() {
        // The block's stretch of all rows ends where the next block's first active row begins.
        let last = b + 1 == blocks.len();
        let until = if last { dims.rows } else { active[*end] as usize };
        let take = until - first;
        let (a, rest) = std::mem::take(&mut loss).split_at_mut(take);
        loss = rest;
        let (b, rest) = std::mem::take(&mut lse).split_at_mut(take);
        lse = rest;
        let (c, rest) = std::mem::take(&mut dz).split_at_mut(take * dims.width);
        dz = rest;
        let rows =
            OutRows { first, loss: a, lse: b, dz: c, width: dims.width, accumulate: out.accumulate_dz };
        tasks.push((&active[start..*end], rows));
        (start, first) = (*end, until);
    }
    run_all(tasks, |(rows, mut out)| {
        out.clear();
        if !rows.is_empty() {
            let len = scratch_len(kernels.panel, dims.width);
            with_arena(len, |arena| problem.forward_rows(rows, &mut out, arena));
        }
    });
}

fn backward<A: Act>(
    kernels: &'static Kernels,
    dims: Dims,
    input: In<Cpu, A>,
    lse: &[f32],
    grads: ColumnGradients<Cpu>,
) {
    let problem = Problem::new(kernels, dims, &input);
    let active = problem.active_rows();
    if active.is_empty() {
        return;
    }
    let (width, padded, tile) = (dims.width, problem.padded, tile_columns(dims.width));
    let lanes = active.len().next_multiple_of(kernels.panel);
    let teacher = problem.targets.teacher();
    let teacher_len = if teacher.is_some() { lanes * width } else { 0 };
    with_arena(lanes * width + lanes * padded + teacher_len + 64, |mut arena| {
        let (panels, z) = (arena.take(lanes * width), arena.take(lanes * padded));
        let teacher_panels = arena.take(teacher_len);
        pack_rows(&active, problem.z, width, kernels.panel, panels);
        widen_rows(active.iter().map(|i| &problem.z[*i as usize * width..][..width]), padded, z);
        if let Some(teacher) = teacher {
            pack_rows(&active, teacher.z, width, kernels.panel, teacher_panels);
        }
        let packed = PackedRows { rows: &active, panels, teacher_panels, z };
        let mut bias = grads.bias.map(|b| b[..dims.columns].chunks_mut(tile));
        let mut scale = grads.scale.map(|s| s[..dims.columns].chunks_mut(tile));
        let columns = grads.column[..dims.columns * width].chunks_mut(tile * width);
        let tasks = columns.enumerate().map(|(i, column)| OutColumns {
            first: i * tile,
            column,
            bias: bias.as_mut().and_then(Iterator::next),
            scale: scale.as_mut().and_then(Iterator::next),
        });
        run_all(tasks.collect(), |out| {
            let len = scratch_len(kernels.panel, width);
            with_arena(len, |arena| problem.backward_tile(&packed, lse, out, arena));
        });
    });
}

fn lse<A: Act>(kernels: &'static Kernels, dims: Dims, z: &[A], column: &[A], scale: f32, lse: &mut [f32]) {
    let (width, padded) = (dims.width, dims.width.next_multiple_of(kernels.panel));
    let problem = Problem {
        kernels,
        dims,
        padded,
        z,
        column,
        scale: None,
        bias: None,
        margin: None,
        row_weight: &[],
        targets: Targets::Sparse {
            entries: 0,
            column: &[],
            mass: None,
            share: 1.0,
            mix: None,
            teacher: None,
        },
    };
    let all: Vec<u32> = (0..dims.rows as u32).collect();
    let mut lse = &mut lse[..dims.rows];
    let (mut tasks, mut start) = (Vec::new(), 0);
    for end in row_blocks(dims.rows, kernels.panel) {
        let (head, rest) = std::mem::take(&mut lse).split_at_mut(end - start);
        lse = rest;
        tasks.push((&all[start..end], head));
        start = end;
    }
    run_all(tasks, |(rows, out)| {
        with_arena(scratch_len(kernels.panel, width), |mut arena| {
            let lanes = rows.len().next_multiple_of(kernels.panel);
            let stats = Rows::new(&mut arena);
            let scratch = TileScratch::new(&mut arena, width, padded);
            let panels = arena.take(BLOCK_ROWS * width);
            pack_rows(rows, z, width, kernels.panel, panels);
            stats.max.fill(EXCLUDED);
            stats.sum.fill(0.0);
            scratch.scale.fill(scale);
            scratch.bias.fill(0.0);
            for first in (0..dims.columns).step_by(tile_columns(width)) {
                let columns = problem.columns(first, scratch.columns);
                // SAFETY: scratch is sized for a tile of BLOCK_ROWS rows, `lanes` of which are packed.
                unsafe {
                    let tile = problem.dots(columns, panels, lanes, scratch.s);
                    (kernels.finish)(tile, scratch.scale, scratch.bias);
                    (kernels.online)(tile, scratch.scale, stats.max, stats.sum, stats.shrink);
                }
            }
            for (lane, out) in out.iter_mut().enumerate() {
                *out = stats.max[lane] + stats.sum[lane].ln();
            }
        });
    });
}

impl<A: Act> PrototypeLoss<A> for Cpu {
    fn prototype_loss_forward(&self, dims: Dims, input: In<Cpu, A>, out: Out<Cpu, A>) -> Result<()> {
        forward(Kernels::best(), dims, input, out);
        Ok(())
    }

    fn prototype_loss_backward(
        &self,
        dims: Dims,
        input: In<Cpu, A>,
        lse: &Buf<f32>,
        grads: ColumnGradients<Cpu>,
    ) -> Result<()> {
        backward(Kernels::best(), dims, input, lse, grads);
        Ok(())
    }

    fn prototype_loss_lse(
        &self,
        dims: Dims,
        z: &Buf<A>,
        column: &Buf<A>,
        scale: f32,
        out: &mut Buf<f32>,
    ) -> Result<()> {
        lse(Kernels::best(), dims, z, column, scale, out);
        Ok(())
    }
}
