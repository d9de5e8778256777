//! Device buffers: an address, a length, and shared ownership so that a part keeps its allocation alive.

use super::Driver;
use crate::device::{Element, Len};
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// One block of device memory, freed in stream order when its last buffer goes.
struct Allocation {
    driver: Arc<Driver>,
    address: u64,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `address` came from this driver's `allocate`, and no buffer refers to it any more.
        unsafe { self.driver.free(self.address) }
    }
}

/// `len` elements of device memory: an allocation or a part of one.
pub struct Buf<T: Element> {
    address: u64,
    len: usize,
    owner: Option<Arc<Allocation>>,
    element: PhantomData<fn() -> T>,
}

impl<T: Element> Buf<T> {
    /// Memory of undefined content.
    pub(super) fn allocate(driver: &Arc<Driver>, len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(Buf { address: 0, len, owner: None, element: PhantomData });
        }
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| Error::out_of_memory(usize::MAX, None))?;
        let address = driver.allocate(bytes)?;
        let owner = Some(Arc::new(Allocation { driver: Arc::clone(driver), address }));
        Ok(Buf { address, len, owner, element: PhantomData })
    }

    /// Where the buffer starts, in device memory.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Fails when the buffer is shorter than `len`.
    pub(super) fn check_room(&self, len: usize) -> Result<()> {
        if len <= self.len {
            return Ok(());
        }
        Err(Error::bug("a copy is longer than the device buffer")
            .found(format!("{len} elements"))
            .wanted(format!("at most {}", self.len)))
    }

    /// A second handle to `range`.
    ///
    /// # Safety
    /// See [`Device::part`](crate::device::Device::part).
    pub(super) unsafe fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "part {range:?} of a buffer of {}",
            self.len
        );
        Buf {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.len(),
            owner: self.owner.clone(),
            element: PhantomData,
        }
    }

    /// The same memory as numbers of another type; `None` where the size or the alignment does not fit.
    ///
    /// # Safety
    /// As for [`Buf::part`].
    pub(super) unsafe fn cast<U: Element>(&self) -> Option<Buf<U>> {
        let fits = self.bytes().is_multiple_of(size_of::<U>())
            && self.address.is_multiple_of(align_of::<U>() as u64);
        fits.then(|| Buf {
            address: self.address,
            len: self.bytes() / size_of::<U>(),
            owner: self.owner.clone(),
            element: PhantomData,
        })
    }
}

impl<T: Element> Len for Buf<T> {
    fn len(&self) -> usize {
        self.len
    }
}
