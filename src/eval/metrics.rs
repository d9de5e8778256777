//! Classification scores with scikit-learn's semantics.
//!
//! For class c with true positives TP, false positives FP and false negatives FN:
//!
//! ```text
//! F1_c = 2 TP / (2 TP + FP + FN)         macro-F1 = mean of F1_c over the classes present in truth ∪ predictions
//! ```
//!
//! A class that is never true but predicted once counts (with F1 0), a class that is in neither does not. Head, medium
//! and tail scores are the same mean over the classes whose share of the *training* cells lies in a range, so they say
//! how rare classes fare whatever the test set holds of them.

use super::rows::same_length;
use crate::error::{Code, Error, Result};
use serde::Serialize;

/// Scores of one class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassScore {
    /// Index of the class.
    pub class: usize,
    /// TP / (TP + FP); 0 where nothing was predicted as this class.
    pub precision: f64,
    /// TP / (TP + FN); 0 where no cell is of this class.
    pub recall: f64,
    /// 2 TP / (2 TP + FP + FN).
    pub f1: f64,
    /// Cells of this class in the truth.
    pub support: usize,
}

/// What a list of predictions is worth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Classification {
    /// Share of cells predicted right.
    pub accuracy: f64,
    /// Mean F1 over the classes present in truth or predictions.
    pub macro_f1: f64,
    /// Classes present in truth or predictions, ascending.
    pub per_class: Vec<ClassScore>,
    /// Cells scored.
    pub cells: usize,
}

/// Counts (K, K): row = true class, column = predicted class.
pub fn confusion(truth: &[usize], predicted: &[usize], classes: usize) -> Result<Vec<u64>> {
    same_length("confusion matrix", truth.len(), predicted.len())?;
    let mut counts = vec![0u64; classes * classes];
    for (&t, &p) in truth.iter().zip(predicted) {
        if t >= classes || p >= classes {
            return Err(Error::bug("a class index lies beyond the number of classes")
                .found(t.max(p))
                .wanted(classes));
        }
        counts[t * classes + p] += 1;
    }
    Ok(counts)
}

/// Accuracy, per-class F1 and macro-F1 of `predicted` against `truth` (class indices below `classes`).
/// Fails on an empty list: a mean of nothing is not a score.
pub fn classification(truth: &[usize], predicted: &[usize], classes: usize) -> Result<Classification> {
    let counts = confusion(truth, predicted, classes)?;
    if truth.is_empty() {
        return Err(Error::new(Code::NoLabelledCells, "there are no labelled cells to score")
            .next("check --label and the split"));
    }
    let mut per_class = Vec::new();
    let mut right = 0;
    for class in 0..classes {
        let hit = counts[class * classes + class];
        let support: u64 = counts[class * classes..(class + 1) * classes].iter().sum();
        let called: u64 = (0..classes).map(|t| counts[t * classes + class]).sum();
        right += hit;
        if support + called == 0 {
            continue;
        }
        let ratio = |n: u64, d: u64| if d == 0 { 0.0 } else { n as f64 / d as f64 };
        per_class.push(ClassScore {
            class,
            precision: ratio(hit, called),
            recall: ratio(hit, support),
            f1: ratio(2 * hit, support + called),
            support: support as usize,
        });
    }
    let macro_f1 = per_class.iter().map(|c| c.f1).sum::<f64>() / per_class.len() as f64;
    Ok(Classification {
        accuracy: right as f64 / truth.len() as f64,
        macro_f1,
        per_class,
        cells: truth.len(),
    })
}

/// Where head ends and tail begins, as shares of the labelled training cells.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ShareThresholds {
    /// Classes with at least this share are head.
    pub head: f64,
    /// Classes below this share are tail.
    pub tail: f64,
}

impl Default for ShareThresholds {
    fn default() -> Self {
        ShareThresholds { head: 0.10, tail: 0.02 }
    }
}

/// Macro-F1 by frequency in training; `None` where a group has no class in truth or predictions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupF1 {
    /// Mean F1 of classes with share ≥ `thresholds.head`.
    pub head: Option<f64>,
    /// Mean F1 of the classes between.
    pub medium: Option<f64>,
    /// Mean F1 of classes with share < `thresholds.tail`.
    pub tail: Option<f64>,
    /// The thresholds used; printed with the result.
    pub thresholds: ShareThresholds,
}

/// Splits the per-class F1 of `scores` by `train_counts` (K), the labelled training cells of each class.
pub fn group_f1(scores: &Classification, train_counts: &[usize], thresholds: ShareThresholds) -> GroupF1 {
    let total = train_counts.iter().sum::<usize>().max(1) as f64;
    let mut sums = [(0f64, 0usize); 3];
    for c in &scores.per_class {
        let share = train_counts.get(c.class).copied().unwrap_or(0) as f64 / total;
        let group = if share >= thresholds.head {
            0
        } else if share >= thresholds.tail {
            1
        } else {
            2
        };
        sums[group].0 += c.f1;
        sums[group].1 += 1;
    }
    let mean = |(sum, n): (f64, usize)| (n > 0).then(|| sum / n as f64);
    GroupF1 { head: mean(sums[0]), medium: mean(sums[1]), tail: mean(sums[2]), thresholds }
}

/// recall@k for several k.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecallAt {
    /// The values of k.
    pub k: Vec<usize>,
    /// Share of cells whose true class is among the k best, per k.
    pub micro: Vec<f64>,
    /// Mean over classes of that share, per k.
    #[serde(rename = "macro")]
    pub macro_: Vec<f64>,
    /// Cells scored: those whose true class has a column.
    pub cells: usize,
}

/// recall@k of `scores` (C, P), higher = better. `truth[i]` is the column of cell i's true class, `None` where it has
/// none: such a cell cannot be found and is left out of the score, which `cells` shows. Equal scores rank by column.
/// `None` when no cell can be scored.
pub fn recall_at(
    scores: &[f32],
    columns: usize,
    truth: &[Option<usize>],
    ks: &[usize],
) -> Result<Option<RecallAt>> {
    same_length("recall@k", scores.len().checked_div(columns).unwrap_or(0), truth.len())?;
    let mut found = vec![vec![0u64; ks.len()]; columns];
    let mut support = vec![0u64; columns];
    for (row, t) in scores.chunks_exact(columns.max(1)).zip(truth) {
        let Some(t) = *t else { continue };
        if t >= columns {
            return Err(Error::bug("a class index lies beyond the number of columns")
                .found(t)
                .wanted(columns));
        }
        let ahead = row.iter().enumerate().filter(|&(j, &s)| s > row[t] || (s == row[t] && j < t)).count();
        support[t] += 1;
        found[t].iter_mut().zip(ks).for_each(|(f, &k)| *f += u64::from(ahead < k));
    }
    let cells: u64 = support.iter().sum();
    if cells == 0 {
        return Ok(None);
    }
    let present: Vec<usize> = (0..columns).filter(|&c| support[c] > 0).collect();
    let micro =
        (0..ks.len()).map(|i| present.iter().map(|&c| found[c][i]).sum::<u64>() as f64 / cells as f64);
    let mean = |i: usize| present.iter().map(|&c| found[c][i] as f64 / support[c] as f64).sum::<f64>();
    let macro_ = (0..ks.len()).map(|i| mean(i) / present.len() as f64);
    Ok(Some(RecallAt {
        k: ks.to_vec(),
        micro: micro.collect(),
        macro_: macro_.collect(),
        cells: cells as usize,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_predicted_but_never_true_counts_and_an_absent_one_does_not() {
        // Class 3 is in neither list; class 2 is predicted once and never true.
        let s = classification(&[0, 0, 1, 1], &[0, 2, 1, 1], 4).unwrap();
        assert_eq!(s.per_class.iter().map(|c| c.class).collect::<Vec<_>>(), [0, 1, 2]);
        let f1 = [2.0 / 3.0, 1.0, 0.0];
        assert!(s.per_class.iter().zip(f1).all(|(c, f)| (c.f1 - f).abs() < 1e-15));
        assert!((s.macro_f1 - 5.0 / 9.0).abs() < 1e-15 && s.accuracy == 0.75);
    }

    #[test]
    fn groups_follow_the_training_share_and_absent_groups_are_none() {
        let s = classification(&[0, 1, 1], &[0, 1, 0], 3).unwrap();
        let g = group_f1(&s, &[95, 4, 1], ShareThresholds::default());
        assert_eq!((g.head, g.tail), (Some(s.per_class[0].f1), None));
        assert_eq!(g.medium, Some(s.per_class[1].f1));
        // A class that training never saw is tail.
        let s = classification(&[2], &[2], 3).unwrap();
        assert_eq!(group_f1(&s, &[5, 5, 0], ShareThresholds::default()).tail, Some(1.0));
    }

    #[test]
    fn recall_counts_ties_by_column_and_leaves_out_cells_without_a_column() {
        let scores = [0.5, 0.5, 0.1, /**/ 0.9, 0.2, 0.3, /**/ 0.0, 0.0, 0.0];
        let r = recall_at(&scores, 3, &[Some(1), Some(2), None], &[1, 2, 10]).unwrap().unwrap();
        assert_eq!(
            (r.cells, r.micro.clone(), r.macro_.clone()),
            (2, vec![0.0, 1.0, 1.0], vec![0.0, 1.0, 1.0])
        );
        assert_eq!(recall_at(&scores, 3, &[None; 3], &[1]).unwrap(), None);
    }

    #[test]
    fn unequal_lengths_and_empty_lists_are_errors() {
        assert!(classification(&[0], &[0, 1], 2).is_err());
        assert_eq!(classification(&[], &[], 2).unwrap_err().kind().exit_code(), 3);
        assert!(classification(&[2], &[0], 2).is_err());
    }
}
