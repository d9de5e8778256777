//! Cases shared by `cellrefine bench` and `benches/`: timing, counted bytes and FLOPs, ceilings, JSON.
//!
//! A sample lasts at least a quarter of a second, so that a clock tick or an interrupt is noise; the median of the samples is
//! the result and the smallest one is told beside it. The ceiling ([`peak`]) is measured in the same run, because a shared
//! machine has no other honest one, and the share of it that other processes took is reported as `other_load`.

pub mod clock;
pub mod compare;
pub mod gpu_clocks;
pub mod kernels;
pub mod lengths;
pub mod loader;
pub mod pack;
pub mod peak;
pub mod random;
pub mod refine;
pub mod step;
pub mod table;

use crate::error::Result;
use std::time::Instant;

/// How long to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Before the first sample.
    pub warm_up_s: f64,
    /// Of a sample, at least.
    pub sample_s: f64,
    /// Of all samples together, at least.
    pub total_s: f64,
    /// Samples, at least.
    pub samples: usize,
}

impl Effort {
    /// Whole steps: about `total_s` seconds of samples.
    pub fn steps(total_s: f64) -> Self {
        Effort { warm_up_s: 0.5, sample_s: 0.25, total_s, samples: 3 }
    }
    /// Single ops.
    pub fn kernels() -> Self {
        Effort { warm_up_s: 0.05, sample_s: 0.05, total_s: 0.25, samples: 3 }
    }
    /// On a GPU: 20 samples of at least 2 ms.
    pub fn on_gpu(warm_up_s: f64) -> Self {
        Effort { warm_up_s, sample_s: 0.002, total_s: 0.0, samples: 20 }
    }
    /// Does it run, and about how fast: no number to quote.
    pub fn quick() -> Self {
        Effort { warm_up_s: 0.0, sample_s: 0.0, total_s: 0.0, samples: 2 }
    }
}

/// Times of one case.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// Milliseconds per call, one value per sample, sorted.
    pub ms: Vec<f64>,
    /// Share of the machine that other processes used meanwhile, 0 to 1; 0 where it cannot be read.
    pub other_load: f64,
    /// Calls of a sample.
    pub calls_per_sample: usize,
    /// Of a GPU, meanwhile.
    pub clocks: Option<gpu_clocks::Clocks>,
}

impl Timing {
    /// Of a device whose speed means nothing.
    pub fn none() -> Self {
        Timing { ms: Vec::new(), other_load: 0.0, calls_per_sample: 0, clocks: None }
    }
    /// Median over the samples; NaN, which JSON writes as null, where nothing was timed.
    pub fn median_ms(&self) -> f64 {
        self.ms.get(self.ms.len() / 2).copied().unwrap_or(f64::NAN)
    }
    /// The fastest sample; NaN where nothing was timed.
    pub fn min_ms(&self) -> f64 {
        self.ms.first().copied().unwrap_or(f64::NAN)
    }
    /// The slowest sample; NaN where nothing was timed.
    pub fn max_ms(&self) -> f64 {
        self.ms.last().copied().unwrap_or(f64::NAN)
    }
}

/// Times `call`.
pub fn time(effort: Effort, mut call: impl FnMut() -> Result<()>) -> Result<Timing> {
    let start = Instant::now();
    call()?;
    while start.elapsed().as_secs_f64() < effort.warm_up_s {
        call()?;
    }
    let (busy, own, start) = (busy_seconds(), own_seconds(), Instant::now());
    let (mut ms, mut calls) = (Vec::new(), 0);
    while ms.len() < effort.samples || start.elapsed().as_secs_f64() < effort.total_s {
        let sample = Instant::now();
        calls = 0;
        while calls == 0 || sample.elapsed().as_secs_f64() < effort.sample_s {
            call()?;
            calls += 1;
        }
        ms.push(sample.elapsed().as_secs_f64() * 1e3 / calls as f64);
    }
    ms.sort_by(f64::total_cmp);
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let others = (busy_seconds() - busy) - (own_seconds() - own);
    let other_load = (others / (start.elapsed().as_secs_f64() * cores)).clamp(0.0, 1.0);
    let calls_per_sample = calls;
    Ok(Timing { ms, other_load, calls_per_sample, clocks: None })
}

/// Clock ticks per second of /proc: fixed on Linux.
const TICKS_PER_S: f64 = 100.0;

/// Seconds that all cores together were busy since boot.
fn busy_seconds() -> f64 {
    let Ok(stat) = std::fs::read_to_string("/proc/stat") else { return 0.0 };
    let ticks: Vec<f64> =
        stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    // user, nice, system, irq, softirq, steal: not idle, not waiting for disks.
    [0, 1, 2, 5, 6, 7].iter().filter_map(|i| ticks.get(*i)).sum::<f64>() / TICKS_PER_S
}

/// Seconds of processor time of this process.
fn own_seconds() -> f64 {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return 0.0 };
    // The command name may hold spaces; fields are counted after its closing bracket: utime and stime are the 12th and 13th.
    let rest = stat.rsplit(')').next().unwrap_or("");
    rest.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S
}

/// Peak resident memory of this process, where the system says it.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// Four significant digits: what a timing is worth.
pub(crate) fn round4(x: f64) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let scale = 10f64.powi(3 - x.abs().log10().floor() as i32);
    (x * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_sorted_and_as_many_as_asked() {
        let effort = Effort { warm_up_s: 0.0, sample_s: 0.0, total_s: 0.0, samples: 5 };
        let mut calls = 0;
        let t = time(effort, || {
            calls += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((t.ms.len(), calls), (5, 6));
        assert!(t.ms.is_sorted() && t.min_ms() <= t.median_ms() && (0.0..=1.0).contains(&t.other_load));
    }

    #[test]
    fn four_digits() {
        assert_eq!([1234.567, 0.00123456, 0.0, -98765.0].map(round4), [1235.0, 0.001235, 0.0, -98770.0]);
    }
}
