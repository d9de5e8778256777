//! The emulator as a driver: kernels run as host C++ (`kernels/emulator/`), in the calling thread and its rayon pool.
//!
//! Memory is the host's. Every allocation ends at a page without access, so that a kernel that leaves its last buffer is
//! stopped there, and the report says by how many bytes. A launch is over when the call returns.
//!
//! CELLREFINE_EMULATOR_LIBRARY names a shared object with kernels of the same names (built from edited sources); its
//! kernels run in place of those of this build. The mutants of the tests come in this way.

use super::driver::Grid;
use super::functions::{EmulatedKernel, Kernel};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, PoisonError};

/// The order in which emulated threads run, and when asynchronous copies land. Each hides faults that another shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Schedule {
    /// Warps ascending; a cp.async lands when its own thread waits for it.
    Late = 0,
    /// Blocks, warps and lanes descending.
    Reversed = 1,
    /// Warps take turns at every wait; a cp.async lands at once.
    Eager = 2,
}

impl Schedule {
    /// All of them, for tests.
    pub const ALL: [Schedule; 3] = [Schedule::Late, Schedule::Reversed, Schedule::Eager];

    /// The name in CELLREFINE_EMULATOR_SCHEDULE.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Late => "late",
            Schedule::Reversed => "reversed",
            Schedule::Eager => "eager",
        }
    }

    /// CELLREFINE_EMULATOR_SCHEDULE, or `late`.
    pub(super) fn from_environment() -> Result<Self> {
        let Ok(name) = std::env::var("CELLREFINE_EMULATOR_SCHEDULE") else { return Ok(Schedule::Late) };
        Schedule::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            Error::usage("no such schedule")
                .at("CELLREFINE_EMULATOR_SCHEDULE")
                .found(name)
                .wanted("late, reversed or eager")
        })
    }
}

/// `cuhost::Launch` of `kernels/emulator/runtime.h`, field by field.
#[repr(C)]
struct Launch {
    kernel: *const EmulatedKernel,
    arguments: *const *mut c_void,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u64,
    schedule: i32,
    failed: AtomicU32,
    next_block: AtomicU64,
    fault_address: u64,
    error: [c_char; 1536],
}

/// A pointer that rayon may carry to the threads that run blocks.
struct SharedLaunch(*mut Launch);
// SAFETY: the C++ side shares a launch between threads by its atomics; `error` is written once, by whoever sets `failed`.
unsafe impl Sync for SharedLaunch {}

/// The emulated device.
pub struct Emulated {
    schedule: Schedule,
    library: Option<Library>,
    /// Start and bytes of every live allocation, for reports.
    live: Mutex<BTreeMap<u64, usize>>,
}

impl Emulated {
    pub(super) fn open(schedule: Schedule) -> Result<Self> {
        let library = std::env::var("CELLREFINE_EMULATOR_LIBRARY").ok().map(|path| Library::open(&path));
        Ok(Emulated { schedule, library: library.transpose()?, live: Mutex::default() })
    }

    pub(super) fn name(&self) -> String {
        format!("emulated ({} copies, {} threads)", self.schedule.name(), rayon::current_num_threads())
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let refused = || {
            Error::environment("out of memory")
                .found(format!("{:.1} MB refused", bytes as f64 / 1e6))
                .next("lower batch.tokens, batch.cells or batch.max_tokens; `cellrefine plan` prints what a run needs")
        };
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
        self.live().insert(address, bytes);
        Ok(address)
    }

    pub(super) unsafe fn free(&self, address: u64) {
        let Some(bytes) = self.live().remove(&address) else { return };
        let page = page_size();
        let pages = bytes.next_multiple_of(page) + page;
        let guard = address as usize + bytes.next_multiple_of(ALIGN);
        // SAFETY: the mapping that `allocate` made for this address, by the same arithmetic.
        unsafe { libc::munmap((guard + page - pages) as *mut c_void, pages) };
    }

    pub(super) unsafe fn upload(&self, to: u64, host: &[u8]) -> Result<()> {
        // SAFETY: the caller's range; host memory of this process.
        unsafe { ptr::copy_nonoverlapping(host.as_ptr(), to as *mut u8, host.len()) };
        Ok(())
    }

    pub(super) unsafe fn download(&self, from: u64, host: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, host.as_mut_ptr(), host.len()) };
        Ok(())
    }

    pub(super) unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    pub(super) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    pub(super) fn poison(&self, at: u64, bytes: usize) {
        // SAFETY: the workspace's own block, which its lock holder alone uses.
        unsafe { ptr::write_bytes(at as *mut u8, 0xFF, bytes) };
    }

    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        act: usize,
        grid: Grid,
        arguments: &[*mut c_void],
        _sizes: &[usize],
    ) -> Result<()> {
        let entry = kernel.entry();
        let code = match &self.library {
            Some(library) => library.kernel(entry.name, act)?.unwrap_or(kernel.built_in(act)),
            None => kernel.built_in(act),
        };
        // SAFETY: null, or a static of the emulator.
        let Some(run) = (unsafe { code.as_ref() }).and_then(|k| k.run) else {
            return Err(Error::bug("a kernel without host code").at(entry.name));
        };
        let mut launch = Launch {
            kernel: code,
            arguments: arguments.as_ptr(),
            grid: grid.blocks,
            block: grid.threads,
            shared_bytes: grid.shared_bytes as u64,
            schedule: self.schedule as i32,
            failed: AtomicU32::new(0),
            next_block: AtomicU64::new(0),
            fault_address: 0,
            error: [0; 1536],
        };
        let blocks: u64 = grid.blocks.iter().map(|b| *b as u64).product();
        let workers = blocks.min(rayon::current_num_threads() as u64);
        let shared = SharedLaunch(&raw mut launch);
        let shared = &shared;
        let work = move || {
            // SAFETY: `launch` lives until the scope below ends, and `run` is made to be called from several threads.
            unsafe { run(shared.0.cast()) };
        };
        if workers > 1 {
            rayon::scope(|scope| {
                for _ in 1..workers {
                    scope.spawn(|_| work());
                }
                work();
            });
        } else {
            work();
        }
        if *launch.failed.get_mut() == 0 {
            return Ok(());
        }
        // SAFETY: the C++ side ends the text with a zero.
        let text = unsafe { CStr::from_ptr(launch.error.as_ptr()) }.to_string_lossy().into_owned();
        let place = format!("kernels/{}.cu: {} ({})", entry.file, entry.name, ["f32", "bf16"][act]);
        let mut error = Error::bug("a kernel failed in the emulator").at(place).found(text);
        if launch.fault_address != 0 {
            error = error.wanted(self.nearest(launch.fault_address));
        }
        Err(error)
    }

    fn live(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, usize>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where an address lies, told from the buffer before it.
    fn nearest(&self, address: u64) -> String {
        match self.live().range(..=address).next_back() {
            Some((start, bytes)) if address - start < 1 << 32 => format!(
                "addresses inside a buffer; this one is {} bytes past the end of one of {bytes} bytes",
                (address - start).saturating_sub(*bytes as u64)
            ),
            _ => "addresses inside a buffer; none starts near this one".into(),
        }
    }
}

/// What kernels may rely on for a whole allocation's start. A GPU gives 256; less leaves less room between the end of a
/// buffer and the page that stops an access.
const ALIGN: usize = 16;

fn page_size() -> usize {
    // SAFETY: a plain query.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// A shared object with emulated kernels. Never closed: a kernel's code may be on a stack somewhere.
struct Library(*mut c_void);

// SAFETY: a handle of dlopen may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above; dlsym is thread-safe.
unsafe impl Sync for Library {}

impl Library {
    fn open(path: &str) -> Result<Self> {
        let refused = |why: String| {
            Error::input("cannot load the kernels of CELLREFINE_EMULATOR_LIBRARY").at(path).found(why)
        };
        let name = CString::new(path).map_err(|e| refused(e.to_string()))?;
        // SAFETY: a C string; what the object runs when it is loaded is the user's choice.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: after a failed dlopen, dlerror returns a C string or null.
            let why = unsafe { libc::dlerror().cast_const().as_ref().map(|e| CStr::from_ptr(e)) };
            return Err(refused(why.map_or("no reason given".into(), |w| w.to_string_lossy().into_owned())));
        }
        Ok(Library(handle))
    }

    /// The kernel of that name, where the object has one.
    fn kernel(&self, name: &str, act: usize) -> Result<Option<*const EmulatedKernel>> {
        let symbol = format!("cellrefine_{}_{name}", ["f32", "bf16"][act]);
        let symbol = CString::new(symbol).map_err(|e| Error::bug(e.to_string()))?;
        // SAFETY: a live handle and a C string.
        let code: *const EmulatedKernel = unsafe { libc::dlsym(self.0, symbol.as_ptr()) }.cast_const().cast();
        Ok((!code.is_null()).then_some(code))
    }
}

impl Kernel {
    /// The kernel as built in; null where it is not compiled for that activation type.
    fn built_in(self, act: usize) -> *const EmulatedKernel {
        self.entry().emulated[act].map_or(ptr::null(), |e| e.0)
    }
}
