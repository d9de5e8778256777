//! `cellrefine plan`: memory and FLOPs of a run before it starts.

use super::{Global, Output};
use crate::config::{Sources, Stage};
use crate::corpus::Corpus;
use crate::error::{Code, Error, Result};
use crate::model::config::Vocabulary;
use crate::model::{Preset, checkpoint};
use crate::train::plan::{PlanCase, plan};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Flags of `plan`: those of the stage it plans; a flag that changes neither memory nor work is taken and ignored.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    cellrefine plan --preset gf-v1-10m --set batch.tokens=8192\n  \
    cellrefine plan --preset gf-v2-104m --ranks 8 --set optimizer.sharded=true\n  \
    cellrefine plan --corpus pbmc.cells --checkpoint runs/pretrain --markers blood.gmt --label cell_type --out runs/refine")]
pub struct Flags {
    /// Stage: by default refine where --markers is given, finetune where --checkpoint and --label are, else pretrain.
    #[arg(long, value_enum)]
    stage: Option<StageFlag>,
    /// Corpus folder: real lengths, vocabulary and number of cells. Without it every cell fills the context.
    #[arg(long, value_name = "X.cells")]
    corpus: Option<PathBuf>,
    /// Size of a new encoder: tiny, small, gf-v1-10m, gf-v1-40m, gf-v2-104m, gf-v2-316m.
    #[arg(
        long,
        value_name = "PRESET",
        required_unless_present = "checkpoint",
        conflicts_with = "checkpoint"
    )]
    preset: Option<String>,
    /// Run, checkpoint or Hugging Face folder to start from.
    #[arg(long, value_name = "CKPT")]
    checkpoint: Option<PathBuf>,
    /// Marker sets: as many prototypes as sets, unless labels say otherwise.
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
    /// Obs column with the classes.
    #[arg(long, value_name = "COLUMN")]
    label: Option<String>,
    /// Prototypes or classes, where neither labels nor markers say.
    #[arg(long, value_name = "N")]
    types: Option<usize>,
    /// Processes that train together: what each of them holds and sends.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ranks: u16,
    /// Taken for the stage's sake.
    #[arg(long, value_name = "RUN", hide = true)]
    out: Option<PathBuf>,
    /// Taken for the stage's sake.
    #[arg(long, hide = true)]
    split: Option<String>,
    /// Taken for the stage's sake.
    #[arg(long, hide = true)]
    holdout: Option<String>,
    /// Taken for the stage's sake.
    #[arg(long, hide = true)]
    labels_per_class: Option<usize>,
    /// Taken for the stage's sake.
    #[arg(long, hide = true)]
    marker_map: Option<PathBuf>,
    /// Taken for the stage's sake.
    #[arg(long, hide = true)]
    allow_unmatched: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum StageFlag {
    Pretrain,
    Refine,
    Finetune,
}

/// Prototypes or classes where nothing says how many.
const TYPES: usize = 50;

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let stage = match (flags.stage, &flags.markers, &flags.label, &flags.checkpoint) {
        (Some(StageFlag::Pretrain), ..) => Stage::Pretrain,
        (Some(StageFlag::Refine), ..) | (None, Some(_), ..) => Stage::Refine,
        (Some(StageFlag::Finetune), ..) | (None, None, Some(_), Some(_)) => Stage::Finetune,
        _ => Stage::Pretrain,
    };
    let corpus = flags.corpus.as_deref().map(Corpus::open).transpose()?;
    let vocabulary = corpus.as_ref().map(Corpus::vocab).transpose()?.map(|v| (v.len(), Vocabulary::of(&v)));
    let mut config = match (&flags.preset, &flags.checkpoint) {
        (Some(name), _) => {
            let preset = Preset::named(name)?;
            let (len, vocabulary) = vocabulary
                .unwrap_or((preset.vocab, Vocabulary { mask: 1, first_gene: 2, ..Vocabulary::default() }));
            preset.config(len, vocabulary)
        }
        (None, Some(path)) => {
            let mut config = checkpoint::read_config(&checkpoint::resolve(path)?)?;
            if let Some((len, vocabulary)) = vocabulary {
                config.adopt_vocabulary(len, &vocabulary)?;
            }
            config
        }
        (None, None) => {
            return Err(Error::new(Code::FlagConflict, "name either a preset or a checkpoint to start from"));
        }
    };
    let sources = Sources::of_process(global.config.clone(), global.set.clone(), global.seed);
    let settings = sources.resolve(stage, &config)?;
    settings.model.apply_to(&mut config, flags.checkpoint.is_some())?;
    let classes = match (&corpus, &flags.label) {
        (Some(corpus), Some(label)) => Some(corpus.categorical(label)?.categories.len()),
        _ => None,
    };
    let sets = flags.markers.as_deref().filter(|m| *m != Path::new("derive")).map(count_sets).transpose()?;
    let types = flags.types.or(classes).or(sets).unwrap_or(TYPES);
    let plan = plan(&PlanCase {
        stage,
        config: &config,
        settings: &settings,
        corpus: corpus.as_ref(),
        types,
        labelled: flags.label.is_some() && flags.labels_per_class.is_none(),
        ranks: usize::from(flags.ranks),
    })?;
    Ok(Output { text: plan.to_text(), json: plan.to_json() })
}

/// Distinct first fields: set names of a GMT file, or labels of a TSV.
fn count_sets(path: &Path) -> Result<usize> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, "read the marker sets", &e))?;
    let text = String::from_utf8_lossy(&bytes);
    let names: HashSet<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .filter_map(|line| line.split('\t').next())
        .collect();
    Ok(names.len())
}
