//! The emulator's device memory: the host's, one mapping per allocation.
//!
//! Every allocation ends at a page without access, so that a kernel that leaves its last buffer is stopped there, and the report
//! says by how many bytes. CELLREFINE_EMULATOR_MEMORY limits the bytes in all, so that a run can meet a full GPU.

use crate::error::{Code, Error, Result};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What kernels may rely on for a whole allocation's start. A GPU gives 256; less leaves less room between the end of a
/// buffer and the page that stops an access.
const ALIGN: usize = 16;

/// Every live allocation.
pub(super) struct HostMemory {
    /// Bytes in all.
    limit: Option<usize>,
    /// Start and bytes.
    live: Mutex<BTreeMap<u64, usize>>,
}

impl HostMemory {
    /// # Errors
    /// A CELLREFINE_EMULATOR_MEMORY that is no number (2).
    pub(super) fn open() -> Result<Self> {
        let limit = std::env::var("CELLREFINE_EMULATOR_MEMORY").ok().map(|text| {
            text.parse().map_err(|_| {
                Error::new(Code::EmulatorVariable, "not a number of bytes")
                    .at("CELLREFINE_EMULATOR_MEMORY")
                    .found(text)
            })
        });
        Ok(HostMemory { limit: limit.transpose()?, live: Mutex::default() })
    }

    /// `bytes` of memory with undefined content; at least 1.
    ///
    /// # Errors
    /// Out of memory (4).
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut live = self.live();
        let free = self.limit.map(|limit| (limit - live.values().sum::<usize>(), limit));
        let refused = || Error::out_of_memory(bytes, free);
        if free.is_some_and(|(free, _)| bytes > free) {
            return Err(refused());
        }
        let page = page_size();
        let pages =
            bytes.checked_next_multiple_of(page).and_then(|b| b.checked_add(page)).ok_or_else(refused)?;
        // SAFETY: a fresh private mapping.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), pages, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(refused());
        }
        let guard = start as usize + pages - page;
        // SAFETY: the last page of the mapping just made.
        if unsafe { libc::mprotect(guard as *mut c_void, page, libc::PROT_NONE) } != 0 {
            // SAFETY: the mapping just made.
            unsafe { libc::munmap(start, pages) };
            return Err(refused());
        }
        let address = (guard - bytes.next_multiple_of(ALIGN)) as u64;
        live.insert(address, bytes);
        Ok(address)
    }

    /// # Safety
    /// Nothing called later uses the memory.
    pub(super) unsafe fn free(&self, address: u64) {
        let Some(bytes) = self.live().remove(&address) else { return };
        let page = page_size();
        let pages = bytes.next_multiple_of(page) + page;
        let guard = address as usize + bytes.next_multiple_of(ALIGN);
        // SAFETY: the mapping that `allocate` made for this address, by the same arithmetic.
        unsafe { libc::munmap((guard + page - pages) as *mut c_void, pages) };
    }

    /// The start of the allocation that an address lies in.
    pub(super) fn allocation(&self, address: u64) -> Option<u64> {
        let live = self.live();
        let (start, bytes) = live.range(..=address).next_back()?;
        (address - start < *bytes as u64).then_some(*start)
    }

    /// Where an address lies, told from the buffer before it.
    pub(super) fn nearest(&self, address: u64) -> String {
        match self.live().range(..=address).next_back() {
            Some((start, bytes)) if address - start < 1 << 32 => format!(
                "addresses inside a buffer; this one is {} bytes past the end of one of {bytes} bytes",
                (address - start).saturating_sub(*bytes as u64)
            ),
            _ => "addresses inside a buffer; none starts near this one".into(),
        }
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<u64, usize>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn page_size() -> usize {
    // SAFETY: a plain query.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
