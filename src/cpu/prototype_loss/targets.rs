//! What the softmax should be, as slices, and how it enters a tile.
//!
//! One-hot and few-entry targets never fill a tile: their logits are read, and their gradients corrected, at the target's
//! element alone. Targets with a dense share (class overlap, teacher, same label) are written into a second tile.

use super::kernels::{EXCLUDED, Kernels, Tile};
use crate::cpu::Cpu;
use crate::device::Act;
use crate::ops::prototype_loss::{In, Target};
use std::collections::HashMap;

/// Frozen teacher, as slices.
pub(super) struct Teacher<'a> {
    pub z: &'a [f32],
    pub column: &'a [f32],
    pub lse: &'a [f32],
    pub scale: f32,
    pub share: f32,
}

/// Target distributions, as slices.
pub(super) enum Targets<'a> {
    Sparse {
        entries: usize,
        column: &'a [i32],
        mass: Option<&'a [f32]>,
        /// 1 - ε - δ.
        share: f32,
        /// (P, P) matrix and ε.
        mix: Option<(&'a [f32], f32)>,
        teacher: Option<Teacher<'a>>,
    },
    Same {
        row_label: &'a [i32],
        column_label: &'a [i32],
        first_self: usize,
        same_bias: Option<&'a [f32]>,
        /// Columns with a label, by label.
        count: HashMap<i32, u32>,
    },
}

/// The rows and columns a tile covers.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    /// Original row of each lane in use.
    pub rows: &'a [u32],
    /// First column.
    pub first: usize,
}

impl<'a> Targets<'a> {
    pub fn new<A: Act>(columns: usize, input: &In<'a, Cpu, A>) -> Self {
        match &input.target {
            Target::Sparse { entries, column, mass, mix, teacher } => Targets::Sparse {
                entries: *entries,
                column,
                mass: mass.map(|m| &m[..]),
                share: 1.0
                    - mix.as_ref().map_or(0.0, |m| m.share)
                    - teacher.as_ref().map_or(0.0, |t| t.share),
                mix: mix.as_ref().map(|m| (&m.matrix[..], m.share)),
                teacher: teacher.as_ref().map(|t| Teacher {
                    z: t.z,
                    column: t.column,
                    lse: t.lse,
                    scale: t.scale,
                    share: t.share,
                }),
            },
            Target::SameLabel { row_label, column_label, first_self, same_bias } => {
                let mut count = HashMap::new();
                for label in column_label[..columns].iter().filter(|l| **l >= 0) {
                    *count.entry(*label).or_insert(0) += 1;
                }
                Targets::Same {
                    row_label,
                    column_label,
                    first_self: *first_self,
                    same_bias: same_bias.map(|b| &b[..]),
                    count,
                }
            }
        }
    }

    /// Whether a second tile holds the target.
    pub fn is_dense(&self) -> bool {
        !matches!(self, Targets::Sparse { mix: None, teacher: None, .. })
    }

    /// The frozen teacher, if it has a share.
    pub fn teacher(&self) -> Option<&Teacher<'a>> {
        match self {
            Targets::Sparse { teacher, .. } => teacher.as_ref(),
            Targets::Same { .. } => None,
        }
    }

    /// Columns with row `i`'s label, itself left out.
    fn positives(&self, i: usize) -> u32 {
        match self {
            Targets::Sparse { .. } => 0,
            Targets::Same { row_label, column_label, first_self, count, .. } => {
                let label = row_label[i];
                let own = u32::from(label >= 0 && column_label[first_self + i] == label);
                count.get(&label).map_or(0, |n| n - own)
            }
        }
    }

    /// Rows without any target are skipped.
    pub fn has_target(&self, i: usize) -> bool {
        match self {
            Targets::Sparse { entries, column, .. } => {
                column[i * entries..(i + 1) * entries].iter().any(|c| *c >= 0)
            }
            Targets::Same { .. } => self.positives(i) > 0,
        }
    }

    /// The (column, mass) entries of row `i`, before the shares.
    pub fn entries(&self, i: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let (columns, mass) = match self {
            Targets::Sparse { entries, column, mass, .. } => {
                let range = i * entries..(i + 1) * entries;
                (&column[range.clone()], mass.map(|m| &m[range]))
            }
            Targets::Same { .. } => (&[][..], None),
        };
        let entry =
            move |(m, c): (usize, &i32)| (*c >= 0).then(|| (*c as usize, mass.map_or(1.0, |mass| mass[m])));
        columns.iter().enumerate().filter_map(entry)
    }

    /// The label column of row `i`, where the margin sits.
    pub fn label(&self, i: usize) -> Option<usize> {
        match self {
            Targets::Sparse { entries, column, .. } => {
                column[i * entries..(i + 1) * entries].first().filter(|c| **c >= 0).map(|c| *c as usize)
            }
            Targets::Same { .. } => None,
        }
    }

    /// Raw dot products to logits: same-label biases in place of the others, own columns excluded. True when that was
    /// done here; sparse targets leave it to [`Kernels::finish`].
    pub fn finish(&self, t: Tile, place: Place, scale: &[f32], bias: &[f32]) -> bool {
        let Targets::Same { row_label, column_label, first_self, same_bias, .. } = self else { return false };
        for p in 0..t.columns {
            let same_bias = same_bias.map_or(bias[p], |b| b[place.first + p]).max(EXCLUDED);
            let (other_bias, label) = (bias[p].max(EXCLUDED), column_label[place.first + p]);
            for (lane, row) in place.rows.iter().enumerate() {
                // SAFETY: lane < rows and p < columns of the tile.
                let s = unsafe { &mut *t.s.add(p * t.rows + lane) };
                let i = *row as usize;
                *s = match () {
                    () if first_self + i == place.first + p => EXCLUDED,
                    () if row_label[i] == label => *s * scale[p] + same_bias,
                    () => *s * scale[p] + other_bias,
                };
            }
        }
        true
    }

    /// Fills the second tile with t (but for the teacher's share, which needs its own products).
    pub fn fill(&self, t: Tile, place: Place, columns: usize) {
        // SAFETY: the tile is columns × rows.
        let tile = unsafe { std::slice::from_raw_parts_mut(t.s, t.columns * t.rows) };
        tile.fill(0.0);
        for (lane, row) in place.rows.iter().enumerate() {
            let i = *row as usize;
            match self {
                Targets::Sparse { share, mix, .. } => {
                    for (k, mass) in self.entries(i) {
                        if let Some(p) = inside(k, place.first, t.columns) {
                            tile[p * t.rows + lane] += share * mass;
                        }
                        if let Some((matrix, epsilon)) = mix {
                            let overlap = &matrix[k * columns + place.first..][..t.columns];
                            for (p, a) in overlap.iter().enumerate() {
                                tile[p * t.rows + lane] += epsilon * mass * a;
                            }
                        }
                    }
                }
                Targets::Same { row_label, column_label, first_self, .. } => {
                    let share = 1.0 / self.positives(i) as f32;
                    for p in 0..t.columns {
                        if column_label[place.first + p] == row_label[i] && place.first + p != first_self + i
                        {
                            tile[p * t.rows + lane] = share;
                        }
                    }
                }
            }
        }
    }

    /// What the target's logit is without: nothing, or its bias.
    pub fn offset(&self, bias_in_target: bool, first: usize, bias: &[f32], offset: &mut [f32]) {
        match self {
            _ if bias_in_target => offset.fill(0.0),
            Targets::Same { same_bias: Some(b), .. } => {
                let n = bias.len();
                offset[..n].copy_from_slice(&b[first..first + n]);
            }
            _ => offset[..bias.len()].copy_from_slice(bias),
        }
    }
}

/// `k - first` if it lies below `columns`.
pub(super) fn inside(k: usize, first: usize, columns: usize) -> Option<usize> {
    k.checked_sub(first).filter(|p| *p < columns)
}

/// scale · x + bias with the very rounding of the kernels' `finish`, so that a lone column's loss is exactly 0.
pub(super) fn logit(kernels: &Kernels, x: f32, scale: f32, bias: f32) -> f32 {
    let s = if kernels.fused { x.mul_add(scale, bias) } else { x * scale + bias };
    if s < EXCLUDED { EXCLUDED } else { s }
}
