//! Tiles of the streaming kernels, and the memory that their splits take.

use super::hopper;
use crate::cuda::Grid;
use crate::cuda::workspace::bytes;
use crate::device::Act;
use crate::error::{Code, Error, Result};

/// Widths of the first pair of kernels, and of the second.
const NARROW: usize = 256;
const WIDE: usize = 1152;
/// Blocks that keep the largest GPU busy: two for each of 132 multiprocessors. The streamed operand is split until there are so
/// many, but a split has at least [`LEAST_TILES`] tiles, so that its partial sums stay a small share of its work.
pub(super) const BLOCKS: usize = 264;
const LEAST_TILES: usize = 2;

/// What a block keeps and what it walks over, in rows of the one operand and of the other.
pub(super) struct Tiling {
    pub wide: bool,
    /// Grid in x: tiles of the resident operand.
    pub resident_tiles: usize,
    /// Grid in y.
    pub splits: usize,
    /// Streamed tiles of a split.
    pub tiles_per_split: usize,
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Tiling {
    /// Of the portable kernels.
    ///
    /// # Errors
    /// Rows wider than they can be (2).
    pub(super) fn new<A: Act>(resident: usize, streamed: usize, width: usize) -> Result<Self> {
        if width > WIDE {
            return Err(Error::new(Code::KernelShape, "the rows are too wide for the softmax loss kernels")
                .found(width)
                .wanted(format!("at most {WIDE}")));
        }
        let wide = width > NARROW;
        let [own, tile] = tile_rows::<A>(wide);
        let rows = (own + 2 * tile) * (width.next_multiple_of(16) + 8) * 2;
        let parts = if wide { 8 * 2 * 32 * 16 } else { 0 };
        let (resident_tiles, tiles) = (resident.div_ceil(own), streamed.div_ceil(tile));
        let tiles_per_split = tiles.div_ceil((BLOCKS / resident_tiles.max(1)).max(1)).max(LEAST_TILES);
        Ok(Tiling {
            wide,
            resident_tiles,
            splits: tiles.div_ceil(tiles_per_split).max(1),
            tiles_per_split,
            threads: 256,
            shared_bytes: if A::IS_F32 { 0 } else { rows + parts },
        })
    }

    pub(super) fn grid(&self) -> Grid {
        Grid::plane(self.resident_tiles, self.splits, self.threads).shared(self.shared_bytes)
    }
}

/// BM and BN of the kernels: rows of a resident and of a streamed tile.
fn tile_rows<A: Act>(wide: bool) -> [usize; 2] {
    match (A::IS_F32, wide) {
        (true, false) => [64, 64],
        (true, true) => [32, 64],
        (false, false) => [128, 32],
        (false, true) => [32, 16],
    }
}

/// Bytes of workspace for at most so many rows and columns, in both passes, with whatever kernels a GPU takes.
pub(in crate::cuda) fn most_bytes<A: Act>(rows: usize, columns: usize, width: usize) -> usize {
    let [own, tile] = tile_rows::<A>(width > NARROW);
    // Resident rows times splits: splits fill up to BLOCKS tiles of residents, and have at least LEAST_TILES tiles each.
    let portable = |resident: usize, streamed: usize| {
        let splits = streamed.div_ceil(tile).div_ceil(LEAST_TILES);
        resident.max((resident * splits).min(BLOCKS * own))
    };
    let split = |resident: usize, streamed: usize| {
        let hopper = hopper::fits::<A>(width).then(|| hopper::most_rows(resident, streamed, width));
        portable(resident, streamed).max(hopper.unwrap_or(0))
    };
    let (forward, backward) = (split(rows, columns), split(columns, rows));
    let forward = bytes::<f32>(&[forward * 4, forward * width, rows]);
    forward.max(bytes::<f32>(&[backward * 2, backward * width, rows]))
}
