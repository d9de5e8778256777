//! Everything that a resumed run must find again: where the loop stood, who its inputs were, and the moments.
//!
//! Weights lie in `model.safetensors` (f32 masters, exact), the stage's own in its own files, the moments here in
//! `state.safetensors`, the rest in `state.json`. With them a resumed run makes the same bits as one that never stopped.

use super::inputs::Allowed;
use super::optimizer::Moments;
use super::spikes::Spikes;
use crate::corpus::SamplerState;
use crate::device::Device;
use crate::error::{Code, Error, Result};
use crate::model::snapshot::{Numbers, Snapshot};
use crate::model::tensors::{Declared, TensorFile};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::ops::Range;
use std::path::Path;

/// Version of the layout of `state.json` and `state.safetensors`.
pub const FORMAT: u32 = 1;
/// Name of the moments' file.
pub const MOMENTS: &str = "state.safetensors";

/// Where the loop stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoopState {
    /// Steps made, bad ones included.
    pub step: u64,
    /// Steps of the whole run: the schedule's length.
    pub steps: u64,
    /// Updates applied: Adam's t.
    pub updates: u64,
    /// Bad steps since the last good one.
    pub bad_in_a_row: u64,
    /// Bad steps in all.
    pub bad_steps: u64,
    /// Norms and losses that the next are compared with; checkpoints of before there were any lack it.
    #[serde(default)]
    pub spikes: Spikes,
    /// Where the sampler stands.
    pub sampler: SamplerState,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Seconds of training.
    pub seconds: f64,
}

/// The best evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its step.
    pub step: u64,
    /// Its measure.
    pub measure: String,
    /// Its value.
    pub value: f64,
}

impl LoopState {
    /// The manifest of a checkpoint by `world` ranks, its file list apart.
    pub fn manifest(&self, identity: &Value, world: usize) -> Value {
        serde_json::json!({"format": FORMAT, "world_size": world, "identity": identity, "loop": self})
    }

    /// Reads a manifest and meets it with the inputs of this run, but for those that are `allowed` to be others.
    ///
    /// # Errors
    /// Input: another format, or inputs that are not the run's: corpus, vocabulary, label, markers, split.
    pub fn read(manifest: &Value, identity: &Value, place: &Path, allowed: Allowed) -> Result<LoopState> {
        if manifest["format"].as_u64() != Some(FORMAT as u64) {
            return Err(Error::new(Code::CheckpointState, "the checkpoint's state has another format")
                .at(place.display())
                .found(&manifest["format"])
                .wanted(FORMAT));
        }
        let empty = Map::new();
        let theirs = manifest["identity"].as_object().unwrap_or(&empty);
        let other_corpus = allowed.corpus && theirs.get("corpus") != identity.get("corpus");
        for (name, mine) in identity.as_object().unwrap_or(&empty) {
            let there = theirs.get(name).unwrap_or(&Value::Null);
            let passes = match name.as_str() {
                "corpus" => allowed.corpus,
                "vocabulary" => allowed.vocabulary,
                // The same rule over other cells.
                "split" => other_corpus && mine["spec"] == there["spec"],
                _ => false,
            };
            if there != mine && !passes {
                return Err(Error::new(
                    Code::ResumeOther,
                    format!("the run was started with another {}", name.replace('_', " ")),
                )
                .at(place.display())
                .found(mine)
                .wanted(there)
                .next("give the inputs of the run's start, or start another run with another --out"));
            }
        }
        serde_json::from_value(manifest["loop"].clone()).map_err(|e| {
            Error::new(Code::CheckpointState, "the checkpoint's state cannot be read")
                .at(place.display())
                .found(e.to_string())
        })
    }
}

/// Adds moments, first and second, under their names, to a checkpoint.
pub fn save_moments(checkpoint: &mut Snapshot, moments: Vec<(&str, [Vec<f32>; 2])>) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, [m, v]) in moments {
        tensors.push((Declared::f32(format!("{name}.m"), &[m.len()]), Numbers::all(m)));
        tensors.push((Declared::f32(format!("{name}.v"), &[v.len()]), Numbers::all(v)));
    }
    checkpoint.tensors(MOMENTS, &[("format", "pt")], tensors)
}

/// Reads them back: of each name's `len` elements those of the range.
pub fn read_moments<B: Device>(
    dev: &B,
    folder: &Path,
    moments: Vec<(&str, &mut Moments<B>, usize, Range<usize>)>,
) -> Result<()> {
    let file = TensorFile::open(&folder.join(MOMENTS))?;
    for (name, moments, len, range) in moments {
        dev.write(&mut moments.m, &file.floats(&format!("{name}.m"), &[len])?[range.clone()])?;
        dev.write(&mut moments.v, &file.floats(&format!("{name}.v"), &[len])?[range])?;
    }
    Ok(())
}
