//! Per-thread working memory that outlives a call, so that a step allocates nothing after its first run.
//!
//! Each thread keeps a stack of blocks; [`take`] pops one and the guard gives it back. A thread that steals another task
//! while it waits takes a further block from the stack, so nested use is safe and settles as quickly.

use super::memory;
use bytemuck::Pod;
use std::cell::RefCell;

/// A cache line, so that blocks are aligned for the widest loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: plain bytes without padding; every bit pattern is valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; `Copy` and 'static.
unsafe impl Pod for Line {}

/// A thread's blocks, smallest and largest in any order.
struct Blocks(Vec<Vec<Line>>);

impl Drop for Blocks {
    fn drop(&mut self) {
        memory::scratch_freed(self.0.iter().map(|block| size_of_val(&block[..])).sum());
    }
}

thread_local! {
    static BLOCKS: RefCell<Blocks> = const { RefCell::new(Blocks(Vec::new())) };
}

/// A block of working memory, aligned to 64 bytes. Its content is whatever the last user left.
pub struct Scratch(Vec<Line>);

/// A block of at least `bytes` bytes: the smallest of this thread's that is large enough, or the largest, grown.
pub fn take(bytes: usize) -> Scratch {
    let lines = bytes.div_ceil(size_of::<Line>());
    let mut block = BLOCKS.with_borrow_mut(|Blocks(blocks)| {
        let fits = (0..blocks.len()).filter(|&i| blocks[i].len() >= lines).min_by_key(|&i| blocks[i].len());
        match fits.or_else(|| (0..blocks.len()).max_by_key(|&i| blocks[i].len())) {
            Some(i) => blocks.swap_remove(i),
            None => Vec::new(),
        }
    });
    if block.len() < lines {
        memory::scratch_grew((lines - block.len()) * size_of::<Line>());
        block.resize(lines, Line([0; 64]));
    }
    Scratch(block)
}

impl Scratch {
    /// Its size.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.0[..])
    }

    /// The first `len` elements as `T`.
    pub fn slice<T: Pod>(&mut self, len: usize) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.0[..(len * size_of::<T>()).div_ceil(64)])[..len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let block = std::mem::take(&mut self.0);
        // A thread that is being torn down has no stack any more; then the block is simply freed.
        let bytes = size_of_val(&block[..]);
        if BLOCKS.try_with(|blocks| blocks.borrow_mut().0.push(block)).is_err() {
            memory::scratch_freed(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_blocks_are_distinct_and_come_back() {
        let first = {
            let mut a = take(1000);
            let mut b = take(1000);
            let (pa, pb) = (a.slice::<f32>(250).as_ptr(), b.slice::<f32>(250).as_ptr());
            assert_ne!(pa, pb);
            assert_eq!(pa as usize % 64, 0);
            pa
        };
        let mut again = [take(1000), take(1000)];
        assert!(again.iter_mut().any(|s| s.slice::<f32>(1).as_ptr() == first));
    }
}
