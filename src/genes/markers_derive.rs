//! Marker sets from the training cells, one class versus the rest, out of the corpus alone.
//!
//! ```text
//! x_ig    value of gene g in cell i, 0 where the cell lacks it:
//!           the stored ln(1 + 10⁴·count/total), or, without stored values, 1 − r_i(g)/L_i (rank r of L tokens)
//! t_kg  = (μ_kg − μ_rest,g) / √((σ²_kg + a)/n_k + (σ²_rest,g + b)/n_rest)      Welch, with a floor under the variances
//! s_kg  = t_kg · μ_kg / Σ_j μ_jg      where g is in ≥ 25 % of the class and μ_kg > μ_rest,g; otherwise 0
//! ```
//! The best `top` genes by s make the set, with weights ∝ s: strong, steady and specific. Means over the rest weigh cells alike.
//! Ranks carry nearly the same evidence: on 8,000 blood and 8,569 pancreas cells the two ways share 84 and 83 % of their genes,
//! and the marker score's macro-F1 on test cells is .773 for .798 and .724 for .723.
//! Cells are summed in fixed blocks per class, blocks combined in order, so that the bits do not depend on threads.

use super::markers::MarkerSets;
use crate::corpus::{Corpus, Genes, TrainingCells};
use crate::error::{Code, Error, Result};
use rayon::prelude::*;

/// Cells summed by one task.
const BLOCK_CELLS: usize = 4096;
/// Blocks in flight: bounds memory at this many dense vectors over the vocabulary.
const BLOCKS_AT_ONCE: usize = 32;
/// A marker is present in at least this share of its class.
const MIN_PRESENT: f64 = 0.25;
/// Floors (a, b) under the variance within the class and in the rest: on the scale of log-normalised expression, and of
/// relative ranks.
const FLOOR_VALUES: (f64, f64) = (0.1, 0.01);
const FLOOR_RANKS: (f64, f64) = (0.01, 0.001);

/// Sums over the cells of one class.
#[derive(Clone)]
struct Sums {
    /// Σ x, Σ x², cells that hold the gene; each (V).
    x: Vec<f64>,
    xx: Vec<f64>,
    present: Vec<u32>,
}

impl Sums {
    fn zero(vocab: usize) -> Self {
        Sums { x: vec![0.0; vocab], xx: vec![0.0; vocab], present: vec![0; vocab] }
    }

    fn over(corpus: &Corpus, cells: &[u32]) -> Result<Self> {
        let mut sums = Sums::zero(corpus.manifest().vocabulary.len);
        for &cell in cells {
            let genes = corpus.genes(cell as usize)?;
            match corpus.values(cell as usize)? {
                Some(values) => sums.add(genes, values.iter().map(|v| v.to_f64())),
                None => {
                    let len = genes.len() as f64;
                    sums.add(genes, (0..genes.len()).map(|r| 1.0 - r as f64 / len));
                }
            }
        }
        Ok(sums)
    }

    fn add(&mut self, genes: Genes<'_>, x: impl Iterator<Item = f64>) {
        for (g, x) in genes.iter().zip(x) {
            let g = g as usize;
            self.x[g] += x;
            self.xx[g] += x * x;
            self.present[g] += 1;
        }
    }

    fn merge(&mut self, other: &Sums) {
        self.x.iter_mut().zip(&other.x).for_each(|(a, b)| *a += b);
        self.xx.iter_mut().zip(&other.xx).for_each(|(a, b)| *a += b);
        self.present.iter_mut().zip(&other.present).for_each(|(a, b)| *a += b);
    }
}

/// Derived sets: one per class, in class order; a class without training cells or without a marker has an empty set.
#[derive(Debug, Clone, PartialEq)]
pub struct Derived {
    /// The sets, named by class.
    pub markers: MarkerSets,
    /// Labelled training cells per class.
    pub cells: Vec<u64>,
    /// Were stored values used (or ranks)?
    pub from_values: bool,
}

/// Derives at most `top` markers per class from the labelled cells of `training`.
///
/// # Errors
/// Input: fewer than two classes with cells, no class with a marker, a damaged corpus.
pub fn derive(corpus: &Corpus, training: &TrainingCells<'_>, top: usize) -> Result<Derived> {
    let classes = training.classes().len();
    let cells = training.counts();
    if cells.iter().filter(|n| **n > 0).count() < 2 {
        return Err(Error::new(
            Code::MarkersNotDerived,
            "markers set one class against the rest: two classes are needed",
        )
        .at(corpus.path().display())
        .found(format!("{} classes with training cells", cells.iter().filter(|n| **n > 0).count()))
        .next("name another --label column, or change --split"));
    }
    let mut by_class = vec![Vec::new(); classes];
    for (&cell, &label) in training.cells().iter().zip(training.labels()) {
        if label >= 0 {
            by_class[label as usize].push(cell);
        }
    }
    let vocab = corpus.manifest().vocabulary.len;
    let mut sums = vec![Sums::zero(vocab); classes];
    let blocks: Vec<(usize, &[u32])> =
        by_class.iter().enumerate().flat_map(|(k, c)| c.chunks(BLOCK_CELLS).map(move |b| (k, b))).collect();
    for wave in blocks.chunks(BLOCKS_AT_ONCE) {
        let done: Vec<Result<Sums>> = wave.par_iter().map(|(_, block)| Sums::over(corpus, block)).collect();
        for ((k, _), block) in wave.iter().zip(done) {
            sums[*k].merge(&block?);
        }
    }
    let floor = if corpus.manifest().values { FLOOR_VALUES } else { FLOOR_RANKS };
    let mut all = Sums::zero(vocab);
    let mut means = vec![0.0; vocab];
    for (class, &n) in sums.iter().zip(&cells).filter(|(_, n)| **n > 0) {
        all.merge(class);
        means.iter_mut().zip(&class.x).for_each(|(m, x)| *m += x / n as f64);
    }
    let n_all = cells.iter().sum::<u64>() as f64;
    let sets: Vec<Vec<(u32, f32)>> = (sums.par_iter().zip(&cells))
        .map(|(class, &n)| best(class, n as f64, &all, n_all, &means, floor, top))
        .collect();
    if sets.iter().all(|s| s.is_empty()) {
        return Err(Error::new(
            Code::MarkersNotDerived,
            "no class has a marker: no gene is more frequent in one class than in the rest",
        )
        .at(corpus.path().display())
        .next("check that --label names cell types"));
    }
    let markers = MarkerSets::from_weights(training.classes().to_vec(), sets);
    Ok(Derived { markers, cells, from_values: corpus.manifest().values })
}

/// The `top` genes of a class of `n` cells, with their scores; `means` is Σ_j μ_jg over the classes (V).
fn best(
    class: &Sums,
    n: f64,
    all: &Sums,
    n_all: f64,
    means: &[f64],
    floor: (f64, f64),
    top: usize,
) -> Vec<(u32, f32)> {
    let n_rest = n_all - n;
    if n == 0.0 || n_rest == 0.0 {
        return Vec::new();
    }
    let mut scored = Vec::new();
    for (g, means_g) in means.iter().enumerate() {
        if (class.present[g] as f64) < MIN_PRESENT * n {
            continue;
        }
        let (mean, mean_rest) = (class.x[g] / n, (all.x[g] - class.x[g]) / n_rest);
        let variance = class.xx[g] / n - mean * mean;
        let variance_rest = (all.xx[g] - class.xx[g]) / n_rest - mean_rest * mean_rest;
        let t = (mean - mean_rest) / ((variance + floor.0) / n + (variance_rest + floor.1) / n_rest).sqrt();
        let score = t * mean / (means_g + 1e-6);
        if mean > mean_rest && score > 0.0 {
            scored.push((g as u32, score));
        }
    }
    scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    scored.truncate(top);
    scored.into_iter().map(|(g, s)| (g, s as f32)).collect()
}
