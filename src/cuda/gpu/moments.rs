//! Events with their clock on, and a GPU's numbers.

use super::failure::failure;
use super::{Gpu, driver_version};
use crate::cuda::moment::Facts;
use crate::error::Result;
use cudarc::driver::{result, sys};
use std::ffi::CStr;

impl Gpu {
    /// An event at the end of all work queued so far, with its clock on.
    pub(in crate::cuda) fn timed_event(&self) -> Result<sys::CUevent> {
        self.enter()?;
        let timing = |e| failure("timing its work", e);
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(timing)?;
        // SAFETY: the event just made, on a live stream.
        unsafe { result::event::record(event, self.stream()) }.map_err(timing)?;
        Ok(event)
    }

    /// Milliseconds from one timed event to a later one, which is waited for.
    pub(in crate::cuda) fn ms_between(&self, from: sys::CUevent, to: sys::CUevent) -> Result<f64> {
        self.enter()?;
        let timing = |e| failure("timing its work", e);
        // SAFETY: live events of this GPU's, both recorded.
        unsafe {
            result::event::synchronize(to).map_err(timing)?;
            result::event::elapsed(from, to).map(f64::from).map_err(timing)
        }
    }

    /// What the driver tells of this GPU.
    pub(in crate::cuda) fn facts(&self) -> Result<Facts> {
        use sys::CUdevice_attribute as Attribute;
        self.enter()?;
        let asking = |e| failure("asking about the GPU", e);
        // SAFETY: a device of this driver.
        let number = |a| unsafe { result::device::get_attribute(self.device, a) }.map_err(asking);
        let mut bus = [0; 20];
        // SAFETY: room for the address and its final zero, as much as is said.
        unsafe { sys::cuDeviceGetPCIBusId(bus.as_mut_ptr(), bus.len() as i32, self.device) }
            .result()
            .map_err(asking)?;
        // SAFETY: the call above ended it with a zero.
        let bus = unsafe { CStr::from_ptr(bus.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Facts {
            name: self.name.clone(),
            cuda: driver_version()?,
            capability: self.capability,
            multiprocessors: self.multiprocessors,
            l2_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            sm_mhz: number(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)? as usize / 1000,
            bus,
        })
    }
}
