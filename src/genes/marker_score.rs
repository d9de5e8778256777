//! Marker scores straight from rank tokens: u_ik = Σ_g a_kg · max(0, 1 − r_i(g)/R), R = min(L_i, 512).

use super::markers::MarkerSets;
use crate::corpus::Corpus;
use crate::error::{Error, Result};

/// Raw scores u (cells, P) of `cells`, row-major.
pub fn marker_scores(corpus: &Corpus, cells: &[u32], markers: &MarkerSets) -> Result<Vec<f32>> {
    let _ = (corpus, cells, markers);
    Err(Error::bug("marker scores are not written yet"))
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
        let _ = scores;
        Standardiser { mean: vec![0.0; types], std: vec![1.0; types] }
    }
    /// Standardises scores (cells, P) in place.
    pub fn apply(&self, scores: &mut [f32]) {
        let _ = scores;
    }
}
