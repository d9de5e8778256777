//! Packed batches of cells of different lengths, without padding.
//!
//! A batch is the corpus's own layout: `cell_start` (C+1) over packed `gene` (N). It is bounded by cells and by tokens, a cell is
//! cut to the model's context, and the model's special tokens are put in while copying.

use super::reader::Corpus;
use super::sampler::SamplerState;
use crate::error::{Code, Error, Result};
use half::f16;

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

impl BatchOptions {
    pub(super) fn specials(&self) -> usize {
        self.cls.is_some() as usize + self.eos.is_some() as usize
    }

    pub(super) fn check(&self, corpus: &Corpus) -> Result<()> {
        let vocab = &corpus.manifest().vocabulary;
        let wrong = |what: &str, setting: &str, found: usize| {
            Error::new(Code::SettingValue, what).at(setting).found(found)
        };
        if self.cells == 0 {
            return Err(wrong("a batch needs at least one cell", "batch.cells", 0));
        }
        if self.max_tokens <= self.specials() {
            return Err(wrong(
                "a cell needs room for a gene beside the special tokens",
                "batch.max_tokens",
                self.max_tokens,
            )
            .wanted(format!("at least {}", self.specials() + 1)));
        }
        if self.tokens < self.max_tokens || self.tokens > u32::MAX as usize {
            return Err(wrong(
                "a batch must hold at least one cell of full length",
                "batch.tokens",
                self.tokens,
            )
            .wanted(format!("{} (batch.max_tokens) to {}", self.max_tokens, u32::MAX)));
        }
        if let Some(&t) = [self.cls, self.eos].iter().flatten().find(|&&t| t as usize >= vocab.len) {
            return Err(Error::new(
                Code::VocabularyMismatch,
                "a special token of the model is outside the corpus's vocabulary",
            )
            .at(corpus.path().display())
            .found(t)
            .wanted(format!("ids below {}", vocab.len))
            .next("use the vocabulary that the checkpoint was trained with"));
        }
        if self.values && !corpus.manifest().values {
            return Err(Error::new(
                Code::ValuesMissing,
                "the model reads expression values, the corpus stores none",
            )
            .at(corpus.path().display())
            .next("pack the corpus again with --values"));
        }
        Ok(())
    }
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
    /// What it is a share of; the whole itself where one process trains alone.
    pub whole: Whole,
    /// Where the sampler stands after this batch; `None` for batches in input order.
    pub after: Option<SamplerState>,
}

/// The batch of all ranks, of which each loads a run of whole cells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Whole {
    /// Corpus index per cell, of all ranks.
    pub cells: Vec<u32>,
    /// Tokens of all of them.
    pub tokens: usize,
    /// Where each rank's share of them starts (world + 1); the last is C.
    pub shares: Vec<usize>,
    /// Place of this share's first cell among them.
    pub first_cell: usize,
    /// Place of this share's first token.
    pub first_token: usize,
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
