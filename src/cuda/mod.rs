//! The CUDA backend: hand-written kernels (`kernels/*.cu`) behind the ops of [`crate::ops`].
//!
//! One file per op, holding the launch geometry and the call. [`Driver`] is a GPU (cudarc, libraries loaded at run time) or
//! the emulator, which runs the same kernels as host C++: same geometry, same argument lists. See `docs/kernels.md`.

mod adamw;
mod anchor;
mod buffer;
mod capture;
#[cfg(emulator)]
mod copy_queue;
pub mod cublas;
mod driver;
mod embed;
#[cfg(emulator)]
mod emulated;
mod functions;
mod gene_attention;
pub mod gpu;
#[cfg(emulator)]
mod host_memory;
mod layernorm;
mod linear;
mod mask_tokens;
mod moment;
#[cfg(feature = "nccl")]
mod nccl;
mod normalize;
mod pinned;
mod pool;
mod prototype_loss;
mod reduce;
mod rows;
mod sort;
mod structure;
mod tensor_map;
#[cfg(test)]
#[path = "../../tests/toy_kernel/mod.rs"]
mod toy_kernel;
mod workspace;

pub use buffer::Buf;
pub use capture::Graph;
pub use driver::{Driver, Event, Grid, Traffic, traffic};
#[cfg(emulator)]
pub use emulated::{Arch, Schedule};
pub use functions::Dropout as DropoutArgument;
pub use moment::{Facts, Moment};

#[cfg(feature = "nccl")]
use crate::collective::Collective;
#[cfg(feature = "nccl")]
use crate::collective::Piece;
use crate::device::{Act, Device, Dropout, Element, Later, Len, Queue, StepSizes};
use crate::error::Result;
use crate::rng;
use std::ops::Range;
use std::sync::Arc;
pub use workspace::step_bytes;
use workspace::{Arena, Workspace};

/// How many kernels this build holds.
pub fn kernel_count() -> usize {
    functions::KERNELS.len()
}

/// A GPU or the emulator of one, with a workspace for what kernels hand to one another. Cheap to clone.
///
/// Ops of one device run in the order in which they are called; handles may move between threads.
#[derive(Clone)]
pub struct Cuda(Arc<Shared>);

struct Shared {
    // The arena goes before the driver that owns its memory.
    arena: Arena,
    /// Made by the first sum over ranks that goes through NCCL; goes before the driver as well.
    #[cfg(feature = "nccl")]
    nccl: std::sync::Mutex<Option<nccl::Communicator>>,
    driver: Arc<Driver>,
}

impl Cuda {
    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// No GPU code in this build, no driver, an old driver, no such GPU (4).
    pub fn open(ordinal: usize) -> Result<Self> {
        let gpu = gpu::Gpu::open(ordinal)?;
        crate::trace::to_nvtx();
        Ok(Self::over(Driver::Gpu(gpu)))
    }

    /// The emulator: no GPU needed. The schedule comes from CELLREFINE_EMULATOR_SCHEDULE (`late`, `reversed`, `eager`),
    /// and else is `late`.
    ///
    /// # Errors
    /// A schedule of another name, a CELLREFINE_EMULATOR_MEMORY that is no number (2); a CELLREFINE_EMULATOR_LIBRARY that
    /// cannot be loaded (3).
    #[cfg(emulator)]
    pub fn emulated() -> Result<Self> {
        Self::emulated_with(Schedule::from_environment()?)
    }

    /// The emulator with a schedule of the caller's choice.
    ///
    /// # Errors
    /// As [`Cuda::emulated`].
    #[cfg(emulator)]
    pub fn emulated_with(schedule: Schedule) -> Result<Self> {
        Self::emulated_gpu(schedule, Arch::from_environment()?)
    }

    /// The emulator as a GPU of one architecture or the other: which kernels it takes where both have some.
    ///
    /// # Errors
    /// As [`Cuda::emulated`].
    #[cfg(emulator)]
    pub fn emulated_gpu(schedule: Schedule, arch: Arch) -> Result<Self> {
        Ok(Self::over(Driver::Emulated(emulated::Emulated::open(schedule, arch)?)))
    }

    fn over(driver: Driver) -> Self {
        Cuda(Arc::new(Shared {
            arena: Arena::default(),
            #[cfg(feature = "nccl")]
            nccl: std::sync::Mutex::default(),
            driver: Arc::new(driver),
        }))
    }

    /// Runs `queue` over NCCL where `ranks` ask for it and this is a GPU; `None` where the host carries floats between ranks.
    #[cfg(feature = "nccl")]
    fn over_nccl(
        &self,
        ranks: &Collective,
        queue: impl FnOnce(&nccl::Communicator, &gpu::Gpu) -> Result<()>,
    ) -> Option<Result<()>> {
        let Driver::Gpu(gpu) = &**self.driver() else { return None };
        if !ranks.uses_nccl() {
            return None;
        }
        let mut link = self.0.nccl.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let met = match link.take() {
            Some(met) => Ok(met),
            None => nccl::Communicator::meet(gpu, ranks),
        };
        Some(met.and_then(|met| queue(link.insert(met), gpu)))
    }

    /// Does this device run the kernels for compute capability 9.0?
    pub fn is_hopper(&self) -> bool {
        self.driver().is_hopper()
    }

    /// What runs the kernels.
    pub fn driver(&self) -> &Arc<Driver> {
        &self.0.driver
    }

    /// Memory for the intermediate results of one op call; its content is undefined. An op takes it once.
    fn workspace(&self) -> Workspace<'_> {
        self.0.arena.lock(&self.0.driver)
    }
}

/// What kernels compare Philox lanes with.
impl From<Dropout> for DropoutArgument {
    fn from(d: Dropout) -> Self {
        DropoutArgument {
            seed: d.seed,
            first_row: d.first_row,
            step: d.step,
            site: d.site,
            threshold: rng::dropout_threshold(d.probability),
            scale: rng::dropout_scale(d.probability),
        }
    }
}

impl Device for Cuda {
    type Buf<T: Element> = Buf<T>;
    type Event = Event;

    fn name(&self) -> String {
        self.driver().name()
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buf<T>> {
        let mut buf = Buf::allocate(self.driver(), len)?;
        self.clear(&mut buf)?;
        Ok(buf)
    }

    fn write<T: Element>(&self, buf: &mut Buf<T>, host: &[T]) -> Result<()> {
        buf.check_room(host.len())?;
        // SAFETY: the buffer holds at least that many bytes on this driver's device.
        unsafe { self.driver().upload(buf.address(), bytemuck::cast_slice(host)) }
    }

    fn event(&self, queue: Queue) -> Result<Event> {
        Event::new(self.driver(), queue)
    }

    fn record(&self, event: &mut Event, queue: Queue) -> Result<()> {
        event.record(queue)
    }

    fn wait(&self, event: &Event, queue: Queue) -> Result<()> {
        event.wait(queue)
    }

    fn write_beside<T: Element>(&self, buf: &mut Buf<T>, host: &[T]) -> Result<()> {
        buf.check_room(host.len())?;
        // SAFETY: the buffer holds at least that many bytes on this driver's device.
        unsafe { self.driver().upload_beside(buf.address(), bytemuck::cast_slice(host)) }
    }

    fn read<T: Element>(&self, buf: &Buf<T>, host: &mut [T]) -> Result<()> {
        buf.check_room(host.len())?;
        // SAFETY: as in `write`.
        unsafe { self.driver().download(buf.address(), bytemuck::cast_slice_mut(host)) }
    }

    fn reserve<A: Act>(&self, sizes: &StepSizes) -> Result<()> {
        self.workspace().reserve(step_bytes::<A>(sizes, self.is_hopper()))
    }

    fn read_later<T: Element>(&self, buf: &Buf<T>) -> Result<Later<T>> {
        // SAFETY: the range is the buffer's own.
        let read = unsafe { self.driver().read_later(buf.address(), buf.bytes()) }?;
        let (driver, len) = (Arc::clone(self.driver()), buf.len());
        Ok(Box::new(move || {
            let mut host = vec![bytemuck::Zeroable::zeroed(); len];
            driver.finish_read(read, bytemuck::cast_slice_mut(&mut host))?;
            Ok(host)
        }))
    }

    fn clear<T: Element>(&self, buf: &mut Buf<T>) -> Result<()> {
        // SAFETY: the range is the buffer's own.
        unsafe { self.driver().clear(buf.address(), buf.bytes()) }
    }

    fn copy<T: Element>(&self, from: &Buf<T>, to: &mut Buf<T>, len: usize) -> Result<()> {
        from.check_room(len)?;
        to.check_room(len)?;
        // SAFETY: both hold `len` elements; `to` is borrowed mutably, so they are two buffers.
        unsafe { self.driver().copy(from.address(), to.address(), len * size_of::<T>()) }
    }

    #[cfg(feature = "nccl")]
    fn queues_sums(&self, ranks: &Collective) -> bool {
        matches!(&**self.driver(), Driver::Gpu(_)) && ranks.uses_nccl()
    }

    #[cfg(feature = "nccl")]
    fn sum(&self, ranks: &Collective, buf: &mut Buf<f32>, piece: &Piece, queue: Queue) -> Result<()> {
        buf.check_room(piece.range.end)?;
        // SAFETY: the buffer holds the piece on this driver's device.
        let queued = self.over_nccl(ranks, |nccl, gpu| unsafe { nccl.sum(gpu, buf.address(), piece, queue) });
        queued.unwrap_or_else(|| crate::device::sum_staged(self, ranks, buf, piece))
    }

    #[cfg(feature = "nccl")]
    fn all_gather(&self, ranks: &Collective, buf: &mut Buf<f32>, ranges: &[Range<usize>]) -> Result<()> {
        buf.check_room(ranges.iter().map(|range| range.end).max().unwrap_or(0))?;
        // SAFETY: the buffer holds all ranges on this driver's device.
        let queued =
            self.over_nccl(ranks, |nccl, gpu| unsafe { nccl.all_gather(gpu, buf.address(), ranges) });
        queued.unwrap_or_else(|| crate::device::all_gather_staged(self, ranks, buf, ranges))
    }

    unsafe fn part<T: Element>(&self, buf: &Buf<T>, range: Range<usize>) -> Buf<T> {
        // SAFETY: the caller keeps the two handles from being used at once, as this function's contract asks.
        unsafe { buf.part(range) }
    }
}
