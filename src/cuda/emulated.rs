//! The emulator as a driver: kernels run as host C++ (`kernels/emulator/`), in the calling thread and its rayon pool.
//!
//! Memory is the host's ([`HostMemory`]). A launch is over when the call returns; uploads on the queue of copies land when they
//! have to ([`CopyQueue`]).
//!
//! CELLREFINE_EMULATOR_LIBRARY names a shared object with kernels of the same names (built from edited sources); its
//! kernels run in place of those of this build. The mutants of the tests come in this way.

mod library;

use super::capture::not_recordable;
use super::copy_queue::CopyQueue;
use super::driver::{Grid, LaterRead, Point};
use super::functions::{EmulatedKernel, Kernel};
use super::host_memory::HostMemory;
use super::tensor_map::{BOX_COLUMNS, Boxes, TensorMap};
use crate::device::Queue;
use crate::error::{Code, Error, Result};
use library::Library;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

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
            Error::new(Code::EmulatorVariable, "no such schedule")
                .at("CELLREFINE_EMULATOR_SCHEDULE")
                .found(name)
                .wanted("late, reversed or eager")
        })
    }
}

/// The GPU that is emulated: it decides which kernels an op takes where Hopper has its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// A100 and everything after: `mma.sync`, `cp.async`.
    Sm80,
    /// H100 and H200: `wgmma`, the copy engine.
    Sm90,
}

impl Arch {
    /// CELLREFINE_EMULATOR_ARCH, or `sm_90`.
    pub(super) fn from_environment() -> Result<Self> {
        match std::env::var("CELLREFINE_EMULATOR_ARCH").as_deref() {
            Ok("sm_80") => Ok(Arch::Sm80),
            Ok("sm_90") | Err(_) => Ok(Arch::Sm90),
            Ok(other) => Err(Error::new(Code::EmulatorVariable, "no such architecture")
                .at("CELLREFINE_EMULATOR_ARCH")
                .found(other)
                .wanted("sm_80 or sm_90")),
        }
    }
}

/// MAX_RESIDENTS of `kernels/emulator/runtime.h`.
const MULTIPROCESSORS: usize = 4;
/// `cuhost::TensorMap::MARK`.
const TENSOR_MAP_MARK: u64 = 0x5445_4E53_4F52_4D50;

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
    cooperative: u64,
    error: [c_char; 1536],
}

// The same numbers stand in tests/emulator/cases.cpp, against the C++ side.
const _: () = assert!(
    std::mem::offset_of!(Launch, grid) == 16
        && std::mem::offset_of!(Launch, shared_bytes) == 40
        && std::mem::offset_of!(Launch, failed) == 52
        && std::mem::offset_of!(Launch, fault_address) == 64
        && std::mem::offset_of!(Launch, cooperative) == 72
        && std::mem::offset_of!(Launch, error) == 80
        && size_of::<Launch>() == 1616
        && size_of::<EmulatedKernel>() == 24
);

/// A pointer that rayon may carry to the threads that run blocks.
struct SharedLaunch(*mut Launch);
// SAFETY: the C++ side shares a launch between threads by its atomics; `error` is written once, by whoever sets `failed`.
unsafe impl Sync for SharedLaunch {}

/// The emulated device.
pub struct Emulated {
    schedule: Schedule,
    arch: Arch,
    library: Option<Library>,
    memory: HostMemory,
    copies: CopyQueue,
    /// While a thread records: its id and what it has queued.
    recording: Mutex<Option<(ThreadId, Vec<Work>)>>,
}

/// Work that a graph holds.
enum Work {
    Launch {
        kernel: Kernel,
        act: usize,
        grid: Grid,
        arguments: Vec<Box<[u64]>>,
        sizes: Vec<usize>,
    },
    Clear {
        at: u64,
        bytes: usize,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    /// A matrix product, which the CPU backend does.
    Call(Box<dyn Fn() -> Result<()> + Send + Sync>),
}

/// Recorded work, in order.
pub(super) struct Graph(Vec<Work>);

impl Emulated {
    pub(super) fn open(schedule: Schedule, arch: Arch) -> Result<Self> {
        let library = std::env::var("CELLREFINE_EMULATOR_LIBRARY").ok().map(|path| Library::open(&path));
        Ok(Emulated {
            schedule,
            arch,
            library: library.transpose()?,
            memory: HostMemory::open()?,
            copies: CopyQueue::new(schedule),
            recording: Mutex::default(),
        })
    }

    pub(super) fn name(&self) -> String {
        format!("emulated ({} copies, {} threads)", self.schedule.name(), rayon::current_num_threads())
    }

    pub(super) fn is_hopper(&self) -> bool {
        self.arch == Arch::Sm90
    }

    pub(super) fn multiprocessors(&self) -> usize {
        MULTIPROCESSORS
    }

    pub(super) fn tensor_map(&self, b: Boxes) -> Result<TensorMap> {
        let mut words = [0; 16];
        let row_bytes = 2 * b.columns as u64;
        let fields = [b.address, b.rows as u64, b.columns as u64, row_bytes, b.box_rows as u64];
        words[..5].copy_from_slice(&fields);
        words[5..7].copy_from_slice(&[BOX_COLUMNS as u64, TENSOR_MAP_MARK]);
        Ok(TensorMap(words))
    }

    pub(super) fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let me = std::thread::current().id();
        if self.recording().is_some() {
            return Err(not_recordable("a second recording"));
        }
        *self.recording() = Some((me, Vec::new()));
        let done = work();
        let recorded = self.recording().take();
        done?;
        Ok(Graph(recorded.map_or(Vec::new(), |(_, work)| work)))
    }

    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        for work in &graph.0 {
            match work {
                Work::Launch { kernel, act, grid, arguments, sizes } => {
                    let pointers: Vec<*mut c_void> =
                        arguments.iter().map(|a| a.as_ptr().cast_mut().cast()).collect();
                    // SAFETY: the values that the launch was recorded with; the graph's contract keeps the buffers alive.
                    unsafe { self.launch_now(*kernel, *act, *grid, &pointers, sizes) }?;
                }
                // SAFETY: as when they were recorded.
                Work::Clear { at, bytes } => unsafe { ptr::write_bytes(*at as *mut u8, 0, *bytes) },
                // SAFETY: as when they were recorded.
                Work::Copy { from, to, bytes } => unsafe {
                    ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
                },
                Work::Call(call) => call()?,
            }
        }
        Ok(())
    }

    fn recording(&self) -> MutexGuard<'_, Option<(ThreadId, Vec<Work>)>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is this thread recording?
    fn records(&self) -> bool {
        self.recording().as_ref().is_some_and(|(thread, _)| *thread == std::thread::current().id())
    }

    /// Adds to the recording, or hands the work back where this thread is not recording.
    fn recorded(&self, work: impl FnOnce() -> Work) -> bool {
        let mut recording = self.recording();
        match recording.as_mut() {
            Some((thread, list)) if *thread == std::thread::current().id() => {
                list.push(work());
                true
            }
            _ => false,
        }
    }

    /// Runs work of the CPU backend in its place among the kernels.
    pub(super) fn call(&self, work: impl Fn() -> Result<()> + Send + Sync + 'static) -> Result<()> {
        if self.records() {
            self.recorded(|| Work::Call(Box::new(work)));
            return Ok(());
        }
        work()
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        if self.records() {
            return Err(not_recordable("an allocation"));
        }
        self.memory.allocate(bytes)
    }

    pub(super) unsafe fn free(&self, address: u64) {
        self.copies.forget(address);
        // SAFETY: passed on.
        unsafe { self.memory.free(address) }
    }

    /// One more piece of work, on the buffers at these addresses.
    fn work_on(&self, addresses: &[u64]) -> Result<()> {
        self.copies.work(addresses.iter().filter_map(|address| self.memory.allocation(*address)))
    }

    pub(super) fn event(&self) -> Result<Point> {
        Ok(Point::Emulated(self.copies.point(Queue::Compute)))
    }

    pub(super) fn record(&self, point: &mut Point, queue: Queue) -> Result<()> {
        if self.records() {
            return Err(not_recordable("an event"));
        }
        *point = Point::Emulated(self.copies.point(queue));
        Ok(())
    }

    pub(super) fn wait(&self, point: &Point, queue: Queue) -> Result<()> {
        if self.records() {
            return Err(not_recordable("a wait for another queue"));
        }
        match point {
            Point::Emulated(point) => self.copies.wait(*point, queue),
            Point::Gpu(_) => unreachable!("an event keeps the device that made it"),
        }
        Ok(())
    }

    pub(super) unsafe fn upload_beside(&self, to: u64, host: &[u8]) -> Result<()> {
        if self.records() {
            return Err(not_recordable("a copy from the host"));
        }
        match self.memory.allocation(to) {
            Some(allocation) => self.copies.upload(allocation, to, host),
            None => Ok(()), // nothing to copy
        }
    }

    pub(super) unsafe fn upload(&self, to: u64, host: &[u8]) -> Result<()> {
        if self.records() {
            return Err(not_recordable("a copy from the host"));
        }
        self.work_on(&[to])?;
        // SAFETY: the caller's range; host memory of this process.
        unsafe { ptr::copy_nonoverlapping(host.as_ptr(), to as *mut u8, host.len()) };
        Ok(())
    }

    pub(super) unsafe fn download(&self, from: u64, host: &mut [u8]) -> Result<()> {
        if self.records() {
            return Err(not_recordable("a copy to the host"));
        }
        self.work_on(&[from])?;
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, host.as_mut_ptr(), host.len()) };
        Ok(())
    }

    pub(super) unsafe fn read_later(&self, from: u64, bytes: usize) -> Result<LaterRead> {
        let mut host = vec![0; bytes];
        // SAFETY: the caller's range.
        unsafe { self.download(from, &mut host) }?;
        Ok(LaterRead::Emulated(host))
    }

    pub(super) unsafe fn clear(&self, at: u64, bytes: usize) -> Result<()> {
        if self.recorded(|| Work::Clear { at, bytes }) {
            return Ok(());
        }
        self.work_on(&[at])?;
        // SAFETY: as above.
        unsafe { ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    pub(super) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if self.recorded(|| Work::Copy { from, to, bytes }) {
            return Ok(());
        }
        self.work_on(&[from, to])?;
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    pub(super) fn poison(&self, at: u64, bytes: usize) {
        if self.records() {
            return; // the workspace is in use by what was recorded before, in the order of its replay
        }
        // SAFETY: the workspace's own block, which its lock holder alone uses.
        unsafe { ptr::write_bytes(at as *mut u8, 0xFF, bytes) };
    }

    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        act: usize,
        grid: Grid,
        arguments: &[*mut c_void],
        sizes: &[usize],
    ) -> Result<()> {
        // Values, since the pointers end with the call; in words of 8 bytes, which is as aligned as any argument wants.
        let values = || {
            let value = |(pointer, size): (&*mut c_void, &usize)| {
                let mut words = vec![0u64; size.div_ceil(8)].into_boxed_slice();
                // SAFETY: each argument is `size` bytes, by the caller's word, and `words` holds as many.
                unsafe { ptr::copy_nonoverlapping(pointer.cast::<u8>(), words.as_mut_ptr().cast(), *size) };
                words
            };
            arguments.iter().zip(sizes).map(value).collect()
        };
        if self.recorded(|| Work::Launch { kernel, act, grid, arguments: values(), sizes: sizes.to_vec() }) {
            return Ok(());
        }
        // SAFETY: passed on.
        unsafe { self.launch_now(kernel, act, grid, arguments, sizes) }
    }

    /// # Safety
    /// As [`Driver::launch`](super::Driver).
    unsafe fn launch_now(
        &self,
        kernel: Kernel,
        act: usize,
        grid: Grid,
        arguments: &[*mut c_void],
        sizes: &[usize],
    ) -> Result<()> {
        // An argument of eight bytes that is an address within a buffer is taken for a pointer.
        // A tensor map starts with the address of its matrix.
        let words =
            arguments.iter().zip(sizes).filter(|(_, size)| [8, size_of::<TensorMap>()].contains(size));
        // SAFETY: eight bytes at least, by the caller's word.
        let words: Vec<u64> = words.map(|(word, _)| unsafe { word.cast::<u64>().read_unaligned() }).collect();
        self.work_on(&words)?;
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
            cooperative: u64::from(grid.cooperative),
            error: [0; 1536],
        };
        let blocks: u64 = grid.blocks.iter().map(|b| *b as u64).product();
        let workers = if grid.cooperative { 1 } else { blocks.min(rayon::current_num_threads() as u64) };
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
            error = error.wanted(self.memory.nearest(launch.fault_address));
        }
        Err(error)
    }
}

impl Kernel {
    /// The kernel as built in; null where it is not compiled for that activation type.
    fn built_in(self, act: usize) -> *const EmulatedKernel {
        self.entry().emulated[act].map_or(ptr::null(), |e| e.0)
    }
}
