//! One typed launch function per kernel, written by `build.rs` from the signatures in `kernels/*.cu`.
//!
//! `const act_t*` is `&Buf<A>`, `float*` is `&mut Buf<f32>`, `OPTIONAL` makes an `Option`, numbers and `KERNEL_ARGUMENT`
//! structs go by value. Nothing else in the crate launches a kernel, so a parameter that one side has and the other has not
//! is a compile error.

#![allow(dead_code)] // the table and the structs are complete; what of them is used depends on the driver

use super::driver::Grid;
use super::tensor_map::TensorMap;
use super::{Buf, Cuda};
use crate::device::Act;
use crate::error::Result;
use std::ffi::c_void;

/// Where the host C++ of a kernel starts; its address alone is kept here.
#[derive(Clone, Copy)]
pub(crate) struct Entry(pub *const EmulatedKernel);

// SAFETY: the address of an immutable static of the emulator.
unsafe impl Sync for Entry {}

/// `cuhost::Kernel` of `kernels/emulator/runtime.h`.
#[repr(C)]
pub(crate) struct EmulatedKernel {
    call: Option<unsafe extern "C" fn(*const *mut c_void)>,
    pub run: Option<unsafe extern "C" fn(*mut c_void) -> i32>,
    max_threads: i32,
}

/// A row of the kernel table.
pub(crate) struct KernelEntry {
    pub name: &'static str,
    /// Stem of the file in `kernels/`.
    pub file: &'static str,
    pub line: u32,
    /// Row of `IMAGES`.
    pub image: usize,
    /// For compute capability 9.0 alone.
    pub hopper: bool,
    /// f32, bf16; a kernel without `act_t` has the first alone, one for Hopper the second.
    pub emulated: [Option<Entry>; 2],
}

/// Column of the tables above for an activation type.
pub(crate) fn act_index<A: Act>() -> usize {
    usize::from(!A::IS_F32)
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

impl Kernel {
    /// Its row of the table.
    pub(crate) fn entry(self) -> &'static KernelEntry {
        &KERNELS[self as usize]
    }
}
