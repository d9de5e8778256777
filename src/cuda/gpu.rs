//! A GPU as a driver, over cudarc's thin layer of the CUDA driver API. libcuda is loaded at run time.
//!
//! cudarc panics when libcuda is missing, even while printing an error. So [`Gpu::open`] asks for the library first, and
//! errors are told from their numbers alone. Everything is queued on streams of our own, one for work, and one each for uploads
//! and for sums over ranks beside it: the legacy default stream cannot be captured. Uploads pass through page-locked memory, so that the host never waits
//! for one. Not yet confirmed on a GPU.

mod failure;
mod moments;
mod patience;
mod queues;

use super::cublas::Products;
use super::driver::Grid;
use super::functions::{IMAGES, KERNELS, Kernel, KernelEntry};
use super::pinned::{Reads, Ring};
use super::tensor_map::{BOX_COLUMNS, Boxes, TensorMap};
use crate::error::{Code, Error, Result};
use cudarc::driver::{result, sys};
use failure::failure;
pub(super) use patience::Patience;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

/// The oldest driver API that code of nvcc 13.0 runs on (driver r580).
const OLDEST_DRIVER: i32 = 13000;
/// Dynamic shared memory that a kernel may take without asking.
const SHARED_BYTES_GRANTED: u32 = 48 << 10;

/// One GPU, its context, stream and kernels.
pub struct Gpu {
    ordinal: usize,
    name: String,
    context: sys::CUcontext,
    device: sys::CUdevice,
    stream: sys::CUstream,
    /// Uploads beside `stream`.
    copies: sys::CUstream,
    /// Sums over ranks beside `stream`.
    sums: sys::CUstream,
    /// Rows as in `KERNELS`; resolved once.
    functions: Vec<[Option<Function>; 2]>,
    /// Present once `open` has returned.
    products: Option<Products>,
    /// Compute capability, as 90 for 9.0.
    capability: i32,
    multiprocessors: usize,
    /// Small copies to the host.
    reads: Reads,
    /// Copies from the host.
    uploads: Ring,
    /// How long the host waits for it.
    patience: Patience,
}

struct Function {
    handle: sys::CUfunction,
    shared_bytes: AtomicU32,
}

// SAFETY: driver handles may be used from any thread whose current context is theirs; every method makes it so.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver serialises access to a stream.
unsafe impl Sync for Gpu {}

/// The GPUs that this build can use.
///
/// # Errors
/// No GPU code in this build, no driver, an old driver, no GPU (4).
pub fn available() -> Result<usize> {
    if IMAGES.iter().flatten().all(Option::is_none) {
        return Err(Error::new(Code::NoGpuCode, "this build holds no GPU code")
            .found("no nvcc when it was built")
            .next("scripts/cuda-toolkit.sh, then build again; or --device cpu"));
    }
    count()
}

/// The GPUs of this machine.
///
/// # Errors
/// No driver, an old driver, no GPU (4).
pub fn count() -> Result<usize> {
    driver_version()?;
    result::init().map_err(|e| match e.0 {
        sys::cudaError_enum::CUDA_ERROR_NO_DEVICE => no_gpu("CUDA_ERROR_NO_DEVICE"),
        _ => failure("starting the driver", e),
    })?;
    let count = result::device::get_count().map_err(|e| failure("counting GPUs", e))?;
    if count == 0 {
        return Err(no_gpu("0 devices"));
    }
    Ok(count as usize)
}

fn no_gpu(found: &str) -> Error {
    Error::new(Code::NoSuchGpu, "no NVIDIA GPU")
        .found(found)
        .wanted("at least one GPU of compute capability 8.0 or later")
        .next("nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them; or --device cpu")
}

/// The driver's API version, as 13000 for 13.0.
///
/// # Errors
/// No libcuda, a driver too old (4).
pub fn driver_version() -> Result<i32> {
    // SAFETY: only opens a library by name.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::new(Code::GpuDriver, "no NVIDIA driver")
            .found("libcuda.so.1 cannot be loaded")
            .wanted("driver r580 (CUDA 13.0) or later")
            .next("install the driver of the GPU; or --device cpu"));
    }
    let mut version = 0;
    // SAFETY: libcuda is there; the pointer is to a live number. This call needs no initialisation.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|e| failure("asking for the driver's version", e))?;
    if version < OLDEST_DRIVER {
        return Err(Error::new(Code::GpuDriver, "the NVIDIA driver is too old")
            .found(format!("CUDA {}.{}", version / 1000, version % 1000 / 10))
            .wanted("CUDA 13.0 (driver r580) or later")
            .next("update the driver; or --device cpu"));
    }
    Ok(version)
}

/// A CUDA graph that can be launched.
pub(super) struct Graph(sys::CUgraphExec);

// SAFETY: the handle is used under the GPU's context alone, which every method enters.
unsafe impl Send for Graph {}
// SAFETY: as above; launches of one graph are serialised by the stream.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, dropped once; a running launch keeps what it needs.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

impl Gpu {
    /// GPU `ordinal`, with every kernel loaded.
    ///
    /// # Errors
    /// As [`available`]; no GPU of that number; a GPU that the build's code does not run on (4).
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let count = available()?;
        if ordinal >= count {
            return Err(Error::new(Code::NoSuchGpu, "no such GPU")
                .found(format!("cuda:{ordinal}"))
                .wanted(format!("cuda:0 to cuda:{}", count - 1)));
        }
        let opening = |e| failure("opening the GPU", e);
        let device = result::device::get(ordinal as i32).map_err(opening)?;
        let name = result::device::get_name(device).map_err(opening)?;
        use sys::CUdevice_attribute as Attribute;
        // SAFETY: a device of this driver.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(opening);
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: a device of this driver.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(opening)?;
        // SAFETY: the context just retained.
        unsafe { result::ctx::set_current(context) }.map_err(opening)?;
        let queue = || result::stream::create(result::stream::StreamKind::NonBlocking).map_err(opening);
        let (stream, copies, sums) = (queue()?, queue()?, queue()?);
        let mut gpu = Gpu {
            ordinal,
            name,
            context,
            device,
            stream,
            copies,
            sums,
            functions: Vec::new(),
            products: None,
            capability: 10 * major + minor,
            multiprocessors,
            reads: Reads::default(),
            uploads: Ring::default(),
            patience: Patience::default(),
        };
        gpu.functions = gpu.load()?;
        gpu.products = Some(Products::open(&gpu)?);
        Ok(gpu)
    }

    fn load(&self) -> Result<Vec<[Option<Function>; 2]>> {
        let mut modules = Vec::new();
        for (i, images) in IMAGES.iter().enumerate() {
            let hopper = KERNELS.iter().any(|k| k.image == i && k.hopper);
            let images = if hopper && self.capability != 90 { &[None; 2] } else { images };
            let module = |image: Option<&'static [u8]>| {
                let Some(image) = image else { return Ok(None) };
                // SAFETY: a fatbin that nvcc wrote.
                let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
                module.map(Some).map_err(|e| failure("loading the kernels", e).at(&self.name))
            };
            modules.push([module(images[0])?, module(images[1])?]);
        }
        let mut functions = Vec::new();
        for kernel in KERNELS {
            let function = |module: Option<sys::CUmodule>| {
                let Some(module) = module else { return Ok(None) };
                let name = CString::new(kernel.name).map_err(|e| Error::bug(e.to_string()))?;
                // SAFETY: a live module; modules are never unloaded.
                let handle = unsafe { result::module::get_function(module, name) };
                let handle = handle.map_err(|e| failure("finding a kernel", e).at(kernel.name))?;
                Ok(Some(Function { handle, shared_bytes: AtomicU32::new(SHARED_BYTES_GRANTED) }))
            };
            let [f32_module, bf16_module] = modules[kernel.image];
            functions.push([function(f32_module)?, function(bf16_module)?]);
        }
        Ok(functions)
    }

    /// Is it one, and does this build hold the code?
    pub(super) fn is_hopper(&self) -> bool {
        let has_code = |(k, f): (&KernelEntry, &[Option<Function>; 2])| k.hopper && f[1].is_some();
        KERNELS.iter().zip(&self.functions).any(has_code)
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub(super) fn tensor_map(&self, b: Boxes) -> Result<TensorMap> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, row_bytes) = ([b.columns as u64, b.rows as u64], [2 * b.columns as u64]);
        let (boxes, steps) = ([BOX_COLUMNS as u32, b.box_rows as u32], [1, 1]);
        // SAFETY: the arrays hold as many numbers as two dimensions take; the address is looked at when the map is used.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                b.address as *mut c_void,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|e| failure("describing a matrix to the copy engine", e))?;
        Ok(TensorMap(map.opaque))
    }

    /// Makes this GPU's context the calling thread's.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failure("entering its context", e))
    }

    /// How long the host waits for it.
    #[cfg(feature = "nccl")]
    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// The stream of all work.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Matrix products.
    pub(super) fn products(&self) -> &Products {
        self.products.as_ref().unwrap_or_else(|| unreachable!("`open` makes it before anybody holds a `Gpu`"))
    }

    pub(super) fn name(&self) -> String {
        format!("cuda:{} ({})", self.ordinal, self.name)
    }

    /// Records what this thread queues while `work` runs.
    pub(super) fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.enter()?;
        let capturing = |e| failure("recording work", e);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and records nothing yet, or the driver refuses.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(capturing)?;
        let done = work();
        // The recording ends whatever became of the work. SAFETY: begun above.
        let graph = unsafe { result::stream::end_capture(self.stream) };
        done?;
        let graph = graph.map_err(capturing)?;
        // SAFETY: a graph just made; its description is not needed once it can be launched.
        unsafe {
            let launchable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            Ok(Graph(launchable.map_err(capturing)?))
        }
    }

    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        self.enter()?;
        // SAFETY: a live graph of this GPU; its buffers live by the graph's contract.
        unsafe { result::graph::launch(graph.0, self.stream) }
            .map_err(|e| failure("replaying recorded work", e))
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the stream is alive; what the memory holds is the caller's concern.
        unsafe { result::malloc_async(self.stream, bytes) }.map_err(|e| {
            if e.0 != sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY {
                return failure("allocating memory", e);
            }
            Error::out_of_memory(bytes, result::mem_get_info().ok()).at(self.name())
        })
    }

    pub(super) unsafe fn free(&self, address: u64) {
        // A failure here means that the context is already gone, and the memory with it.
        if self.enter().is_ok() {
            // SAFETY: memory of this stream's, by the caller's word; freed behind all that is queued.
            let _ = unsafe { result::free_async(address, self.stream) };
        }
    }

    pub(super) fn poison(&self, _at: u64, _bytes: usize) {}

    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        act: usize,
        grid: Grid,
        arguments: &[*mut c_void],
        _sizes: &[usize],
    ) -> Result<()> {
        self.enter()?;
        let entry = kernel.entry();
        let place = |e: Error| e.at(format!("kernels/{}.cu: {}", entry.file, entry.name));
        let Some(function) = &self.functions[kernel as usize][act] else {
            return Err(place(Error::bug("a kernel without GPU code")));
        };
        if grid.shared_bytes > function.shared_bytes.load(Ordering::Relaxed) {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a live function.
            unsafe {
                result::function::set_function_attribute(function.handle, attribute, grid.shared_bytes as i32)
            }
            .map_err(|e| place(failure("granting shared memory", e)))?;
            function.shared_bytes.fetch_max(grid.shared_bytes, Ordering::Relaxed);
        }
        let [blocks, threads] = [grid.blocks, grid.threads].map(|[x, y, z]| (x, y, z));
        let mut arguments = arguments.to_vec();
        let launch = if grid.cooperative { result::launch_cooperative_kernel } else { result::launch_kernel };
        // SAFETY: the arguments are the kernel's, by the caller's word; the driver copies their values before it returns.
        unsafe { launch(function.handle, blocks, threads, grid.shared_bytes, self.stream, &mut arguments) }
            .map_err(|e| place(failure("launching a kernel", e)))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.products = None;
        if self.enter().is_ok() {
            // SAFETY: nothing is queued later; the primary context was retained once in `open`. Errors have no remedy here.
            unsafe {
                let _ = result::stream::synchronize(self.copies);
                let _ = result::stream::synchronize(self.sums);
                let _ = result::stream::synchronize(self.stream);
                self.reads.free();
                self.uploads.free();
                let _ = result::stream::destroy(self.copies);
                let _ = result::stream::destroy(self.sums);
                let _ = result::stream::destroy(self.stream);
                let _ = result::primary_ctx::release(self.device);
            }
        }
    }
}
