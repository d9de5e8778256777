//! Who watches a run: the command line, the demo, a test. Also the one place where a test may break a step on purpose.

use super::record::StepRecord;
use crate::config::Stage;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether to go on after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Next step.
    Continue,
    /// Write a checkpoint and stop, as after SIGTERM.
    Stop,
}

/// Watches a run. Every method has a default that does nothing.
pub trait Observer {
    /// The run starts, or goes on, at `step` of `steps`.
    fn begin(&mut self, stage: Stage, step: u64, steps: u64) {
        let _ = (stage, step, steps);
    }
    /// Something that a person should know.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
    /// A step ended; logged steps carry their record.
    fn step(&mut self, step: u64, record: Option<&StepRecord>) -> Flow {
        let _ = (step, record);
        Flow::Continue
    }
    /// The run ended.
    fn end(&mut self) {}
    /// Fault injection: put a NaN into this step's gradient?
    fn poisons(&self, step: u64) -> bool {
        let _ = step;
        false
    }
    /// Fault injection: a number to put into this step's gradient?
    fn spikes(&self, step: u64) -> Option<f32> {
        self.poisons(step).then_some(f32::NAN)
    }
}

/// Watches nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unwatched;

impl Observer for Unwatched {}

/// SIGINT, SIGTERM and SIGUSR1 (which some schedulers send ahead of their own end): the first asks for a checkpoint at the end of the step, the second stops the process at once.
pub fn stop_on_signals() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGUSR1] {
        // In this order: the second signal finds the flag set by the first. Registration fails for forbidden signals alone.
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone());
        let _ = signal_hook::flag::register(signal, flag.clone());
    }
    flag
}

/// Has one of the signals come?
pub fn asked_to_stop(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
