//! Copies of a GPU, its queues, and the events between them.

use super::super::capture::not_recordable;
use super::super::driver::{LaterRead, Point};
use super::super::pinned::Block;
use super::Gpu;
use super::failure::failure;
use crate::device::Queue;
use crate::error::Result;
use cudarc::driver::{result, sys};

fn handle(point: &Point) -> sys::CUevent {
    match point {
        Point::Gpu(event) => *event,
        #[cfg(emulator)]
        Point::Emulated(_) => unreachable!("an event keeps the device that made it"),
    }
}

impl Gpu {
    pub(in crate::cuda) unsafe fn upload(&self, to: u64, host: &[u8]) -> Result<()> {
        // SAFETY: passed on.
        unsafe { self.upload_on(to, host, self.stream) }
    }

    pub(in crate::cuda) unsafe fn upload_beside(&self, to: u64, host: &[u8]) -> Result<()> {
        // SAFETY: passed on.
        unsafe { self.upload_on(to, host, self.copies) }
    }

    /// # Safety
    /// The device range lies within one allocation.
    unsafe fn upload_on(&self, to: u64, host: &[u8], stream: sys::CUstream) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive. A recorded copy would read the page-locked block again when it is replayed.
        let status = unsafe { result::stream::is_capturing(self.stream) };
        match status.map_err(|e| failure("copying to it", e))? {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => {}
            _ => return Err(not_recordable("a copy from the host")),
        }
        // SAFETY: the caller's range.
        unsafe { self.uploads.upload(to, host, stream, &self.patience) }
            .map_err(|e| failure("copying to it", e))
    }

    pub(in crate::cuda) fn queue(&self, queue: Queue) -> sys::CUstream {
        match queue {
            Queue::Compute => self.stream,
            Queue::Copies => self.copies,
            Queue::Sums => self.sums,
        }
    }

    pub(in crate::cuda) fn event(&self) -> Result<Point> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        event.map(Point::Gpu).map_err(|e| failure("making an event", e))
    }

    pub(in crate::cuda) fn record(&self, point: &mut Point, queue: Queue) -> Result<()> {
        self.enter()?;
        // SAFETY: a live event of this GPU's, and one of its streams.
        unsafe { result::event::record(handle(point), self.queue(queue)) }
            .map_err(|e| failure("recording an event", e))
    }

    pub(in crate::cuda) fn wait(&self, point: &Point, queue: Queue) -> Result<()> {
        self.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: a live event of this GPU's, and one of its streams.
        unsafe { result::stream::wait_event(self.queue(queue), handle(point), flags) }
            .map_err(|e| failure("waiting for an event", e))
    }

    pub(in crate::cuda) fn destroy(&self, event: sys::CUevent) {
        if self.enter().is_ok() {
            // SAFETY: made by `event`, used by nobody any more; work that waits for it keeps what it needs.
            let _ = unsafe { result::event::destroy(event) };
        }
    }

    pub(in crate::cuda) unsafe fn download(&self, from: u64, host: &mut [u8]) -> Result<()> {
        self.enter()?;
        if self.patience.ends() {
            // A copy to memory that is not page-locked waits in the driver, without end.
            self.synchronize()?;
        }
        // SAFETY: the caller's range; the stream is waited for before `host` is used again.
        unsafe { result::memcpy_dtoh_async(host, from, self.stream) }
            .map_err(|e| failure("copying from it", e))?;
        self.synchronize()
    }

    pub(in crate::cuda) unsafe fn read_later(&self, from: u64, bytes: usize) -> Result<LaterRead> {
        self.enter()?;
        // SAFETY: the caller's range, on this GPU's stream.
        unsafe { self.reads.begin(from, bytes, self.stream) }
            .map(LaterRead::Gpu)
            .map_err(|e| failure("copying from it", e))
    }

    pub(in crate::cuda) fn finish_read(&self, block: Block, host: &mut [u8]) -> Result<()> {
        self.enter()?;
        self.reads.finish(block, host, &self.patience).map_err(|e| failure("copying from it", e))
    }

    pub(in crate::cuda) fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive.
        let sleep = || unsafe { result::stream::synchronize(self.stream) };
        // SAFETY: as above.
        let ask = || unsafe { sys::cuStreamQuery(self.stream) }.result();
        self.patience.wait(sleep, ask).map_err(|e| failure("finishing its work", e))
    }

    pub(in crate::cuda) unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's range.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }
            .map_err(|e| failure("clearing memory", e))
    }

    pub(in crate::cuda) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the caller's ranges.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|e| failure("copying within it", e))
    }
}
