//! What `kernels/prototype_loss_sm90.cu` takes, and its launches.

use super::tiling::Tiling;
use super::{Operands, Parts, Slots};
use crate::cuda::functions::{SoftmaxCall, prototype_loss_columns_sm90, prototype_loss_rows_sm90};
use crate::cuda::{Buf, Cuda};
use crate::device::Act;
use crate::error::Result;
use crate::ops::prototype_loss::{ColumnGradients, Dims};

/// Widest rows, and what their number of elements has to be a multiple of: the copy engine reads rows at 16-byte addresses.
const WIDEST: usize = 256;
const ALIGNED: usize = 8;
/// RESIDENT, STREAMED and STAGES of `kernels/prototype_loss_wgmma.cuh`; its parameters of a streamed index; its mbarriers.
const RESIDENT: usize = 128;
const STREAMED: usize = 64;
const STAGES: usize = 4;
const PARAMETER_BYTES: usize = 16;
const MBARRIER_BYTES: usize = (3 * STAGES + 1) * 8;
const THREADS: u32 = 384;

/// Multiprocessors that splits are meant to fill, one block each: those of an H100 or H200. A constant, so that a result does not
/// depend on the GPU's.
const MULTIPROCESSORS: usize = 132;
/// Three waves of blocks at most while the streamed operand is split; it bounds what partial sums take.
const MOST_BLOCKS: usize = 3 * MULTIPROCESSORS;
/// A split has at least as many tiles as there are stages: with fewer it would be over before its pipeline is full.
const LEAST_TILES: usize = STAGES;
/// What a block costs beside its tiles, in tiles of 1.2 µs: its resident rows, the first tile's latency, 128 KB of sums to store.
const BLOCK_TILES: usize = 6;
/// Blocks whose partial sums take as long to add up as a tile; and the launch that does it.
const BLOCKS_PER_TILE: usize = 40;
const SUM_TILES: usize = 4;

/// Are rows of this type and width for these kernels?
pub(super) fn fits<A: Act>(width: usize) -> bool {
    !A::IS_F32 && width <= WIDEST && width.is_multiple_of(ALIGNED)
}

/// Do these kernels take the call? bf16 on Hopper, widths up to 256 that are multiples of 8, and targets of one column a row;
/// the portable kernels take the others.
pub(super) fn takes<A: Act>(cuda: &Cuda, dims: Dims, operands: &Operands<'_, A>) -> bool {
    cuda.is_hopper() && fits::<A>(dims.width) && operands.call.entries == 1 && !operands.dense()
}

/// The splits that cost least: waves of blocks times a block's tiles, and what it takes to add up the parts.
fn splits(resident_tiles: usize, tiles: usize) -> usize {
    let most = (MOST_BLOCKS / resident_tiles.max(1)).min(tiles / LEAST_TILES).max(1);
    let cost = |splits: usize| {
        let blocks = resident_tiles * splits;
        let streamed = blocks.div_ceil(MULTIPROCESSORS) * (tiles.div_ceil(splits) + BLOCK_TILES);
        streamed + if splits > 1 { blocks / BLOCKS_PER_TILE + SUM_TILES } else { 0 }
    };
    // Equal costs: fewer splits.
    (1..=most).min_by_key(|splits| cost(*splits)).unwrap_or(1)
}

/// Resident rows times splits, at most, for operands up to these sizes.
pub(super) fn most_rows(resident: usize, streamed: usize) -> usize {
    resident.max((resident * (streamed.div_ceil(STREAMED) / LEAST_TILES)).min(MOST_BLOCKS * RESIDENT))
}

/// Tiles of one pass.
pub(super) fn tiling(resident: usize, streamed: usize, width: usize) -> Tiling {
    let (resident_tiles, tiles) = (resident.div_ceil(RESIDENT), streamed.div_ceil(STREAMED));
    let tiles_per_split = tiles.div_ceil(splits(resident_tiles, tiles));
    // D': 128 or 256.
    let row_bytes = 2 * if width <= 128 { 128 } else { 256 };
    let streamed_bytes = STAGES * STREAMED * (row_bytes + PARAMETER_BYTES);
    Tiling {
        wide: false,
        resident_tiles,
        splits: tiles.div_ceil(tiles_per_split),
        tiles_per_split,
        threads: THREADS,
        shared_bytes: RESIDENT * row_bytes + streamed_bytes + MBARRIER_BYTES,
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
    prototype_loss_rows_sm90(
        cuda,
        tiling.grid(),
        cuda.tensor_map(operands.z, dims.rows, dims.width, RESIDENT)?,
        cuda.tensor_map(operands.column, dims.columns, dims.width, STREAMED)?,
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
    prototype_loss_columns_sm90(
        cuda,
        tiling.grid(),
        cuda.tensor_map(operands.z, dims.rows, dims.width, STREAMED)?,
        cuda.tensor_map(operands.column, dims.columns, dims.width, RESIDENT)?,
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
        for width in [8, 64, 200, 256] {
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
        for resident in sizes {
            for streamed in sizes {
                let t = tiling(resident, streamed, 256);
                assert!(
                    (t.splits - 1) * t.tiles_per_split * STREAMED < streamed,
                    "{resident} {streamed}: an empty split"
                );
                assert!(t.splits * t.tiles_per_split * STREAMED >= streamed);
                for (more, longer) in
                    [(resident, streamed), (resident + 1, streamed), (2 * resident, 3 * streamed)]
                {
                    assert!(resident * t.splits <= most_rows(more, longer), "{resident} {streamed}");
                }
            }
        }
        // One launch for the second pass of a small problem; enough blocks for the GPU in a middle one.
        assert_eq!(tiling(100, 256, 256).splits, 1);
        let middle = tiling(4096, 10_000, 256);
        assert!((120..=132).contains(&(middle.resident_tiles * middle.splits)));
    }
}
