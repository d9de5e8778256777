//! Targets of the training cells: labels where there are any, marker scores elsewhere, both in one run.
//!
//! ```text
//! labelled cell      t = e_y
//! unlabelled cell    t = softmax_k(u_k / τ_u), kept where max t ≥ confidence      u: standardised marker scores
//! overlap            A_yk ∝ exp(J_yk / τ_J) for k ≠ y, A_yy = 0                   J: weighted Jaccard of marker sets
//! ```
//! A soft target is stored as its few largest entries, rescaled to sum 1; entry 0 is its most likely type.

use super::ObjectiveConfig;
use crate::error::{Code, Error, Result};

/// Targets of all training cells, in the teacher's table order.
#[derive(Debug, Clone, PartialEq)]
pub struct CellTargets {
    types: usize,
    entries: usize,
    column: Vec<i32>,
    mass: Vec<f32>,
    class: Vec<i32>,
    guess: Vec<i32>,
    labelled: usize,
}

impl CellTargets {
    /// From labels (N; -1 = missing) and, where some are missing, standardised marker scores (N, P). Without scores,
    /// unlabelled cells take no part in the class terms.
    ///
    /// # Errors
    /// A label at or above `types`, scores of another size, or no cell that takes part.
    pub fn new(
        labels: &[i32],
        scores: Option<&[f32]>,
        types: usize,
        config: &ObjectiveConfig,
    ) -> Result<Self> {
        let cells = labels.len();
        if let Some(bad) = labels.iter().position(|l| *l >= types as i32) {
            return Err(Error::bug("a label without a prototype")
                .at(format!("training cell {bad}"))
                .found(labels[bad])
                .wanted(format!("below {types}")));
        }
        if scores.is_some_and(|s| s.len() != cells * types) {
            return Err(Error::bug("marker scores of another size")
                .found(scores.map_or(0, <[f32]>::len))
                .wanted(format!("{cells} cells × {types} types")));
        }
        let labelled = labels.iter().filter(|l| **l >= 0).count();
        let soft = scores.filter(|_| labelled < cells);
        let entries = if soft.is_some() { config.target_entries.min(types) } else { 1 };
        let mut all = CellTargets {
            types,
            entries,
            column: vec![-1; cells * entries],
            mass: vec![0.0; cells * entries],
            class: labels.to_vec(),
            guess: labels.to_vec(),
            labelled,
        };
        for (i, label) in labels.iter().enumerate() {
            let at = i * entries;
            if *label >= 0 {
                all.column[at] = *label;
                all.mass[at] = 1.0;
            } else if let Some(scores) = soft {
                let ranked = ranked_softmax(&scores[i * types..(i + 1) * types], config.tau_marker);
                let (best, top) = ranked[0];
                all.guess[i] = best as i32;
                if top >= config.confidence {
                    all.class[i] = best as i32;
                    let kept: f32 = ranked[..entries].iter().map(|(_, p)| p).sum();
                    for (m, (k, p)) in ranked[..entries].iter().enumerate() {
                        all.column[at + m] = *k as i32;
                        all.mass[at + m] = p / kept;
                    }
                }
            }
        }
        if cells > 0 && all.kept() == 0 && (config.proto > 0.0 || config.cell_cell > 0.0) {
            return Err(Error::new(Code::NoLabelledCells, "no training cell takes part in the class terms")
                .found(format!("{labelled} labelled cells of {cells}, none with a confident marker score"))
                .wanted("labels, or marker sets that tell the cells apart")
                .next(
                    "give --label COL, lower objective.confidence, or look at `cellrefine markers check`",
                ));
        }
        Ok(all)
    }

    /// P.
    pub fn types(&self) -> usize {
        self.types
    }
    /// Entries per cell: 1 when all targets are labels.
    pub fn entries(&self) -> usize {
        self.entries
    }
    /// N.
    pub fn cells(&self) -> usize {
        self.class.len()
    }
    /// (entries) columns of one cell, -1 = none.
    pub fn columns(&self, cell: usize) -> &[i32] {
        &self.column[cell * self.entries..(cell + 1) * self.entries]
    }
    /// (entries) masses of one cell.
    pub fn masses(&self, cell: usize) -> &[f32] {
        &self.mass[cell * self.entries..(cell + 1) * self.entries]
    }
    /// (N) label, or confident most likely type, or -1: no part in the class terms.
    pub fn class(&self) -> &[i32] {
        &self.class
    }
    /// (N) label, or most likely type however unlikely, or -1 without scores: what balances the cell–cell term.
    pub fn guess(&self) -> &[i32] {
        &self.guess
    }
    /// Cells with a label.
    pub fn labelled(&self) -> usize {
        self.labelled
    }
    /// Cells that take part in the class terms.
    pub fn kept(&self) -> usize {
        self.class.iter().filter(|c| **c >= 0).count()
    }
    /// n_c (P): cells per class, pseudo-labels included.
    pub fn counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.types];
        self.class.iter().filter(|c| **c >= 0).for_each(|c| counts[*c as usize] += 1);
        counts
    }
}

/// (type, probability), most likely first, ties by type.
fn ranked_softmax(scores: &[f32], tau: f32) -> Vec<(usize, f32)> {
    let top = scores.iter().cloned().fold(f32::MIN, f32::max);
    let e: Vec<f64> = scores.iter().map(|u| (((u - top) / tau) as f64).exp()).collect();
    let sum: f64 = e.iter().sum();
    let mut ranked: Vec<(usize, f32)> = e.iter().map(|e| (e / sum) as f32).enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked
}

/// The overlap matrix A (P, P) from the weighted Jaccard indices J (P, P); rows sum to 1. None for a lone type, which
/// overlaps with nothing.
pub fn overlap(jaccard: &[f32], types: usize, tau: f32) -> Option<Vec<f32>> {
    if types < 2 {
        return None;
    }
    let mut a = vec![0.0f32; types * types];
    for (y, (row, j)) in a.chunks_exact_mut(types).zip(jaccard.chunks_exact(types)).enumerate() {
        let others = || (0..types).filter(|k| *k != y);
        let top = others().map(|k| j[k]).fold(f32::MIN, f32::max);
        let e = |k: usize| (((j[k] - top) / tau) as f64).exp();
        let sum: f64 = others().map(e).sum();
        others().for_each(|k| row[k] = (e(k) / sum) as f32);
    }
    Some(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_scores_in_one_run() {
        let config = ObjectiveConfig { target_entries: 2, ..Default::default() };
        let scores = [0.0, 9.0, 0.0, /**/ 0.0, 0.1, 0.2, /**/ 4.0, 1.0, 3.0];
        let t = CellTargets::new(&[2, -1, -1], Some(&scores), 3, &config).unwrap();
        assert_eq!(t.class(), [2, -1, 0]);
        assert_eq!(t.guess(), [2, 2, 0]);
        assert_eq!(t.counts(), [1, 0, 1]);
        assert_eq!((t.columns(0), t.masses(0)), (&[2, -1][..], &[1.0, 0.0][..]));
        assert_eq!(t.columns(1), [-1, -1]);
        assert_eq!(t.columns(2), [0, 2]);
        let e = (-1.0f32).exp();
        assert!(
            (t.masses(2)[0] - 1.0 / (1.0 + e)).abs() < 1e-6
                && (t.masses(2).iter().sum::<f32>() - 1.0).abs() < 1e-6
        );
        assert_eq!((t.labelled(), t.kept(), t.entries()), (1, 2, 2));
    }

    #[test]
    fn labels_alone_need_one_entry_and_nothing_to_learn_from_is_an_error() {
        let config = ObjectiveConfig::default();
        let t = CellTargets::new(&[0, 1, -1], None, 2, &config).unwrap();
        assert_eq!((t.entries(), t.kept()), (1, 2));
        let e = CellTargets::new(&[-1, -1], Some(&[0.0; 8]), 4, &config).unwrap_err();
        assert_eq!(e.kind().exit_code(), 3);
        assert!(CellTargets::new(&[3], None, 2, &config).is_err());
        assert!(CellTargets::new(&[0], Some(&[0.0; 3]), 2, &config).is_err());
    }

    #[test]
    fn overlap_rows_sum_to_one_without_the_diagonal() {
        let j = [1.0, 0.3, 0.0, 0.3, 1.0, 0.1, 0.0, 0.1, 1.0];
        let a = overlap(&j, 3, 0.1).unwrap();
        for (y, row) in a.chunks(3).enumerate() {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6 && row[y] == 0.0);
        }
        assert!((a[1] / a[2] - (3.0f32).exp()).abs() < 1e-3);
        assert!(overlap(&[1.0], 1, 0.1).is_none());
    }
}
