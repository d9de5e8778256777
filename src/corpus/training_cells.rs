//! What may be learned from: training cells and the labels that may be used.

use std::borrow::Cow;

/// A view of training cells and their labels. Only [`Split::training`](super::splits::Split::training) makes one, so that what is fitted cannot see others.
#[derive(Debug, Clone)]
pub struct TrainingCells<'a> {
    pub(super) cells: Cow<'a, [u32]>,
    pub(super) labels: Vec<i32>,
    pub(super) classes: &'a [String],
}

impl<'a> TrainingCells<'a> {
    /// The cells, ascending.
    pub fn cells(&self) -> &[u32] {
        &self.cells
    }
    /// Class per cell, parallel to [`cells`](Self::cells); −1 = no label. Empty without a label column.
    pub fn labels(&self) -> &[i32] {
        &self.labels
    }
    /// Class names.
    pub fn classes(&self) -> &'a [String] {
        self.classes
    }
    /// Labelled cells per class.
    pub fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.classes.len()];
        for &label in &self.labels {
            if label >= 0 {
                counts[label as usize] += 1;
            }
        }
        counts
    }
    /// Only the cells that have a label: what supervised training draws from.
    pub fn labelled(&self) -> TrainingCells<'a> {
        let keep = |i: &usize| self.labels.get(*i).is_some_and(|&l| l >= 0);
        let chosen: Vec<usize> = (0..self.cells.len()).filter(keep).collect();
        TrainingCells {
            cells: chosen.iter().map(|&i| self.cells[i]).collect(),
            labels: chosen.iter().map(|&i| self.labels[i]).collect(),
            classes: self.classes,
        }
    }
}
