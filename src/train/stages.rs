//! One call per stage: open, build, run. The command line and the demo come through here.

use super::finetune::Finetune;
use super::folder::RunFolder;
use super::inputs::{Opened, RunInputs, open};
use super::observer::Observer;
use super::pretrain::Pretrain;
use super::refine::Refine;
use super::refine_start::{MarkerInputs, Started, marker_sets, start};
use super::run::{Session, run};
use super::summary::RunSummary;
use super::task::Task;
use super::trunk::Trunk;
use crate::bench::peak::Ceiling;
use crate::collective::Collective;
use crate::config::{HeadStart, Stage};
use crate::corpus::splits::SplitRule;
use crate::corpus::{Sampler, Sampling};
use crate::device::Act;
use crate::digest::sha256;
use crate::error::{Code, Error, Result};
use crate::genes::markers::MarkerSets;
use crate::model::Parameters;
use crate::model::checkpoint::{self, LoadOptions};
use crate::model::weights::Parameter;
use crate::objective::prototype_file::StoredPrototypes;
use crate::on_backend;
use crate::ops::Backend;
use crate::ops::gene_attention::Pattern;
use serde_json::json;

/// Masked-gene pretraining of a preset, or on from a checkpoint.
///
/// # Errors
/// Usage (2), input (3), environment (4), interrupted after a checkpoint (5), numerical (6).
pub fn pretrain(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary> {
    inputs.ranks.guard(|| {
        let opened = open(Stage::Pretrain, inputs, SplitRule::All, observer)?;
        if opened.settings.lora.rank > 0 {
            return Err(Error::new(Code::SettingConflict, "adapters are for refine and finetune")
                .found(format!("lora.rank = {}", opened.settings.lora.rank))
                .next("leave lora.rank out"));
        }
        let precision = opened.settings.train.precision;
        on_backend!(inputs.device, precision, |dev: B, A| pretrain_on::<B, A>(dev, opened, inputs, observer))
    })
}

fn pretrain_on<B: Backend<A> + Ceiling, A: Act>(
    dev: &B,
    opened: Opened,
    inputs: &RunInputs,
    observer: &mut dyn Observer,
) -> Result<RunSummary> {
    let identity = opened.identity(Stage::Pretrain, json!({}))?;
    let settings = &opened.settings;
    let sampler = Sampler::over(&opened.split.training(), settings.batch.sampling, settings.seed)?;
    let mut trunk = trunk::<B, A>(dev, &opened, &inputs.ranks, |_| true)?;
    let mut task = Pretrain::new(&trunk, &settings.mask, settings.seed)?;
    let folder = opened.claim(&inputs.out, &inputs.ranks)?;
    finish(Stage::Pretrain, opened, folder, inputs, identity, &mut trunk, &mut task, sampler, observer)
}

/// A classifier on a checkpoint.
///
/// # Errors
/// As [`pretrain`].
pub fn finetune(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<RunSummary> {
    inputs.ranks.guard(|| {
        if inputs.split.label.is_none() {
            return Err(
                Error::new(Code::LabelsNeeded, "finetune needs a label column").next("--label COLUMN")
            );
        }
        let rule = SplitRule::parse_fractions(DEFAULT_SPLIT)?;
        let opened = open(Stage::Finetune, inputs, rule, observer)?;
        let precision = opened.settings.train.precision;
        on_backend!(inputs.device, precision, |dev: B, A| finetune_on::<B, A>(dev, opened, inputs, observer))
    })
}

/// The division of a labelled stage that is told nothing.
pub const DEFAULT_SPLIT: &str = "train=0.67,test=0.33";

fn finetune_on<B: Backend<A> + Ceiling, A: Act>(
    dev: &B,
    opened: Opened,
    inputs: &RunInputs,
    observer: &mut dyn Observer,
) -> Result<RunSummary> {
    let settings = &opened.settings;
    let labels = opened.split.labels.clone().ok_or_else(|| Error::bug("a labelled split without labels"))?;
    let training = opened.split.training().labelled();
    let counts = training.counts();
    let identity =
        opened.identity(Stage::Finetune, json!({"label": labels.column, "classes": labels.classes}))?;
    let sampler = match settings.batch.sampling {
        Sampling::None => Sampler::of_cells(training.cells().to_vec(), settings.seed)?,
        classes => Sampler::over(&training, classes, settings.seed)?,
    };
    let frozen = settings.finetune.freeze_layers;
    if frozen > opened.config.layers {
        return Err(Error::new(Code::SettingValue, "finetune.freeze_layers is beyond the encoder")
            .found(frozen)
            .wanted(format!("at most {}", opened.config.layers)));
    }
    let depth = opened.config.depth(opened.config.layer)?;
    let mut trunk = trunk::<B, A>(dev, &opened, &inputs.ranks, |p| learns_below(p, depth, frozen))?;
    let (learning_rate, seed) = (settings.optimizer.head_learning_rate, settings.seed);
    let mut task = Finetune::new(&trunk, &settings.finetune, labels, &counts, learning_rate, seed)?;
    if let (HeadStart::Prototypes, Some(folder)) = (settings.finetune.head, &opened.start)
        && let Some(stored) = StoredPrototypes::read(folder, opened.config.width)?
    {
        let classes = task.start_at(&trunk, &stored)?;
        if classes > 0 {
            observer
                .note(&format!("the classifier starts at the checkpoint's prototypes for {classes} classes"));
        }
    }
    let folder = opened.claim(&inputs.out, &inputs.ranks)?;
    finish(Stage::Finetune, opened, folder, inputs, identity, &mut trunk, &mut task, sampler, observer)
}

/// Prototype-guided post-pretraining of a checkpoint.
///
/// # Errors
/// As [`pretrain`].
pub fn refine(inputs: &RunInputs, markers: &MarkerInputs, observer: &mut dyn Observer) -> Result<RunSummary> {
    inputs.ranks.guard(|| {
        let rule = match &inputs.split.label {
            Some(_) => SplitRule::parse_fractions(DEFAULT_SPLIT)?,
            None => SplitRule::All,
        };
        let opened = open(Stage::Refine, inputs, rule, observer)?;
        let precision = opened.settings.train.precision;
        on_backend!(inputs.device, precision, |dev: B, A| refine_on::<B, A>(
            dev, opened, inputs, markers, observer
        ))
    })
}

fn refine_on<B: Backend<A> + Ceiling, A: Act>(
    dev: &B,
    mut opened: Opened,
    inputs: &RunInputs,
    marker_inputs: &MarkerInputs,
    observer: &mut dyn Observer,
) -> Result<RunSummary> {
    // A split taken over may name a label column; without --label its labels are not looked at.
    let labelled = inputs.split.label.is_some();
    if opened.other_corpus {
        return Err(Error::new(Code::ResumeOther, "a refine run cannot go on with another corpus")
            .at(opened.corpus.path().display())
            .found("--allow-corpus")
            .wanted("the corpus whose cells the run's teacher and targets belong to")
            .next(format!(
                "refine anew from its weights: --checkpoint {} with another --out",
                inputs.out.display()
            )));
    }
    let settings = &opened.settings;
    let training = opened.split.training();
    let markers = marker_sets(marker_inputs, &opened, &training, labelled)?;
    let sampler = match (labelled, settings.batch.sampling) {
        (true, sampling) => Sampler::over(&training, sampling, settings.seed)?,
        (false, Sampling::None) => Sampler::of_cells(training.cells().to_vec(), settings.seed)?,
        (false, _) => {
            return Err(Error::new(Code::LabelsNeeded, "class sampling needs labels")
                .next("add --label, or leave batch.sampling out"));
        }
    };
    if matches!(opened.config.attention, Pattern::MarkerSparse { .. }) {
        opened.config.globals = markers.genes();
    }
    let depth = opened.config.depth(opened.config.layer)?;
    let mlm = settings.objective.mlm > 0.0;
    let mut trunk =
        trunk::<B, A>(dev, &opened, &inputs.ranks, |p| learns_below(p, depth, 0) || (mlm && is_head(p)))?;
    let Started { parts, first } =
        start(&mut trunk, &opened, inputs, &markers, &training, labelled, observer)?;
    let mut task = Refine::new(&trunk, parts, &settings.mask)?;
    let folder = opened.claim(&inputs.out, &inputs.ranks)?;
    let start = inputs.ranks.lead(|| {
        if let Some(first) = &first {
            first.write(&inputs.out)?;
        }
        if opened.resume.is_none() {
            markers.write_gmt(&inputs.out.join("markers.gmt"), &opened.vocab, |_| {
                "as used by this run".to_string()
            })?;
        }
        Ok(super::refine_start::digest(&inputs.out)?.into_bytes())
    })?;
    let identity = opened.identity(
        Stage::Refine,
        json!({"label": inputs.split.label, "types": markers.names, "markers": digest_of(&markers),
            "start": String::from_utf8_lossy(&start)}),
    )?;
    finish(Stage::Refine, opened, folder, inputs, identity, &mut trunk, &mut task, sampler, observer)
}

/// SHA-256 of marker sets: names, genes and weights.
fn digest_of(markers: &MarkerSets) -> String {
    let mut bytes = Vec::new();
    for (name, set) in markers.names.iter().zip(&markers.sets) {
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        for (token, weight) in set {
            bytes.extend_from_slice(&token.to_le_bytes());
            bytes.extend_from_slice(&weight.to_le_bytes());
        }
    }
    sha256(&bytes)
}

/// Does this parameter take part in a cell vector from the first `depth` layers, of which the first `frozen` do not learn?
/// What has no gradient must not decay either.
pub(super) fn learns_below(parameter: &Parameter, depth: usize, frozen: usize) -> bool {
    let name = parameter.name.as_str();
    match name.strip_prefix("layer.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok()) {
        Some(layer) => (frozen..depth).contains(&layer),
        None => frozen == 0 && !name.starts_with("head."),
    }
}

/// Does it belong to the masked-gene head?
fn is_head(parameter: &Parameter) -> bool {
    parameter.name.starts_with("head.")
}

/// The trunk with random weights, those of the checkpoint, or those of the checkpoint to resume from.
fn trunk<B: Backend<A>, A: Act>(
    dev: &B,
    opened: &Opened,
    ranks: &Collective,
    learns: impl Fn(&Parameter) -> bool,
) -> Result<Trunk<B, A>> {
    let (config, settings) = (&opened.config, &opened.settings);
    let params = match opened.resume.as_ref().or(opened.start.as_ref()) {
        Some(folder) => {
            let (loaded, params) = checkpoint::load::<B, A>(dev, folder, LoadOptions::default())?;
            if loaded.vocab != config.vocab {
                return Err(Error::new(Code::ResumeOther, "the run was started with another vocabulary")
                    .at(folder.display())
                    .found(format!("{} ids", config.vocab))
                    .wanted(format!("{} ids, a row of the word table each", loaded.vocab))
                    .next("give the corpus of the run's start, or start another run with another --out"));
            }
            params
        }
        None => Parameters::random(dev, config, settings.seed)?,
    };
    let mut trunk = Trunk::new(dev, config, params, opened.corpus.clone(), settings, ranks, learns)?;
    if let Some(adapters) = &mut trunk.adapters {
        adapters.start(dev, &trunk.params, settings.seed)?;
    }
    Ok(trunk)
}

#[allow(clippy::too_many_arguments)] // the parts of one run, each built by its stage
fn finish<B: Backend<A> + Ceiling, A: Act>(
    stage: Stage,
    opened: Opened,
    folder: RunFolder,
    inputs: &RunInputs,
    identity: serde_json::Value,
    trunk: &mut Trunk<B, A>,
    task: &mut dyn Task<B, A>,
    sampler: Sampler,
    observer: &mut dyn Observer,
) -> Result<RunSummary> {
    if (opened.resume.is_none() || opened.other_corpus) && inputs.ranks.leads() {
        opened.write_run_record(stage, inputs, &identity)?;
    }
    let validation = opened.validation();
    let sampler = sampler.ordered(opened.settings.batch.order)?;
    let session = Session {
        stage,
        folder,
        settings: opened.settings,
        identity,
        start: opened.start,
        vocabulary: Some(opened.vocab_file),
        resume: opened.resume,
        allow: inputs.allow,
        resume_command: inputs.resume_command.clone(),
        validation,
        peak_flop_per_s: trunk.dev.peak(!A::IS_F32).map(|peak| 1e9 * peak.gflop_per_s),
        observer,
    };
    run(session, trunk, task, sampler)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::{Network, Parts};
    use crate::model::{Preset, Weights};

    #[test]
    fn frozen_layers_embeddings_and_unused_heads_do_not_learn() {
        let config = Preset::named("small").map(|p| p.config(50, Default::default())).unwrap();
        let list = Network::list(Weights::of(&config));
        let learning = |depth, frozen| -> Vec<&str> {
            list.iter().filter(|p| learns_below(p, depth, frozen)).map(|p| p.name.as_str()).collect()
        };
        let all = learning(4, 0);
        assert!(all.contains(&"word") && all.contains(&"layer.3.up_bias") && !all.contains(&"head.bias"));
        let some = learning(3, 2);
        assert!(some.iter().all(|name| name.starts_with("layer.2.")) && some.len() == 12, "{some:?}");
        assert!(learning(4, 4).is_empty());
    }
}
