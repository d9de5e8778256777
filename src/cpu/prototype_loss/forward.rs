//! The first pass over a block of rows: loss, lse and dz.

use super::Problem;
use super::kernels::PANEL;
use super::scratch::{Arena, BLOCK_ROWS, Rows, TileScratch, pack_rows, tile_columns};
use super::targets::Place;
use crate::device::Act;
use crate::ops::prototype_loss::Dims;

impl<A: Act> Problem<'_, A> {
    /// Loss, lse and dz of `rows`, which all lie in `first..first + loss.len()`.
    pub(super) fn forward_rows(&self, rows: &[u32], out: &mut OutRows<A>, mut arena: Arena) {
        let Dims { width, gradient_scale, .. } = self.dims;
        let padded = self.padded;
        let lanes = rows.len().next_multiple_of(PANEL);
        let mut stats = Rows::new(&mut arena);
        let mut scratch = TileScratch::new(&mut arena, width, padded);
        let panels = arena.take(BLOCK_ROWS * width);
        let o = arena.take(BLOCK_ROWS * padded);
        stats.start(self, rows);
        pack_rows(rows, self.z, width, panels);
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
                pack_rows(rows, teacher.z, width, teacher_panels);
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
}

/// O's rows times their factor, where it is not 1.
pub(super) fn shrink_rows(o: &mut [f32], padded: usize, factor: &[f32]) {
    for (o, factor) in o.chunks_exact_mut(padded).zip(factor) {
        if *factor != 1.0 {
            o.iter_mut().for_each(|o| *o *= factor);
        }
    }
}

/// A range of rows of the outputs.
pub(super) struct OutRows<'a, A> {
    pub(super) first: usize,
    pub(super) loss: &'a mut [f32],
    pub(super) lse: &'a mut [f32],
    pub(super) dz: &'a mut [A],
    pub(super) width: usize,
    pub(super) accumulate: bool,
}

impl<A: Act> OutRows<'_, A> {
    pub(super) fn clear(&mut self) {
        self.loss.fill(0.0);
        self.lse.fill(0.0);
        if !self.accumulate {
            self.dz.fill(A::default());
        }
    }

    pub(super) fn set(&mut self, row: usize, loss: f32, lse: f32, dz: &[f32]) {
        let i = row - self.first;
        self.loss[i] = loss;
        self.lse[i] = lse;
        let to = &mut self.dz[i * self.width..(i + 1) * self.width];
        for (to, dz) in to.iter_mut().zip(dz) {
            *to = A::from_f32(if self.accumulate { to.to_f32() + dz } else { *dz });
        }
    }
}
