//! What a resumed run meets again, and what it may meet otherwise: corpus, vocabulary, division of the cells, settings.

use super::{RunInputs, SETTINGS, SplitFlags};
use crate::config::{Settings, Sources, Stage};
use crate::corpus::splits::SplitRule;
use crate::corpus::{Corpus, SplitSpec};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::model::ModelConfig;
use crate::train::folder::read_manifest;
use crate::train::observer::Observer;
use std::path::Path;

/// What a resumed run may meet otherwise than at its start. Each is refused unless it is allowed by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowed {
    /// Another corpus (`--allow-corpus`): it is divided anew by the run's rule, and its cells come from the first epoch on.
    pub corpus: bool,
    /// Another vocabulary of the same length (`--allow-vocabulary`): token ids keep their weights, whatever they mean now.
    pub vocabulary: bool,
    /// Other settings (`--allow-settings`); the sizes of the network stay.
    pub settings: bool,
}

/// Settings that may differ between a run's start and its continuation: they do not touch the numbers.
const FREE: [&str; 7] = [
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.max_bad_steps",
    "train.recompute",
    "batch.ahead",
    "train.eval_cells",
];

/// Settings that make a network what it is: its checkpoints have tensors of these sizes.
const FIXED: [&str; 9] = [
    "model.layers",
    "model.width",
    "model.heads",
    "model.ffn",
    "model.positions",
    "model.embedding",
    "model.value_bins",
    "lora.rank",
    "lora.targets",
];

/// The settings of a run that goes on: those of its start, and others where they are allowed. Are there such?
pub(super) fn resumed_settings(
    stage: Stage,
    inputs: &RunInputs,
    config: &ModelConfig,
    observer: &mut dyn Observer,
) -> Result<(Settings, bool)> {
    let saved = inputs.out.join(SETTINGS);
    let of_start = Sources { config: Some(saved.clone()), ..Sources::default() }.resolve(stage, config)?;
    let mut sources = inputs.sources.clone();
    sources.config = sources.config.or(Some(saved.clone()));
    let now = sources.resolve(stage, config)?;
    let flat = |settings: &Settings| -> Result<Vec<(String, String)>> {
        let table = toml::Table::try_from(settings).map_err(|e| Error::bug(format!("settings: {e}")))?;
        let mut leaves = Vec::new();
        flatten("", &toml::Value::Table(table), &mut leaves);
        Ok(leaves)
    };
    let mut others = false;
    for ((name, wanted), (_, found)) in flat(&of_start)?.into_iter().zip(flat(&now)?) {
        let other = wanted != found && !FREE.contains(&name.as_str());
        let fixed = FIXED.contains(&name.as_str());
        if other && (fixed || !inputs.allow.settings) {
            let or = if fixed { "" } else { ", or add --allow-settings to go on with it" };
            return Err(Error::new(
                Code::ResumeOther,
                format!("setting {name} differs from the run's start"),
            )
            .at(saved.display())
            .found(found)
            .wanted(wanted)
            .next(format!("leave it out to continue the run, start another with another --out{or}")));
        }
        if other {
            observer.note(&format!("setting {name} is {found} from here on; it was {wanted}"));
        }
        others |= other;
    }
    Ok((now, others))
}

/// Meets the corpus and the vocabulary of the checkpoint at `place` with the present ones. True where the corpus is another.
pub(super) fn cells_met_again(place: &Path, corpus: &Corpus, vocab: &Vocab, allow: Allowed) -> Result<bool> {
    let identity = &read_manifest(place)?["identity"];
    let others = |name: &str, digest: &str| identity[name].as_str().is_some_and(|theirs| theirs != digest);
    let now = [("corpus", corpus.digest(), allow.corpus), ("vocabulary", vocab.digest(), allow.vocabulary)];
    let others = now.map(|(name, digest, allowed)| (name, digest, allowed, others(name, digest)));
    if let Some((name, digest, ..)) = others.iter().find(|(_, _, allowed, other)| *other && !allowed) {
        let flags: Vec<_> =
            others.iter().filter(|o| o.3).map(|(name, ..)| format!("--allow-{name}")).collect();
        return Err(Error::new(Code::ResumeOther, format!("the run was started with another {name}"))
            .at(place.display())
            .found(digest)
            .wanted(identity[*name].as_str().unwrap_or_default())
            .next(format!(
                "give the {name} of the run's start, start another run with another --out, or go on with this one: {}",
                flags.join(" ")
            )));
    }
    Ok(others[0].3)
}

fn flatten(path: &str, value: &toml::Value, leaves: &mut Vec<(String, String)>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let dot = if path.is_empty() { "" } else { "." };
                flatten(&format!("{path}{dot}{key}"), value, leaves);
            }
        }
        leaf => leaves.push((path.to_string(), leaf.to_string())),
    }
}

/// Refuses flags that ask a resumed run for another division than its own.
pub(super) fn same_division(flags: &SplitFlags, rule: Option<&SplitRule>, spec: &SplitSpec) -> Result<()> {
    let others = [
        ("--split or --holdout", rule.is_some_and(|rule| *rule != spec.rule)),
        ("--label", flags.label.is_some() && flags.label != spec.label),
        ("--exclude-label", !flags.exclude.is_empty() && flags.exclude != spec.exclude),
        (
            "--labels-per-class",
            flags.labels_per_class.is_some() && flags.labels_per_class != spec.labels_per_class,
        ),
    ];
    let Some((flag, _)) = others.iter().find(|(_, other)| *other) else { return Ok(()) };
    let json = |spec: &SplitSpec| serde_json::to_string(spec).unwrap_or_default();
    let asked = SplitSpec {
        rule: rule.unwrap_or(&spec.rule).clone(),
        label: flags.label.clone().or(spec.label.clone()),
        exclude: flags.exclude.clone(),
        labels_per_class: flags.labels_per_class,
        seed: spec.seed,
    };
    Err(Error::new(Code::ResumeOther, format!("the run was started with another {flag}"))
        .found(json(&asked))
        .wanted(json(spec))
        .next("leave it out to continue the run, or start another with another --out"))
}
