//! `cellrefine refine`.

use super::ranks::{RankArgs, output};
use super::training::{ResumeFlag, SplitArgs, TraceFlag, Watcher, help, inputs};
use super::{Global, Output};
use crate::config::Stage;
use crate::error::Result;
use crate::trace::Trace;
use crate::train::{MarkerInputs, stages};
use std::path::PathBuf;

/// Flags of `refine`.
#[derive(Debug, clap::Args)]
#[command(after_help = help(Stage::Refine, EXAMPLES))]
pub struct Flags {
    /// Corpus folder, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run, checkpoint or Hugging Face folder to refine; as given, it is also the frozen teacher.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Marker sets (GMT or TSV), or `derive`: one versus rest on the labelled training cells.
    #[arg(long, value_name = "M.gmt")]
    markers: PathBuf,
    /// Run folder to write.
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Obs column with the classes; absent = label-free, missing values = partly labelled.
    #[arg(long, value_name = "COLUMN")]
    label: Option<String>,
    /// Use so many labels per class of the training part; its other cells train by their markers.
    #[arg(long, value_name = "N", requires = "label")]
    labels_per_class: Option<usize>,
    /// TSV of label and set name, where names differ.
    #[arg(long, value_name = "FILE")]
    marker_map: Option<PathBuf>,
    /// Table of gene symbols and Ensembl ids, where the vocabulary has no symbols.
    #[arg(long, value_name = "FILE")]
    gene_map: Option<PathBuf>,
    /// Allow labels without a marker set: their prototypes start from their labelled cells.
    #[arg(long)]
    allow_unmatched: bool,
    #[command(flatten)]
    split: SplitArgs,
    #[command(flatten)]
    resume: ResumeFlag,
    #[command(flatten)]
    trace: TraceFlag,
    #[command(flatten)]
    pub(super) ranks: RankArgs,
}

const EXAMPLES: &str = "Examples:\n  \
    cellrefine refine --corpus pbmc.cells --checkpoint runs/pretrain --markers blood.gmt --label cell_type --out runs/refine\n  \
    cellrefine refine --corpus pbmc.cells --checkpoint runs/pretrain --markers blood.gmt --out runs/label-free \
    --set objective.confidence=0.7";

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let split = flags.split.flags(flags.label.clone(), flags.labels_per_class);
    let mut inputs = inputs(global, &flags.corpus, &flags.out, split, &flags.resume);
    inputs.checkpoint = Some(flags.checkpoint.clone());
    let markers = MarkerInputs {
        markers: flags.markers.clone(),
        map: flags.marker_map.clone(),
        gene_map: flags.gene_map.clone(),
        allow_unmatched: flags.allow_unmatched,
    };
    let ranks = flags.ranks.join(&mut inputs)?;
    let trace = if ranks.leads() { flags.trace.start()? } else { None };
    let summary = stages::refine(&inputs, &markers, &mut Watcher::new(global, &ranks))?;
    trace.map_or(Ok(()), Trace::finish)?;
    Ok(output(&summary, &ranks))
}
