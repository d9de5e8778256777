//! `bench loader`: cells per second out of a mapped corpus into packed batches.

use crate::error::{Error, Result};
use std::path::PathBuf;

/// What to time.
#[derive(Debug, Clone, Default)]
pub struct LoaderCase {
    /// A corpus to read; `None` makes a synthetic one with log-normal lengths in a temporary folder.
    pub corpus: Option<PathBuf>,
    /// Cells of the synthetic corpus; 0 = 300,000.
    pub cells: usize,
    /// Cells in a batch; 0 = 64.
    pub batch: usize,
    /// Packing threads; 0 = 1.
    pub threads: usize,
    /// Input order in place of random order.
    pub sequential: bool,
    /// Seed.
    pub seed: u64,
}

/// Runs the case; the object has `cells_per_s, tokens_per_s, mean_tokens, threads, order` and more.
pub fn run(case: &LoaderCase) -> Result<serde_json::Value> {
    let _ = case;
    Err(Error::bug("the loader benchmark is not written yet"))
}
