//! Maps a corpus into memory.

use super::format::Manifest;
use crate::error::{Error, Result};
use half::f16;
use std::path::{Path, PathBuf};

/// The gene ids of a cell, in rank order, borrowed from the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Genes<'a> {
    /// Vocabularies of at most 65,536 ids.
    U16(&'a [u16]),
    /// Larger vocabularies.
    U32(&'a [u32]),
}

impl<'a> Genes<'a> {
    /// Number of genes.
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Genes::U16(g) => g.len(),
            Genes::U32(g) => g.len(),
        }
    }
    /// No genes at all?
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The id at rank `rank`.
    #[inline]
    pub fn get(&self, rank: usize) -> u32 {
        match self {
            Genes::U16(g) => g[rank] as u32,
            Genes::U32(g) => g[rank],
        }
    }
    /// The ids, best rank first.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = u32> + 'a {
        (0..self.len()).map(move |rank| self.get(rank))
    }
    /// The ids as a new vector.
    pub fn to_vec(self) -> Vec<u32> {
        self.iter().collect()
    }
}

/// A categorical obs column of the whole corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Categorical {
    /// Index into `categories` per cell; −1 is missing.
    pub codes: Vec<i32>,
    /// Sorted names.
    pub categories: Vec<String>,
}

/// An open corpus: cells by index, 0 up to [`Corpus::cells`], in the order in which they were packed.
#[derive(Debug)]
pub struct Corpus {
    root: PathBuf,
    manifest: Manifest,
}

impl Corpus {
    /// Opens and checks the folder at `path`.
    pub fn open(path: &Path) -> Result<Corpus> {
        Err(Error::bug("the corpus reader is not written yet").at(path.display()))
    }
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }
    /// Number of cells.
    pub fn cells(&self) -> usize {
        self.manifest.cells as usize
    }
    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.manifest.tokens
    }
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
    /// Digest that names the cells.
    pub fn digest(&self) -> &str {
        &self.manifest.digest
    }
    /// Bytes of the vocabulary file that travels with the corpus; an error where none does.
    pub fn vocab_file(&self) -> Result<Vec<u8>> {
        Err(Error::bug("the corpus reader is not written yet"))
    }
    /// Reads everything and checks every checksum and digest.
    pub fn verify(&self) -> Result<()> {
        Err(Error::bug("the corpus reader is not written yet"))
    }
    /// Number of genes of `cell`. Panics where `cell` is not below [`Corpus::cells`], as all per-cell calls do.
    #[inline]
    pub fn len_of(&self, cell: usize) -> usize {
        let _ = cell;
        0
    }
    /// The genes of `cell`. The error is a failed checksum, found on the first touch of the bytes.
    #[inline]
    pub fn genes(&self, cell: usize) -> Result<Genes<'_>> {
        let _ = cell;
        Err(Error::bug("the corpus reader is not written yet"))
    }
    /// The values of `cell`, parallel to its genes; `None` where the corpus stores none.
    pub fn values(&self, cell: usize) -> Result<Option<&[f16]>> {
        let _ = cell;
        Err(Error::bug("the corpus reader is not written yet"))
    }
    /// Total count of `cell` over all genes of its source.
    pub fn total_count(&self, cell: usize) -> Result<f32> {
        let _ = cell;
        Err(Error::bug("the corpus reader is not written yet"))
    }
    /// Name of `cell` in its source.
    pub fn cell_id(&self, cell: usize) -> Result<&str> {
        let _ = cell;
        Err(Error::bug("the corpus reader is not written yet"))
    }
    /// The categorical column `column`; where it is absent the error lists the columns and the nearest name.
    pub fn categorical(&self, column: &str) -> Result<Categorical> {
        Err(Error::bug("the corpus reader is not written yet").at(column))
    }
    /// The numeric column `column`; NaN is missing.
    pub fn numeric(&self, column: &str) -> Result<Vec<f64>> {
        Err(Error::bug("the corpus reader is not written yet").at(column))
    }
}
