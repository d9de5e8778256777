//! CPU buffers: 64-byte aligned, zeroed, shared ownership so that a part keeps its allocation alive.

use crate::device::{Element, Len};
use crate::error::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

/// A cache line, and the widest vector register.
const ALIGN: usize = 64;

/// One block of memory, freed when its last buffer goes.
struct Allocation {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the block is plain memory; access goes through `Buf`, whose borrows follow Rust's rules.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        super::memory::buffer_freed(self.layout.size());
        // SAFETY: `ptr` came from `alloc_zeroed` with this very layout, whose size is not zero.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// `len` elements of CPU memory: an allocation or a part of one. Dereferences to a slice.
pub struct Buf<T: Element> {
    ptr: NonNull<T>,
    len: usize,
    _owner: Option<Arc<Allocation>>,
    _type: PhantomData<T>,
}

// SAFETY: a `Buf` is a slice with shared ownership of its block; `T` is plain data. Parts that overlap are made only by the
// unsafe `part`, whose contract forbids using them at once.
unsafe impl<T: Element> Send for Buf<T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for Buf<T> {}

impl<T: Element> Buf<T> {
    /// `len` zeros. Fails with the bytes asked for when the allocator refuses.
    pub fn zeros(len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(Buf { ptr: NonNull::dangling(), len, _owner: None, _type: PhantomData });
        }
        let refused = || Error::out_of_memory(len.saturating_mul(size_of::<T>()), None);
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(refused)?;
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| refused())?;
        // SAFETY: the layout's size is not zero.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        super::memory::buffer_allocated(bytes);
        let owner = Arc::new(Allocation { ptr, layout });
        Ok(Buf { ptr: ptr.cast(), len, _owner: Some(owner), _type: PhantomData })
    }

    /// A handle to memory of another owner.
    ///
    /// # Safety
    /// `ptr` is valid for `len` initialised elements and outlives the handle; Rust's rule for borrows is the caller's.
    pub(crate) unsafe fn over(ptr: NonNull<T>, len: usize) -> Self {
        Buf { ptr, len, _owner: None, _type: PhantomData }
    }

    /// A second handle to `range`.
    ///
    /// # Safety
    /// See [`Device::part`](crate::device::Device::part).
    pub unsafe fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "part {range:?} of a buffer of {}",
            self.len
        );
        // SAFETY: the offset lies inside the block, which `_owner` keeps alive.
        let ptr = unsafe { self.ptr.add(range.start) };
        Buf { ptr, len: range.len(), _owner: self._owner.clone(), _type: PhantomData }
    }
}

impl<T: Element> Len for Buf<T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<T: Element> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `ptr` is valid for `len` initialised elements (zeroed at birth) while `_owner` lives.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Element> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; `&mut self` is exclusive, and overlapping parts are kept apart by the contract of `part`.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_parts_share_memory() {
        let mut a = Buf::<f32>::zeros(100).unwrap();
        assert_eq!(a.as_ptr() as usize % ALIGN, 0);
        assert!(a.iter().all(|x| *x == 0.0));
        // SAFETY: `p` is dropped before `a` is used again.
        let mut p = unsafe { a.part(10..20) };
        p[0] = 3.0;
        drop(p);
        assert_eq!(a[10], 3.0);
        a[11] = 4.0;
        // SAFETY: `a` is gone when `p` is read; the block is not.
        let p = unsafe { a.part(11..12) };
        drop(a);
        assert_eq!(p[0], 4.0);
    }

    #[test]
    fn an_absurd_size_is_an_error() {
        let e = Buf::<f64>::zeros(usize::MAX / 2).err().expect("refused");
        assert_eq!(e.kind().exit_code(), 4);
        assert_eq!(Buf::<f32>::zeros(0).unwrap().len(), 0);
    }
}
