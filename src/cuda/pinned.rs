//! Page-locked host memory, which a GPU copies from and to by itself, while the host goes on. Not yet confirmed on a GPU.

use super::gpu::Patience;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::sync::{Mutex, PoisonError};

/// Page-locked memory with the event behind its last copy.
pub(super) struct Block {
    host: *mut u8,
    bytes: usize,
    done: sys::CUevent,
}

// SAFETY: plain memory of one owner, and a driver handle that any thread may use.
unsafe impl Send for Block {}

impl Block {
    /// Allocates; the context is the calling thread's, here and below.
    fn new(bytes: usize) -> Result<Self, DriverError> {
        // SAFETY: a fresh allocation, not write-combined, since the host reads it.
        let host = unsafe { result::malloc_host(bytes, 0) }?.cast();
        let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        Ok(Block { host, bytes, done })
    }

    /// Frees it; no copy is on its way.
    fn free(self) {
        // SAFETY: made by `new`, used by nobody any more. Errors have no remedy here.
        unsafe {
            let _ = result::event::destroy(self.done);
            let _ = result::free_host(self.host.cast());
        }
    }

    /// Waits until its last copy is done; at once where there was none.
    fn wait(&self, patience: &Patience) -> Result<(), DriverError> {
        // SAFETY: a live event.
        let sleep = || unsafe { result::event::synchronize(self.done) };
        // SAFETY: as above.
        let ask = || unsafe { result::event::query(self.done) };
        patience.wait(sleep, ask)
    }
}

/// Blocks for small reads that the host asks for later.
#[derive(Default)]
pub(super) struct Reads(Mutex<Vec<Block>>);

impl Reads {
    /// Queues a copy of `bytes` at `from` to a block.
    ///
    /// # Safety
    /// The range lies within one allocation; `stream` is alive.
    pub(super) unsafe fn begin(
        &self,
        from: u64,
        bytes: usize,
        stream: sys::CUstream,
    ) -> Result<Block, DriverError> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match free.iter().position(|block| block.bytes >= bytes) {
            Some(at) => free.swap_remove(at),
            None => Block::new(bytes)?,
        };
        // SAFETY: the block is this read's alone, and is not looked at before the event behind the copy.
        unsafe {
            let host = std::slice::from_raw_parts_mut(block.host, bytes);
            result::memcpy_dtoh_async(host, from, stream)?;
            result::event::record(block.done, stream)?;
        }
        Ok(block)
    }

    /// Waits for the copy and hands it over. (A block whose read is never finished is lost: the run has failed.)
    pub(super) fn finish(
        &self,
        block: Block,
        host: &mut [u8],
        patience: &Patience,
    ) -> Result<(), DriverError> {
        block.wait(patience)?;
        // SAFETY: as many bytes were copied, and the copy is done.
        host.copy_from_slice(unsafe { std::slice::from_raw_parts(block.host, host.len()) });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        Ok(())
    }

    /// Frees the blocks; no copy is on its way.
    pub(super) fn free(&mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(Block::free);
    }
}

/// Blocks of a ring, and bytes of one: several steps' batches, so that the host waits for a copy only when it is steps ahead.
const BLOCKS: usize = 64;
const BLOCK_BYTES: usize = 256 << 10;

/// Blocks that uploads pass through in turn; each is made when its turn comes first.
#[derive(Default)]
pub(super) struct Ring(Mutex<(Vec<Block>, usize)>);

impl Ring {
    /// Queues the copy of `host` to the device; `host` may be reused at once.
    ///
    /// # Safety
    /// The device range lies within one allocation; `stream` is alive.
    pub(super) unsafe fn upload(
        &self,
        to: u64,
        host: &[u8],
        stream: sys::CUstream,
        patience: &Patience,
    ) -> Result<(), DriverError> {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (blocks, turn) = &mut *ring;
        for (i, part) in host.chunks(BLOCK_BYTES).enumerate() {
            if blocks.len() < BLOCKS {
                blocks.push(Block::new(BLOCK_BYTES)?);
                *turn = blocks.len() - 1;
            }
            let block = &blocks[*turn];
            *turn = (*turn + 1) % BLOCKS;
            block.wait(patience)?;
            // SAFETY: the block's last copy is done, and nobody else writes to it under this lock; the copy is queued, and the
            // event behind it, before the block's next turn.
            unsafe {
                let staged = std::slice::from_raw_parts_mut(block.host, part.len());
                staged.copy_from_slice(part);
                result::memcpy_htod_async(to + (i * BLOCK_BYTES) as u64, staged, stream)?;
                result::event::record(block.done, stream)?;
            }
        }
        Ok(())
    }

    /// Frees the blocks; no copy is on its way.
    pub(super) fn free(&mut self) {
        let (blocks, _) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        blocks.drain(..).for_each(Block::free);
    }
}
