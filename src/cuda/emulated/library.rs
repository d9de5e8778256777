//! Kernels that come from a shared object instead of this build: the mutants of the tests.

use super::super::functions::EmulatedKernel;
use crate::error::{Code, Error, Result};
use std::ffi::{CStr, CString, c_void};

/// A shared object with emulated kernels. Never closed: a kernel's code may be on a stack somewhere.
pub(super) struct Library(*mut c_void);

// SAFETY: a handle of dlopen may be used from any thread.
unsafe impl Send for Library {}
// SAFETY: as above; dlsym is thread-safe.
unsafe impl Sync for Library {}

impl Library {
    pub(super) fn open(path: &str) -> Result<Self> {
        let refused = |why: String| {
            Error::new(Code::EmulatorLibrary, "cannot load the kernels of CELLREFINE_EMULATOR_LIBRARY")
                .at(path)
                .found(why)
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
    pub(super) fn kernel(&self, name: &str, act: usize) -> Result<Option<*const EmulatedKernel>> {
        let symbol = format!("cellrefine_{}_{name}", ["f32", "bf16"][act]);
        let symbol = CString::new(symbol).map_err(|e| Error::bug(e.to_string()))?;
        // SAFETY: a live handle and a C string.
        let code: *const EmulatedKernel = unsafe { libc::dlsym(self.0, symbol.as_ptr()) }.cast_const().cast();
        Ok((!code.is_null()).then_some(code))
    }
}
