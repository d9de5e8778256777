//! Clock, power and temperature of a GPU while it is timed, read through NVML where the driver brings it. Settings are never
//! touched.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two readings.
const PERIOD: Duration = Duration::from_millis(20);

/// Medians over a measurement; `None` where the GPU does not say.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Clocks {
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: Option<f64>,
    /// Watts.
    pub power_w: Option<f64>,
    /// Degrees Celsius.
    pub temperature_c: Option<f64>,
}

/// The library; absent without a driver.
fn library() -> Option<&'static Nvml> {
    static LIBRARY: OnceLock<Option<Nvml>> = OnceLock::new();
    LIBRARY.get_or_init(|| Nvml::init().ok()).as_ref()
}

/// The driver's own version, such as 580.95.05.
pub fn driver_version() -> Option<String> {
    library()?.sys_driver_version().ok()
}

/// A thread that reads until it is told to stop.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<[Option<f64>; 3]>>,
}

impl Sampler {
    /// Reads the GPU at this address of the bus; `None` where NVML is absent or does not know it.
    pub fn start(bus: &str) -> Option<Sampler> {
        let library = library()?;
        let device = library.device_by_pci_bus_id(bus).ok()?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut readings = Vec::new();
            while !until.load(Relaxed) {
                readings.push([
                    device.clock_info(Clock::SM).ok().map(f64::from),
                    device.power_usage().ok().map(|mw| f64::from(mw) / 1e3),
                    device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
                ]);
                std::thread::sleep(PERIOD);
            }
            readings
        });
        Some(Sampler { stop, thread })
    }

    /// Stops, and gives the medians.
    pub fn finish(self) -> Option<Clocks> {
        self.stop.store(true, Relaxed);
        Some(medians(&self.thread.join().ok()?))
    }
}

fn medians(readings: &[[Option<f64>; 3]]) -> Clocks {
    let median = |i: usize| {
        let mut all: Vec<f64> = readings.iter().filter_map(|r| r[i]).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    };
    Clocks { sm_mhz: median(0), power_w: median(1), temperature_c: median(2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_leave_out_what_was_not_said() {
        let r = [[Some(3.0), None, Some(40.0)], [Some(1.0), None, None], [Some(2.0), None, Some(50.0)]];
        let want = Clocks { sm_mhz: Some(2.0), power_w: None, temperature_c: Some(50.0) };
        assert_eq!(medians(&r), want);
        assert_eq!(medians(&[]), Clocks::default());
    }
}
