//! Page-locked host memory, which a GPU copies from and to by itself, while the host goes on. Not yet confirmed on a GPU.

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

    /// Waits until its last copy is done; at once where there was none.
    fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: a live event.
        unsafe { result::event::synchronize(self.done) }
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
    pub(super) fn finish(&self, block: Block, host: &mut [u8]) -> Result<(), DriverError> {
        block.wait()?;
        // SAFETY: as many bytes were copied, and the copy is done.
        host.copy_from_slice(unsafe { std::slice::from_raw_parts(block.host, host.len()) });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(block);
        Ok(())
    }

    /// Frees the blocks; no copy is on its way.
    pub(super) fn free(&mut self) {
        for block in self.0.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: made by `Block::new`, used by nobody any more. Errors have no remedy here.
            unsafe {
                let _ = result::event::destroy(block.done);
                let _ = result::free_host(block.host.cast());
            }
        }
    }
}
