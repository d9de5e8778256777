//! The order of cells in training: seeded, resumable.

use super::splits::TrainingCells;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// How often each class is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampling {
    /// Every cell once per epoch, in a fresh permutation.
    #[default]
    None,
    /// Classes in proportion to √n, with replacement.
    Sqrt,
    /// Classes equally, with replacement.
    Uniform,
}

/// Where a sampler stands. Small: the order itself is a function of (seed, epoch).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    /// Epochs finished.
    pub epoch: u64,
    /// Cells drawn in this epoch.
    pub position: u64,
    /// Seed of the order.
    pub seed: u64,
    /// Class sampling.
    pub sampling: Sampling,
    /// Digest of the cells and labels drawn from.
    pub cells_digest: String,
}

/// Draws cells of the training split.
#[derive(Debug, Clone)]
pub struct Sampler {
    state: SamplerState,
}

impl Sampler {
    /// Draws from `training`; needs labels unless `sampling` is `None`.
    pub fn over(training: &TrainingCells<'_>, sampling: Sampling, seed: u64) -> Result<Self> {
        let _ = (training, sampling, seed);
        Err(Error::bug("the sampler is not written yet"))
    }
    /// Draws from `cells` without labels.
    pub fn of_cells(cells: Vec<u32>, seed: u64) -> Result<Self> {
        let _ = (cells, seed);
        Err(Error::bug("the sampler is not written yet"))
    }
    /// This process draws every `world`-th cell, from the `rank`-th on.
    pub fn for_rank(self, rank: usize, world: usize) -> Self {
        let _ = (rank, world);
        self
    }
    /// Cells drawn per epoch.
    pub fn epoch_len(&self) -> usize {
        0
    }
    /// Where it stands.
    pub fn state(&self) -> SamplerState {
        self.state.clone()
    }
    /// Continues from `state`; refuses the state of another seed, sampling or set of cells.
    pub fn restore(&mut self, state: &SamplerState) -> Result<()> {
        let _ = state;
        Err(Error::bug("the sampler is not written yet"))
    }
}
