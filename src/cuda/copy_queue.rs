//! The emulator's second queue: uploads that run beside the kernels, as late or as early as a GPU may run them.
//!
//! A copy that is queued here lands when work waits for an event behind it (schedules `late` and `reversed`), or at once
//! (`eager`). Either way two faults are errors, under every schedule, whatever the bytes are: work on a buffer whose copy it has not waited
//! for, and a copy into a buffer that work may still use, because no event kept it behind that work.

use super::Schedule;
use crate::device::Queue;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much had been queued where.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Point {
    work: u64,
    copies: u64,
}

/// The queue.
pub(super) struct CopyQueue {
    at_once: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Kernels, clears and copies so far, and uploads on this queue.
    queued: Point,
    /// Work that the next upload has waited for.
    waited_for: u64,
    /// Uploads that no work has waited for yet, in order.
    open: Vec<Upload>,
    /// The last work on each allocation, by its start.
    used: HashMap<u64, u64>,
}

struct Upload {
    number: u64,
    /// Start of the allocation, and of the range.
    allocation: u64,
    to: u64,
    bytes: Vec<u8>,
}

impl Upload {
    fn land(&self) {
        // SAFETY: a range of a live allocation: those that are freed leave the list.
        unsafe { std::ptr::copy_nonoverlapping(self.bytes.as_ptr(), self.to as *mut u8, self.bytes.len()) }
    }
}

impl CopyQueue {
    pub(super) fn new(schedule: Schedule) -> Self {
        CopyQueue { at_once: schedule == Schedule::Eager, state: Mutex::default() }
    }

    /// One more piece of work, on these allocations.
    ///
    /// # Errors
    /// An upload to one of them that the work has not waited for (1).
    pub(super) fn work(&self, allocations: impl IntoIterator<Item = u64>) -> Result<()> {
        let mut state = self.state();
        state.queued.work += 1;
        let number = state.queued.work;
        for allocation in allocations {
            if state.open.iter().any(|upload| upload.allocation == allocation) {
                return Err(Error::bug("work on a buffer whose upload it has not waited for")
                    .wanted("an event behind the upload, and a wait before the work"));
            }
            state.used.insert(allocation, number);
        }
        Ok(())
    }

    /// Queues an upload to `to`, within `allocation`.
    ///
    /// # Errors
    /// Work on the allocation that the queue has not waited for (1).
    pub(super) fn upload(&self, allocation: u64, to: u64, host: &[u8]) -> Result<()> {
        let mut state = self.state();
        if state.used.get(&allocation).is_some_and(|last| *last > state.waited_for) {
            return Err(Error::bug("an upload to a buffer that queued work may still use")
                .wanted("an event behind the work, and a wait before the upload"));
        }
        state.queued.copies += 1;
        let upload = Upload { number: state.queued.copies, allocation, to, bytes: host.to_vec() };
        if self.at_once {
            upload.land();
        }
        state.open.push(upload);
        Ok(())
    }

    /// The allocation is freed.
    pub(super) fn forget(&self, allocation: u64) {
        let mut state = self.state();
        state.open.retain(|upload| upload.allocation != allocation);
        state.used.remove(&allocation);
    }

    /// The end of what is queued on `queue`.
    pub(super) fn point(&self, queue: Queue) -> Point {
        let Point { work, copies } = self.state().queued;
        match queue {
            // The host sums here, in turn with the kernels.
            Queue::Compute | Queue::Sums => Point { work, copies: 0 },
            Queue::Copies => Point { work: 0, copies },
        }
    }

    /// Keeps `queue` behind the point.
    pub(super) fn wait(&self, point: Point, queue: Queue) {
        let mut state = self.state();
        match queue {
            Queue::Copies => state.waited_for = state.waited_for.max(point.work),
            Queue::Compute | Queue::Sums => {
                let (done, open) =
                    std::mem::take(&mut state.open).into_iter().partition(|u| u.number <= point.copies);
                state.open = open;
                let done: Vec<Upload> = done;
                done.iter().filter(|_| !self.at_once).for_each(Upload::land);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
