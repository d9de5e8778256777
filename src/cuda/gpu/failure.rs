//! What a failed call to the driver is called, and what its user does next.

use crate::error::{Code, Error};
use cudarc::driver::result::DriverError;

const SET_UP: &str = "nvidia-smi tells whether the driver and the GPU answer; or --device cpu";
const NEWER: &str = "cellrefine doctor compares this build's architectures with the GPU; or --device cpu";
const SMALLER: &str = "nvidia-smi names other users of its memory; lower batch.tokens";
/// After any of these nothing on the device is trusted; what stands on the disk is.
const BROKEN: &str =
    "dmesg | grep -i xid tells hardware errors from others; continue with --resume=auto, or --device cpu";
const BUG: &str =
    "CUDA_LAUNCH_BLOCKING=1 finds the call; please report it with what cellrefine doctor prints";

/// An error of the driver, told from its number: cudarc's own text asks libcuda, and panics where that is missing.
pub(super) fn failure(doing: &str, e: DriverError) -> Error {
    let number = e.0 as u32;
    if number == 702 {
        // The end of the host's own patience (`Patience::wait`).
        return Error::new(Code::RankLate, format!("the GPU did not come to an end {doing}"))
            .found("a sum over the ranks that another rank does not come to, or work that takes longer than ranks wait")
            .next("see the other ranks' messages; a longer wait: --rank-timeout SECONDS; then continue with --resume=auto");
    }
    let (name, next) = match number {
        1 => ("CUDA_ERROR_INVALID_VALUE", BUG),
        2 => ("CUDA_ERROR_OUT_OF_MEMORY", SMALLER),
        3 => ("CUDA_ERROR_NOT_INITIALIZED", SET_UP),
        34 => (
            "CUDA_ERROR_STUB_LIBRARY",
            "the libcuda.so.1 found is the toolkit's stub: take its folder out of LD_LIBRARY_PATH; or --device cpu",
        ),
        46 => ("CUDA_ERROR_DEVICE_UNAVAILABLE", SET_UP),
        100 => ("CUDA_ERROR_NO_DEVICE", SET_UP),
        101 => ("CUDA_ERROR_INVALID_DEVICE", SET_UP),
        209 => ("CUDA_ERROR_NO_BINARY_FOR_GPU", NEWER),
        214 => ("CUDA_ERROR_ECC_UNCORRECTABLE", BROKEN),
        222 => ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", NEWER),
        500 => ("CUDA_ERROR_NOT_FOUND", NEWER),
        700 => ("CUDA_ERROR_ILLEGAL_ADDRESS", BUG),
        701 => ("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", BUG),
        716 => ("CUDA_ERROR_MISALIGNED_ADDRESS", BUG),
        719 => ("CUDA_ERROR_LAUNCH_FAILED", BROKEN),
        803 => (
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "libcuda and the kernel's driver are of different versions: restart the machine or the container after an \
             update; or --device cpu",
        ),
        804 => (
            "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
            "take the compatibility libcuda out of LD_LIBRARY_PATH; or --device cpu",
        ),
        900..=908 => ("a stream-capture error", BUG),
        _ => ("see CUresult in cuda.h", BROKEN),
    };
    Error::new(Code::GpuFailed, format!("the GPU driver failed {doing}"))
        .found(format!("{name} ({number})"))
        .next(next)
}
