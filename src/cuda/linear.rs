//! Linear layers: matrix products by cuBLASLt on a GPU and by the CPU backend in the emulator; what surrounds them by
//! `kernels/linear_epilogue.cu` on both. Formula in [`crate::ops::linear`].
//!
//! Large matrix products are what cuBLASLt is for; everything else in the network is a kernel of our own.

use super::functions::{linear_bias_gradient, linear_relu_mask, reduce_columns};
use super::workspace::bytes;
use super::{Buf, Cuda, Driver, Grid};
#[cfg(emulator)]
use crate::cpu::{self, Cpu};
use crate::device::Act;
#[cfg(emulator)]
use crate::device::{Element, Len};
use crate::error::Result;
use crate::ops::linear::{Activation, BackwardInput, BackwardWeight, Dims, In, Linear};
#[cfg(emulator)]
use std::{marker::PhantomData, ptr::NonNull};

/// Rows that one block sums for the bias gradient, at least, and blocks over rows, at most.
const ROWS_PER_BLOCK: usize = 64;
const MOST_BLOCKS: usize = 512;

/// Bytes of workspace for at most so many rows, in the encoder and its head: the bias gradients. (A product that is masked by a
/// ReLU and added to its output needs more; neither makes one.)
pub(super) fn most_bytes(rows: usize, outputs: usize) -> usize {
    bytes::<f32>(&[rows.div_ceil(ROWS_PER_BLOCK).min(MOST_BLOCKS) * outputs])
}

/// The emulator's memory, as the CPU backend will see it.
#[cfg(emulator)]
struct View<T: Element> {
    address: u64,
    len: usize,
    element: PhantomData<fn() -> T>,
}

#[cfg(emulator)]
impl<T: Element> View<T> {
    fn of(buf: &Buf<T>) -> Self {
        View { address: buf.address(), len: buf.len(), element: PhantomData }
    }

    /// # Safety
    /// The buffer lies in host memory (the emulator's) and outlives what is returned; Rust's rule for borrows is the caller's.
    unsafe fn buf(&self) -> cpu::Buf<T> {
        let ptr = NonNull::new(self.address as *mut T).unwrap_or(NonNull::dangling());
        // SAFETY: an emulated buffer is `len` elements of host memory; the caller keeps it alive.
        unsafe { cpu::Buf::over(ptr, self.len) }
    }
}

impl Cuda {
    /// `dx = dy · W`, or `dx += …`.
    fn input_product<A: Act>(
        &self,
        dims: Dims,
        [dy, weight]: [&Buf<A>; 2],
        accumulate: bool,
        dx: &mut Buf<A>,
    ) -> Result<()> {
        match &**self.driver() {
            Driver::Gpu(gpu) => gpu.products().input(gpu, dims, [dy, weight], accumulate, dx),
            #[cfg(emulator)]
            Driver::Emulated(emulated) => {
                let (dy, weight, dx) = (View::of(dy), View::of(weight), View::of(dx));
                emulated.call(move || {
                    // SAFETY: emulated buffers, borrowed for the call or kept by the graph's contract; `dx` mutably.
                    let (dy, weight, mut dx) = unsafe { (dy.buf(), weight.buf(), dx.buf()) };
                    let input = BackwardInput { dy: &dy, weight: &weight, relu_output: None, accumulate };
                    Cpu.linear_backward_input(dims, input, &mut dx)
                })
            }
        }
    }
}

impl<A: Act> Linear<A> for Cuda {
    fn linear_forward(&self, dims: Dims, input: In<'_, Self, A>, y: &mut Self::Buf<A>) -> Result<()> {
        match &**self.driver() {
            Driver::Gpu(gpu) => {
                let relu = input.activation == Activation::Relu;
                gpu.products().forward(gpu, dims, [input.x, input.weight], input.bias, relu, y)
            }
            #[cfg(emulator)]
            Driver::Emulated(emulated) => {
                let (x, weight, bias) = (View::of(input.x), View::of(input.weight), input.bias.map(View::of));
                let (activation, y) = (input.activation, View::of(y));
                emulated.call(move || {
                    // SAFETY: as in `input_product`; `y` mutably.
                    let (x, weight, bias, mut y) =
                        unsafe { (x.buf(), weight.buf(), bias.as_ref().map(|b| b.buf()), y.buf()) };
                    let input = In { x: &x, weight: &weight, bias: bias.as_ref(), activation };
                    Cpu.linear_forward(dims, input, &mut y)
                })
            }
        }
    }

    fn linear_backward_input(
        &self,
        dims: Dims,
        input: BackwardInput<'_, Self, A>,
        dx: &mut Self::Buf<A>,
    ) -> Result<()> {
        let n = dims.rows * dims.inputs;
        let Some(x) = input.relu_output else {
            return self.input_product(dims, [input.dy, input.weight], input.accumulate, dx);
        };
        let grid = Grid::line(n.div_ceil(256 * 8), 256);
        if input.accumulate {
            let mut workspace = self.workspace();
            let mut product = workspace.one::<A>(n)?;
            self.input_product(dims, [input.dy, input.weight], false, &mut product)?;
            linear_relu_mask(self, grid, Some(&product), x, dx, n as u64, 1)
        } else {
            self.input_product(dims, [input.dy, input.weight], false, dx)?;
            linear_relu_mask(self, grid, None, x, dx, n as u64, 0)
        }
    }

    fn linear_backward_weight(
        &self,
        dims: Dims,
        input: BackwardWeight<'_, Self, A>,
        dweight: &mut Self::Buf<f32>,
        dbias: Option<&mut Self::Buf<f32>>,
    ) -> Result<()> {
        match &**self.driver() {
            Driver::Gpu(gpu) => gpu.products().weight(gpu, dims, [input.x, input.dy], dweight)?,
            #[cfg(emulator)]
            Driver::Emulated(emulated) => {
                let (x, dy, dweight) = (View::of(input.x), View::of(input.dy), View::of(dweight));
                emulated.call(move || {
                    // SAFETY: as in `input_product`; `dweight` mutably.
                    let (x, dy, mut dweight) = unsafe { (x.buf(), dy.buf(), dweight.buf()) };
                    Cpu.linear_backward_weight(dims, BackwardWeight { x: &x, dy: &dy }, &mut dweight, None)
                })?;
            }
        }
        let Some(dbias) = dbias else { return Ok(()) };
        let Dims { rows, outputs, .. } = dims;
        let rows_per_block = rows.div_ceil(MOST_BLOCKS).max(ROWS_PER_BLOCK);
        let blocks = rows.div_ceil(rows_per_block);
        let mut workspace = self.workspace();
        let mut partial = workspace.one::<f32>(blocks * outputs)?;
        let grid = Grid::plane(outputs.div_ceil(256), blocks, 256);
        let (rows, per_block, columns) = (rows as i32, rows_per_block as i32, outputs as i32);
        linear_bias_gradient(self, grid, input.dy, &mut partial, rows, per_block, columns)?;
        let grid = Grid::line(outputs.div_ceil(32), 256);
        reduce_columns(self, grid, &partial, dbias, None, blocks as i32, columns, columns)
    }
}
