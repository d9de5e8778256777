//! One op on two backends: the CPU's own code, and the CUDA kernel, compiled as C++ and run by the emulator.
//!
//!     cargo run --release --example one_op_two_backends
//!
//! Everything above the boundary is written once, generic over the backend, and compiled apart for each: `layernorm` below does
//! not know where it runs. With a GPU, `Cuda::open(0)` takes the third place and nothing else changes.

use cellrefine::cpu::Cpu;
use cellrefine::cuda::Cuda;
use cellrefine::device::Dropout;
use cellrefine::error::Result;
use cellrefine::ops::{Backend, layernorm};

/// N rows of width D.
const ROWS: usize = 5;
const WIDTH: usize = 200;

/// y = LayerNorm(residual + x), read back to the host, (N, D).
fn layernorm<B: Backend<f32>>(dev: &B, x: &[f32], residual: &[f32]) -> Result<Vec<f32>> {
    let (mut x, residual) = (dev.upload(x)?, dev.upload(residual)?);
    let (weight, bias) = (dev.upload(&[1.5f32; WIDTH])?, dev.upload(&[0.25f32; WIDTH])?);
    let mut y = dev.zeros::<f32>(ROWS * WIDTH)?;
    let (mut mean, mut rstd) = (dev.zeros::<f32>(ROWS)?, dev.zeros::<f32>(ROWS)?);
    // Fields have names and shapes; a buffer that is too short is an error here, before any kernel sees it.
    let dims = layernorm::Dims { rows: ROWS, width: WIDTH, eps: 1e-12 };
    let input =
        layernorm::In { residual: Some(&residual), weight: &weight, bias: &bias, dropout: Dropout::NONE };
    let output = layernorm::Out { x_then_sum: &mut x, y: &mut y, mean: &mut mean, rstd: &mut rstd };
    layernorm::forward::<f32, B>(dev, dims, input, output)?;
    dev.download(&y)
}

fn main() -> Result<()> {
    let x: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i as f32 * 0.37).sin()).collect();
    let residual: Vec<f32> = x.iter().map(|v| 2.0 * v * v).collect();

    let cpu = layernorm(&Cpu, &x, &residual)?;
    println!("cpu       y[0] = {:.6}", cpu[0]);
    let emulated = match Cuda::emulated() {
        Ok(dev) => layernorm(&dev, &x, &residual)?,
        Err(e) => {
            println!("emulated  not in this build: {}", e.what());
            return Ok(());
        }
    };
    println!("emulated  y[0] = {:.6}", emulated[0]);

    // The two add in different orders, so they agree to rounding and not to the bit.
    let apart = cpu.iter().zip(&emulated).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("largest difference over {} values: {apart:.1e}", cpu.len());
    assert!(apart < 1e-5);
    Ok(())
}
