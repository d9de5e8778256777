//! What is said about a logged step, and how fast it went.
//!
//! Rates cover the steps since the last record, evaluation and checkpoints left out. Tokens are real ones: there is no padding.
//! FLOPs are counted from Σ len and Σ len² (three times the forward pass); work repeated for gradient caching is not counted.

use super::task::{Evaluation, Loss};
use crate::collective::Collective;
use crate::error::Result;
use crate::model::ModelConfig;
use crate::model::flops::{self, Work};
use crate::report::jsonl::JsonLines;
use crate::report::prometheus::PromFile;
use crate::report::tensorboard::EventFile;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A logged step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    /// Step, from 1.
    pub step: u64,
    /// Epochs finished.
    pub epoch: f64,
    /// Loss, by term.
    pub loss: Loss,
    /// Learning rate of the encoder.
    pub learning_rate: f64,
    /// Norm of the mean gradient over all groups, before clipping.
    pub grad_norm: f64,
    /// Cells since the last record.
    pub cells: u64,
    /// Real tokens since the last record.
    pub tokens: u64,
    /// Milliseconds per step since the last record.
    pub dt_ms: f64,
    /// Cells per second.
    pub cells_per_s: f64,
    /// Real tokens per second.
    pub tokens_per_s: f64,
    /// Counted work per second.
    pub gflop_per_s: f64,
    /// Share of the device's arithmetic peak, measured at the start of the run.
    pub fraction_of_peak: Option<f64>,
    /// Skipped steps so far.
    pub bad_steps: u64,
    /// Spikes of the gradient norm or the loss so far.
    pub spikes: u64,
    /// Memory of this process.
    pub host_memory_bytes: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// The evaluation made at this step.
    pub evaluation: Option<Evaluation>,
}

impl StepRecord {
    /// Every number with its name.
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        let mut all = vec![("loss", self.loss.total)];
        all.extend(&self.loss.terms);
        all.extend([
            ("learning_rate", self.learning_rate),
            ("grad_norm", self.grad_norm),
            ("epoch", self.epoch),
            ("cells", self.cells as f64),
            ("tokens", self.tokens as f64),
            ("dt_ms", self.dt_ms),
            ("cells_per_s", self.cells_per_s),
            ("tokens_per_s", self.tokens_per_s),
            ("gflop_per_s", self.gflop_per_s),
            ("bad_steps", self.bad_steps as f64),
            ("spikes", self.spikes as f64),
            ("host_memory_bytes", self.host_memory_bytes as f64),
        ]);
        if let Some(fraction) = self.fraction_of_peak {
            all.push(("fraction_of_peak", fraction));
            all.push(("peak_gflop_per_s", self.gflop_per_s / fraction.max(f64::MIN_POSITIVE)));
        }
        if let Some(e) = &self.evaluation {
            all.push((e.measure, e.value));
            all.extend(&e.others);
        }
        all
    }

    /// The line of metrics.jsonl. NaN and infinities are null: JSON has no word for them.
    pub fn to_json(&self) -> Value {
        let mut line = json!({"step": self.step, "time": self.time});
        for (name, value) in self.scalars() {
            let whole = value.fract() == 0.0 && value.abs() < 9e15 && COUNTS.contains(&name);
            line[name] = if whole { json!(value as u64) } else { json!(value) };
        }
        line
    }

    /// A line for the console.
    pub fn to_text(&self) -> String {
        let mut text = format!("step {} loss {:.4}", self.step, self.loss.total);
        if self.loss.terms.len() > 1 {
            for (name, value) in &self.loss.terms {
                text += &format!(" {name} {value:.3}");
            }
        }
        text += &format!(
            " norm {:.2} lr {:.1e} {:.0} cells/s {:.0} tokens/s",
            self.grad_norm, self.learning_rate, self.cells_per_s, self.tokens_per_s
        );
        if let Some(fraction) = self.fraction_of_peak {
            text += &format!(" {:.0}% of peak", 100.0 * fraction);
        }
        text
    }
}

/// Whole numbers among the scalars.
const COUNTS: [&str; 5] = ["cells", "tokens", "bad_steps", "spikes", "host_memory_bytes"];

/// Counts cells, tokens and work against the clock.
pub struct Meter {
    peak_flop_per_s: Option<f64>,
    since: Instant,
    seconds: f64,
    steps: u64,
    cells: u64,
    tokens: u64,
    flop: f64,
    all_seconds: f64,
    all_cells: u64,
    all_tokens: u64,
}

impl Meter {
    /// Starts the clock, against the FLOP/s of all ranks together.
    pub fn new(peak_flop_per_s: Option<f64>) -> Meter {
        Meter {
            peak_flop_per_s,
            since: Instant::now(),
            seconds: 0.0,
            steps: 0,
            cells: 0,
            tokens: 0,
            flop: 0.0,
            all_seconds: 0.0,
            all_cells: 0,
            all_tokens: 0,
        }
    }

    /// A step ended.
    pub fn add(&mut self, cells: usize, work: Work, config: &ModelConfig) {
        let now = Instant::now();
        self.seconds += (now - self.since).as_secs_f64();
        self.since = now;
        self.steps += 1;
        self.cells += cells as u64;
        self.tokens += work.tokens;
        self.flop += flops::training(config, config.layers, work);
    }

    /// Makes the interval's work that of all ranks; before its record.
    pub fn of_all(&mut self, ranks: &Collective) -> Result<()> {
        let mut sums = [self.tokens as f64, self.flop];
        ranks.sum(&mut sums)?;
        (self.tokens, self.flop) = (sums[0] as u64, sums[1]);
        Ok(())
    }

    /// What happened since the last step (an evaluation, a checkpoint) is no training time.
    pub fn pause(&mut self) {
        self.since = Instant::now();
    }

    /// The record of a step, with the counts of bad steps and spikes so far; starts the next interval.
    #[allow(clippy::too_many_arguments)] // the fields of a record, which has no partial state
    pub fn record(
        &mut self,
        step: u64,
        epoch: f64,
        loss: Loss,
        learning_rate: f64,
        grad_norm: f64,
        [bad_steps, spikes]: [u64; 2],
        evaluation: Option<Evaluation>,
    ) -> StepRecord {
        let seconds = self.seconds.max(1e-9);
        let flop_per_s = self.flop / seconds;
        // A peak that is exceeded is none: other programs had the machine while it was measured. Then no share is told.
        self.peak_flop_per_s = self.peak_flop_per_s.filter(|peak| flop_per_s <= *peak);
        let record = StepRecord {
            step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            cells: self.cells,
            tokens: self.tokens,
            dt_ms: 1e3 * seconds / self.steps.max(1) as f64,
            cells_per_s: self.cells as f64 / seconds,
            tokens_per_s: self.tokens as f64 / seconds,
            gflop_per_s: flop_per_s / 1e9,
            fraction_of_peak: self.peak_flop_per_s.map(|peak| flop_per_s / peak),
            bad_steps,
            spikes,
            host_memory_bytes: resident_bytes(),
            time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64()),
            evaluation,
        };
        self.all_seconds += self.seconds;
        self.all_cells += self.cells;
        self.all_tokens += self.tokens;
        (self.seconds, self.steps, self.cells, self.tokens, self.flop) = (0.0, 0, 0, 0, 0.0);
        record
    }

    /// Cells and tokens per second since the start.
    pub fn overall(&self) -> (f64, f64) {
        let seconds = self.all_seconds.max(1e-9);
        (self.all_cells as f64 / seconds, self.all_tokens as f64 / seconds)
    }
}

/// Resident memory of this process; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok())
        .unwrap_or(0);
    // SAFETY: sysconf reads a constant of the system and touches no memory of ours.
    pages * unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64
}

/// The run's open records.
pub struct Writers {
    lines: JsonLines,
    events: EventFile,
    prom: PromFile,
    steps: u64,
}

impl Writers {
    /// Opens the records in `folder` to go on after `step` of `steps`.
    pub fn open(folder: &Path, step: u64, steps: u64) -> Result<Writers> {
        Ok(Writers {
            lines: JsonLines::open(&folder.join("metrics.jsonl"), step)?,
            events: EventFile::create(folder, step)?,
            prom: PromFile::new(folder),
            steps,
        })
    }

    /// The files whose lines a checkpoint makes durable.
    pub fn lasting(&self) -> Vec<PathBuf> {
        vec![self.lines.path().to_path_buf(), self.events.path().to_path_buf()]
    }

    /// Writes one step to all of them.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        let mut line = record.to_json();
        line["steps"] = json!(self.steps);
        self.lines.write(&line)?;
        self.events.scalars(record.step, record.scalars())?;
        self.prom.write(&line, &record.loss.terms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_that_is_exceeded_is_told_no_more() {
        let mut meter = Meter::new(Some(10.0));
        let mut share = |flop: f64| {
            (meter.flop, meter.seconds) = (flop, 1.0);
            meter.record(1, 0.0, Loss::default(), 0.0, 0.0, [0, 0], None).fraction_of_peak
        };
        assert_eq!(share(5.0), Some(0.5));
        assert_eq!(share(11.0), None);
        assert_eq!(share(5.0), None);
    }
}
