//! `cellrefine annotate`.

use super::embed::EncoderFlags;
use super::{Global, Output};
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::Result;
use crate::eval::annotate::{Request, annotate};
use crate::eval::request::MarkerChoice;
use crate::eval::zero_shot::Evidence;
use crate::objective::PrototypeMode;
use crate::on_backend;
use crate::ops::Backend;
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// Marker sets: shared by `annotate` and `eval`.
#[derive(Debug, Clone, clap::Args)]
pub struct MarkerFlags {
    /// Labels and sets by another name than each other's: TSV, label and set name.
    #[arg(long, value_name = "FILE")]
    pub marker_map: Option<PathBuf>,
    /// Symbols to Ensembl ids for the marker genes, TSV, plain or gzip.
    #[arg(long, value_name = "FILE")]
    pub gene_map: Option<PathBuf>,
    /// Go on where a label has no marker set.
    #[arg(long)]
    pub allow_unmatched: bool,
    /// Make prototypes anew: marker sentences, marker tokens, best-scoring cells, or label means [default: the checkpoint's, else
    /// cells].
    #[arg(long, value_name = "MODE", value_parser = ["sentence", "tokens", "cells", "labels"])]
    pub prototypes: Option<String>,
}

impl MarkerFlags {
    /// With the marker file.
    pub fn choice(&self, file: &std::path::Path) -> MarkerChoice {
        MarkerChoice {
            file: file.to_path_buf(),
            map: self.marker_map.clone(),
            gene_map: self.gene_map.clone(),
            allow_unmatched: self.allow_unmatched,
        }
    }
    /// The mode named.
    pub fn mode(&self) -> Option<PrototypeMode> {
        self.prototypes.as_deref().map(|mode| match mode {
            "sentence" => PrototypeMode::Sentence,
            "tokens" => PrototypeMode::Tokens,
            "cells" => PrototypeMode::Cells,
            _ => PrototypeMode::Labels,
        })
    }
}

/// Flags of `annotate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Evidence: prototype = cosine to the type's prototype about the teacher's mean; markers = marker score of the rank tokens over the best \
reference cell's; both = their sum. Probability = softmax of the evidence over the types at the checkpoint's temperature. The table has \
one line a cell, in input order: cell_id, label, probability, cosine, marker_score, then the next best.

Examples:
  cellrefine annotate --corpus X.cells --checkpoint RUN --markers M.gmt --out labels.tsv
  cellrefine annotate --corpus X.cells --checkpoint RUN --markers M.gmt --out labels.tsv --evidence both --unknown-below 0.5")]
pub struct Flags {
    /// Corpus, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run folder, checkpoint folder or Hugging Face folder.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Marker sets, GMT or TSV.
    #[arg(long, value_name = "M.gmt")]
    markers: PathBuf,
    /// The table to write.
    #[arg(long, value_name = "FILE.tsv")]
    out: PathBuf,
    /// Labels a cell.
    #[arg(long, default_value_t = 5, value_name = "N")]
    top: usize,
    /// What speaks for a label.
    #[arg(long, value_enum, default_value = "prototype")]
    evidence: Evidence,
    /// Call a cell `unknown` whose best probability is below this.
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    unknown_below: f32,
    /// Softmax temperature [default: the checkpoint's, else 0.07].
    #[arg(long, value_name = "TAU", value_parser = parse_temperature)]
    temperature: Option<f32>,
    #[command(flatten)]
    marker: MarkerFlags,
    #[command(flatten)]
    encoder: EncoderFlags,
}

fn parse_temperature(text: &str) -> std::result::Result<f32, String> {
    match text.parse::<f32>() {
        Ok(t) if t > 0.0 && t.is_finite() => Ok(t),
        _ => Err("a number above 0".into()),
    }
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let request = Request {
        corpus: Arc::new(Corpus::open(&flags.corpus)?),
        checkpoint: flags.checkpoint.clone(),
        markers: flags.marker.choice(&flags.markers),
        evidence: flags.evidence,
        prototypes: flags.marker.mode(),
        top: flags.top,
        unknown_below: flags.unknown_below,
        temperature: flags.temperature,
        embed: flags.encoder.options(&flags.checkpoint),
    };
    on_backend!(global.device, flags.encoder.dtype, |dev: B, A| with::<B, A>(dev, global, flags, &request))
}

fn with<B: Backend<A>, A: Act>(dev: &B, global: &Global, flags: &Flags, request: &Request) -> Result<Output> {
    let progress = global.progress("annotate", Some(request.corpus.cells() as u64));
    let done = annotate::<B, A>(dev, request, &flags.out, |n| progress.add(n))?;
    progress.finish();
    let mut text = format!(
        "{}: {} cells, {} types, evidence {}\nprototypes from {}; reference: {}\n\n",
        flags.out.display(),
        done.cells,
        done.types.len(),
        request.evidence.name(),
        done.prototypes.unwrap_or("nothing: not needed"),
        done.reference
    );
    let mut counts: Vec<(&String, &usize)> = done.counts.iter().collect();
    counts.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    for (label, n) in counts {
        let _ = writeln!(text, "{n:>9}  {label}");
    }
    if !done.without_markers.is_empty() {
        let _ = writeln!(text, "note: no marker set for {}", done.without_markers.join(", "));
    }
    Ok(Output {
        text,
        json: json!({"out": flags.out, "cells": done.cells, "types": done.types, "evidence": request.evidence,
            "labels": done.counts, "prototypes": done.prototypes, "reference": done.reference,
            "temperature": done.temperature, "unknown_below": flags.unknown_below, "without_markers": done.without_markers}),
    })
}
