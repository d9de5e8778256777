//! Packed batches of cells of different lengths, without padding.

use super::reader::Corpus;
use super::sampler::{Sampler, SamplerState};
use crate::error::{Error, Result};
use half::f16;
use std::sync::Arc;

/// Packed tokens, in the width of the vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokens {
    /// At most 65,536 ids.
    U16(Vec<u16>),
    /// More.
    U32(Vec<u32>),
}

impl Default for Tokens {
    fn default() -> Self {
        Tokens::U16(Vec::new())
    }
}

impl Tokens {
    /// Number of tokens N.
    pub fn len(&self) -> usize {
        match self {
            Tokens::U16(t) => t.len(),
            Tokens::U32(t) => t.len(),
        }
    }
    /// None at all?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Token `i`.
    #[inline]
    pub fn get(&self, i: usize) -> u32 {
        match self {
            Tokens::U16(t) => t[i] as u32,
            Tokens::U32(t) => t[i],
        }
    }
    /// Widens into `out` (N).
    pub fn widen_into(&self, out: &mut Vec<u32>) {
        out.clear();
        match self {
            Tokens::U16(t) => out.extend(t.iter().map(|&t| t as u32)),
            Tokens::U32(t) => out.extend_from_slice(t),
        }
    }
}

/// What a batch may hold and what the model adds to each cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchOptions {
    /// At most so many cells.
    pub cells: usize,
    /// At most so many tokens in all, special tokens included.
    pub tokens: usize,
    /// At most so many tokens per cell, special tokens included: the model's context.
    pub max_tokens: usize,
    /// Token put before each cell.
    pub cls: Option<u32>,
    /// Token put after each cell.
    pub eos: Option<u32>,
    /// Copy values too (special tokens get 0); the corpus must store them.
    pub values: bool,
}

/// Cells packed end to end.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Corpus index per cell (C).
    pub cells: Vec<u32>,
    /// Tokens of all cells, special tokens included (N).
    pub gene: Tokens,
    /// Value per token (N), or empty.
    pub value: Vec<f16>,
    /// Where each cell starts (C+1); the last is N.
    pub cell_start: Vec<u32>,
    /// Tokens of the longest cell.
    pub max_len: usize,
    /// Where the sampler stands after this batch; `None` for batches in input order.
    pub after: Option<SamplerState>,
}

impl Batch {
    /// Number of cells C.
    pub fn len(&self) -> usize {
        self.cells.len()
    }
    /// No cells?
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }
    /// Number of tokens N.
    pub fn tokens(&self) -> usize {
        self.gene.len()
    }
    /// Position of each token in its cell, into `out` (N).
    pub fn positions_into(&self, out: &mut Vec<u32>) {
        out.clear();
        for w in self.cell_start.windows(2) {
            out.extend(0..w[1] - w[0]);
        }
    }
}

/// Fills batches on the calling thread.
#[derive(Debug)]
pub struct Packer {}

impl Packer {
    /// Endless batches in the sampler's order; a batch never spans two epochs.
    pub fn sampled(corpus: Arc<Corpus>, sampler: Sampler, options: BatchOptions) -> Result<Self> {
        let _ = (corpus, sampler, options);
        Err(Error::bug("batches are not written yet"))
    }
    /// Batches over `cells` in the given order, once.
    pub fn in_order(corpus: Arc<Corpus>, cells: Vec<u32>, options: BatchOptions) -> Result<Self> {
        let _ = (corpus, cells, options);
        Err(Error::bug("batches are not written yet"))
    }
    /// Fills `batch`, reusing its buffers; false at the end of an ordered pass.
    pub fn fill(&mut self, batch: &mut Batch) -> Result<bool> {
        let _ = batch;
        Err(Error::bug("batches are not written yet"))
    }
    /// Batches that one whole epoch from the present state makes (training) or that remain (in order).
    pub fn batches_in_epoch(&self, epoch: u64) -> usize {
        let _ = epoch;
        0
    }
}

/// A [`Packer`] on a thread of its own, a bounded number of batches ahead.
#[derive(Debug)]
pub struct Loader {}

impl Loader {
    /// Starts filling; at most `ahead` finished batches wait.
    pub fn spawn(packer: Packer, ahead: usize) -> Result<Self> {
        let _ = (packer, ahead);
        Err(Error::bug("the loader is not written yet"))
    }
    /// The next batch; `None` at the end of an ordered pass.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        Err(Error::bug("the loader is not written yet"))
    }
    /// Gives a batch's buffers back for reuse.
    pub fn recycle(&mut self, batch: Batch) {
        let _ = batch;
    }
    /// Where the sampler stands after the batches handed out so far: what to save. Batches waiting in the queue do not count.
    pub fn state(&self) -> Option<SamplerState> {
        None
    }
}
