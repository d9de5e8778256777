//! Attention over packed cells: geometry of `kernels/gene_attention*.cu`. Formula in [`crate::ops::gene_attention`], tiling in
//! `kernels/gene_attention.cuh` and `docs/kernels-attention.md`. Bf16 with heads of 64 has kernels of its own on Hopper.

mod hopper;

use super::functions::{AttentionShape, gene_attention_order};
use super::functions::{gene_attention_dkv_32, gene_attention_dkv_64, gene_attention_dkv_128};
use super::functions::{gene_attention_dq_32, gene_attention_dq_64, gene_attention_dq_128};
use super::functions::{gene_attention_forward_32, gene_attention_forward_64, gene_attention_forward_128};
use super::workspace::bytes;
use super::{Buf, Cuda, Grid};
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::ops::gene_attention::{BackwardIn, Dims, GeneAttention, In, Pattern};

/// Rows of a block, 16 for each of its warps.
const ROWS: usize = 64;
/// Threads of a block.
const THREADS: u32 = 128;
/// Threads of a block of `gene_attention_order`.
const ORDER_THREADS: u32 = 256;

/// Shared memory of a block that owns `own` arrays of 64 rows and keeps `floats` numbers with each row of the two visited tiles:
/// `Tile` and the layouts in the kernels.
fn shared_bytes<A: Act>(head_width: usize, own: usize, floats: usize) -> usize {
    let row = head_width * size_of::<A>() + 16;
    let visited = (8192 / (head_width * size_of::<A>())).min(64);
    let strips = if A::IS_F32 { ROWS * (visited + 4) * 4 } else { 0 };
    own * ROWS * row + 2 * 2 * visited * row + 4 * ROWS + 2 * visited * 4 * (1 + floats) + strips
}

/// Picks the kernel of a head width.
macro_rules! by_head_width {
    ($width:expr, $k32:ident, $k64:ident, $k128:ident) => {
        match $width {
            32 => $k32::<A>,
            64 => $k64::<A>,
            128 => $k128::<A>,
            other => return Err(unsupported(other)),
        }
    };
}

fn unsupported(head_width: usize) -> Error {
    Error::new(Code::KernelShape, "no attention kernel for this head width")
        .found(head_width.to_string())
        .wanted("32, 64 or 128 on this device")
        .next("choose model.width and model.heads so that their quotient is one of these, or --device cpu")
}

/// Token order and count of global tokens of each cell.
type Order = [Buf<u32>; 2];

impl Cuda {
    /// Queues `gene_attention_order` where the pattern needs it, into workspace for (N) and (C) numbers.
    fn attention_order<A: Act>(
        &self,
        dims: Dims,
        input: &In<'_, Self, A>,
        [mut order, mut globals]: Order,
    ) -> Result<Option<Order>> {
        let (Pattern::MarkerSparse { .. }, Some(global)) = (dims.pattern, input.global) else {
            return Ok(None);
        };
        let grid = Grid::line(dims.cells, ORDER_THREADS);
        gene_attention_order(self, grid, input.cell_start, global, &mut order, &mut globals)?;
        Ok(Some([order, globals]))
    }
}

/// Bytes of workspace for at most so many tokens and cells.
pub(super) fn most_bytes<A: Act>(tokens: usize, cells: usize, heads: usize, hopper: bool) -> usize {
    match hopper && !A::IS_F32 {
        true => hopper::most_bytes(tokens, cells, heads),
        false => bytes::<u32>(&[tokens, cells]),
    }
}

fn shape(dims: Dims) -> AttentionShape {
    let window = match dims.pattern {
        Pattern::Dense => 0,
        Pattern::MarkerSparse { window } => window.min(dims.tokens),
    };
    AttentionShape {
        tokens: dims.tokens as i32,
        cells: dims.cells as i32,
        heads: dims.heads as i32,
        window: window as i32,
        scale: (dims.head_width as f64).sqrt().recip() as f32,
    }
}

fn grid<A: Act>(dims: Dims, own: usize, floats: usize) -> Grid {
    Grid::plane(dims.tokens.div_ceil(ROWS), dims.heads, THREADS).shared(shared_bytes::<A>(
        dims.head_width,
        own,
        floats,
    ))
}

impl<A: Act> GeneAttention<A> for Cuda {
    fn gene_attention_forward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        o: &mut Buf<A>,
        lse: &mut Buf<f32>,
    ) -> Result<()> {
        if hopper::takes::<A>(self, dims) {
            return self.hopper_attention_forward(dims, &input, o, lse);
        }
        let forward = by_head_width!(
            dims.head_width,
            gene_attention_forward_32,
            gene_attention_forward_64,
            gene_attention_forward_128
        );
        let mut workspace = self.workspace();
        let room = workspace.parts([dims.tokens, dims.cells])?;
        let order = self.attention_order(dims, &input, room)?;
        let (order, globals) = order.as_ref().map(|[o, g]| (o, g)).unzip();
        let dropout = input.dropout.into();
        let grid = grid::<A>(dims, 1, 0);
        forward(self, grid, input.qkv, input.cell_start, order, globals, o, lse, shape(dims), dropout)
    }

    fn gene_attention_backward(
        &self,
        dims: Dims,
        input: In<'_, Self, A>,
        backward: BackwardIn<'_, Self, A>,
        dqkv: &mut Buf<A>,
        delta: &mut Buf<f32>,
    ) -> Result<()> {
        if hopper::takes_backward::<A>(self, dims) {
            return self.hopper_attention_backward(dims, &input, &backward, dqkv, delta);
        }
        let dq = by_head_width!(
            dims.head_width,
            gene_attention_dq_32,
            gene_attention_dq_64,
            gene_attention_dq_128
        );
        let dkv = by_head_width!(
            dims.head_width,
            gene_attention_dkv_32,
            gene_attention_dkv_64,
            gene_attention_dkv_128
        );
        let mut workspace = self.workspace();
        let room = workspace.parts([dims.tokens, dims.cells])?;
        let order = self.attention_order(dims, &input, room)?;
        let (order, globals) = order.as_ref().map(|[o, g]| (o, g)).unzip();
        let BackwardIn { do_, o, lse } = backward;
        let (qkv, start, shape) = (input.qkv, input.cell_start, shape(dims));
        let dropout = input.dropout.into();
        // dq first: it sets delta.
        dq(
            self,
            grid::<A>(dims, 2, 0),
            qkv,
            do_,
            o,
            lse,
            start,
            order,
            globals,
            dqkv,
            delta,
            shape,
            dropout,
        )?;
        dkv(self, grid::<A>(dims, 2, 2), qkv, do_, lse, delta, start, order, globals, dqkv, shape, dropout)
    }
}
