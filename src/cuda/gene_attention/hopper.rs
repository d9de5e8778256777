//! Attention on Hopper: geometry of `kernels/gene_attention_*sm90.cu`, for bf16 and heads of 64.

use super::shape;
use crate::cuda::functions::{
    gene_attention_backward_dropout_sm90, gene_attention_backward_sm90, gene_attention_backward_sparse_sm90,
    gene_attention_dq_sm90, gene_attention_forward_dropout_sm90, gene_attention_forward_sm90,
    gene_attention_forward_sparse_sm90, gene_attention_items, gene_attention_stats_sm90,
};
use crate::cuda::workspace::bytes;
use crate::cuda::{Buf, Cuda, Grid};
use crate::device::{Act, Device, Dropout};
use crate::error::Result;
use crate::ops::gene_attention::{BackwardIn, Dims, In};

/// K of these kernels.
const HEAD_WIDTH: usize = 64;
/// Rows of a consumer warpgroup, and of a visited tile.
const SLOT: usize = 64;
const TILE: usize = 128;
/// Rows of a box of the copy engine.
const BOX_ROWS: usize = 64;
/// Longest cell that the list's counting sort takes: BINS tiles of 64 rows.
const LONGEST: usize = 1024 * SLOT;
/// Numbers of an entry of the list.
const ENTRY: usize = 8;
/// `DQ_FLOATS`: dq of a tile.
const DQ_FLOATS: usize = TILE * HEAD_WIDTH;

/// `Forward::BYTES`: queries and outputs, K and V of 3 stages, what lies beside them.
const fn forward_bytes(slots: usize) -> usize {
    let stages = 3;
    let barriers = 8 * (2 + 4 * stages);
    2 * slots * SLOT * 128 + 2 * stages * TILE * 128 + barriers + ITEM_BYTES + 4 * stages * (TILE + 1)
}
/// `Backward::BYTES`: K and V, Q and dO of 2 stages, ds, dq, what lies beside them.
const BACKWARD_BYTES: usize = {
    let stages = 2;
    let tiles = (2 + 2 * stages) * TILE * 128 + TILE * TILE * 2 + DQ_FLOATS * 4;
    tiles + stages * TILE * 12 + 8 * (4 + 2 * stages) + ITEM_BYTES + 4 * stages
};
/// `Item`.
const ITEM_BYTES: usize = 64;

/// Entries of the list for so many tokens and cells, at most, with so many rows to an entry.
fn most_entries(tokens: usize, cells: usize, rows: usize) -> usize {
    tokens / rows + cells
}

/// Bytes of workspace of both directions, for at most so many tokens and cells.
pub(super) fn most_bytes(tokens: usize, cells: usize, heads: usize) -> usize {
    let list = [ENTRY * most_entries(tokens, cells, SLOT), 1];
    let tiles = heads * most_entries(tokens, cells, TILE);
    let backward = [2 * tokens * heads, tiles * DQ_FLOATS, tiles];
    bytes::<u32>(&[tokens, cells]) + bytes::<u32>(&list) + bytes::<f32>(&backward)
}

/// Are these kernels the ones to take?
pub(super) fn takes<A: Act>(cuda: &Cuda, dims: Dims) -> bool {
    !A::IS_F32 && dims.head_width == HEAD_WIDTH && dims.max_len < LONGEST && cuda.is_hopper()
}

/// The same for the backward pass: all blocks of a cell and head wait for one another, so all have to be resident.
pub(super) fn takes_backward<A: Act>(cuda: &Cuda, dims: Dims) -> bool {
    takes::<A>(cuda, dims) && dims.max_len.div_ceil(TILE) <= cuda.driver().multiprocessors()
}

impl Cuda {
    /// The list of work, longest cells first. `slots`: tiles of 64 rows to an entry; `merge`: may it hold several short cells?
    fn attention_items<A: Act>(
        &self,
        dims: Dims,
        input: &In<'_, Self, A>,
        [entries, count]: [&mut Buf<u32>; 2],
        slots: usize,
        merge: bool,
    ) -> Result<()> {
        let (cells, slots) = (dims.cells as i32, slots as i32);
        gene_attention_items(
            self,
            Grid::line(1, 1024),
            input.cell_start,
            entries,
            count,
            cells,
            slots,
            merge.into(),
        )
    }

    /// Sets o and lse.
    pub(super) fn hopper_attention_forward<A: Act>(
        &self,
        dims: Dims,
        input: &In<'_, Self, A>,
        o: &mut Buf<A>,
        lse: &mut Buf<f32>,
    ) -> Result<()> {
        let mut workspace = self.workspace();
        let list = ENTRY * most_entries(dims.tokens, dims.cells, SLOT);
        let [mut entries, mut count, order, globals] = workspace.parts([list, 1, dims.tokens, dims.cells])?;
        let order = self.attention_order(dims, input, [order, globals])?;
        let dropout = input.dropout != Dropout::NONE;
        let slots = if order.is_none() && !dropout { 3 } else { 2 };
        self.attention_items(dims, input, [&mut entries, &mut count], slots, true)?;
        let threads = 128 * (slots as u32 + 1);
        let grid = Grid::line(self.driver().multiprocessors(), threads).shared(forward_bytes(slots));
        let (start, shape) = (input.cell_start, shape(dims));
        if let Some([order, globals]) = &order {
            let (qkv, dropout) = (input.qkv, input.dropout.into());
            return gene_attention_forward_sparse_sm90(
                self, grid, qkv, start, order, globals, &entries, &count, o, lse, shape, dropout,
            );
        }
        let qkv = self.tensor_map(input.qkv, dims.tokens, 3 * dims.width(), BOX_ROWS)?;
        if dropout {
            let dropout = input.dropout.into();
            return gene_attention_forward_dropout_sm90(
                self, grid, qkv, start, &entries, &count, o, lse, shape, dropout,
            );
        }
        gene_attention_forward_sm90(self, grid, qkv, start, &entries, &count, o, lse, shape)
    }

    /// Sets dqkv and delta.
    pub(super) fn hopper_attention_backward<A: Act>(
        &self,
        dims: Dims,
        input: &In<'_, Self, A>,
        backward: &BackwardIn<'_, Self, A>,
        dqkv: &mut Buf<A>,
        delta: &mut Buf<f32>,
    ) -> Result<()> {
        let mut workspace = self.workspace();
        let most = most_entries(dims.tokens, dims.cells, TILE);
        let (list, tiles, rows) = (ENTRY * most, dims.heads * most, dims.tokens * dims.heads);
        let [mut entries, mut count, order, globals, stats, sums, mut counters] =
            workspace.parts([list, 1, dims.tokens, dims.cells, 2 * rows, tiles * DQ_FLOATS, tiles])?;
        let [mut stats, mut sums] = [stats, sums].map(|part| as_floats(&part));
        let order = self.attention_order(dims, input, [order, globals])?;
        self.attention_items(dims, input, [&mut entries, &mut count], 2, false)?;
        self.clear(&mut counters)?;

        let shape = shape(dims);
        let BackwardIn { do_, o, lse } = *backward;
        let tokens = order.as_ref().map(|[order, _]| order);
        let grid = Grid::line(rows.div_ceil(32).min(8 * self.driver().multiprocessors()), 256);
        gene_attention_stats_sm90(self, grid, do_, o, lse, tokens, delta, &mut stats, shape)?;

        let (start, grid) = (input.cell_start, Grid::line(self.driver().multiprocessors(), 384));
        let grid = grid.shared(BACKWARD_BYTES).cooperative();
        let dropout = input.dropout.into();
        if let Some([order, globals]) = &order {
            gene_attention_backward_sparse_sm90(
                self,
                grid,
                input.qkv,
                do_,
                &stats,
                start,
                order,
                globals,
                &entries,
                &count,
                &mut sums,
                &mut counters,
                dqkv,
                shape,
                dropout,
            )?;
        } else {
            let qkv = self.tensor_map(input.qkv, dims.tokens, 3 * dims.width(), BOX_ROWS)?;
            let d_o = self.tensor_map(do_, dims.tokens, dims.width(), BOX_ROWS)?;
            if input.dropout == Dropout::NONE {
                gene_attention_backward_sm90(
                    self,
                    grid,
                    qkv,
                    d_o,
                    &stats,
                    start,
                    &entries,
                    &count,
                    &mut sums,
                    &mut counters,
                    dqkv,
                    shape,
                )?;
            } else {
                gene_attention_backward_dropout_sm90(
                    self,
                    grid,
                    qkv,
                    d_o,
                    &stats,
                    start,
                    &entries,
                    &count,
                    &mut sums,
                    &mut counters,
                    dqkv,
                    shape,
                    dropout,
                )?;
            }
        }
        let grid = Grid::line(tiles.min(8 * self.driver().multiprocessors()), 256);
        gene_attention_dq_sm90(self, grid, &sums, start, tokens, &entries, &count, dqkv, shape)
    }
}

/// The same memory as f32.
fn as_floats(part: &Buf<u32>) -> Buf<f32> {
    // SAFETY: the caller gives the first handle up for the second.
    unsafe { part.cast() }.unwrap_or_else(|| unreachable!("both are 4 bytes"))
}

#[cfg(all(test, emulator))]
mod tests {
    use super::*;
    use crate::cuda::{Arch, Schedule};
    use crate::ops::gene_attention::Pattern;
    use std::collections::BTreeSet;

    /// The list for these cells, as (cells of an entry, T, first entry, the cells).
    fn list(dev: &Cuda, lengths: &[usize], slots: usize, merge: bool) -> Vec<(u32, u32, u32, Vec<u32>)> {
        let mut start = vec![0u32];
        start.extend(lengths.iter().scan(0, |end, len| {
            *end += *len as u32;
            Some(*end)
        }));
        let tokens = start[lengths.len()] as usize;
        let dims = Dims {
            tokens,
            cells: lengths.len(),
            heads: 1,
            head_width: HEAD_WIDTH,
            max_len: *lengths.iter().max().unwrap(),
            pattern: Pattern::Dense,
        };
        let (qkv, cell_start) = (dev.zeros::<half::bf16>(0).unwrap(), dev.upload(&start).unwrap());
        let input = In { qkv: &qkv, cell_start: &cell_start, global: None, dropout: Dropout::NONE };
        let most = most_entries(tokens, lengths.len(), SLOT);
        let (mut entries, mut count) =
            (dev.upload(&vec![!0u32; ENTRY * most]).unwrap(), dev.upload(&[!0u32]).unwrap());
        dev.attention_items(dims, &input, [&mut entries, &mut count], slots, merge).unwrap();
        let count = dev.download(&count).unwrap()[0] as usize;
        assert!(count <= most);
        let entries = dev.download(&entries).unwrap();
        entries
            .chunks(ENTRY)
            .take(count)
            .map(|e| (e[0], e[1], e[2], e[4..4 + e[0] as usize].to_vec()))
            .collect()
    }

    #[test]
    fn the_list_holds_every_tile_once_and_long_cells_first() {
        for schedule in Schedule::ALL {
            let dev = Cuda::emulated_gpu(schedule, Arch::Sm90).unwrap();
            // Two bins of each warp of the sort; a tile more or less; many of one length.
            let mut lengths = vec![65_535, 1, 40_000, 64, 65, 2_048, 2_049, 33_000, 128, 3, 192, 193];
            lengths.extend([100; 1100]);
            lengths.extend([20; 7]);
            for (slots, merge) in [(3, true), (2, true), (2, false)] {
                let got = list(&dev, &lengths, slots, merge);
                let mut seen = BTreeSet::new();
                let mut last_tiles = usize::MAX;
                for (i, (cells, parts, first, members)) in got.iter().enumerate() {
                    let tiles = lengths[members[0] as usize].div_ceil(SLOT);
                    assert!(tiles <= last_tiles, "entry {i}: {tiles} tiles behind {last_tiles}");
                    last_tiles = tiles;
                    assert!((*first..first + parts).contains(&(i as u32)), "entry {i} of {first} + {parts}");
                    if *cells > 1 {
                        assert!(merge && *cells as usize <= slots && *parts == 1);
                        assert!(members.iter().all(|c| lengths[*c as usize] <= SLOT));
                    }
                    assert_eq!(*parts as usize, if *cells > 1 { 1 } else { tiles.div_ceil(slots) });
                    for cell in members {
                        assert!(seen.insert((*cell, i as u32 - first)), "cell {cell} twice");
                    }
                }
                let want: usize = lengths.iter().map(|len| len.div_ceil(SLOT).div_ceil(slots)).sum();
                assert_eq!(seen.len(), want, "{slots} slots, merge {merge}");
                let short = lengths.iter().filter(|len| **len <= SLOT).count();
                let saved = if merge { short - short.div_ceil(slots) } else { 0 };
                assert_eq!(got.len(), want - saved);
            }
        }
    }
}
