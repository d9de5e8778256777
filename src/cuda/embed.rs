//! Input embedding: workspace and geometry of `kernels/embed.cu`. Formula in [`crate::ops::embed`].

use super::functions::{
    embed_backward_edges, embed_backward_rows, embed_backward_tokens, embed_forward, reduce_columns,
};
use super::layernorm::warps;
use super::sort::{counts, sort_by_key};
use super::workspace::bytes;
use super::{Buf, Cuda, Grid};
use crate::device::Act;
use crate::error::Result;
use crate::ops::embed::{BackwardIn, Dims, Embed, Gradients, Out, Tables};

/// Tokens of a block of the sweep over tokens, at least, and its blocks, at most: as in [`super::layernorm`].
const TOKENS_PER_BLOCK: usize = 32;
const MOST_BLOCKS: usize = 1024;
/// Places of a warp and of a block in the sweep over sorted tokens.
const CHUNK: usize = 32;
const PLACES: usize = 8 * CHUNK;
/// Columns of a block there: a pack of 8 for each lane of a warp.
const COLUMNS: usize = 256;

/// Bins and their table, which the kernels take as null where the model has none.
type Values<'a, A> = (Option<&'a Buf<u32>>, Option<&'a Buf<A>>);

fn values<'a, A: Act>(dims: Dims, tables: &Tables<'a, Cuda, A>) -> Values<'a, A> {
    let some = dims.value_bins > 0;
    (tables.value_bin.filter(|_| some), tables.value_table.filter(|_| some))
}

/// Numbers that the backward pass works in.
fn lengths(tokens: usize, width: usize, blocks: usize) -> [usize; 8] {
    let (chunks, sweep_blocks) = (tokens.div_ceil(CHUNK), tokens.div_ceil(PLACES));
    [
        tokens,
        tokens,
        blocks * 2 * width,
        chunks * 2 * width,
        sweep_blocks * width,
        counts(tokens),
        tokens,
        tokens,
    ]
}

/// Bytes of workspace for at most so many tokens.
pub(super) fn most_bytes(tokens: usize, width: usize) -> usize {
    bytes::<f32>(&lengths(tokens, width, tokens.div_ceil(TOKENS_PER_BLOCK).min(MOST_BLOCKS)))
}

impl<A: Act> Embed<A> for Cuda {
    fn embed_forward(&self, dims: Dims, tables: Tables<'_, Self, A>, out: Out<'_, Self, A>) -> Result<()> {
        let Dims { tokens, width, .. } = dims;
        if tokens * width == 0 {
            return Ok(());
        }
        let row_bytes = width.next_multiple_of(8) * 4;
        let warps = warps(row_bytes)?;
        let (value_bin, value_table) = values(dims, &tables);
        embed_forward(
            self,
            Grid::line(tokens.div_ceil(warps), 32 * warps as u32).shared(warps * row_bytes),
            tables.gene,
            tables.position,
            value_bin,
            tables.word,
            tables.position_table,
            tables.type_table,
            value_table,
            tables.weight,
            tables.bias,
            out.x,
            out.mean,
            out.rstd,
            tables.dropout.into(),
            tokens as i32,
            width as i32,
            dims.eps,
        )
    }

    fn embed_backward(
        &self,
        dims: Dims,
        tables: Tables<'_, Self, A>,
        input: BackwardIn<'_, Self, A>,
        grads: Gradients<'_, Self>,
    ) -> Result<()> {
        let Dims { tokens, width, .. } = dims;
        if tokens * width == 0 {
            return Ok(());
        }
        let row_bytes = 2 * width.next_multiple_of(8) * 4;
        let warps = warps(row_bytes)?;
        let tokens_per_block = tokens.div_ceil(MOST_BLOCKS).max(TOKENS_PER_BLOCK);
        let blocks = tokens.div_ceil(tokens_per_block);
        let sweep_blocks = tokens.div_ceil(PLACES);
        let mut workspace = self.workspace();
        let [mut mean_g, mut mean_gn, mut partial, mut edge, mut total, count, first, second] =
            workspace.parts(lengths(tokens, width, blocks))?;
        let mut count = integers(&count)?;
        let mut places = [integers(&first)?, integers(&second)?];
        let (value_bin, value_table) = values(dims, &tables);
        let columns = |n: usize| Grid::line(n.div_ceil(32), 256);

        embed_backward_tokens(
            self,
            Grid::line(blocks, 32 * warps as u32).shared(warps * row_bytes),
            tables.gene,
            tables.position,
            value_bin,
            tables.word,
            tables.position_table,
            tables.type_table,
            value_table,
            tables.weight,
            input.dx,
            input.mean,
            input.rstd,
            &mut mean_g,
            &mut mean_gn,
            &mut partial,
            tables.dropout.into(),
            tokens as i32,
            tokens_per_block as i32,
            width as i32,
        )?;
        let (rows, both, split) = (blocks as i32, (2 * width) as i32, width as i32);
        reduce_columns(
            self,
            columns(2 * width),
            &partial,
            grads.weight,
            Some(grads.bias),
            rows,
            both,
            split,
        )?;

        let mut sweep = |keys: usize, key: &Buf<u32>, table: &mut Buf<f32>, total: Option<&mut Buf<f32>>| {
            let order = sort_by_key(self, tokens, keys, key, &mut places, &mut count)?;
            embed_backward_rows(
                self,
                Grid::plane(sweep_blocks, width.div_ceil(COLUMNS), 256),
                order,
                key,
                tables.gene,
                tables.position,
                value_bin,
                tables.word,
                tables.position_table,
                tables.type_table,
                value_table,
                tables.weight,
                input.dx,
                input.mean,
                input.rstd,
                &mean_g,
                &mean_gn,
                table,
                &mut edge,
                total,
                tables.dropout.into(),
                tokens as i32,
                width as i32,
            )?;
            embed_backward_edges(
                self,
                Grid::plane(sweep_blocks, width.div_ceil(COLUMNS), 256),
                order,
                key,
                &edge,
                table,
                tokens as i32,
                width as i32,
            )
        };
        sweep(dims.vocab, tables.gene, grads.word, Some(&mut total))?;
        sweep(dims.positions, tables.position, grads.position_table, None)?;
        if let (Some(value_bin), Some(table)) = (value_bin, grads.value_table) {
            sweep(dims.value_bins, value_bin, table, None)?;
        }
        reduce_columns(
            self,
            columns(width),
            &total,
            grads.type_table,
            None,
            sweep_blocks as i32,
            split,
            split,
        )
    }
}

/// Workspace as token numbers.
fn integers(part: &Buf<f32>) -> Result<Buf<u32>> {
    // SAFETY: the float view of this part is used no more.
    unsafe { part.cast() }.ok_or_else(|| crate::error::Error::bug("f32 and u32 have one size and alignment"))
}
