//! How long work takes, by the clock that fits the device.
//!
//! On a processor: wall time of whole samples. On a GPU: events in the order of its work. There a sample of a kernel is the sum
//! of single launches, each between two events and after a write of twice the L2 cache that is not timed, so that every launch
//! finds a cold cache; the write also keeps the GPU busy while the host queues the next launch, so that no gap is timed. Whole steps
//! run back to back between two events. The emulator is not timed at all.

use super::gpu_clocks::{Clocks, Sampler};
use super::{Effort, Timing, time};
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::device::Device;
use crate::error::Result;
use serde_json::{Value, json};
use std::time::Instant;

/// Launches of one sample, at most: events that wait to be read.
const MOST_CALLS: usize = 256;

/// What a launch finds in the L2 cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Nothing of its own.
    Cold,
    /// What the call before left.
    AsLeft,
}

/// A device that can time what it does.
pub trait Clock: Device {
    /// Times `call`; a device whose speed means nothing gives no samples.
    fn time(&self, effort: Effort, cache: Cache, call: &mut dyn FnMut() -> Result<()>) -> Result<Timing>;
    /// Records `call` as a graph and times its replays; `None` where the device has no graphs.
    fn time_graph(&self, effort: Effort, call: &mut dyn FnMut() -> Result<()>) -> Result<Option<Timing>>;
    /// The device's own numbers, as far as timings depend on them.
    fn conditions(&self) -> Value;
}

impl Clock for Cpu {
    fn time(&self, effort: Effort, _: Cache, call: &mut dyn FnMut() -> Result<()>) -> Result<Timing> {
        time(effort, call)
    }
    fn time_graph(&self, _: Effort, _: &mut dyn FnMut() -> Result<()>) -> Result<Option<Timing>> {
        Ok(None)
    }
    fn conditions(&self) -> Value {
        Value::Null
    }
}

impl Clock for Cuda {
    fn time(&self, effort: Effort, cache: Cache, call: &mut dyn FnMut() -> Result<()>) -> Result<Timing> {
        let Some(facts) = self.facts()? else { return Ok(Timing::none()) };
        let start = Instant::now();
        call()?;
        self.synchronize()?;
        while start.elapsed().as_secs_f64() < effort.warm_up_s {
            call()?;
            self.synchronize()?;
        }
        let once = per_call(self, 3, 2, call)?.unwrap_or(0.0);
        let calls = ((1e3 * effort.sample_s / once.max(1e-4)).ceil() as usize).clamp(1, MOST_CALLS);
        let mut flush = match cache {
            Cache::Cold => Some(self.zeros::<u8>(2 * facts.l2_bytes.max(1 << 20))?),
            Cache::AsLeft => None,
        };
        let sampler = Sampler::start(&facts.bus);
        let (mut ms, start) = (Vec::new(), Instant::now());
        while ms.len() < effort.samples || start.elapsed().as_secs_f64() < effort.total_s {
            ms.push(match &mut flush {
                Some(flush) => cold_sample(self, calls, flush, call)?,
                None => sample(self, calls, call)?,
            });
        }
        ms.sort_by(f64::total_cmp);
        let clocks = sampler.and_then(Sampler::finish);
        Ok(Timing { ms, other_load: 0.0, calls_per_sample: calls, clocks })
    }

    fn time_graph(&self, effort: Effort, call: &mut dyn FnMut() -> Result<()>) -> Result<Option<Timing>> {
        // Once without recording: all memory is there.
        call()?;
        let graph = self.capture(call)?;
        graph.replay()?;
        self.time(effort, Cache::AsLeft, &mut || graph.replay()).map(Some)
    }

    fn conditions(&self) -> Value {
        let Ok(Some(f)) = self.facts() else { return Value::Null };
        json!({
            "name": f.name,
            "driver": super::gpu_clocks::driver_version(),
            "cuda": format!("{}.{}", f.cuda / 1000, f.cuda % 1000 / 10),
            "compute_capability": format!("{}.{}", f.capability / 10, f.capability % 10),
            "multiprocessors": f.multiprocessors,
            "l2_bytes": f.l2_bytes,
            "sm_mhz_max": f.sm_mhz,
        })
    }
}

/// Milliseconds of a call among `calls` back to back.
fn sample(dev: &Cuda, calls: usize, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let before = dev.moment()?;
    for _ in 0..calls {
        call()?;
    }
    let after = dev.moment()?;
    Ok(between(&before, &after)? / calls as f64)
}

/// Milliseconds of a call that finds a cold cache, the mean of `calls`.
fn cold_sample(
    dev: &Cuda,
    calls: usize,
    flush: &mut crate::cuda::Buf<u8>,
    call: &mut dyn FnMut() -> Result<()>,
) -> Result<f64> {
    let mut pairs = Vec::with_capacity(calls);
    for _ in 0..calls {
        dev.clear(flush)?;
        let before = dev.moment()?;
        call()?;
        pairs.push((before, dev.moment()?));
    }
    let all: Result<Vec<f64>> = pairs.iter().map(|(before, after)| between(before, after)).collect();
    Ok(all?.iter().sum::<f64>() / calls as f64)
}

fn between(before: &Option<crate::cuda::Moment>, after: &Option<crate::cuda::Moment>) -> Result<f64> {
    match (before, after) {
        (Some(before), Some(after)) => after.ms_since(before),
        _ => Ok(f64::NAN),
    }
}

/// Median milliseconds of a call over samples of `calls` back to back; `None` where the device takes no moments.
pub(super) fn per_call(
    dev: &Cuda,
    samples: usize,
    calls: usize,
    call: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<f64>> {
    call()?;
    let mut ms = (0..samples).map(|_| sample(dev, calls, call)).collect::<Result<Vec<_>>>()?;
    ms.sort_by(f64::total_cmp);
    Ok(Some(ms[ms.len() / 2]).filter(|ms| ms.is_finite()))
}

/// The fields of a timing in a report.
pub(super) fn fields(timing: &Timing) -> Value {
    let Clocks { sm_mhz, power_w, temperature_c } = timing.clocks.unwrap_or_default();
    json!({
        "runs": timing.ms.len(),
        "calls_per_sample": timing.calls_per_sample,
        "sm_mhz": sm_mhz,
        "power_w": power_w,
        "temperature_c": temperature_c,
    })
}
