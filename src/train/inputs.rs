//! What every stage opens first: corpus, vocabulary, checkpoint, split, run folder; and how an older run lends its split.

mod met_again;

pub use met_again::Allowed;

use super::folder::{RunFolder, checkpoints, verify};
use super::observer::Observer;
use crate::backend::Choice;
use crate::collective::Collective;
use crate::config::{Settings, Sources, Stage};
use crate::corpus::splits::{SplitRecord, SplitRule};
use crate::corpus::{Corpus, Split, SplitSpec};
use crate::digest::sha256;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::genes::markers_file::RawSets;
use crate::model::checkpoint::{self, VOCABULARY};
use crate::model::config::Vocabulary;
use crate::model::{ModelConfig, Preset};
use crate::ops::gene_attention::Pattern;
use met_again::{cells_met_again, resumed_settings, same_division};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the effective settings in a run folder.
pub const SETTINGS: &str = "settings.toml";
/// Name of the split's record in a run folder.
pub const SPLIT: &str = "split.json";
/// Name of the record of a run's inputs.
pub const RUN: &str = "run.json";

/// Whether to go on with what is in the run folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resume {
    /// A new run; a folder that holds one already is refused.
    #[default]
    No,
    /// Go on from the newest checkpoint; fail where there is none or it is damaged.
    Last,
    /// Go on from the newest checkpoint that verifies; start afresh where there is none.
    Auto,
}

/// How cells are divided, as flags say it. With nothing said, the split of the checkpoint's run is taken over.
#[derive(Debug, Clone, Default)]
pub struct SplitFlags {
    /// `train=0.67,test=0.33`.
    pub split: Option<String>,
    /// `COLUMN=VALUE`.
    pub holdout: Option<String>,
    /// Share of the cells outside the held-out part that validates.
    pub validation: f64,
    /// Label column.
    pub label: Option<String>,
    /// Label values left out.
    pub exclude: Vec<String>,
    /// Labels kept per class of the training part.
    pub labels_per_class: Option<usize>,
}

/// What every stage is given.
#[derive(Debug, Clone, Default)]
pub struct RunInputs {
    /// Where the network runs.
    pub device: Choice,
    /// Corpus folder.
    pub corpus: PathBuf,
    /// Run folder.
    pub out: PathBuf,
    /// Preset of a new encoder.
    pub preset: Option<String>,
    /// Run, checkpoint or Hugging Face folder.
    pub checkpoint: Option<PathBuf>,
    /// Marker sets whose genes are the global tokens of marker-sparse attention; without them, those of the checkpoint are.
    /// Refine takes the genes of its own markers.
    pub globals: Option<PathBuf>,
    /// Division of the cells.
    pub split: SplitFlags,
    /// Continue?
    pub resume: Resume,
    /// And with what that is new?
    pub allow: Allowed,
    /// Take the lock that a writer of another host left?
    pub force_unlock: bool,
    /// Command that continues this run, for messages.
    pub resume_command: Option<String>,
    /// Settings besides the defaults.
    pub sources: Sources,
    /// The processes that train together, all of them with these very inputs.
    pub ranks: Collective,
}

/// Everything open and checked.
pub struct Opened {
    /// The cells.
    pub corpus: Arc<Corpus>,
    /// The vocabulary of the corpus.
    pub vocab: Vocab,
    /// Its file, for the checkpoints.
    pub vocab_file: Vec<u8>,
    /// The network, settings applied.
    pub config: ModelConfig,
    /// Model folder that the weights start from; `None` = random.
    pub start: Option<PathBuf>,
    /// Checkpoint to resume from, verified.
    pub resume: Option<PathBuf>,
    /// Effective settings.
    pub settings: Settings,
    /// The division of the cells.
    pub split: Split,
    /// Does a resumed run go on with another corpus than it was started with?
    pub other_corpus: bool,
    /// Or with other settings than the run folder has?
    other_settings: bool,
}

/// Opens the inputs of `stage`. `default_rule` divides the cells where neither flags nor an older run say how.
pub fn open(
    stage: Stage,
    inputs: &RunInputs,
    default_rule: SplitRule,
    observer: &mut dyn Observer,
) -> Result<Opened> {
    let corpus = Arc::new(Corpus::open(&inputs.corpus)?);
    if corpus.cells() == 0 {
        return Err(Error::new(Code::NoCells, "the corpus has no cells")
            .at(corpus.path().display())
            .next("pack it again"));
    }
    let vocab_file = corpus.vocab_file()?;
    let vocab = Vocab::load(corpus.path().join(VOCABULARY))?;
    let vocabulary = Vocabulary::of(&vocab);
    let start = inputs.checkpoint.as_deref().map(checkpoint::resolve).transpose()?;
    // One rank looks, for all of them: they must not choose differently.
    let resume = inputs.ranks.lead(|| {
        let place = resume_point(inputs, observer)?;
        Ok(place.map(|place| place.into_os_string().into_vec()).unwrap_or_default())
    })?;
    let resume = (!resume.is_empty()).then(|| PathBuf::from(OsString::from_vec(resume)));
    let other_corpus = match &resume {
        Some(place) => cells_met_again(place, &corpus, &vocab, inputs.allow)?,
        None => false,
    };
    let mut config = match (&start, &inputs.preset) {
        (Some(folder), None) => {
            let mut config = checkpoint::read_config(folder)?;
            if resume.is_some() && inputs.allow.vocabulary {
                config.vocabulary.digest = None;
            }
            config.adopt_vocabulary(vocab.len(), &vocabulary)?;
            config
        }
        (None, Some(name)) => Preset::named(name)?.config(vocab.len(), vocabulary),
        _ => {
            return Err(Error::new(Code::FlagConflict, "name either a preset or a checkpoint to start from"));
        }
    };
    let (settings, other_settings) = match &resume {
        Some(_) => resumed_settings(stage, inputs, &config, observer)?,
        None => (inputs.sources.resolve(stage, &config)?, false),
    };
    settings.model.apply_to(&mut config, start.is_some())?;
    if let Some(file) = &inputs.globals {
        config.globals = globals(file, &vocab, &config)?;
    }
    let split = divide(&corpus, inputs, &settings, default_rule, resume.is_some(), observer)?;
    refuse_empty_cells(&corpus, &config, &split)?;
    let opened = Opened {
        corpus,
        vocab,
        vocab_file,
        config,
        start,
        resume,
        settings,
        split,
        other_corpus,
        other_settings,
    };
    Ok(opened)
}

impl Opened {
    /// Takes the run folder: locks it and, for a new run, clears it and writes settings and split. The last thing before
    /// training, so that bad input leaves nothing behind.
    pub fn claim(&self, out: &Path, ranks: &Collective) -> Result<RunFolder> {
        let mut folder = RunFolder::of_leader(out);
        ranks.lead(|| {
            folder = self.claim_alone(out)?;
            Ok(Vec::new())
        })?;
        Ok(folder)
    }

    fn claim_alone(&self, out: &Path) -> Result<RunFolder> {
        let folder = RunFolder::open(out)?;
        if self.resume.is_none() {
            folder.clear()?;
        }
        if self.resume.is_none() || self.other_settings {
            let text =
                toml::to_string_pretty(&self.settings).map_err(|e| Error::bug(format!("settings: {e}")))?;
            disk::replace(&out.join(SETTINGS), text.as_bytes())?;
        }
        let of_another = || Ok(read_split(&out.join(SPLIT))?.corpus_digest != self.corpus.digest());
        if self.resume.is_none() || of_another()? {
            let record =
                serde_json::to_string_pretty(&self.split.record()).map_err(|e| Error::bug(e.to_string()))?;
            disk::replace(&out.join(SPLIT), format!("{record}\n").as_bytes())?;
            self.split.write_tsv(&self.corpus, &out.join("split.tsv"))?;
        }
        Ok(folder)
    }

    /// What a resumed run must meet again, besides the settings.
    pub fn identity(&self, stage: Stage, more: Value) -> Result<Value> {
        let record = serde_json::to_value(self.split.record()).map_err(|e| Error::bug(e.to_string()))?;
        let mut identity = json!({"stage": stage, "corpus": self.corpus.digest(), "vocabulary": self.vocab.digest(),
            "split": record});
        if !self.config.globals.is_empty() {
            let globals = sha256(bytemuck::cast_slice(&self.config.globals));
            identity["globals"] = Value::String(globals);
        }
        if let (Some(identity), Value::Object(more)) = (identity.as_object_mut(), more) {
            identity.extend(more);
        }
        Ok(identity)
    }

    /// Writes `run.json`: what the run was given, for `inspect`, `report` and later stages.
    pub fn write_run_record(&self, stage: Stage, inputs: &RunInputs, identity: &Value) -> Result<()> {
        let record = json!({"stage": stage, "version": env!("CARGO_PKG_VERSION"), "corpus": inputs.corpus,
            "checkpoint": inputs.checkpoint, "preset": inputs.preset, "device": inputs.device.to_string(), "label": self.split.spec.label,
            "inputs": identity});
        disk::replace(&inputs.out.join(RUN), format!("{record:#}\n").as_bytes())
    }

    /// At most `train.eval_cells` validation cells, spread evenly over the part.
    pub fn validation(&self) -> Vec<u32> {
        let (val, most) = (&self.split.val, self.settings.train.eval_cells);
        if val.len() <= most {
            return val.clone();
        }
        (0..most).map(|i| val[i * val.len() / most]).collect()
    }
}

/// A cell without a gene would end the run in the step that draws it.
fn refuse_empty_cells(corpus: &Corpus, config: &ModelConfig, split: &Split) -> Result<()> {
    if config.prefix() + config.suffix() > 0 {
        return Ok(());
    }
    let empty = |cell: &&u32| corpus.len_of(**cell as usize) == 0;
    let cells = || split.train.iter().chain(&split.val);
    let Some(first) = cells().find(empty) else { return Ok(()) };
    let name = corpus.cell_id(*first as usize)?;
    Err(Error::new(
        Code::EmptyCell,
        "a cell has no gene of the vocabulary, and the model adds no special token",
    )
    .at(format!("{}: cell {first} ({name:?})", corpus.path().display()))
    .found(format!("{} such cells of {}", cells().filter(empty).count(), cells().count()))
    .next("pack again without empty cells (--empty-cells skip)"))
}

/// The genes of all sets of a marker file.
fn globals(file: &Path, vocab: &Vocab, config: &ModelConfig) -> Result<Vec<u32>> {
    if config.attention == Pattern::Dense {
        return Err(Error::new(
            Code::FlagConflict,
            "--markers names the global tokens of marker-sparse attention, and attention is dense",
        )
        .at(file.display())
        .next("--set model.attention=marker-sparse, or leave --markers out"));
    }
    Ok(RawSets::load(file, vocab, None)?.all()?.genes())
}

/// The checkpoint that a resumed run continues from. A folder that another process writes is refused here, before anything is read.
fn resume_point(inputs: &RunInputs, observer: &mut dyn Observer) -> Result<Option<PathBuf>> {
    RunFolder::look(&inputs.out, inputs.force_unlock)?;
    let found = checkpoints(&inputs.out)?;
    match inputs.resume {
        Resume::No if !found.is_empty() => {
            Err(Error::new(Code::OutputExists, "the run folder holds a run already")
                .at(inputs.out.display())
                .found(format!("{} checkpoints, the newest of step {}", found.len(), found[0].0))
                .next("continue it with --resume, or choose another --out"))
        }
        Resume::No => Ok(None),
        Resume::Last => match found.into_iter().next() {
            Some((_, place)) => verify(&place).map(|_| Some(place)),
            None => Err(Error::new(Code::NoResume, "there is no checkpoint to resume from")
                .at(inputs.out.display())
                .next("leave --resume out, or --resume=auto to start afresh where there is none")),
        },
        Resume::Auto => {
            for (_, place) in found {
                match verify(&place) {
                    Ok(_) => {
                        observer.note(&format!("resuming from {}", place.display()));
                        return Ok(Some(place));
                    }
                    Err(e) => observer.note(&format!("skipped {}: {e}", place.display())),
                }
            }
            observer.note("no checkpoint to resume from: starting afresh");
            Ok(None)
        }
    }
}

/// The split: of the flags, of the run itself (resumed), of the checkpoint's run, or the default; said aloud.
fn divide(
    corpus: &Corpus,
    inputs: &RunInputs,
    settings: &Settings,
    default_rule: SplitRule,
    resumes: bool,
    observer: &mut dyn Observer,
) -> Result<Split> {
    let flags = &inputs.split;
    let spec = |rule: SplitRule| SplitSpec {
        rule,
        label: flags.label.clone(),
        exclude: flags.exclude.clone(),
        labels_per_class: flags.labels_per_class,
        seed: settings.seed,
    };
    let rule = match (&flags.split, &flags.holdout) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Code::FlagConflict, "--split and --holdout exclude each other"));
        }
        (Some(text), None) => Some(SplitRule::parse_fractions(text)?),
        (None, Some(text)) => Some(SplitRule::parse_holdout(text, flags.validation)?),
        (None, None) => None,
    };
    if resumes {
        let record = read_split(&inputs.out.join(SPLIT))?;
        same_division(flags, rule.as_ref(), &record.spec)?;
        if !inputs.allow.corpus || record.corpus_digest == corpus.digest() {
            return Split::restore(corpus, &record);
        }
        let split = Split::make(corpus, &record.spec)?;
        observer.note(&format!(
            "another corpus, divided by the run's rule: {} train, {} validation, {} test",
            split.train.len(),
            split.val.len(),
            split.test.len()
        ));
        return Ok(split);
    }
    let split = match (rule, inherited(inputs.checkpoint.as_deref(), corpus)?) {
        (Some(rule), _) => Split::make(corpus, &spec(rule))?,
        (None, Some((place, record))) => {
            let split = take_over(corpus, record, flags)?;
            observer.note(&format!("split taken over from {}", place.display()));
            split
        }
        (None, None) => Split::make(corpus, &spec(default_rule))?,
    };
    observer.note(&format!(
        "cells: {} train, {} validation, {} test",
        split.train.len(),
        split.val.len(),
        split.test.len()
    ));
    Ok(split)
}

/// The split of the run that `checkpoint` belongs to, where it divided this corpus.
fn inherited(checkpoint: Option<&Path>, corpus: &Corpus) -> Result<Option<(PathBuf, SplitRecord)>> {
    let Some(checkpoint) = checkpoint else { return Ok(None) };
    // RUN, or RUN/checkpoints/step-N.
    let absolute =
        std::fs::canonicalize(checkpoint).map_err(|e| Error::io(checkpoint, "open the checkpoint", &e))?;
    let candidates = [Some(absolute.as_path()), absolute.parent().and_then(Path::parent)];
    for place in candidates.into_iter().flatten().map(|run| run.join(SPLIT)).filter(|place| place.is_file()) {
        let record = read_split(&place)?;
        if record.corpus_digest == corpus.digest() && record.spec.rule != SplitRule::All {
            return Ok(Some((place, record)));
        }
    }
    Ok(None)
}

/// The record's parts, with this stage's label and number of labels.
fn take_over(corpus: &Corpus, record: SplitRecord, flags: &SplitFlags) -> Result<Split> {
    let same_label = flags.label.is_none() || flags.label == record.spec.label;
    let same_cells = flags.exclude.is_empty() || flags.exclude == record.spec.exclude;
    if !same_label || !same_cells {
        let spec = &record.spec;
        return Err(Error::new(Code::SplitOther, "the checkpoint's run divided its cells in another way")
            .found(format!("label {:?}, left out {:?}", flags.label, flags.exclude))
            .wanted(format!("label {:?}, left out {:?}, as in that run", spec.label, spec.exclude))
            .next("pretrain with the same --label and --exclude-label, or give --split for a new division"));
    }
    let spec = SplitSpec {
        labels_per_class: flags.labels_per_class.or(record.spec.labels_per_class),
        ..record.spec.clone()
    };
    if spec == record.spec {
        return Split::restore(corpus, &record);
    }
    let split = Split::make(corpus, &spec)?;
    // Hiding labels must not move cells between the parts.
    Split::restore(corpus, &record)?;
    Ok(split)
}

/// Reads a split's record.
pub fn read_split(place: &Path) -> Result<SplitRecord> {
    let text = std::fs::read_to_string(place).map_err(|e| Error::io(place, "read the run's split", &e))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::new(Code::SplitRecord, "the split's record cannot be read")
            .at(place.display())
            .found(e.to_string())
    })
}
