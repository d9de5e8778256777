//! One driver for the GPU and for the emulator: memory, copies, launches, all in the order in which they are called, except
//! uploads on the queue of copies, which run beside the rest, as far as events allow.

use super::functions::Kernel;
use super::tensor_map::{Boxes, TensorMap};
use crate::device::Queue;
use crate::error::Result;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Launch geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks: x, y, z.
    pub blocks: [u32; 3],
    /// Threads of a block: x, y, z.
    pub threads: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// All blocks are resident at once, and may wait for one another: at most [`Driver::multiprocessors`] of them.
    pub cooperative: bool,
}

impl Grid {
    /// `blocks` blocks of `threads` threads, in one dimension.
    pub fn line(blocks: usize, threads: u32) -> Self {
        Self::plane(blocks, 1, threads)
    }
    /// `x` by `y` blocks of `threads` threads.
    pub fn plane(x: usize, y: usize, threads: u32) -> Self {
        Grid {
            blocks: [x as u32, y as u32, 1],
            threads: [threads, 1, 1],
            shared_bytes: 0,
            cooperative: false,
        }
    }
    /// With so much dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Grid { shared_bytes: bytes as u32, ..self }
    }
    /// As a cooperative launch.
    pub fn cooperative(self) -> Self {
        Grid { cooperative: true, ..self }
    }
    /// No block at all: nothing to launch.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.contains(&0)
    }
}

/// What this process has asked of its devices so far, all together: what may stop a device, or the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// Memory allocated.
    pub allocations: u64,
    /// Copies from the host.
    pub uploads: u64,
    /// Copies to the host that were waited for, and with them all work before.
    pub downloads: u64,
    /// Copies to the host that were only queued.
    pub later_reads: u64,
}

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static UPLOADS: AtomicU64 = AtomicU64::new(0);
static DOWNLOADS: AtomicU64 = AtomicU64::new(0);
static LATER_READS: AtomicU64 = AtomicU64::new(0);

/// The counts now.
pub fn traffic() -> Traffic {
    Traffic {
        allocations: ALLOCATIONS.load(Relaxed),
        uploads: UPLOADS.load(Relaxed),
        downloads: DOWNLOADS.load(Relaxed),
        later_reads: LATER_READS.load(Relaxed),
    }
}

/// `match`es on the driver and calls the same method.
macro_rules! each {
    ($self:expr, $driver:ident => $call:expr) => {
        match $self {
            Driver::Gpu($driver) => $call,
            #[cfg(emulator)]
            Driver::Emulated($driver) => $call,
        }
    };
}

/// A point in the order of a queue.
pub struct Event {
    driver: Arc<Driver>,
    point: Point,
}

/// What a driver knows of it.
pub(super) enum Point {
    Gpu(cudarc::driver::sys::CUevent),
    #[cfg(emulator)]
    Emulated(super::copy_queue::Point),
}

// SAFETY: a driver handle that any thread may use whose current context is its own, which every method sees to.
unsafe impl Send for Event {}
// SAFETY: as above; an event is moved by `&mut` alone.
unsafe impl Sync for Event {}

impl Event {
    /// At the end of all work queued so far.
    pub(super) fn new(driver: &Arc<Driver>, queue: Queue) -> Result<Self> {
        let point = each!(&**driver, d => d.event()?);
        let mut event = Event { driver: Arc::clone(driver), point };
        event.record(queue)?;
        Ok(event)
    }

    /// Moves it to the end of all work queued so far.
    pub(super) fn record(&mut self, queue: Queue) -> Result<()> {
        each!(&*self.driver, d => d.record(&mut self.point, queue))
    }

    /// Holds back what is queued on `queue` from now on.
    pub(super) fn wait(&self, queue: Queue) -> Result<()> {
        each!(&*self.driver, d => d.wait(&self.point, queue))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let (Driver::Gpu(gpu), Point::Gpu(event)) = (&*self.driver, &self.point) {
            gpu.destroy(*event);
        }
    }
}

/// A copy to the host that was queued.
pub(super) enum LaterRead {
    Gpu(super::pinned::Block),
    /// As it was when it was queued: launches are over when they return.
    #[cfg(emulator)]
    Emulated(Vec<u8>),
}

/// What runs the kernels.
pub enum Driver {
    /// An NVIDIA GPU.
    Gpu(super::gpu::Gpu),
    /// The kernels as host C++.
    #[cfg(emulator)]
    Emulated(super::emulated::Emulated),
}

impl Driver {
    /// What `doctor` and the run record call it.
    pub fn name(&self) -> String {
        each!(self, d => d.name())
    }

    /// Does it run the kernels for compute capability 9.0?
    pub fn is_hopper(&self) -> bool {
        each!(self, d => d.is_hopper())
    }

    /// Blocks that run at once when each takes a multiprocessor of its own.
    pub fn multiprocessors(&self) -> usize {
        each!(self, d => d.multiprocessors())
    }

    /// What `tma_load` needs to know of a matrix.
    ///
    /// # Errors
    /// A matrix that the copy engine cannot take (4).
    pub(super) fn tensor_map(&self, boxes: Boxes) -> Result<TensorMap> {
        each!(self, d => d.tensor_map(boxes))
    }

    /// `bytes` of memory with undefined content; at least 1.
    ///
    /// # Errors
    /// Out of memory (4).
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        ALLOCATIONS.fetch_add(1, Relaxed);
        each!(self, d => d.allocate(bytes))
    }

    /// Returns memory behind all work that was queued before.
    ///
    /// # Safety
    /// `address` came from `allocate` of this driver, and nothing called later uses it.
    pub(super) unsafe fn free(&self, address: u64) {
        // SAFETY: passed on.
        each!(self, d => unsafe { d.free(address) })
    }

    /// Host to device. `host` may be reused at once.
    ///
    /// # Safety
    /// The device range lies within one allocation.
    pub(super) unsafe fn upload(&self, to: u64, host: &[u8]) -> Result<()> {
        UPLOADS.fetch_add(1, Relaxed);
        // SAFETY: passed on.
        each!(self, d => unsafe { d.upload(to, host) })
    }

    /// Host to device on the queue of copies. `host` may be reused at once.
    ///
    /// # Safety
    /// The device range lies within one allocation.
    pub(super) unsafe fn upload_beside(&self, to: u64, host: &[u8]) -> Result<()> {
        UPLOADS.fetch_add(1, Relaxed);
        // SAFETY: passed on.
        each!(self, d => unsafe { d.upload_beside(to, host) })
    }

    /// Device to host, behind all work that was queued before; waits for it.
    ///
    /// # Safety
    /// The device range lies within one allocation.
    pub(super) unsafe fn download(&self, from: u64, host: &mut [u8]) -> Result<()> {
        DOWNLOADS.fetch_add(1, Relaxed);
        // SAFETY: passed on.
        each!(self, d => unsafe { d.download(from, host) })
    }

    /// Queues a copy of a few bytes to the host, behind all work that was queued before; waits for nothing.
    ///
    /// # Safety
    /// The device range lies within one allocation.
    pub(super) unsafe fn read_later(&self, from: u64, bytes: usize) -> Result<LaterRead> {
        LATER_READS.fetch_add(1, Relaxed);
        // SAFETY: passed on.
        each!(self, d => unsafe { d.read_later(from, bytes) })
    }

    /// Waits for a queued copy, and for no work behind it; fills `host`, of as many bytes.
    pub(super) fn finish_read(&self, read: LaterRead, host: &mut [u8]) -> Result<()> {
        match (self, read) {
            (Driver::Gpu(gpu), LaterRead::Gpu(block)) => gpu.finish_read(block, host),
            #[cfg(emulator)]
            (_, LaterRead::Emulated(bytes)) => {
                host.copy_from_slice(&bytes);
                Ok(())
            }
            #[cfg(emulator)]
            _ => unreachable!("a read keeps the device that queued it"),
        }
    }

    /// Zeros.
    ///
    /// # Safety
    /// The range lies within one allocation.
    pub(super) unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: passed on.
        each!(self, d => unsafe { d.clear(at, bytes) })
    }

    /// Device to device.
    ///
    /// # Safety
    /// The ranges lie within allocations and do not overlap.
    pub(super) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: passed on.
        each!(self, d => unsafe { d.copy(from, to, bytes) })
    }

    /// Marks memory of undefined content, where that costs nothing that matters: NaN in the emulator.
    pub(super) fn poison(&self, at: u64, bytes: usize) {
        each!(self, d => d.poison(at, bytes))
    }

    /// Queues a kernel, compiled for activation type `act` (an index of [`super::functions::act_index`]). An empty grid is no
    /// launch.
    ///
    /// # Safety
    /// `arguments` points to one live value per parameter of the kernel, of its type, of `sizes` bytes; buffers lie on this
    /// driver's device and are as long as the kernel's dimensions say.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        act: usize,
        grid: Grid,
        arguments: &[*mut c_void],
        sizes: &[usize],
    ) -> Result<()> {
        debug_assert_eq!(arguments.len(), sizes.len());
        if grid.is_empty() {
            return Ok(());
        }
        // SAFETY: passed on.
        each!(self, d => unsafe { d.launch(kernel, act, grid, arguments, sizes) })
    }
}
