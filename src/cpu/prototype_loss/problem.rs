//! One call as slices, and what both passes do with a tile: logits, targets, products.

use super::kernels::{Kernels, PANEL, Product, Tile};
use super::scratch::{Columns, TileScratch, column_values, tile_columns};
use super::targets::{Place, Targets, inside, logit};
use crate::cpu::Cpu;
use crate::device::Act;
use crate::ops::prototype_loss::{Dims, In};

/// One call, as slices.
pub(super) struct Problem<'a, A> {
    pub(super) kernels: &'static Kernels,
    pub(super) dims: Dims,
    /// D rounded up to whole panels.
    pub(super) padded: usize,
    pub(super) z: &'a [A],
    pub(super) column: &'a [A],
    pub(super) scale: Option<&'a [f32]>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) margin: Option<&'a [f32]>,
    pub(super) row_weight: &'a [f32],
    pub(super) targets: Targets<'a>,
}
impl<'a, A: Act> Problem<'a, A> {
    pub(super) fn new(kernels: &'static Kernels, dims: Dims, input: &In<'a, Cpu, A>) -> Self {
        Problem {
            kernels,
            dims,
            padded: dims.width.next_multiple_of(PANEL),
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
    pub(super) fn active_rows(&self) -> Vec<u32> {
        let takes_part = |i: &u32| {
            let i = *i as usize;
            self.row_weight[i] != 0.0 && self.targets.has_target(i)
        };
        (0..self.dims.rows as u32).filter(takes_part).collect()
    }

    pub(super) fn scale_of(&self, k: usize) -> f32 {
        self.scale.map_or(1.0, |s| s[k])
    }

    /// S = P Zᵀ for one tile.
    ///
    /// # Safety
    /// `panels` holds `rows` packed rows of this width, `s` a tile.
    pub(super) unsafe fn dots(&self, columns: Columns, panels: &[f32], rows: usize, s: &mut [f32]) -> Tile {
        let (panel, width) = (PANEL, self.dims.width);
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
    pub(super) unsafe fn logits(
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
    pub(super) fn labels_inside(&self, tile: Tile, place: Place, mut f: impl FnMut(usize, usize)) {
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
    pub(super) unsafe fn dense_target(
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

    pub(super) fn columns(&self, first: usize, scratch: &mut [f32]) -> Columns {
        let count = tile_columns(self.dims.width).min(self.dims.columns - first);
        Columns::new(self.column, self.dims.width, self.padded, first, count, scratch)
    }

    /// o (rows, padded) (+)= tileᵀ P.
    ///
    /// # Safety
    /// `tile` and `columns` have the same columns; `o` holds `rows`, at most `tile.rows`.
    pub(super) unsafe fn add_columns(
        &self,
        tile: Tile,
        columns: Columns,
        rows: usize,
        o: &mut [f32],
        accumulate: bool,
    ) {
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
            b_panel: PANEL,
            c: o.as_mut_ptr(),
            c_m: self.padded,
            accumulate,
        };
        // SAFETY: passed on from the caller; columns are padded to whole panels.
        unsafe { (self.kernels.product)(&product) }
    }
}
