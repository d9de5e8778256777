//! What the CPU backend holds: bytes in buffers, counted where they are allocated, and bytes of scratch, counted where it grows.
//! `plan` is held against these numbers.

use crate::device::StepSizes;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static BUFFERS: AtomicU64 = AtomicU64::new(0);
static MOST: AtomicU64 = AtomicU64::new(0);
static SCRATCH: AtomicU64 = AtomicU64::new(0);

/// Bytes of this process's backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// In buffers now.
    pub buffers: u64,
    /// In buffers at most, since [`start_watch`] or the start of the process.
    pub most_buffers: u64,
    /// In the scratch of all threads; it is kept until its thread ends.
    pub scratch: u64,
}

/// The count now.
pub fn memory() -> Memory {
    Memory {
        buffers: BUFFERS.load(Relaxed),
        most_buffers: MOST.load(Relaxed),
        scratch: SCRATCH.load(Relaxed),
    }
}

/// Forgets the largest count of buffers so far.
pub fn start_watch() {
    MOST.store(BUFFERS.load(Relaxed), Relaxed);
}

pub(super) fn buffer_allocated(bytes: usize) {
    let now = BUFFERS.fetch_add(bytes as u64, Relaxed) + bytes as u64;
    MOST.fetch_max(now, Relaxed);
}

pub(super) fn buffer_freed(bytes: usize) {
    BUFFERS.fetch_sub(bytes as u64, Relaxed);
}

pub(super) fn scratch_grew(bytes: usize) {
    SCRATCH.fetch_add(bytes as u64, Relaxed);
}

pub(super) fn scratch_freed(bytes: usize) {
    SCRATCH.fetch_sub(bytes as u64, Relaxed);
}

/// Scratch of a training step on `threads` threads, by kernel: what each needs where it alone had run. Blocks are shared between
/// kernels, and a thread that steals a task takes a further one, so the sum is an estimate and no bound.
pub fn scratch_estimate(s: &StepSizes, threads: usize) -> Vec<(&'static str, &'static str, u64)> {
    let lanes = |n: usize| n.next_multiple_of(16);
    let head = lanes(s.width / s.heads.max(1));
    // Panels of Q, K, V and their gradients for one cell and head, and a tile; cut cells add dK and dV of up to four items.
    let attention = threads * (4 * s.longest * head + (5 * head + 128) * 48 + 2 * s.longest);
    let cut = if s.longest >= 2048 { 2 * 4 * s.heads * head * s.tokens } else { 0 };
    // The weight in panels, once; per thread a block of the gradient of a weight: packed rows and a chunk of columns.
    let panels = lanes(3 * s.width).max(lanes(s.ffn)) * s.width.max(s.ffn);
    let blocks =
        threads * (32 * (128 * 8 + 16) + 128 * lanes(s.width.max(s.ffn)).min(528) + 64 * s.width.max(s.ffn));
    let embed = s.vocab + 5 * s.tokens + threads * 3 * s.width;
    let softmax = match s.masked + s.types > 0 {
        true => threads * (3 * 120 * 96 + (2 * 120 + 3 * 96) * s.width.next_multiple_of(32) + 8 * 96),
        false => 0,
    };
    let floats = [
        ("attention", "(threads, 4L·K)", attention + cut),
        ("matrix products", "(D, max(3D, F)) and (threads)", panels + blocks),
        ("embedding gradient", "(V + 5N)", embed),
        ("streaming softmax", "(threads, tile)", softmax),
    ];
    floats.into_iter().filter(|(.., n)| *n > 0).map(|(name, shape, n)| (name, shape, 4 * n as u64)).collect()
}
