//! `cellrefine finetune`.

use super::ranks::{RankArgs, output};
use super::training::{ResumeFlag, SplitArgs, TraceFlag, Watcher, help, inputs};
use super::{Global, Output};
use crate::config::Stage;
use crate::error::Result;
use crate::trace::Trace;
use crate::train::stages;
use std::path::PathBuf;

/// Flags of `finetune`.
#[derive(Debug, clap::Args)]
#[command(after_help = help(Stage::Finetune, EXAMPLES))]
pub struct Flags {
    /// Corpus folder, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run, checkpoint or Hugging Face folder to start from.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Obs column with the classes.
    #[arg(long, value_name = "COLUMN")]
    label: String,
    /// Marker sets whose genes are the global tokens of marker-sparse attention; without it those of the checkpoint are.
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
    /// Run folder to write.
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Use so many labelled training cells per class.
    #[arg(long, value_name = "N")]
    labels_per_class: Option<usize>,
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
    cellrefine finetune --corpus pbmc.cells --checkpoint runs/refine --label cell_type --out runs/finetune\n  \
    cellrefine finetune --corpus pbmc.cells --checkpoint runs/pretrain --label cell_type --labels-per-class 10 \
    --set finetune.class_weights=none --out runs/few";

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let split = flags.split.flags(Some(flags.label.clone()), flags.labels_per_class);
    let mut inputs = inputs(global, &flags.corpus, &flags.out, split, &flags.resume);
    inputs.checkpoint = Some(flags.checkpoint.clone());
    inputs.globals = flags.markers.clone();
    let ranks = flags.ranks.join(&mut inputs)?;
    let trace = if ranks.leads() { flags.trace.start()? } else { None };
    let summary = stages::finetune(&inputs, &mut Watcher::new(global, &ranks))?;
    trace.map_or(Ok(()), Trace::finish)?;
    Ok(output(&summary, &ranks))
}
