//! Marker-gene sets as tokens with weights.

use crate::error::{Error, Result};

/// One set per type k: a_kg ≥ 0, Σ_g a_kg = 1. Genes by falling weight, equal weights by token.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MarkerSets {
    /// Name of the type (the class name where sets were met with labels).
    pub names: Vec<String>,
    /// (token, weight) per set; empty for a class that was allowed to have no set.
    pub sets: Vec<Vec<(u32, f32)>>,
}

impl MarkerSets {
    /// Number of sets P.
    pub fn len(&self) -> usize {
        self.names.len()
    }
    /// No sets?
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
    /// Weighted Jaccard J_kl = Σ_g min(a_kg, a_lg) / Σ_g max(a_kg, a_lg), row-major (P, P); 1 on the diagonal.
    pub fn jaccard(&self) -> Vec<f32> {
        Vec::new()
    }
}

/// Marker sets of a file before weights: see `markers_file`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawSets {}

impl RawSets {
    /// Sets for `classes` in their order, weighted by specificity over these sets alone. `map` is (label, set name).
    pub fn for_labels(
        &self,
        classes: &[String],
        map: Option<&[(String, String)]>,
        allow_unmatched: bool,
    ) -> Result<MarkerSets> {
        let _ = (classes, map, allow_unmatched);
        Err(Error::bug("marker sets are not written yet"))
    }
    /// All usable sets, weighted by specificity over all of them.
    pub fn all(&self) -> Result<MarkerSets> {
        Err(Error::bug("marker sets are not written yet"))
    }
}
