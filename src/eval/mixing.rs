//! How well batches mix within cell types: batch-ASW and iLISI, as scib and Harmony define them.
//!
//! ```text
//! batch-ASW = mean over types of  mean over cells i of the type of  1 − |s_batch(i)|
//! LISI(i)   = 1 / Σ_b p_b(i)²     p_b(i): share of batch b among i's neighbours, weighted exp(−β_i d_ij), with β_i such that
//!                                 the weights have the given perplexity (30, over 89 neighbours)
//! iLISI     = (median LISI − 1) / (B − 1)
//! ```
//!
//! s_batch is the euclidean silhouette of the batch labels within one cell type (scib's `silhouette_batch`): 1 = mixed,
//! 0 = apart. LISI (Korsunsky et al. 2019) reads as an effective number of batches around a cell, 1 to B; the scaled iLISI
//! is 0 to 1. Both reward mixing alone: read them beside the type scores, which an embedding that mixes everything loses.

use super::knn::nearest;
use super::rows::{Rows, same_length};
use super::silhouette::{Metric, compact, silhouette_samples};
use crate::error::Result;
use rayon::prelude::*;
use serde::Serialize;

/// Mixing scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mixing {
    /// Distinct batches.
    pub batches: usize,
    /// Batch-ASW in [0, 1], 1 = mixed; `None` where no type spans two batches.
    pub batch_asw: Option<f64>,
    /// Median LISI scaled to [0, 1]; `None` for one batch, or cells too few for a neighbourhood.
    pub ilisi: Option<f64>,
    /// Median LISI, in effective batches.
    pub lisi_median: Option<f64>,
}

/// Perplexity of LISI's neighbourhoods, Harmony's default; with the cell itself they hold three
/// times as many.
pub const PERPLEXITY: usize = 30;

/// Mixing of `batches` over `rows`, types given by `labels`.
pub fn mixing(rows: Rows, labels: &[usize], batches: &[usize]) -> Result<Mixing> {
    let (batches, counts) = compact(batches);
    let median = if counts.len() > 1 { median(lisi(rows, &batches, PERPLEXITY)?) } else { None };
    Ok(Mixing {
        batches: counts.len(),
        batch_asw: batch_asw(rows, labels, &batches)?,
        ilisi: median.map(|m| (m - 1.0) / (counts.len() - 1) as f64),
        lisi_median: median,
    })
}

/// Batch-ASW; types within one batch, or with every cell in a batch of its own, say nothing and are left out.
pub fn batch_asw(rows: Rows, labels: &[usize], batches: &[usize]) -> Result<Option<f64>> {
    same_length("batch mixing", rows.count(), labels.len())?;
    same_length("batch mixing", rows.count(), batches.len())?;
    let (labels, counts) = compact(labels);
    let mut scores = Vec::new();
    for class in 0..counts.len() {
        let cells: Vec<usize> = (0..labels.len()).filter(|&i| labels[i] == class).collect();
        let values = rows.select(&cells);
        let within: Vec<usize> = cells.iter().map(|&i| batches[i]).collect();
        if let Some(s) = silhouette_samples(Rows::new(&values, rows.width())?, &within, Metric::Euclidean)? {
            scores.push(s.iter().map(|s| 1.0 - s.abs()).sum::<f64>() / s.len() as f64);
        }
    }
    Ok((!scores.is_empty()).then(|| scores.iter().sum::<f64>() / scores.len() as f64))
}

/// LISI of every cell, (C): effective number of `batches` (numbered 0..) among its neighbours, itself left out. With fewer
/// than `3 · perplexity` cells the neighbourhood and the perplexity shrink together. Empty for fewer than 2 cells.
pub fn lisi(rows: Rows, batches: &[usize], perplexity: usize) -> Result<Vec<f64>> {
    same_length("LISI", rows.count(), batches.len())?;
    let kinds = batches.iter().max().map_or(0, |m| m + 1);
    let near = nearest(rows, rows, 3 * perplexity - 1, true)?;
    if near.k == 0 {
        return Ok(Vec::new());
    }
    let target = ((near.k + 1) as f64 / 3.0).max(1.0).ln();
    let cells = near.index.par_chunks_exact(near.k).zip(near.square_distance.par_chunks_exact(near.k));
    Ok(cells
        .map(|(index, square_distance)| {
            let weights = perplexity_weights(square_distance, target);
            let mut share = vec![0f64; kinds];
            index.iter().zip(&weights).for_each(|(&j, w)| share[batches[j as usize]] += w);
            1.0 / share.iter().map(|p| p * p).sum::<f64>()
        })
        .collect())
}

/// Weights ∝ exp(−β d) of euclidean distances d, summing to 1, with β found by bisection so that their entropy is
/// `target`: the search of t-SNE and of Harmony's LISI, which both use distances as they come.
fn perplexity_weights(square_distance: &[f64], target: f64) -> Vec<f64> {
    let distance: Vec<f64> = square_distance.iter().map(|d| d.sqrt()).collect();
    let nearest = distance[0];
    let (mut beta, mut low, mut high) = (1f64, 0f64, f64::INFINITY);
    let mut weights = vec![0f64; distance.len()];
    for _ in 0..50 {
        // Relative to the nearest: the common factor cancels and nothing underflows to a sum of zero.
        weights.iter_mut().zip(&distance).for_each(|(w, d)| *w = (-beta * (d - nearest)).exp());
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        let entropy = -weights.iter().filter(|w| **w > 0.0).map(|w| w * w.ln()).sum::<f64>();
        if (entropy - target).abs() < 1e-5 {
            break;
        }
        if entropy > target {
            low = beta;
            beta = if high.is_finite() { 0.5 * (beta + high) } else { beta * 2.0 };
        } else {
            high = beta;
            beta = 0.5 * (beta + low);
        }
    }
    weights
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let n = values.len();
    (n > 0).then(|| 0.5 * (values[(n - 1) / 2] + values[n / 2]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Philox, site};

    #[test]
    fn mixed_batches_score_high_and_separate_ones_low() {
        let mut rng = Philox::new(8, 0, site::EVAL);
        let n = 240;
        let labels: Vec<usize> = (0..n).map(|i| i % 2).collect();
        let batches: Vec<usize> = (0..n).map(|i| (i / 2) % 2).collect();
        let mut table = |shift: f32| -> Vec<f32> {
            (0..n)
                .flat_map(|i| [rng.normal() as f32 + 20.0 * labels[i] as f32, shift * batches[i] as f32])
                .collect()
        };
        let (mixed, apart) = (table(0.0), table(50.0));
        let mixed = mixing(Rows::new(&mixed, 2).unwrap(), &labels, &batches).unwrap();
        let apart = mixing(Rows::new(&apart, 2).unwrap(), &labels, &batches).unwrap();
        assert!(mixed.batch_asw.unwrap() > 0.9 && apart.batch_asw.unwrap() < 0.1, "{mixed:?} {apart:?}");
        assert!(mixed.ilisi.unwrap() > 0.8 && apart.ilisi.unwrap() < 0.3, "{mixed:?} {apart:?}");
    }

    #[test]
    fn one_batch_one_cell_and_equal_cells() {
        let values = vec![0.5f32; 8];
        let rows = Rows::new(&values, 2).unwrap();
        let one = mixing(rows, &[0; 4], &[3; 4]).unwrap();
        assert_eq!((one.batches, one.batch_asw, one.ilisi), (1, None, None));
        let single = mixing(Rows::new(&values[..2], 2).unwrap(), &[0], &[0]).unwrap();
        assert_eq!((single.batch_asw, single.ilisi), (None, None));
        // Equal cells: every neighbour weighs the same; cell 0 sees one cell of its batch and two of the other.
        let equal = lisi(rows, &[0, 0, 1, 1], 30).unwrap();
        assert!(equal.iter().all(|l| (l - 1.8).abs() < 1e-12), "{equal:?}");
    }

    #[test]
    fn weights_reach_the_perplexity_asked_for() {
        let squares: Vec<f64> = (1..=90).map(|i| (i as f64 * 0.1).powi(2)).collect();
        let w = perplexity_weights(&squares, 30f64.ln());
        let entropy = -w.iter().map(|w| w * w.ln()).sum::<f64>();
        assert!((entropy - 30f64.ln()).abs() < 1e-5 && (w.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
