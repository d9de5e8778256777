//! Marker scores straight from rank tokens, without a model.
//!
//! ```text
//! u_ik = Σ_{g ∈ M_k} a_kg · max(0, 1 − r_i(g)/R),   R = min(L_i, 512)
//! ```
//! r_i(g) is the rank of gene g in cell i, from 0. A score compares cells for one type; to compare types in one cell, each is
//! standardised over the cells it was fitted on. Each cell is scored alone, so the bits do not depend on threads.

use super::markers::MarkerSets;
use crate::corpus::Corpus;
use crate::error::Result;
use rayon::prelude::*;

/// Ranks beyond this count nothing.
pub const RANK_DEPTH: usize = 512;

/// The sets turned round: for each token, the types that it marks.
#[derive(Debug, Clone)]
pub struct MarkerIndex {
    types: usize,
    /// Where each token's entries begin (V+1).
    start: Vec<u32>,
    /// (type, weight) by token.
    entry: Vec<(u32, f32)>,
}

impl MarkerIndex {
    /// Indexes `markers` over a vocabulary of `vocab` ids.
    pub fn new(markers: &MarkerSets, vocab: usize) -> Self {
        let mut flat: Vec<(u32, u32, f32)> = (markers.sets.iter().enumerate())
            .flat_map(|(k, set)| set.iter().map(move |&(token, weight)| (token, k as u32, weight)))
            .collect();
        flat.sort_by_key(|&(token, k, _)| (token, k));
        let mut start = vec![0u32; vocab + 1];
        for &(token, ..) in &flat {
            start[token as usize + 1] += 1;
        }
        for v in 0..vocab {
            start[v + 1] += start[v];
        }
        MarkerIndex { types: markers.len(), start, entry: flat.into_iter().map(|(_, k, w)| (k, w)).collect() }
    }

    /// Scores one cell, genes by rank, into `score` (P).
    pub fn score(&self, genes: impl ExactSizeIterator<Item = u32>, score: &mut [f32]) {
        score.fill(0.0);
        let depth = genes.len().min(RANK_DEPTH);
        for (rank, gene) in genes.take(depth).enumerate() {
            let [from, to] = [0, 1].map(|o| self.start[gene as usize + o] as usize);
            if from < to {
                let evidence = 1.0 - rank as f32 / depth as f32;
                for &(k, weight) in &self.entry[from..to] {
                    score[k as usize] += weight * evidence;
                }
            }
        }
    }
}

/// Raw scores u (cells, P) of `cells`, row-major.
pub fn marker_scores(corpus: &Corpus, cells: &[u32], markers: &MarkerSets) -> Result<Vec<f32>> {
    let index = MarkerIndex::new(markers, corpus.manifest().vocabulary.len);
    let types = index.types;
    let mut scores = vec![0.0; cells.len() * types];
    if types == 0 {
        return Ok(scores);
    }
    scores.par_chunks_mut(types).with_min_len(256).zip(cells.par_iter().with_min_len(256)).try_for_each(
        |(row, &cell)| {
            let genes = corpus.genes(cell as usize)?;
            index.score((0..genes.len()).map(|r| genes.get(r)), row);
            Ok(())
        },
    )?;
    Ok(scores)
}

/// Mean and standard deviation per type over the cells that it was fitted on; applies (u − mean) / (std + 1e-6).
#[derive(Debug, Clone, PartialEq)]
pub struct Standardiser {
    /// Per type (P).
    pub mean: Vec<f32>,
    /// Per type (P), population form.
    pub std: Vec<f32>,
}

impl Standardiser {
    /// Fits on raw scores (cells, P).
    pub fn fit(scores: &[f32], types: usize) -> Self {
        let cells = scores.len().checked_div(types).unwrap_or(0).max(1) as f64;
        let mut mean = vec![0.0f64; types];
        for row in scores.chunks_exact(types.max(1)) {
            mean.iter_mut().zip(row).for_each(|(m, &u)| *m += u as f64);
        }
        mean.iter_mut().for_each(|m| *m /= cells);
        let mut variance = vec![0.0f64; types];
        for row in scores.chunks_exact(types.max(1)) {
            for k in 0..types {
                variance[k] += (row[k] as f64 - mean[k]).powi(2);
            }
        }
        Standardiser {
            mean: mean.iter().map(|&m| m as f32).collect(),
            std: variance.iter().map(|v| (v / cells).sqrt() as f32).collect(),
        }
    }

    /// Standardises scores (cells, P) in place.
    pub fn apply(&self, scores: &mut [f32]) {
        for row in scores.chunks_exact_mut(self.mean.len().max(1)) {
            for (u, (mean, std)) in row.iter_mut().zip(self.mean.iter().zip(&self.std)) {
                *u = (*u - mean) / (std + 1e-6);
            }
        }
    }
}
