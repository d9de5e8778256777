//! Masking of genes: thresholds and geometry of `kernels/mask_tokens.cu`. Rules in [`crate::ops::mask_tokens`].

use super::functions::{MaskRule, mask_choose, mask_compact};
use super::workspace::bytes;
use super::{Cuda, Grid};
use crate::error::Result;
use crate::ops::mask_tokens::{Dims, MaskTokens, Out, words_below};
use crate::rng::site;

/// Tokens of a block, one a thread.
const BLOCK: usize = 256;

/// Bytes of workspace for at most so many tokens.
pub(super) fn most_bytes(tokens: usize) -> usize {
    bytes::<u32>(&[tokens.div_ceil(32), tokens.div_ceil(BLOCK)])
}

impl MaskTokens for Cuda {
    fn mask_tokens(&self, dims: Dims, gene: &Self::Buf<u32>, out: Out<'_, Self>) -> Result<()> {
        if dims.tokens == 0 {
            return Ok(());
        }
        let rule = MaskRule {
            seed: dims.seed,
            first_row: dims.first_row,
            chosen_below: words_below(dims.probability as f64),
            masked_below: words_below(dims.mask_share as f64),
            random_below: words_below(dims.mask_share as f64 + dims.random_share as f64),
            step: dims.step,
            site: site::MASK,
            first_gene: dims.first_gene,
            genes: (dims.vocab as u32).saturating_sub(dims.first_gene),
            mask_id: dims.mask_id,
        };
        let (tokens, blocks) = (dims.tokens as i32, dims.tokens.div_ceil(BLOCK));
        let grid = Grid::line(blocks, BLOCK as u32);
        let mut workspace = self.workspace();
        let [mut chosen, mut count] = workspace.parts::<u32, 2>([dims.tokens.div_ceil(32), blocks])?;
        mask_choose(self, grid, gene, out.gene, &mut chosen, &mut count, rule, tokens)?;
        mask_compact(self, grid, gene, &chosen, &count, out.index, out.target, tokens)
    }
}
