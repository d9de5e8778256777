//! Memory that kernels of one op call hand to one another: partial sums, sorted indices.
//!
//! Calls run in stream order, so all of them share one block, which grows to the largest need and stays. A training run reserves
//! what its steps need at most ([`step_bytes`]), so that no step allocates; else the block grows in the first calls.

use super::{Buf, Driver, embed, gene_attention, layernorm, linear, mask_tokens, prototype_loss, reduce};
use crate::device::{Act, Element, Len, StepSizes};
use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A part starts at a multiple of this.
const ALIGN: usize = 256;

/// The block, kept between calls.
#[derive(Default)]
pub(super) struct Arena(Mutex<Option<Buf<u8>>>);

impl Arena {
    pub(super) fn lock<'a>(&'a self, driver: &'a Arc<Driver>) -> Workspace<'a> {
        // A panic elsewhere leaves the block as good as it was: its content is undefined anyway.
        Workspace { block: self.0.lock().unwrap_or_else(PoisonError::into_inner), driver }
    }
}

/// The block, for the duration of one op call.
pub(super) struct Workspace<'a> {
    block: MutexGuard<'a, Option<Buf<u8>>>,
    driver: &'a Arc<Driver>,
}

impl Workspace<'_> {
    /// One buffer of `len` elements; its content is undefined (NaN in the emulator).
    ///
    /// # Errors
    /// Out of device memory (4).
    pub(super) fn one<T: Element>(&mut self, len: usize) -> Result<Buf<T>> {
        let [part] = self.parts([len])?;
        Ok(part)
    }

    /// Disjoint buffers of the given lengths.
    ///
    /// # Errors
    /// Out of device memory (4).
    pub(super) fn parts<T: Element, const N: usize>(&mut self, lens: [usize; N]) -> Result<[Buf<T>; N]> {
        let mut end = 0;
        let starts = lens.map(|len| {
            let start = end;
            end += bytes::<T>(&[len]);
            start
        });
        self.reserve(end)?;
        let Some(block) = self.block.as_ref() else { unreachable!("just made") };
        self.driver.poison(block.address(), end);
        let mut parts = starts.iter().zip(&lens).map(|(start, len)| {
            // SAFETY: the parts are disjoint, and the lock keeps other calls from taking the block until this one has
            // queued its kernels.
            let part = unsafe { block.part(*start..start + len * size_of::<T>()).cast() };
            part.unwrap_or_else(|| unreachable!("starts are multiples of {ALIGN}"))
        });
        Ok(std::array::from_fn(|_| parts.next().unwrap_or_else(|| unreachable!("as many parts as lengths"))))
    }

    /// Grows the block to at least so many bytes.
    ///
    /// # Errors
    /// Out of device memory (4).
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<()> {
        if self.block.as_ref().is_none_or(|b| b.len() < bytes) {
            // The old block is freed behind the kernels that still use it.
            *self.block = None;
            let refused = |e: Error| match e.is_out_of_memory() {
                true => e.at(format!("what kernels work in, on {}", self.driver.name())),
                false => e,
            };
            *self.block = Some(Buf::allocate(self.driver, bytes).map_err(refused)?);
        }
        Ok(())
    }
}

/// Bytes of parts of these lengths.
pub(super) fn bytes<T: Element>(lens: &[usize]) -> usize {
    lens.iter().map(|len| (len * size_of::<T>()).next_multiple_of(ALIGN)).sum()
}

/// The most that any op of a training step works in, whatever part of `s` the step fills, on a Hopper GPU or another.
pub fn step_bytes<A: Act>(s: &StepSizes, hopper: bool) -> usize {
    let (tokens, cells) = (s.tokens, s.cells);
    let softmax = |rows, columns| prototype_loss::most_bytes::<A>(rows, columns, s.width);
    let f32_softmax = |rows, columns| prototype_loss::most_bytes::<f32>(rows, columns, s.width);
    let ops = [
        embed::most_bytes(tokens, s.width),
        gene_attention::most_bytes::<A>(tokens, cells, s.heads, hopper && s.width == 64 * s.heads),
        layernorm::most_bytes(tokens, s.width),
        linear::most_bytes(tokens, (3 * s.width).max(s.ffn)),
        mask_tokens::most_bytes(tokens),
        reduce::most_bytes(s.parameters.max(s.types * (s.width + 1)).max(tokens)),
        softmax(s.masked, s.vocab),
        // Of the objective and the classifier: rows are cells, columns prototypes, classes or cells.
        f32_softmax(s.batch_cells, s.types),
        f32_softmax(s.batch_cells, if s.types > 0 { s.batch_cells } else { 0 }),
    ];
    ops.into_iter().max().unwrap_or(0)
}
