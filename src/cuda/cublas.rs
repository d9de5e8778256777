//! The three matrix products of a linear layer by cuBLASLt, over cudarc's thin layer. Not yet confirmed on a GPU.
//!
//! Our matrices are row-major, cuBLASLt's are column-major, so each product is asked for transposed:
//!
//! ```text
//! forward   yᵀ  (outputs, rows)    = W  (stored (inputs, outputs), transposed) · xᵀ  (inputs, rows)    + bias, ReLU
//! input     dxᵀ (inputs, rows)     = Wᵀ (stored (inputs, outputs))             · dyᵀ (outputs, rows)
//! weight    dWᵀ (inputs, outputs) += xᵀ (inputs, rows)                          · dy  (stored (outputs, rows), transposed)
//! ```
//! Sums are f32; f32 data is not rounded to tf32. The heuristic runs once per shape and its answer is kept. Algorithms that
//! add up parts of a product by atomics are left out, so that a product has the same bits every time.

use super::Buf;
use super::gpu::Gpu;
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::ops::linear::Dims;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, PoisonError};

/// What NVIDIA advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// cuBLASLt's handle, its workspace, and a plan per shape.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: a cuBLASLt handle may be used from any thread; the plans, whose bias pointer changes per call, are behind a lock.
unsafe impl Send for Products {}
// SAFETY: as above.
unsafe impl Sync for Products {}

/// All that decides which algorithm serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    /// Column-major: D (m, n) = A (m, k) · B (k, n).
    m: usize,
    n: usize,
    k: usize,
    /// A is stored (k, m); B is stored (n, k).
    transposed: [bool; 2],
    bf16: bool,
    /// D is f32 whatever A and B are.
    f32_result: bool,
    bias: bool,
    relu: bool,
    /// Every operand starts at a multiple of 16 bytes.
    aligned: bool,
}

struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Operands of one product.
struct Operands {
    a: u64,
    b: u64,
    d: u64,
    bias: u64,
    accumulate: bool,
}

fn failure(doing: &str, e: CublasError) -> Error {
    // The debug form of the status is its name and needs no library.
    Error::new(Code::GpuFailed, format!("cuBLASLt failed {doing}"))
        .found(format!("{:?}", e.0))
        .next("CUBLASLT_LOG_LEVEL=2 prints more; continue with --resume=auto, or --device cpu")
}

/// Is cuBLASLt there?
///
/// # Errors
/// It cannot be loaded (4).
pub fn available() -> Result<()> {
    // SAFETY: only opens a library by name.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(Error::new(Code::NoCublas, "no cuBLASLt")
        .found("libcublasLt.so.13 cannot be loaded")
        .wanted("cuBLASLt of CUDA 13")
        .next("install the CUDA 13 libraries and name their folder in LD_LIBRARY_PATH; or --device cpu"))
}

impl Products {
    pub(super) fn open(gpu: &Gpu) -> Result<Self> {
        available()?;
        let handle = result::create_handle().map_err(|e| failure("starting", e))?;
        Ok(Products { handle, workspace: gpu.allocate(WORKSPACE_BYTES)?, plans: Mutex::default() })
    }

    /// `y = act(x · Wᵀ + bias)`.
    pub(super) fn forward<A: Act>(
        &self,
        gpu: &Gpu,
        dims: Dims,
        [x, weight]: [&Buf<A>; 2],
        bias: Option<&Buf<A>>,
        relu: bool,
        y: &mut Buf<A>,
    ) -> Result<()> {
        let shape = Shape {
            m: dims.outputs,
            n: dims.rows,
            k: dims.inputs,
            transposed: [true, false],
            bf16: !A::IS_F32,
            f32_result: false,
            bias: bias.is_some(),
            relu,
            aligned: true,
        };
        let bias = bias.map_or(0, |b| b.address());
        let operands =
            Operands { a: weight.address(), b: x.address(), d: y.address(), bias, accumulate: false };
        self.multiply(gpu, shape, operands)
    }

    /// `dx = dy · W`, or `dx += …`.
    pub(super) fn input<A: Act>(
        &self,
        gpu: &Gpu,
        dims: Dims,
        [dy, weight]: [&Buf<A>; 2],
        accumulate: bool,
        dx: &mut Buf<A>,
    ) -> Result<()> {
        let shape = Shape {
            m: dims.inputs,
            n: dims.rows,
            k: dims.outputs,
            transposed: [false, false],
            bf16: !A::IS_F32,
            f32_result: false,
            bias: false,
            relu: false,
            aligned: true,
        };
        let operands =
            Operands { a: weight.address(), b: dy.address(), d: dx.address(), bias: 0, accumulate };
        self.multiply(gpu, shape, operands)
    }

    /// `dW += dyᵀ · x`, in f32.
    pub(super) fn weight<A: Act>(
        &self,
        gpu: &Gpu,
        dims: Dims,
        [x, dy]: [&Buf<A>; 2],
        dweight: &mut Buf<f32>,
    ) -> Result<()> {
        let shape = Shape {
            m: dims.inputs,
            n: dims.outputs,
            k: dims.rows,
            transposed: [false, true],
            bf16: !A::IS_F32,
            f32_result: true,
            bias: false,
            relu: false,
            aligned: true,
        };
        let operands =
            Operands { a: x.address(), b: dy.address(), d: dweight.address(), bias: 0, accumulate: true };
        self.multiply(gpu, shape, operands)
    }

    fn multiply(&self, gpu: &Gpu, shape: Shape, operands: Operands) -> Result<()> {
        if shape.m * shape.n == 0 || shape.k == 0 {
            // Nothing to add; a product over nothing that has to be set is made by no layer.
            return Ok(());
        }
        gpu.enter()?;
        let addresses = [operands.a, operands.b, operands.d, operands.bias];
        let shape = Shape { aligned: addresses.iter().all(|p| p % 16 == 0), ..shape };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(self.plan(shape)?),
        };
        if shape.bias {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.operation, attribute, &operands.bias)?;
        }
        let (alpha, beta) = (1.0f32, if operands.accumulate { 1.0f32 } else { 0.0 });
        let at = |address: u64| address as *const c_void;
        // SAFETY: the layouts are those of the operands, which the op's checks found long enough; the scalars live through
        // the call, which copies them; the workspace belongs to this handle and its one stream.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at(operands.a),
                plan.a,
                at(operands.b),
                plan.b,
                at(operands.d),
                plan.d,
                at(operands.d).cast_mut(),
                plan.d,
                &raw const plan.algorithm,
                (self.workspace as *mut c_void).cast(),
                WORKSPACE_BYTES,
                gpu.stream().cast(),
            )
        }
        .map_err(|e| failure("multiplying", e).at(format!("{shape:?}")))
    }

    fn plan(&self, shape: Shape) -> Result<Plan> {
        use sys::cublasLtMatmulDescAttributes_t as Operation;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let planning = |e| failure("planning a product", e).at(format!("{shape:?}"));
        let f32_type = sys::cudaDataType_t::CUDA_R_32F;
        let data = if shape.bf16 { sys::cudaDataType_t::CUDA_R_16BF } else { f32_type };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, f32_type).map_err(planning)?;
        // cublasOperation_t, which the bindings leave out: CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        let transpose = |t: bool| i32::from(t);
        set(operation, Operation::CUBLASLT_MATMUL_DESC_TRANSA, &transpose(shape.transposed[0]))?;
        set(operation, Operation::CUBLASLT_MATMUL_DESC_TRANSB, &transpose(shape.transposed[1]))?;
        let epilogue = match (shape.bias, shape.relu) {
            (false, false) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            (false, true) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU,
            (true, false) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            (true, true) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU_BIAS,
        };
        set(operation, Operation::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;

        let layout = |rows: usize, columns: usize, kind| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64).map_err(planning)
        };
        let stored = |rows, columns, t: bool| if t { (columns, rows) } else { (rows, columns) };
        let (a_rows, a_columns) = stored(shape.m, shape.k, shape.transposed[0]);
        let (b_rows, b_columns) = stored(shape.k, shape.n, shape.transposed[1]);
        let a = layout(a_rows, a_columns, data)?;
        let b = layout(b_rows, b_columns, data)?;
        let d = layout(shape.m, shape.n, if shape.f32_result { f32_type } else { data })?;

        let preference = result::create_matmul_pref().map_err(planning)?;
        let alignment: u32 = if shape.aligned { 16 } else { if shape.bf16 { 2 } else { 4 } };
        // No reduction, or one through the workspace: not the one by atomics in place.
        let reductions = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let prefer = |attribute, value: *const c_void, bytes| {
            // SAFETY: a live preference; `value` points to `bytes` bytes.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, bytes) }
                .map_err(planning)
        };
        let bytes = WORKSPACE_BYTES as u64;
        prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), 8)?;
        prefer(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reductions).cast(), 4)?;
        for attribute in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            prefer(attribute, (&raw const alignment).cast(), 4)?;
        }
        // SAFETY: live descriptors, as created above.
        let found =
            unsafe { result::get_matmul_algo_heuristic(self.handle, operation, a, b, d, d, preference) };
        // SAFETY: created above, and not used again.
        unsafe { result::destroy_matmul_pref(preference) }.map_err(planning)?;
        Ok(Plan { operation, a, b, d, algorithm: found.map_err(planning)?.algo })
    }
}

/// Sets one attribute of a product.
fn set<T>(
    operation: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<()> {
    // SAFETY: a live descriptor; the value has the attribute's type, which cuBLASLt checks by its size.
    unsafe {
        result::set_matmul_desc_attribute(operation, attribute, ptr::from_ref(value).cast(), size_of::<T>())
    }
    .map_err(|e| failure("describing a product", e))
}

impl Drop for Products {
    fn drop(&mut self) {
        // The workspace goes with the GPU's context. SAFETY: created by this handle, used by nobody any more.
        unsafe {
            for plan in self.plans.lock().unwrap_or_else(PoisonError::into_inner).values() {
                let _ = result::destroy_matmul_desc(plan.operation);
                for layout in [plan.a, plan.b, plan.d] {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}
