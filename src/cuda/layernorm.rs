//! Residual + dropout + LayerNorm: geometry of `kernels/layernorm.cu`. Formula in [`crate::ops::layernorm`].

use super::functions::{layernorm_backward, layernorm_forward, reduce_columns};
use super::workspace::bytes;
use super::{Cuda, Grid};
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::ops::layernorm::{BackwardIn, Dims, Gradients, In, LayerNorm, Out};

/// Warps of a block; each owns a row at a time.
const WARPS: usize = 8;
/// Shared memory of a block that needs no special permission on any GPU.
const SHARED_BYTES: usize = 48 << 10;
/// Rows of a block in the backward pass, at least: enough to make its partial sums a small share of the traffic
/// (16 · D bytes of them against 4 · rows · D · a).
const ROWS_PER_BLOCK: usize = 32;
/// Blocks of the backward pass, at most: the partial sums of so many rows are still added up in microseconds.
const MOST_BLOCKS: usize = 1024;

/// Warps for which `row_bytes` of shared memory each are at hand.
pub(super) fn warps(row_bytes: usize) -> Result<usize> {
    let warps = (SHARED_BYTES / row_bytes).min(WARPS);
    if warps == 0 {
        return Err(Error::new(Code::KernelShape, "the model is too wide for the LayerNorm kernels")
            .found(format!("{row_bytes} bytes of shared memory per row"))
            .wanted(format!("at most {SHARED_BYTES}")));
    }
    Ok(warps)
}

/// Bytes of workspace for at most so many rows.
pub(super) fn most_bytes(rows: usize, width: usize) -> usize {
    bytes::<f32>(&[rows.div_ceil(ROWS_PER_BLOCK).min(MOST_BLOCKS) * 2 * width])
}

impl<A: Act> LayerNorm<A> for Cuda {
    fn layernorm_forward(&self, dims: Dims, input: In<'_, Self, A>, out: Out<'_, Self, A>) -> Result<()> {
        let Dims { rows, width, eps } = dims;
        if rows * width == 0 {
            return Ok(());
        }
        let row_bytes = width.next_multiple_of(8) * 4;
        let warps = warps(row_bytes)?;
        layernorm_forward(
            self,
            Grid::line(rows.div_ceil(warps), 32 * warps as u32).shared(warps * row_bytes),
            input.residual,
            input.weight,
            input.bias,
            out.x_then_sum,
            out.y,
            out.mean,
            out.rstd,
            input.dropout.into(),
            rows as i32,
            width as i32,
            eps,
        )
    }

    fn layernorm_backward(
        &self,
        dims: Dims,
        input: BackwardIn<'_, Self, A>,
        grads: Gradients<'_, Self, A>,
    ) -> Result<()> {
        let Dims { rows, width, .. } = dims;
        if rows * width == 0 {
            return Ok(());
        }
        let row_bytes = 2 * width.next_multiple_of(8) * 4;
        let warps = warps(row_bytes)?;
        let rows_per_block = rows.div_ceil(MOST_BLOCKS).max(ROWS_PER_BLOCK);
        let blocks = rows.div_ceil(rows_per_block);
        let mut workspace = self.workspace();
        let mut partial = workspace.one::<f32>(blocks * 2 * width)?;
        layernorm_backward(
            self,
            Grid::line(blocks, 32 * warps as u32).shared(warps * row_bytes),
            input.dy,
            input.sum,
            input.mean,
            input.rstd,
            input.weight,
            grads.dx,
            grads.dresidual,
            &mut partial,
            input.dropout.into(),
            i32::from(input.relu_input),
            rows as i32,
            rows_per_block as i32,
            width as i32,
        )?;
        reduce_columns(
            self,
            Grid::line((2 * width).div_ceil(32), 256),
            &partial,
            grads.dweight,
            Some(grads.dbias),
            blocks as i32,
            (2 * width) as i32,
            width as i32,
        )
    }
}
