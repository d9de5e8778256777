//! Ceilings of a device, measured now, in the same run as what is held against them: arithmetic and memory.

mod cpu;
mod cuda;

use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::device::Device;

/// A measured ceiling; the larger of two tells more.
#[derive(Debug, Clone, PartialEq, PartialOrd)]
pub struct Peak {
    /// 10⁹ floating-point operations a second, the whole device together.
    pub gflop_per_s: f64,
    /// How it was measured.
    pub source: String,
}

/// A device that knows its ceilings: what training and `bench` hold their speed against. The one place that measures them.
pub trait Ceiling: Device {
    /// Arithmetic peak for f32, or for products of bf16, as it is now; `None` where the device has none worth the name.
    fn peak(&self, bf16: bool) -> Option<Peak>;
    /// 10⁹ bytes a second of copying in this device's memory, reads and writes both counted.
    fn copy_gb_per_s(&self) -> Option<f64>;
}

impl Ceiling for Cpu {
    fn peak(&self, bf16: bool) -> Option<Peak> {
        Some(cpu::measure(bf16))
    }
    fn copy_gb_per_s(&self) -> Option<f64> {
        Some(cpu::copy_gb_per_s())
    }
}

/// None on the emulator, whose speed means nothing, and where the GPU's memory has no room for the operands.
impl Ceiling for Cuda {
    fn peak(&self, bf16: bool) -> Option<Peak> {
        cuda::peak(self, bf16).ok().flatten()
    }
    fn copy_gb_per_s(&self) -> Option<f64> {
        cuda::copy_gb_per_s(self).ok().flatten()
    }
}
