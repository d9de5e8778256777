//! What a run came to, for the caller, for people and for programs.

use super::state::Best;
use super::task::{Evaluation, Loss};
use crate::config::Stage;
use serde_json::{Value, json};
use std::path::PathBuf;

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSummary {
    /// Stage.
    pub stage: Stage,
    /// Run folder.
    pub out: PathBuf,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// The best checkpoint on the validation cells, where there are some.
    pub best: Option<Best>,
    /// Steps made.
    pub steps: u64,
    /// Steps skipped for a NaN or an infinity.
    pub bad_steps: u64,
    /// Spikes of the gradient norm or the loss.
    pub spikes: u64,
    /// Steps whose update was left out for one.
    pub spikes_skipped: u64,
    /// Loss of the last logged step.
    pub loss: Loss,
    /// Measures of the last evaluation.
    pub evaluation: Option<Evaluation>,
    /// Seconds of training.
    pub seconds: f64,
    /// Mean over the run (since a resume).
    pub cells_per_s: f64,
    /// Real tokens, padding does not exist.
    pub tokens_per_s: f64,
}

impl RunSummary {
    /// As printed under `--json`.
    pub fn to_json(&self) -> Value {
        let terms: serde_json::Map<_, _> =
            self.loss.terms.iter().map(|(n, v)| (n.to_string(), json!(v))).collect();
        let evaluation = self.evaluation.as_ref().map(|e| {
            let mut all = vec![(e.measure, e.value)];
            all.extend(&e.others);
            all.into_iter().map(|(n, v)| (n.to_string(), json!(v))).collect::<serde_json::Map<_, _>>()
        });
        json!({"stage": self.stage, "out": self.out, "checkpoint": self.checkpoint, "best": self.best,
            "steps": self.steps, "bad_steps": self.bad_steps, "spikes": self.spikes,
            "spikes_skipped": self.spikes_skipped, "loss": self.loss.total, "terms": terms,
            "evaluation": evaluation, "seconds": self.seconds, "cells_per_s": self.cells_per_s,
            "tokens_per_s": self.tokens_per_s})
    }

    /// A few lines for people.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "{}: {} steps in {:.1} s, loss {:.4}, {:.0} cells/s, {:.0} tokens/s\n",
            self.stage.name(),
            self.steps,
            self.seconds,
            self.loss.total,
            self.cells_per_s,
            self.tokens_per_s
        );
        if let Some(e) = &self.evaluation {
            text += &format!("validation: {} {:.4}\n", e.measure, e.value);
        }
        if self.bad_steps > 0 {
            text += &format!("{} steps skipped: NaN or infinity in the gradient\n", self.bad_steps);
        }
        if self.spikes > 0 {
            let skipped = self.spikes_skipped;
            text += &format!(
                "{} spikes of the gradient norm or the loss, {skipped} updates left out\n",
                self.spikes
            );
        }
        text + &format!("run: {}\n", self.out.display())
    }
}
