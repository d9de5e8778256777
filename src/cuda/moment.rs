//! Moments in the order of a GPU's work, and the milliseconds between two of them; numbers of the GPU that timings are told with.
//!
//! A moment is a CUDA event with its clock on. The emulator has none: its speed means nothing. Not yet confirmed on a GPU.

use super::{Cuda, Driver};
use crate::error::Result;
use std::sync::Arc;

/// The end of all work queued when it was taken.
pub struct Moment {
    driver: Arc<Driver>,
    event: cudarc::driver::sys::CUevent,
}

// SAFETY: a driver handle that any thread may use whose current context is its own, which every method sees to.
unsafe impl Send for Moment {}

/// What a GPU is, as its driver tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Product name.
    pub name: String,
    /// The driver's CUDA version, 13000 for 13.0.
    pub cuda: i32,
    /// Compute capability times ten.
    pub capability: i32,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of L2 cache.
    pub l2_bytes: usize,
    /// Highest clock of the multiprocessors, MHz.
    pub sm_mhz: usize,
    /// Address on the bus, as `0000:0f:00.0`.
    pub bus: String,
}

impl Cuda {
    /// A moment at the end of all work queued so far.
    ///
    /// # Errors
    /// A driver's failure (4); none on the emulator, where it is `None`.
    pub fn moment(&self) -> Result<Option<Moment>> {
        match &**self.driver() {
            Driver::Gpu(gpu) => {
                let event = gpu.timed_event()?;
                Ok(Some(Moment { driver: Arc::clone(self.driver()), event }))
            }
            #[cfg(emulator)]
            Driver::Emulated(_) => Ok(None),
        }
    }

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// What failed in that work (4).
    pub fn synchronize(&self) -> Result<()> {
        match &**self.driver() {
            Driver::Gpu(gpu) => gpu.synchronize(),
            #[cfg(emulator)]
            Driver::Emulated(_) => Ok(()),
        }
    }

    /// The GPU's own numbers; `None` on the emulator.
    ///
    /// # Errors
    /// A driver's failure (4).
    pub fn facts(&self) -> Result<Option<Facts>> {
        match &**self.driver() {
            Driver::Gpu(gpu) => gpu.facts().map(Some),
            #[cfg(emulator)]
            Driver::Emulated(_) => Ok(None),
        }
    }
}

impl Moment {
    /// Milliseconds since `earlier`; waits for this moment.
    ///
    /// # Errors
    /// What failed in the work before (4).
    pub fn ms_since(&self, earlier: &Moment) -> Result<f64> {
        match &*self.driver {
            Driver::Gpu(gpu) => gpu.ms_between(earlier.event, self.event),
            #[cfg(emulator)]
            Driver::Emulated(_) => unreachable!("the emulator takes no moments"),
        }
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        if let Driver::Gpu(gpu) = &*self.driver {
            gpu.destroy(self.event);
        }
    }
}
