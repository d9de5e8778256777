//! What `kernels/prototype_loss_sm90.cu` and `prototype_loss_wide_sm90.cu` take, and their launches.

use super::tiling::Tiling;
use super::{Operands, Parts, Slots};
use crate::cuda::functions::{
    SoftmaxCall, prototype_loss_columns_sm90, prototype_loss_columns_wide_sm90, prototype_loss_rows_sm90,
    prototype_loss_rows_wide_sm90,
};
use crate::cuda::{Buf, Cuda};
use crate::device::Act;
use crate::error::Result;
use crate::ops::prototype_loss::{ColumnGradients, Dims};

/// Widest rows, and what their number of elements has to be a multiple of: the copy engine reads rows at 16-byte addresses.
const WIDEST: usize = 768;
const ALIGNED: usize = 8;
/// The widest of `kernels/prototype_loss_wgmma.cuh`; others go through `kernels/prototype_loss_wide.cuh`.
const NARROW: usize = 256;
/// Threads of a block of either, which are three warpgroups; bytes of a streamed index's parameters.
const THREADS: u32 = 384;
const PARAMETER_BYTES: usize = 16;

/// What a kernel makes of a width.
struct Tiles {
    /// Rows of a resident tile (RESIDENT, WIDE_RESIDENT) and of a streamed one (STREAMED, 8·NT).
    resident: usize,
    streamed: usize,
    /// Blocks that share a resident tile, each with its part of the width.
    blocks: usize,
    shared_bytes: usize,
}

impl Tiles {
    fn new(width: usize) -> Self {
        if width <= NARROW {
            let (resident, streamed, stages) = (128, 64, 4);
            // D': 128 or 256.
            let row_bytes = 2 * if width <= 128 { 128 } else { 256 };
            let mbarriers = 3 * stages + 1;
            let shared_bytes =
                resident * row_bytes + stages * streamed * (row_bytes + PARAMETER_BYTES) + mbarriers * 8;
            return Tiles { resident, streamed, blocks: 1, shared_bytes };
        }
        let (resident, stages) = (64, 2);
        let (streamed, blocks, row_bytes) = if width <= 512 { (64, 1, 2 * 512) } else { (32, 2, 2 * 768) };
        let weights = resident * (128 + 4);
        let mbarriers = 3 * stages + 1;
        let stage_bytes = streamed * (row_bytes + PARAMETER_BYTES) + weights;
        Tiles {
            resident,
            streamed,
            blocks,
            shared_bytes: resident * row_bytes + stages * stage_bytes + mbarriers * 8,
        }
    }
}

/// Multiprocessors that splits are meant to fill, one block each: those of an H100 or H200. A constant, so that a result does not
/// depend on the GPU's.
const MULTIPROCESSORS: usize = 132;
/// Three waves of blocks at most while the streamed operand is split; it bounds what partial sums take.
const MOST_BLOCKS: usize = 3 * MULTIPROCESSORS;
/// A split has at least so many tiles: with fewer it would be over before its pipeline is full.
const LEAST_TILES: usize = 4;
/// What a block costs beside its tiles, in tiles of some 1.2 µs: its resident rows, the first tile's latency, 128 KB of sums to store.
const BLOCK_TILES: usize = 6;
/// Blocks whose partial sums take as long to add up as a tile; and the launch that does it.
const BLOCKS_PER_TILE: usize = 40;
const SUM_TILES: usize = 4;

/// Are rows of this type and width for these kernels?
pub(super) fn fits<A: Act>(width: usize) -> bool {
    !A::IS_F32 && width <= WIDEST && width.is_multiple_of(ALIGNED)
}

/// Do these kernels take the call? bf16 on Hopper, widths up to [`WIDEST`] that are multiples of 8, and targets of one column a row;
/// the portable kernels take the others.
pub(super) fn takes<A: Act>(cuda: &Cuda, dims: Dims, operands: &Operands<'_, A>) -> bool {
    cuda.is_hopper() && fits::<A>(dims.width) && operands.call.entries == 1 && !operands.dense()
}

/// The splits that cost least: waves of blocks times a block's tiles, and what it takes to add up the parts. `blocks`: of one split.
fn splits(blocks: usize, tiles: usize) -> usize {
    let most = (MOST_BLOCKS / blocks.max(1)).min(tiles / LEAST_TILES).max(1);
    let cost = |splits: usize| {
        let blocks = blocks * splits;
        let streamed = blocks.div_ceil(MULTIPROCESSORS) * (tiles.div_ceil(splits) + BLOCK_TILES);
        streamed + if splits > 1 { blocks / BLOCKS_PER_TILE + SUM_TILES } else { 0 }
    };
    // Equal costs: fewer splits.
    (1..=most).min_by_key(|splits| cost(*splits)).unwrap_or(1)
}

/// Resident rows times splits, at most, for operands up to these sizes.
pub(super) fn most_rows(resident: usize, streamed: usize, width: usize) -> usize {
    let tiles = Tiles::new(width);
    let splits = streamed.div_ceil(tiles.streamed) / LEAST_TILES;
    resident.max((resident * splits).min(MOST_BLOCKS / tiles.blocks * tiles.resident))
}

/// Tiles of one pass.
pub(super) fn tiling(resident: usize, streamed: usize, width: usize) -> Tiling {
    let sizes = Tiles::new(width);
    let (blocks, tiles) =
        (resident.div_ceil(sizes.resident) * sizes.blocks, streamed.div_ceil(sizes.streamed));
    let tiles_per_split = tiles.div_ceil(splits(blocks, tiles));
    Tiling {
        wide: width > NARROW,
        resident_tiles: blocks,
        splits: tiles.div_ceil(tiles_per_split),
        tiles_per_split,
        threads: THREADS,
        shared_bytes: sizes.shared_bytes,
    }
}

/// First pass: statistics and weighted columns of every row and split.
pub(super) fn stream_columns<A: Act>(
    cuda: &Cuda,
    dims: Dims,
    operands: &Operands<'_, A>,
    tiling: &Tiling,
    stats: &mut Buf<f32>,
    o: &mut Buf<f32>,
) -> Result<()> {
    let Operands { scale, bias, margin, .. } = *operands;
    let (row_weight, target_column) = operands.one_column();
    let kernel = if tiling.wide { prototype_loss_rows_wide_sm90 } else { prototype_loss_rows_sm90 };
    let tiles = Tiles::new(dims.width);
    kernel(
        cuda,
        tiling.grid(),
        cuda.tensor_map(operands.z, dims.rows, dims.width, tiles.resident)?,
        cuda.tensor_map(operands.column, dims.columns, dims.width, tiles.streamed)?,
        scale,
        bias,
        margin,
        row_weight,
        target_column,
        operands.target_mass,
        stats,
        o,
        SoftmaxCall { tiles_per_split: tiling.tiles_per_split as i32, ..operands.call },
    )
}

/// Where the second pass leaves its sums.
pub(super) enum Sums<'a> {
    /// One split: added to the gradients.
    Added(ColumnGradients<'a, Cuda>),
    /// Several: added up behind it.
    Parts(Parts<'a>),
}

/// Second pass.
pub(super) fn stream_rows<A: Act>(
    cuda: &Cuda,
    dims: Dims,
    operands: &Operands<'_, A>,
    tiling: &Tiling,
    lse: &Buf<f32>,
    sums: Sums<'_>,
) -> Result<()> {
    let Operands { scale, bias, margin, .. } = *operands;
    let (row_weight, target_column) = operands.one_column();
    let (dcolumn, dbias, dscale, sums, slots) = match sums {
        Sums::Added(g) => (g.column, g.bias, g.scale, None, Slots { bias: -1, scale: -1, count: 0 }),
        Sums::Parts(Parts { column, sums, slots }) => (column, None, None, sums, slots),
    };
    let kernel = if tiling.wide { prototype_loss_columns_wide_sm90 } else { prototype_loss_columns_sm90 };
    let tiles = Tiles::new(dims.width);
    kernel(
        cuda,
        tiling.grid(),
        cuda.tensor_map(operands.z, dims.rows, dims.width, tiles.streamed)?,
        cuda.tensor_map(operands.column, dims.columns, dims.width, tiles.resident)?,
        scale,
        bias,
        margin,
        row_weight,
        target_column,
        operands.target_mass,
        lse,
        dcolumn,
        dbias,
        dscale,
        sums,
        slots.bias,
        slots.scale,
        slots.count as i32,
        SoftmaxCall { tiles_per_split: tiling.tiles_per_split as i32, ..operands.call },
    )
}

#[cfg(all(test, emulator))]
mod tests {
    use super::*;
    use crate::cuda::{Arch, Schedule};
    use crate::device::Device;
    use crate::ops::prototype_loss::{In, Mix, Target};
    use half::bf16;

    /// Who takes a call on which GPU.
    #[test]
    fn what_hopper_takes() {
        fn taken<A: Act>(arch: Arch, width: usize, entries: usize, dense: bool) -> bool {
            let cuda = Cuda::emulated_gpu(Schedule::Late, arch).unwrap();
            let (z, column) = (cuda.zeros::<A>(2 * width).unwrap(), cuda.zeros::<A>(3 * width).unwrap());
            let [weight, mass, matrix] = [2, 2 * entries, 9].map(|n| cuda.zeros::<f32>(n).unwrap());
            let target = cuda.zeros::<i32>(2 * entries).unwrap();
            let dims = Dims { rows: 2, columns: 3, width, gradient_scale: 1.0, bias_in_target: true };
            let mix = dense.then_some(Mix { matrix: &matrix, share: 0.1 });
            let target = Target::Sparse { entries, column: &target, mass: Some(&mass), mix, teacher: None };
            let (scale, bias, margin) = (None, None, None);
            let input = In { z: &z, column: &column, scale, bias, margin, row_weight: &weight, target };
            takes(&cuda, dims, &Operands::new(dims, &input))
        }
        for width in [8, 64, 200, 256, 264, 768] {
            assert!(taken::<bf16>(Arch::Sm90, width, 1, false), "{width}");
        }
        assert!(!taken::<bf16>(Arch::Sm80, 64, 1, false), "not on other GPUs");
        assert!(!taken::<f32>(Arch::Sm90, 64, 1, false), "f32");
        assert!(!taken::<bf16>(Arch::Sm90, 60, 1, false), "rows that are not whole 16-byte units");
        assert!(!taken::<bf16>(Arch::Sm90, WIDEST + 8, 1, false), "too wide");
        assert!(!taken::<bf16>(Arch::Sm90, 64, 2, false), "several columns");
        assert!(!taken::<bf16>(Arch::Sm90, 64, 1, true), "targets of all columns");
    }

    /// Whatever the sizes, the parts of all splits fit what a run reserves, and no split is empty.
    #[test]
    fn splits_stay_within_what_is_reserved() {
        let sizes = [1, 63, 64, 65, 128, 129, 1000, 4096, 10_000, 25_424, 100_000];
        for (width, resident) in [64, 256, 512, 768].into_iter().flat_map(|w| sizes.map(|r| (w, r))) {
            for streamed in sizes {
                let (t, tile) = (tiling(resident, streamed, width), Tiles::new(width).streamed);
                let case = format!("{resident} {streamed} {width}");
                assert!((t.splits - 1) * t.tiles_per_split * tile < streamed, "{case}: an empty split");
                assert!(t.splits * t.tiles_per_split * tile >= streamed, "{case}");
                for (more, longer) in
                    [(resident, streamed), (resident + 1, streamed), (2 * resident, 3 * streamed)]
                {
                    assert!(resident * t.splits <= most_rows(more, longer, width), "{case}");
                }
                assert!(t.shared_bytes <= 227 << 10, "{case}: more shared memory than a block has");
            }
        }
        // One launch for the second pass of a small problem; enough blocks for the GPU in a middle one.
        assert_eq!(tiling(100, 256, 256).splits, 1);
        let middle = tiling(4096, 10_000, 256);
        assert!((120..=132).contains(&(middle.resident_tiles * middle.splits)));
    }
}
