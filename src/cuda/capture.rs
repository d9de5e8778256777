//! Graphs: the work of a training step, recorded once and replayed in one call.
//!
//! ```text
//! let graph = cuda.capture(|| step(&cuda))?;      // the step's work is recorded, not run
//! graph.replay()?;                                // runs it: same buffers, same numbers as when it was recorded
//! ```
//! On a GPU this is a CUDA graph. The emulator keeps a list and runs it, so that a step that works only while it is not
//! recorded (because memory moves, or a number changes) fails without a GPU too.

use super::Cuda;
use super::driver::Driver;
use crate::error::{Error, Result};

/// Recorded work. It uses the buffers that it was recorded with, which have to outlive it.
pub struct Graph {
    cuda: Cuda,
    recorded: Recorded,
}

/// What a driver keeps.
enum Recorded {
    Gpu(super::gpu::Graph),
    #[cfg(emulator)]
    Emulated(super::emulated::Graph),
}

impl Cuda {
    /// Records what `work` queues on this device, instead of running it. `work` neither allocates nor copies from or to the
    /// host; the workspace has grown to its size before, by the same work done once without recording.
    ///
    /// # Errors
    /// What `work` returns; work that cannot be recorded (1).
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let recorded = match &**self.driver() {
            Driver::Gpu(gpu) => Recorded::Gpu(gpu.capture(work)?),
            #[cfg(emulator)]
            Driver::Emulated(emulated) => Recorded::Emulated(emulated.capture(work)?),
        };
        Ok(Graph { cuda: self.clone(), recorded })
    }
}

impl Graph {
    /// Queues the recorded work.
    ///
    /// # Errors
    /// A failed launch.
    pub fn replay(&self) -> Result<()> {
        match (&**self.cuda.driver(), &self.recorded) {
            (Driver::Gpu(gpu), Recorded::Gpu(graph)) => gpu.replay(graph),
            #[cfg(emulator)]
            (Driver::Emulated(emulated), Recorded::Emulated(graph)) => emulated.replay(graph),
            #[cfg(emulator)]
            _ => unreachable!("a graph keeps the device that recorded it"),
        }
    }
}

/// The answer to what a recording cannot hold.
pub(super) fn not_recordable(what: &str) -> Error {
    Error::bug(format!("{what} while work is being recorded"))
        .wanted("launches, clears and copies on the device alone")
        .next("do the same work once before it is recorded, so that all memory is there")
}
