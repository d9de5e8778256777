//! Built-in settings per stage, chosen by the encoder's width.
//!
//! Encoders of up to 256 columns learn at 1e-3 and more; the published checkpoints (512 and wider) are refined gently.
//! The values for small encoders are those that a PyTorch reference of the method used on 10^3..10^4 labelled cells, not tuned
//! again here; those for wide ones follow Geneformer's published recipes.

use super::*;
use crate::model::ModelConfig;

/// The three stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Masked-gene pretraining.
    Pretrain,
    /// Prototype-guided post-pretraining.
    Refine,
    /// A classifier on top.
    Finetune,
}

impl Stage {
    /// The command's name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Pretrain => "pretrain",
            Stage::Refine => "refine",
            Stage::Finetune => "finetune",
        }
    }
}

/// Peak learning rates (encoder, classifier, prototypes) of a stage at a width.
fn learning_rates(stage: Stage, width: usize) -> (f64, f64, f64) {
    // Column of the tables below: up to 128, 256, 512, wider.
    let size = [128, 256, 512].iter().filter(|limit| width > **limit).count();
    let encoder = match stage {
        Stage::Pretrain => [1e-3, 1e-3, 5e-4, 2e-4],
        Stage::Refine | Stage::Finetune => [2e-3, 1e-3, 1e-4, 5e-5],
    };
    let (classifier, prototypes) = ([1e-2, 5e-3, 1e-3, 1e-3], [5e-3, 5e-3, 1e-3, 1e-3]);
    (encoder[size], classifier[size], prototypes[size])
}

/// Epochs and share of warm-up.
fn length(stage: Stage) -> (f64, f64) {
    match stage {
        Stage::Pretrain => (6.0, 0.05),
        Stage::Refine => (2.0, 0.05),
        Stage::Finetune => (4.0, 0.1),
    }
}

/// The defaults of a stage, for its `--help`.
pub fn describe_defaults(stage: Stage) -> String {
    let mut text =
        format!("Defaults of {} by the encoder's width (optimizer.learning_rate):\n ", stage.name());
    for width in [128, 256, 512, 768] {
        let relation = if width == 768 { "above 512" } else { &format!("up to {width}") };
        let _ = std::fmt::Write::write_fmt(
            &mut text,
            format_args!("  {relation}: {:e}", learning_rates(stage, width).0),
        );
    }
    let (epochs, warmup) = length(stage);
    text + &format!(
        "\n  train.epochs {epochs}, batch.cells 32, optimizer.warmup {warmup}, optimizer.schedule cosine, optimizer.clip 1\n\
         Every setting: settings.toml in a run folder. Weakest first: defaults, --config FILE, CELLREFINE_SECTION__KEY, --set."
    )
}

impl Settings {
    /// The defaults of `stage` for `model`.
    pub fn defaults(stage: Stage, model: &ModelConfig) -> Settings {
        let (learning_rate, head_learning_rate, prototype_learning_rate) = learning_rates(stage, model.width);
        let (epochs, warmup) = length(stage);
        Settings {
            seed: 0,
            batch: BatchSettings {
                cells: 32,
                tokens: 16_384,
                max_tokens: 0,
                sampling: Sampling::None,
                order: Default::default(),
                ahead: 4,
            },
            optimizer: OptimizerSettings {
                learning_rate,
                head_learning_rate,
                prototype_learning_rate,
                weight_decay: 0.01,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                clip: 1.0,
                warmup,
                schedule: ScheduleKind::Cosine,
                sharded: false,
            },
            train: TrainSettings {
                steps: 0,
                epochs,
                log_every: 10,
                eval_every: 0,
                eval_cells: 2_000,
                checkpoint_every: 1_000,
                keep: 2,
                accumulate: 1,
                max_bad_steps: 10,
                spike_z: 9.0,
                spike_policy: SpikePolicy::Warn,
                precision: Precision::F32,
                recompute: false,
            },
            mask: MaskSettings { probability: 0.15, mask_share: 0.8, random_share: 0.1 },
            finetune: FinetuneSettings {
                class_weights: ClassWeights::EffectiveNumber,
                beta: 0.999,
                head: HeadStart::Prototypes,
                freeze_layers: 0,
            },
            lora: LoraSettings { rank: 0, alpha: 16.0, targets: LoraTargets::All },
            objective: ObjectiveConfig::default(),
            model: match stage {
                Stage::Pretrain => ModelSettings::of(model),
                // What these stages train is the last layer's cell vector, and embeddings follow it.
                Stage::Refine | Stage::Finetune => ModelSettings { layer: 0, ..ModelSettings::of(model) },
            },
        }
    }
}
