//! BERT masking of genes: choose each non-special token with probability p; of the chosen, 80 % become `<mask>`, 10 % a
//! random gene, 10 % stay (shares are parameters).
//!
//! Token t of the logical batch (index `first_row + t`) uses the four words of Philox block `first_row + t` of stream
//! `(seed, step, site::MASK)`: word 0 chooses (w0 < p·2³²), word 1 picks the fate, words 2 and 3 the random gene by the
//! 64-bit multiply-high `first_gene + ((w2 | w3 << 32) · (vocab - first_gene)) >> 64`. So the mask does not depend on how
//! the batch is split.

use super::check_all;
use crate::device::Device;
use crate::error::Result;
use crate::rng::{site, stream_block};

/// Sizes and rates of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dims {
    /// N.
    pub tokens: usize,
    /// V.
    pub vocab: usize,
    /// Ids below this are special: never chosen, never drawn (0 … first_gene).
    pub first_gene: u32,
    /// Id of `<mask>`.
    pub mask_id: u32,
    /// p: share of tokens chosen.
    pub probability: f32,
    /// Of the chosen, share replaced by `<mask>`.
    pub mask_share: f32,
    /// Of the chosen, share replaced by a random gene.
    pub random_share: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u32,
    /// Index, within the logical batch, of this call's first token.
    pub first_row: u64,
}

/// What masking writes.
pub struct Out<'a, B: Device> {
    /// (N) genes after masking.
    pub gene: &'a mut B::Buf<u32>,
    /// (N) capacity: token index of each chosen token, ascending.
    pub index: &'a mut B::Buf<u32>,
    /// (N) capacity: original gene of each chosen token, in the type of a loss's target columns.
    pub target: &'a mut B::Buf<i32>,
}

/// A backend's masking.
pub trait MaskTokens: Device {
    /// Masks; M is [`count`]'s, from the genes on the host, since reading it back would stop the device.
    fn mask_tokens(&self, dims: Dims, gene: &Self::Buf<u32>, out: Out<'_, Self>) -> Result<()>;
}

/// The words below `share · 2³²`, exclusive end: `word < share·2³²` exactly, for share in [0, 1].
pub(crate) fn words_below(share: f64) -> u64 {
    (share * (1u64 << 32) as f64).ceil() as u64
}

/// M, the number of chosen tokens, from the genes on the host: the loss is divided by the masked tokens of the whole logical
/// batch, which must be known before its first part is worked on.
pub fn count(dims: Dims, gene: &[u32]) -> usize {
    let chosen = words_below(dims.probability as f64);
    let is_chosen =
        |t: usize| stream_block(dims.seed, dims.step, site::MASK, dims.first_row + t as u64)[0] as u64;
    let genes = gene[..dims.tokens].iter().enumerate().filter(|(_, gene)| **gene >= dims.first_gene);
    genes.filter(|(t, _)| is_chosen(*t) < chosen).count()
}

/// Checked masking.
pub fn mask<B: MaskTokens>(dev: &B, dims: Dims, gene: &B::Buf<u32>, out: Out<'_, B>) -> Result<()> {
    check_all!("mask_tokens", gene: gene, dims.tokens; masked_gene: out.gene, dims.tokens; index: out.index, dims.tokens;
        target: out.target, dims.tokens);
    let _range = crate::trace::range("mask_tokens");
    dev.mask_tokens(dims, gene, out)
}
