//! `cellrefine pretrain`.

use super::ranks::{RankArgs, output};
use super::training::{ResumeFlag, SplitArgs, TraceFlag, Watcher, help, inputs};
use super::{Global, Output};
use crate::config::Stage;
use crate::error::Result;
use crate::trace::Trace;
use crate::train::stages;
use std::path::PathBuf;

/// Flags of `pretrain`.
#[derive(Debug, clap::Args)]
#[command(after_help = help(Stage::Pretrain, EXAMPLES))]
pub struct Flags {
    /// Corpus folder, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Size of a new encoder: tiny, small, gf-v1-10m, gf-v1-40m, gf-v2-104m, gf-v2-316m.
    #[arg(
        long,
        value_name = "PRESET",
        required_unless_present = "checkpoint",
        conflicts_with = "checkpoint"
    )]
    preset: Option<String>,
    /// Go on from these weights instead: run, checkpoint or Hugging Face folder.
    #[arg(long, value_name = "CKPT")]
    checkpoint: Option<PathBuf>,
    /// Marker sets whose genes are the global tokens of marker-sparse attention; without it those of the checkpoint are.
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
    /// Run folder to write.
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Label column to stratify --split by; labels are not trained on.
    #[arg(long, value_name = "COLUMN")]
    label: Option<String>,
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
    cellrefine pretrain --corpus pbmc.cells --preset tiny --out runs/pretrain\n  \
    cellrefine pretrain --corpus pbmc.cells --preset small --label cell_type --split train=0.6,val=0.1,test=0.3 \
    --set train.epochs=10 --out runs/pretrain";

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let split = flags.split.flags(flags.label.clone(), None);
    let mut inputs = inputs(global, &flags.corpus, &flags.out, split, &flags.resume);
    inputs.preset = flags.preset.clone();
    inputs.checkpoint = flags.checkpoint.clone();
    inputs.globals = flags.markers.clone();
    let ranks = flags.ranks.join(&mut inputs)?;
    let trace = if ranks.leads() { flags.trace.start()? } else { None };
    let summary = stages::pretrain(&inputs, &mut Watcher::new(global, &ranks))?;
    trace.map_or(Ok(()), Trace::finish)?;
    Ok(output(&summary, &ranks))
}
