//! What the copy engine of a Hopper GPU has to know of a matrix: where it lies and which boxes are taken from it.

use super::{Buf, Cuda};
use crate::device::{Element, Len};
use crate::error::{Error, Result};
use half::bf16;

/// A `CUtensorMap`, opaque; in the emulator `cuhost::TensorMap` of `kernels/emulator/runtime.h`.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub struct TensorMap(pub(super) [u64; 16]);

/// A matrix of bf16 in device memory and the box that one `tma_load` takes from it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Boxes {
    pub address: u64,
    pub rows: usize,
    pub columns: usize,
    /// Rows of a box, 256 at most; it has 64 columns, 128 bytes, as the swizzle wants them.
    pub box_rows: usize,
}

/// Columns of a box.
pub(super) const BOX_COLUMNS: usize = 64;

impl Cuda {
    /// A map of `buf` as (rows, columns) of bf16 for boxes of (box_rows, 64).
    ///
    /// # Errors
    /// A refusal of the driver (4); a buffer that holds no such matrix (1).
    pub(super) fn tensor_map<A: Element>(
        &self,
        buf: &Buf<A>,
        rows: usize,
        columns: usize,
        box_rows: usize,
    ) -> Result<TensorMap> {
        if size_of::<A>() != size_of::<bf16>() || buf.len() < rows * columns || !columns.is_multiple_of(8) {
            return Err(Error::bug("a tensor map over what is no matrix of bf16 rows of 16 bytes each"));
        }
        self.driver().tensor_map(Boxes { address: buf.address(), rows, columns, box_rows })
    }
}
