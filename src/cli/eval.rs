//! `cellrefine eval`.

use super::annotate::MarkerFlags;
use super::embed::EncoderFlags;
use super::{Global, Output};
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::eval::evaluate::evaluate;
use crate::eval::frozen::FrozenSettings;
use crate::eval::metrics::ShareThresholds;
use crate::eval::probe::ProbeSettings;
use crate::eval::request::{Part, Request, SplitChoice};
use crate::eval::zero_shot::Evidence;
use crate::on_backend;
use crate::ops::Backend;
use std::path::PathBuf;
use std::sync::Arc;

/// Flags of `eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A run is evaluated on the split that it recorded, and the result says so. Probe, kNN, centre and marker scale see the training part alone. \
accuracy, macro_f1 and per_class are the checkpoint's own answer: its classifier, else the nearest prototype, else the linear probe.

Examples:
  cellrefine eval --corpus X.cells --checkpoint RUN --label cell_type
  cellrefine eval --corpus X.cells --checkpoint RUN --label cell_type --markers M.gmt --evidence both --batch-key donor --json")]
pub struct Flags {
    /// Corpus, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run folder, checkpoint folder or Hugging Face folder.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Label column.
    #[arg(long, value_name = "COL")]
    label: String,
    /// Marker sets, GMT or TSV: for marker evidence, and for prototypes where the checkpoint has none.
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
    /// What recall@k goes by [default: prototypes where there are any, else markers].
    #[arg(long, value_enum)]
    evidence: Option<Evidence>,
    /// Another division of the cells: train=0.67,test=0.33.
    #[arg(long, value_name = "PARTS")]
    split: Option<String>,
    /// Test on the cells of one value: COLUMN=VALUE.
    #[arg(long, value_name = "COL=VALUE")]
    holdout: Option<String>,
    /// The cells that are scored: val to choose settings, so that the test cells stay unseen.
    #[arg(long, value_enum, default_value_t = Part::Test)]
    part: Part,
    /// Label value left out of every part (may be repeated) [default: the run's].
    #[arg(long, value_name = "VALUE")]
    exclude_label: Vec<String>,
    /// Labels per class that probe and kNN may see [default: the run's, else all].
    #[arg(long, value_name = "N")]
    labels_per_class: Option<usize>,
    /// obs column of batches: adds batch-ASW and iLISI.
    #[arg(long, value_name = "COL")]
    batch_key: Option<String>,
    /// Share of the training cells from which a class is head.
    #[arg(long, default_value_t = 0.10, value_name = "SHARE")]
    head_share: f64,
    /// Share of the training cells below which a class is tail.
    #[arg(long, default_value_t = 0.02, value_name = "SHARE")]
    tail_share: f64,
    /// Neighbours of kNN.
    #[arg(long, default_value_t = 15, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    neighbours: u32,
    /// Inverse L2 strength of the linear probe, as scikit-learn's C.
    #[arg(long, default_value_t = 0.1, value_name = "C")]
    probe_c: f64,
    /// Weigh classes equally in the linear probe.
    #[arg(long)]
    probe_balanced: bool,
    #[command(flatten)]
    marker: MarkerFlags,
    #[command(flatten)]
    encoder: EncoderFlags,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let shares = 0.0..=1.0;
    if !(shares.contains(&flags.tail_share)
        && shares.contains(&flags.head_share)
        && flags.tail_share <= flags.head_share)
    {
        return Err(Error::new(Code::FlagConflict, "shares of head and tail contradict each other")
            .found(format!("--head-share {} --tail-share {}", flags.head_share, flags.tail_share))
            .wanted("0 ≤ tail ≤ head ≤ 1"));
    }
    if !(flags.probe_c > 0.0 && flags.probe_c.is_finite()) {
        return Err(Error::new(Code::FlagValue, "--probe-c must be above 0").found(flags.probe_c));
    }
    let request = Request {
        corpus: Arc::new(Corpus::open(&flags.corpus)?),
        checkpoint: flags.checkpoint.clone(),
        label: flags.label.clone(),
        split: SplitChoice {
            split: flags.split.clone(),
            holdout: flags.holdout.clone(),
            exclude: flags.exclude_label.clone(),
            labels_per_class: flags.labels_per_class,
            seed: global.seed,
            recorded_by: None,
        },
        part: flags.part,
        markers: flags.markers.as_deref().map(|file| flags.marker.choice(file)),
        evidence: flags.evidence,
        prototypes: flags.marker.mode(),
        batch_key: flags.batch_key.clone(),
        thresholds: ShareThresholds { head: flags.head_share, tail: flags.tail_share },
        embed: flags.encoder.options(&flags.checkpoint),
        frozen: FrozenSettings {
            probe: ProbeSettings { c: flags.probe_c, balanced: flags.probe_balanced, ..Default::default() },
            neighbours: flags.neighbours as usize,
            seed: global.seed.unwrap_or(0),
            ..Default::default()
        },
    };
    on_backend!(global.device, flags.encoder.dtype, |dev: B, A| with::<B, A>(dev, global, &request))
}

fn with<B: Backend<A>, A: Act>(dev: &B, global: &Global, request: &Request) -> Result<Output> {
    let progress = global.progress("embed", Some(request.corpus.cells() as u64));
    let evaluation = evaluate::<B, A>(dev, request, |n| progress.add(n))?;
    progress.finish();
    Ok(Output { text: evaluation.to_text(), json: evaluation.to_json() })
}
