//! Working memory of one task, and rows and columns brought into the form the kernels read.

use super::Problem;
use super::kernels::{EXCLUDED, PANEL};
use crate::device::Act;

/// Most rows of a tile: 8 register rows of 12, 3 panels of 32; the tile (≤ 120 × 96 × 4 = 46 KB), the packed rows and
/// their gradient (96 · D · 4 each) and the column tile share 1 MB of second-level cache up to D = 768.
pub(super) const BLOCK_ROWS: usize = 96;

/// Columns of a tile: a multiple of the 12 register rows, at most 256 KB of prototypes.
pub(super) fn tile_columns(width: usize) -> usize {
    (65_536 / width.max(1)).clamp(24, 120) / 12 * 12
}

/// Scratch floats of one task: never a function of R · P.
pub(super) fn scratch_len(width: usize) -> usize {
    let (padded, columns) = (width.next_multiple_of(PANEL), tile_columns(width));
    let tiles = 3 * columns * BLOCK_ROWS + 2 * columns * padded;
    let rows = 2 * BLOCK_ROWS * padded.max(width) + BLOCK_ROWS * padded;
    tiles + rows + 8 * BLOCK_ROWS + 5 * columns + 32 * 16
}
/// Scratch handed out in cache-line-aligned pieces.
pub(super) struct Arena<'a>(pub(super) &'a mut [f32]);

impl<'a> Arena<'a> {
    pub(super) fn take(&mut self, len: usize) -> &'a mut [f32] {
        let rest = std::mem::take(&mut self.0);
        let skip = rest.as_ptr().align_offset(64).min(rest.len());
        let (piece, rest) = rest[skip..].split_at_mut(len);
        self.0 = rest;
        piece
    }
}
/// A range of columns as f32: where they lie, or converted and padded into scratch.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub(super) count: usize,
    pub(super) at: *const f32,
    pub(super) stride: usize,
}

impl Columns {
    pub(super) fn new<A: Act>(
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
pub(super) fn widen_rows<'r, A: Act>(rows: impl Iterator<Item = &'r [A]>, padded: usize, out: &mut [f32]) {
    for (from, to) in rows.zip(out.chunks_exact_mut(padded)) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
        to[from.len()..].fill(0.0);
    }
}

/// Rows as panels (panel, D, lanes); lanes beyond `rows` are zero.
pub(super) fn pack_rows<A: Act>(rows: &[u32], z: &[A], width: usize, out: &mut [f32]) {
    for (rows, out) in rows.chunks(PANEL).zip(out.chunks_mut(PANEL * width)) {
        if rows.len() < PANEL {
            out.fill(0.0);
        }
        for (lane, row) in rows.iter().enumerate() {
            let z = &z[*row as usize * width..][..width];
            for (d, z) in z.iter().enumerate() {
                out[d * PANEL + lane] = z.to_f32();
            }
        }
    }
}

/// The per-tile view of a per-column array, or its default.
pub(super) fn column_values(from: Option<&[f32]>, default: f32, first: usize, out: &mut [f32]) {
    match from {
        Some(from) => out.copy_from_slice(&from[first..first + out.len()]),
        None => out.fill(default),
    }
}

/// Statistics of a block of rows, one per lane; idle lanes have weight 0 and an lse that silences them.
pub(super) struct Rows<'s> {
    pub(super) max: &'s mut [f32],
    pub(super) sum: &'s mut [f32],
    pub(super) shrink: &'s mut [f32],
    pub(super) lse: &'s mut [f32],
    pub(super) weight: &'s mut [f32],
    pub(super) target: &'s mut [f32],
    pub(super) teacher_lse: &'s mut [f32],
}

impl<'s> Rows<'s> {
    pub(super) fn new(arena: &mut Arena<'s>) -> Self {
        let [max, sum, shrink, lse, weight, target, teacher_lse] =
            std::array::from_fn(|_| arena.take(BLOCK_ROWS));
        Rows { max, sum, shrink, lse, weight, target, teacher_lse }
    }

    pub(super) fn start<A>(&mut self, problem: &Problem<A>, rows: &[u32]) {
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
pub(super) struct TileScratch<'s> {
    pub(super) s: &'s mut [f32],
    pub(super) t: &'s mut [f32],
    pub(super) teacher: &'s mut [f32],
    pub(super) columns: &'s mut [f32],
    pub(super) teacher_columns: &'s mut [f32],
    pub(super) scale: &'s mut [f32],
    pub(super) bias: &'s mut [f32],
    pub(super) offset: &'s mut [f32],
}

impl<'s> TileScratch<'s> {
    pub(super) fn new(arena: &mut Arena<'s>, width: usize, padded: usize) -> Self {
        let columns = tile_columns(width);
        let [s, t, teacher] = std::array::from_fn(|_| arena.take(columns * BLOCK_ROWS));
        let [of_columns, teacher_columns] = std::array::from_fn(|_| arena.take(columns * padded));
        let [scale, bias, offset] = std::array::from_fn(|_| arena.take(columns));
        TileScratch { s, t, teacher, columns: of_columns, teacher_columns, scale, bias, offset }
    }
}
