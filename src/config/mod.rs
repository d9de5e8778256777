//! Settings of a run: every number that shapes training, read once, checked once, and saved beside the result.
//!
//! Strength, weakest first: the built-in defaults of the stage and the model's width ([`defaults`]), the TOML file of
//! `--config`, the environment (`CELLREFINE_OPTIMIZER__LEARNING_RATE=1e-4` is `optimizer.learning_rate`), and
//! `--set optimizer.learning_rate=1e-4` ([`sources`]). An unknown key is an error that names the nearest known one; a value
//! of the wrong type is an error that names the type. The effective settings go into the run folder as `settings.toml`,
//! which is itself a valid `--config`.

mod check;
mod defaults;
mod model;
mod sources;

pub use defaults::{Stage, describe_defaults};
pub use model::{AttentionKind, ModelSettings};
pub use sources::Sources;

use crate::corpus::Sampling;
use crate::corpus::sampler::CellOrder;
use crate::objective::ObjectiveConfig;
use serde::{Deserialize, Serialize};

/// Everything that shapes a run besides its inputs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Seed of weights, order, masks, dropout and splits.
    pub seed: u64,
    /// Batches.
    pub batch: BatchSettings,
    /// AdamW and its schedule.
    pub optimizer: OptimizerSettings,
    /// The loop.
    pub train: TrainSettings,
    /// Masked genes.
    pub mask: MaskSettings,
    /// The classifier of `finetune`.
    pub finetune: FinetuneSettings,
    /// Adapters of `refine` and `finetune`.
    pub lora: LoraSettings,
    /// Terms of the refine loss, prototypes and class balance.
    pub objective: ObjectiveConfig,
    /// The encoder. `pretrain` builds it; later stages take its sizes from the checkpoint and refuse to change them.
    pub model: ModelSettings,
}

/// Batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchSettings {
    /// Cells per logical batch: what one loss sees at once.
    pub cells: usize,
    /// Tokens computed at once. A logical batch with more goes through in several parts, with the same result; memory
    /// follows this number, not `cells`.
    pub tokens: usize,
    /// Tokens per cell, special tokens included; longer cells are cut. 0 = the model's context.
    pub max_tokens: usize,
    /// Class sampling: `none`, `sqrt` or `uniform` (the last two need labels).
    pub sampling: Sampling,
    /// Order of the cells: `random`, or `blocks` for storage that is slow at random reads.
    #[serde(default)]
    pub order: CellOrder,
    /// Finished batches that wait for the device.
    pub ahead: usize,
}

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Straight down to 0.
    Linear,
    /// Half a cosine down to 0.
    Cosine,
    /// No decay.
    Constant,
}

/// AdamW and its schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSettings {
    /// Peak learning rate of the encoder and the masked-gene head.
    pub learning_rate: f64,
    /// Peak learning rate of the classifier.
    pub head_learning_rate: f64,
    /// Peak learning rate of the prototypes.
    pub prototype_learning_rate: f64,
    /// Decoupled weight decay, for matrices; biases and LayerNorms have none.
    pub weight_decay: f64,
    /// β1.
    pub beta1: f64,
    /// β2.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// Clip threshold of the global gradient norm; 0 = no clipping.
    pub clip: f64,
    /// Warm-up: a share of all steps when below 1, otherwise a number of steps.
    pub warmup: f64,
    /// Shape of the decay.
    pub schedule: ScheduleKind,
    /// Divide the network's moments over the ranks (ZeRO stage 1); without several ranks, or with adapters, nothing changes.
    #[serde(default)]
    pub sharded: bool,
}

/// Type of the activations; master weights, sums and losses are f32 or better either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

/// What follows when a gradient norm lies far above those before it (`train.spike_z`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpikePolicy {
    /// It is said, and training goes on.
    Warn,
    /// It is said, and the step's update is left out: weights and moments stay as they were. The norm must be read before the
    /// update, so that the host waits for the device in every step.
    Skip,
    /// The run stops (exit 6), without a checkpoint.
    Stop,
}

/// The loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Optimiser steps; 0 = as many as `epochs` make.
    pub steps: u64,
    /// Passes over the training cells, where `steps` is 0.
    pub epochs: f64,
    /// A line in metrics.jsonl and TensorBoard every so many steps.
    pub log_every: u64,
    /// Evaluation on the validation part every so many steps; 0 = at the end of each epoch.
    pub eval_every: u64,
    /// Validation cells looked at: at most so many.
    pub eval_cells: usize,
    /// A checkpoint every so many steps; 0 = at the end alone.
    pub checkpoint_every: u64,
    /// Newest checkpoints kept, `best` apart; at least 1.
    pub keep: usize,
    /// Logical batches whose gradients are averaged in one step.
    pub accumulate: usize,
    /// Stop (exit 6) after so many steps in a row with a NaN or infinity.
    pub max_bad_steps: u64,
    /// A gradient norm so many standard deviations above the mean of the last 128, or a logged loss above the last 128 logged ones,
    /// is a spike; 0 = none is. The default is what llm.c's scripts use, 7: their window holds the value itself, which makes 9 of it.
    pub spike_z: f64,
    /// What follows a spike: `warn`, `skip` (the update is left out, and every step waits for its norm) or `stop`. A loss is known
    /// after its update alone: under `skip` a spike in it is said.
    pub spike_policy: SpikePolicy,
    /// Type of the activations.
    pub precision: Precision,
    /// Keep hidden states alone and run each layer again before its backward: less memory, more work, the same bits.
    pub recompute: bool,
}

/// Masked genes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskSettings {
    /// Share of genes chosen.
    pub probability: f64,
    /// Of the chosen, share replaced by `<mask>`.
    pub mask_share: f64,
    /// Of the chosen, share replaced by a random gene; the rest stay.
    pub random_share: f64,
}

/// How classes are weighted in the classifier's loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClassWeights {
    /// Every cell counts the same.
    None,
    /// (1-β)/(1-βⁿ) for a class of n training cells, mean 1 (Cui et al., CVPR 2019).
    EffectiveNumber,
}

/// Where the classifier of `finetune` starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadStart {
    /// At the checkpoint's prototypes, for the classes that have one: nearest prototype, then trained further. Without
    /// prototypes, as `random`.
    Prototypes,
    /// At small random values.
    Random,
}

/// The classifier of `finetune`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneSettings {
    /// Class weights.
    pub class_weights: ClassWeights,
    /// β of the effective-number weights.
    pub beta: f64,
    /// First weights of the classifier.
    pub head: HeadStart,
    /// Encoder layers, from the input, that do not train; with 1 or more the embeddings do not train either.
    pub freeze_layers: usize,
}

/// Which projections of a layer have adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoraTargets {
    /// Attention and feed-forward: query, key, value, output, up, down.
    All,
    /// Query, key, value, output.
    Attention,
    /// Up, down.
    FeedForward,
}

/// Low-rank adapters: with a rank, they alone learn in the encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraSettings {
    /// r; 0 = no adapters, all weights learn.
    pub rank: usize,
    /// α: the adapters' product is scaled by α/r.
    pub alpha: f64,
    /// Where they stand.
    pub targets: LoraTargets,
}
