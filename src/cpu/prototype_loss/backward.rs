//! The second pass over a tile of columns: their gradients, summed over all rows in a fixed order.

use super::Problem;
use super::kernels::{PANEL, Product};
use super::scratch::{Arena, BLOCK_ROWS, Rows, TileScratch, tile_columns};
use super::targets::{Place, inside};
use crate::device::Act;
use crate::ops::prototype_loss::Dims;

impl<A: Act> Problem<'_, A> {
    /// Adds one tile's column gradients. `block` hands out the packed rows.
    pub(super) fn backward_tile(
        &self,
        packed: &PackedRows,
        lse: &[f32],
        mut out: OutColumns,
        mut arena: Arena,
    ) {
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
            let lanes = rows.len().next_multiple_of(PANEL);
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
                    b_panel: PANEL,
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

/// A tile of the column gradients.
pub(super) struct OutColumns<'a> {
    pub(super) first: usize,
    pub(super) column: &'a mut [f32],
    pub(super) bias: Option<&'a mut [f32]>,
    pub(super) scale: Option<&'a mut [f32]>,
}

/// All active rows, packed once for every column tile: panels for S, plain rows for dP.
pub(super) struct PackedRows<'s> {
    pub(super) rows: &'s [u32],
    pub(super) panels: &'s [f32],
    pub(super) teacher_panels: &'s [f32],
    pub(super) z: &'s [f32],
}
