//! How long the host waits for a GPU that may wait for other ranks itself.
//!
//! A sum that NCCL has queued ends when all ranks have come to it, or never. So once GPUs of several ranks have met, the host asks
//! again and again instead of sleeping in the driver, and after the ranks' time-out gives up the communicator, which ends what is
//! queued on it. Not yet measured on several GPUs.

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::cudaError_enum::{CUDA_ERROR_LAUNCH_TIMEOUT, CUDA_ERROR_NOT_READY};
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Asked without a pause for so long, as most waits are short.
const EAGER: Duration = Duration::from_micros(100);
/// Then with one.
const PAUSE: Duration = Duration::from_micros(20);

/// Without end until other ranks may be waited for.
#[derive(Default)]
pub(in crate::cuda) struct Patience(OnceLock<Limit>);

struct Limit {
    time: Duration,
    give_up: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Patience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0.get().map(|limit| limit.time))
    }
}

impl Patience {
    /// Waits for at most `time` from here on; then `give_up` is called, and again at every later wait that takes as long.
    #[cfg_attr(not(feature = "nccl"), allow(dead_code))]
    pub(in crate::cuda) fn end_after(&self, time: Duration, give_up: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.set(Limit { time, give_up: Box::new(give_up) });
    }

    /// Has it an end?
    pub(in crate::cuda) fn ends(&self) -> bool {
        self.0.get().is_some()
    }

    /// Waits until `ask` no longer says that the device is not ready; by `sleep`, which waits in the driver, where there is no end.
    ///
    /// # Errors
    /// What they report; `CUDA_ERROR_LAUNCH_TIMEOUT` at the end of patience.
    pub(in crate::cuda) fn wait(
        &self,
        sleep: impl FnOnce() -> Result<(), DriverError>,
        mut ask: impl FnMut() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let Some(Limit { time, give_up }) = self.0.get() else { return sleep() };
        let started = Instant::now();
        loop {
            match ask() {
                Err(e) if e.0 == CUDA_ERROR_NOT_READY => {}
                answer => return answer,
            }
            let waited = started.elapsed();
            if waited > *time {
                give_up();
                return Err(DriverError(CUDA_ERROR_LAUNCH_TIMEOUT));
            }
            if waited > EAGER {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::sys::cudaError_enum::CUDA_ERROR_LAUNCH_FAILED;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    const NOT_READY: Result<(), DriverError> = Err(DriverError(CUDA_ERROR_NOT_READY));

    #[test]
    fn it_ends_once_other_ranks_may_be_waited_for() {
        let given_up = Arc::new(AtomicUsize::new(0));
        let patience = Patience::default();
        // One process alone sleeps in the driver.
        assert!(patience.wait(|| Ok(()), || unreachable!()).is_ok());
        let count = Arc::clone(&given_up);
        patience.end_after(Duration::from_millis(5), move || _ = count.fetch_add(1, Relaxed));
        let mut asked = 0;
        let third_time = || {
            asked += 1;
            if asked < 3 { NOT_READY } else { Ok(()) }
        };
        assert!(patience.wait(|| unreachable!(), third_time).is_ok());
        let failed = patience.wait(|| unreachable!(), || Err(DriverError(CUDA_ERROR_LAUNCH_FAILED)));
        assert_eq!(failed.unwrap_err().0, CUDA_ERROR_LAUNCH_FAILED);
        assert_eq!(given_up.load(Relaxed), 0);
        assert_eq!(patience.wait(|| unreachable!(), || NOT_READY).unwrap_err().0, CUDA_ERROR_LAUNCH_TIMEOUT);
        assert_eq!(given_up.load(Relaxed), 1);
    }
}
