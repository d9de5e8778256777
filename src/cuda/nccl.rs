//! Sums and gathers of device memory over ranks through NCCL, queued behind the kernels that made it: the host waits for nothing.
//!
//! libnccl is loaded when a run asks for it. Its communicator is made from an id that the leading rank draws and the ranks'
//! [`Collective`] passes on, so whatever brings the ranks together brings NCCL's together. The order of a sum is NCCL's own: the
//! same bits on every rank, and at every repeat on the same machines, but not those of the other transports.
//!
//! A rank that dies within a sum is noticed by the next exchange of the host, or, by a host that waits for its GPU until then, when
//! the ranks' time-out has passed ([`Patience`](super::gpu::Patience)). Not yet measured on several GPUs.

use super::gpu::Gpu;
use crate::collective::{Collective, Piece};
use crate::device::Queue;
use crate::error::{Code, Error, Result};
use cudarc::nccl::result::{self, NcclError};
use cudarc::nccl::sys;
use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// This rank's end of NCCL.
pub(super) struct Communicator {
    link: Arc<Link>,
    world: usize,
}

/// Its handle, and whether it was given up.
struct Link {
    handle: sys::ncclComm_t,
    aborted: AtomicBool,
}

// SAFETY: NCCL allows a communicator to be used from any thread, by one at a time; the device's lock sees to that. It may be
// aborted by another at any time, which `Link::abort` does once.
unsafe impl Send for Link {}
// SAFETY: as above.
unsafe impl Sync for Link {}

impl Link {
    /// Ends what is queued, and never waits for other ranks.
    fn abort(&self) {
        if !self.aborted.swap(true, Relaxed) {
            // SAFETY: made by `meet`, aborted once; `Communicator::handle` gives it out no more.
            let _ = unsafe { result::comm_abort(self.handle) };
        }
    }
}

impl Communicator {
    /// Meets the other ranks' GPUs.
    ///
    /// # Errors
    /// Environment (4): no libnccl, or what NCCL reports.
    pub fn meet(gpu: &Gpu, ranks: &Collective) -> Result<Communicator> {
        // SAFETY: only opens a library by name.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(Code::RankConnection, "NCCL cannot be loaded")
                .found("no libnccl.so.2")
                .next("install NCCL 2 for CUDA 13, or --collective tcp"));
        }
        let id = ranks.lead(|| {
            let id = result::get_uniqueid().map_err(|e| failure("drawing an id", &e))?;
            Ok(bytemuck::cast_slice::<c_char, u8>(&id.internal).to_vec())
        })?;
        let mut internal = [0 as c_char; 128];
        let bytes: &[c_char] = bytemuck::cast_slice(&id);
        if bytes.len() != internal.len() {
            return Err(Error::bug("an id of NCCL has another length").found(bytes.len()));
        }
        internal.copy_from_slice(bytes);
        gpu.enter()?;
        let mut handle = MaybeUninit::uninit();
        let (world, rank) = (ranks.world(), ranks.rank());
        // SAFETY: the context of this rank's GPU is current; `handle` is written where the call succeeds.
        let handle = unsafe {
            let id = sys::ncclUniqueId { internal };
            result::comm_init_rank(handle.as_mut_ptr(), world as i32, id, rank as i32)
                .map_err(|e| failure("meeting the other ranks", &e))?;
            handle.assume_init()
        };
        let link = Arc::new(Link { handle, aborted: AtomicBool::new(false) });
        let theirs = Arc::clone(&link);
        gpu.patience().end_after(ranks.timeout(), move || theirs.abort());
        Ok(Communicator { link, world })
    }

    fn handle(&self) -> Result<sys::ncclComm_t> {
        match self.link.aborted.load(Relaxed) {
            false => Ok(self.link.handle),
            true => Err(Error::new(Code::RankLost, "NCCL was given up after a sum that did not end")),
        }
    }

    /// Queues `Σ` over the ranks of a piece of the floats at `at`, in place.
    ///
    /// # Safety
    /// The piece lies within one allocation of `gpu`, which this communicator was made on.
    pub unsafe fn sum(&self, gpu: &Gpu, at: u64, piece: &Piece, queue: Queue) -> Result<()> {
        gpu.enter()?;
        let handle = self.handle()?;
        let (kind, sum) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        let (stream, failed) =
            (gpu.queue(queue) as sys::cudaStream_t, |e| failure("a sum over the ranks", &e));
        let place = |range: &Range<usize>| at + 4 * range.start as u64;
        if piece.for_all {
            let (at, len) = (place(&piece.range), piece.range.len());
            // SAFETY: passed on; NCCL allows a sum in place.
            let queued = unsafe {
                result::all_reduce(at as *const c_void, at as *mut c_void, len, kind, sum, handle, stream)
            };
            return queued.map(drop).map_err(failed);
        }
        result::group_start().map_err(failed)?;
        for (root, range) in piece.owners.iter().enumerate().filter(|(_, range)| !range.is_empty()) {
            let (at, len, root) = (place(range), range.len(), root as i32);
            // SAFETY: as above; the ranges of owners are disjoint.
            unsafe {
                result::reduce(at as *const c_void, at as *mut c_void, len, kind, sum, root, handle, stream)
            }
            .map_err(failed)?;
        }
        result::group_end().map(drop).map_err(failed)
    }

    /// Queues a gather: floats `ranges[r]` from `at` on go from rank r to all.
    ///
    /// # Safety
    /// As [`Communicator::sum`].
    pub unsafe fn all_gather(&self, gpu: &Gpu, at: u64, ranges: &[Range<usize>]) -> Result<()> {
        debug_assert_eq!(ranges.len(), self.world);
        gpu.enter()?;
        let handle = self.handle()?;
        let failed = |e: NcclError| failure("a gather over the ranks", &e);
        result::group_start().map_err(failed)?;
        for (root, range) in ranges.iter().enumerate().filter(|(_, range)| !range.is_empty()) {
            let place = at + 4 * range.start as u64;
            // SAFETY: passed on; NCCL allows a broadcast in place.
            unsafe {
                result::broadcast(
                    place as *const c_void,
                    place as *mut c_void,
                    range.len(),
                    sys::ncclDataType_t::ncclFloat32,
                    root as i32,
                    handle,
                    gpu.queue(Queue::Compute) as sys::cudaStream_t,
                )
            }
            .map_err(failed)?;
        }
        result::group_end().map(drop).map_err(failed)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.link.abort();
    }
}

fn failure(doing: &str, e: &NcclError) -> Error {
    Error::new(Code::RankLost, format!("NCCL failed at {doing}"))
        .found(format!("ncclResult_t {}", e.0 as u32))
        .next("NCCL_DEBUG=INFO prints more; then continue from the last checkpoint with --resume")
}

#[cfg(test)]
mod tests {
    use crate::collective::Collective;
    use crate::cuda::Cuda;
    use crate::device::{Device, Queue};

    #[test]
    #[ignore = "needs a GPU and libnccl"]
    fn one_rank_sums_and_gathers_its_own() {
        let dev = Cuda::open(0).unwrap();
        let ranks = Collective::default().over_nccl();
        let host: Vec<f32> = (0..100_003).map(|i| i as f32 * 0.37 - 5.0).collect();
        let mut buf = dev.upload(&host).unwrap();
        for queue in [Queue::Compute, Queue::Sums] {
            dev.sum(&ranks, &mut buf, &ranks.piece(3..host.len()), queue).unwrap();
            dev.sum(&ranks, &mut buf, &ranks.scattered_piece(5..host.len(), host.len()), queue).unwrap();
            dev.wait(&dev.event(queue).unwrap(), Queue::Compute).unwrap();
        }
        dev.all_gather(&ranks, &mut buf, std::slice::from_ref(&(0..777))).unwrap();
        assert_eq!(dev.download(&buf).unwrap(), host);
    }
}
