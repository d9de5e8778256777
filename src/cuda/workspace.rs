//! Memory that kernels of one op call hand to one another: partial sums, sorted indices.
//!
//! Calls run in stream order, so all of them share one block, which grows to the largest need and stays. Growing is an
//! allocation: it happens in the first steps, before a graph is captured, never inside one.

use super::{Buf, Driver};
use crate::device::{Element, Len};
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
        let mut bytes = 0;
        let starts = lens.map(|len| {
            let start = bytes;
            bytes += (len * size_of::<T>()).next_multiple_of(ALIGN);
            start
        });
        if self.block.as_ref().is_none_or(|b| b.len() < bytes) {
            // The old block is freed behind the kernels that still use it.
            *self.block = None;
            let refused = |e: Error| match e.is_out_of_memory() {
                true => e.at(format!("what kernels work in, on {}", self.driver.name())),
                false => e,
            };
            *self.block = Some(Buf::allocate(self.driver, bytes).map_err(refused)?);
        }
        let Some(block) = self.block.as_ref() else { unreachable!("just made") };
        self.driver.poison(block.address(), bytes);
        let mut parts = starts.iter().zip(&lens).map(|(start, len)| {
            // SAFETY: the parts are disjoint, and the lock keeps other calls from taking the block until this one has
            // queued its kernels.
            let part = unsafe { block.part(*start..start + len * size_of::<T>()).cast() };
            part.unwrap_or_else(|| unreachable!("starts are multiples of {ALIGN}"))
        });
        Ok(std::array::from_fn(|_| parts.next().unwrap_or_else(|| unreachable!("as many parts as lengths"))))
    }
}
