//! What `eval` is asked: the checkpoint, the cells, and how they are divided.

use super::embed::{EmbedOptions, run_folder};
use super::frozen::FrozenSettings;
use super::metrics::ShareThresholds;
use super::zero_shot::Evidence;
use crate::corpus::splits::{SplitRecord, SplitRule};
use crate::corpus::{Corpus, Split, SplitSpec};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::genes::markers::read_marker_map;
use crate::genes::markers_file::RawSets;
use crate::model::checkpoint::VOCABULARY;
use crate::objective::PrototypeMode;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How the cells are divided, as flags say it; with nothing said, the run's recorded split.
#[derive(Debug, Clone, Default)]
pub struct SplitChoice {
    /// `train=0.67,test=0.33`.
    pub split: Option<String>,
    /// `COLUMN=VALUE`.
    pub holdout: Option<String>,
    /// Label values left out.
    pub exclude: Vec<String>,
    /// Labels kept per class of the training part.
    pub labels_per_class: Option<usize>,
    /// Seed of a split made here.
    pub seed: Option<u64>,
    /// Run whose recorded split is taken, where nothing else is said [default: the checkpoint's].
    pub recorded_by: Option<PathBuf>,
}

/// Marker sets, as flags name them.
#[derive(Debug, Clone, Default)]
pub struct MarkerChoice {
    /// GMT or TSV.
    pub file: PathBuf,
    /// TSV: label, set name.
    pub map: Option<PathBuf>,
    /// Symbols to Ensembl ids.
    pub gene_map: Option<PathBuf>,
    /// A label without a set is no error.
    pub allow_unmatched: bool,
}

impl MarkerChoice {
    /// The file's sets as tokens, and the label table.
    #[allow(clippy::type_complexity)] // (label, set name) pairs, as `RawSets::for_labels` takes them
    pub fn load(&self, corpus: &Corpus) -> Result<(RawSets, Option<Vec<(String, String)>>)> {
        let vocab = Vocab::load(corpus.path().join(VOCABULARY))?;
        let raw = RawSets::load(&self.file, &vocab, self.gene_map.as_deref())?;
        Ok((raw, self.map.as_deref().map(read_marker_map).transpose()?))
    }
}

/// The cells that are scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Test cells.
    #[default]
    Test,
    /// Validation cells: for choosing settings, so that the test cells stay unseen.
    Val,
}

/// What to evaluate.
pub struct Request {
    /// The cells.
    pub corpus: Arc<Corpus>,
    /// Run, checkpoint or Hugging Face folder.
    pub checkpoint: PathBuf,
    /// Label column.
    pub label: String,
    /// Division of the cells.
    pub split: SplitChoice,
    /// The cells that are scored.
    pub part: Part,
    /// Marker sets.
    pub markers: Option<MarkerChoice>,
    /// What recall@k and a prototype prediction go by.
    pub evidence: Option<Evidence>,
    /// Make prototypes in this way instead of taking the checkpoint's.
    pub prototypes: Option<PrototypeMode>,
    /// obs column of batches, for mixing.
    pub batch_key: Option<String>,
    /// Head and tail.
    pub thresholds: ShareThresholds,
    /// How cells become rows.
    pub embed: EmbedOptions,
    /// Probe, kNN, clustering.
    pub frozen: FrozenSettings,
}

/// The split that `choice` asks for on `corpus`, and where it came from.
///
/// # Errors
/// Usage: contradicting flags. Input: a recorded split that the corpus does not give again.
pub fn choose_split(
    corpus: &Corpus,
    checkpoint: &Path,
    label: &str,
    choice: &SplitChoice,
) -> Result<(Split, String)> {
    let fresh = |rule: SplitRule| {
        let spec = SplitSpec {
            rule,
            label: Some(label.to_string()),
            exclude: choice.exclude.clone(),
            labels_per_class: choice.labels_per_class,
            seed: choice.seed.unwrap_or(0),
        };
        Split::make(corpus, &spec)
    };
    match (&choice.split, &choice.holdout) {
        (Some(_), Some(_)) => {
            return Err(Error::new(Code::FlagConflict, "--split and --holdout exclude each other"));
        }
        (Some(text), None) => return Ok((fresh(SplitRule::parse_fractions(text)?)?, "flags".into())),
        (None, Some(text)) => return Ok((fresh(SplitRule::parse_holdout(text, 0.0)?)?, "flags".into())),
        (None, None) => {}
    }
    let why = match recorded(choice.recorded_by.as_deref().unwrap_or(checkpoint))? {
        None => "no run recorded a split".to_string(),
        Some((place, r)) if r.corpus_digest != corpus.digest() => {
            format!("{} divides another corpus", place.display())
        }
        Some((place, r)) if r.spec.rule == SplitRule::All => {
            format!("the run of {} trained on all cells, test cells included", place.display())
        }
        Some((place, r)) => {
            let mut split = Split::restore(corpus, &r)?;
            if !choice.exclude.is_empty() && choice.exclude != r.spec.exclude {
                return Err(Error::new(
                    Code::SplitOther,
                    "the run divided its cells with other labels left out",
                )
                .at(place.display())
                .found(format!("--exclude-label {}", choice.exclude.join(", ")))
                .wanted(format!("{:?}, as in that run", r.spec.exclude))
                .next("leave --exclude-label out, or give --split for a new division"));
            }
            if choice.labels_per_class.is_some() && choice.labels_per_class != r.spec.labels_per_class {
                split =
                    Split::make(corpus, &SplitSpec { labels_per_class: choice.labels_per_class, ..r.spec })?;
            }
            return Ok((split, format!("recorded in {}", place.display())));
        }
    };
    let split = fresh(SplitRule::parse_fractions("train=0.67,test=0.33")?)?;
    Ok((split, format!("default train=0.67,test=0.33 ({why})")))
}

/// The split that the checkpoint's run recorded, if it did.
pub(super) fn recorded(checkpoint: &Path) -> Result<Option<(PathBuf, SplitRecord)>> {
    let Some(place) = run_folder(checkpoint).map(|run| run.join("split.json")).filter(|p| p.is_file()) else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(&place).map_err(|e| Error::io(&place, "read the run's split", &e))?;
    let record = serde_json::from_str(&text).map_err(|e| {
        Error::new(Code::SplitRecord, "the split's record cannot be read")
            .at(place.display())
            .found(e.to_string())
    })?;
    Ok(Some((place, record)))
}
