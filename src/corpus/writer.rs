//! Writes a corpus.

use super::format::{Manifest, ObsKind, VocabIdentity};
use crate::error::{Error, Result};
use half::f16;
use std::path::Path;

/// An obs column to store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObsSpec {
    /// Column name.
    pub name: String,
    /// Storage.
    pub kind: ObsKind,
}

/// What a new corpus is made with.
#[derive(Debug, Clone)]
pub struct CorpusOptions {
    /// The vocabulary of the gene ids.
    pub vocab: VocabIdentity,
    /// The vocabulary file's bytes, copied into the folder as `vocab.tsv`, so that later commands need the corpus alone.
    pub vocab_file: Option<Vec<u8>>,
    /// Does every cell carry values?
    pub values: bool,
    /// Cells in a shard; 0 means [`CorpusOptions::SHARD_CELLS`].
    pub shard_cells: usize,
    /// Obs columns, in the order in which `CellRecord::obs` gives them.
    pub obs: Vec<ObsSpec>,
    /// Recorded in the manifest as it is. Keep time and machine out of it: equal cells give equal bytes.
    pub provenance: serde_json::Value,
}

impl CorpusOptions {
    /// Default cells in a shard.
    pub const SHARD_CELLS: usize = 65_536;
}

/// One value of an obs column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ObsValue<'a> {
    /// Absent in the source.
    Missing,
    /// Of a categorical column.
    Category(&'a str),
    /// Of a numeric column.
    Number(f64),
}

/// One cell to store.
#[derive(Debug, Clone, Copy)]
pub struct CellRecord<'a> {
    /// The cell's name in its source.
    pub id: &'a str,
    /// Gene ids in rank order, best first, without special tokens.
    pub gene: &'a [u32],
    /// Log-normalised expression ln(1 + 10⁴·x/total) per token; present exactly when the corpus stores values.
    pub value: Option<&'a [f16]>,
    /// Total count over all genes of the source.
    pub total_count: f32,
    /// One value per column of `CorpusOptions::obs`.
    pub obs: &'a [ObsValue<'a>],
}

/// Writes cells in order; nothing appears under the final name before [`CorpusWriter::finish`].
#[derive(Debug)]
pub struct CorpusWriter {}

impl CorpusWriter {
    /// Starts a corpus at `out`, which must not exist.
    pub fn create(out: &Path, options: CorpusOptions) -> Result<Self> {
        let _ = (out, options);
        Err(Error::bug("the corpus writer is not written yet"))
    }

    /// Adds a cell.
    pub fn push(&mut self, cell: &CellRecord<'_>) -> Result<()> {
        let _ = cell;
        Err(Error::bug("the corpus writer is not written yet"))
    }

    /// Closes the last shard, writes the manifest and publishes the folder under its final name.
    pub fn finish(self) -> Result<Manifest> {
        Err(Error::bug("the corpus writer is not written yet"))
    }
}
