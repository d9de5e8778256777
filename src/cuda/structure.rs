//! The structure term: geometry of `kernels/structure.cu`. Formula in [`crate::ops::structure`].

use super::functions::structure;
use super::{Buf, Cuda, Grid};
use crate::error::{Code, Error, Result};
use crate::ops::structure::{Dims, Structure};

/// Warps of a block; each owns a prototype. Few, because prototypes are few and every multiprocessor should have some.
const WARPS: usize = 4;
/// Shared memory of a block that needs no special permission on any GPU.
const SHARED_BYTES: usize = 48 << 10;

impl Structure for Cuda {
    fn structure(
        &self,
        dims: Dims,
        p: &Buf<f32>,
        jaccard: &Buf<f32>,
        loss: &mut Buf<f32>,
        dp: &mut Buf<f32>,
    ) -> Result<()> {
        let Dims { prototypes, width, c0, c1, scale } = dims;
        let row_bytes = 2 * width.next_multiple_of(8) * 4;
        let warps = (SHARED_BYTES / row_bytes.max(1)).min(WARPS);
        if warps == 0 {
            return Err(Error::new(
                Code::KernelShape,
                "the prototypes are too wide for the structure kernel",
            )
            .found(format!("{row_bytes} bytes of shared memory per prototype"))
            .wanted(format!("at most {SHARED_BYTES}")));
        }
        let pairs = prototypes as f32 * (prototypes.max(2) - 1) as f32;
        let grid = Grid::line(prototypes.div_ceil(warps), 32 * warps as u32).shared(warps * row_bytes);
        let (n, width) = (prototypes as i32, width as i32);
        structure(self, grid, p, jaccard, loss, dp, c0, c1, scale * 4.0 / pairs, n, width)
    }
}
