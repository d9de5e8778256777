//! Masking of genes: thresholds and geometry of `kernels/mask_tokens.cu`. Rules in [`crate::ops::mask_tokens`].

use super::functions::{MaskRule, mask_choose, mask_compact};
use super::{Cuda, Grid};
use crate::device::Device;
use crate::error::Result;
use crate::ops::mask_tokens::{Dims, MaskTokens, Out, words_below};
use crate::rng::site;

/// Tokens of a block, one a thread.
const BLOCK: usize = 256;

impl MaskTokens for Cuda {
    fn mask_tokens(&self, dims: Dims, gene: &Self::Buf<u32>, out: Out<'_, Self>) -> Result<usize> {
        if dims.tokens == 0 {
            return Ok(0);
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
        let [mut chosen, mut count, mut masked] =
            workspace.parts::<u32, 3>([dims.tokens.div_ceil(32), blocks, 1])?;
        mask_choose(self, grid, gene, out.gene, &mut chosen, &mut count, rule, tokens)?;
        mask_compact(self, grid, gene, &chosen, &count, out.index, out.target, &mut masked, tokens)?;
        let mut total = [0];
        self.read(&masked, &mut total)?;
        Ok(total[0] as usize)
    }
}
