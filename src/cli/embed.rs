//! `cellrefine embed`.

use super::annotate::MarkerFlags;
use super::training::TraceFlag;
use super::{Global, Output};
use crate::config::Precision;
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::eval::annotate::Request;
use crate::eval::embed::{EmbedOptions, Embedder, pool_name};
use crate::eval::h5ad::H5adCopy;
use crate::eval::labeller::Labeller;
use crate::eval::npy::ids_path;
use crate::eval::zero_shot::Evidence;
use crate::on_backend;
use crate::ops::Backend;
use crate::ops::pool::Pooling;
use crate::trace::Trace;
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// How the encoder is run: shared by `embed`, `annotate` and `eval`.
#[derive(Debug, Clone, clap::Args)]
pub struct EncoderFlags {
    /// Layer, as Geneformer counts: 0 = last layer's output, -1 = second to last [default: the checkpoint's, usually -1].
    #[arg(long, allow_hyphen_values = true, value_name = "LAYER")]
    pub layer: Option<i32>,
    /// First token or mean over the tokens without special ones [default: the checkpoint's].
    #[arg(long, value_name = "POOL", value_parser = ["cls", "mean"])]
    pub pool: Option<String>,
    /// Longest cell in tokens, special ones included [default: the run's, else the model's context].
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Tokens of a batch: memory and speed, never results.
    #[arg(long, value_name = "N")]
    pub batch_tokens: Option<usize>,
    /// Arithmetic of the encoder.
    #[arg(long, value_enum, default_value_t = Precision::F32, value_name = "TYPE")]
    pub dtype: Precision,
}

impl EncoderFlags {
    /// The options of an [`Embedder`] for `checkpoint`, whose run may say how long its cells were.
    pub fn options(&self, checkpoint: &Path) -> EmbedOptions {
        EmbedOptions {
            layer: self.layer,
            pooling: self.pool.as_deref().map(|p| if p == "cls" { Pooling::Cls } else { Pooling::Mean }),
            max_tokens: self.max_tokens.or_else(|| crate::eval::embed::run_context(checkpoint)),
            batch_tokens: self.batch_tokens,
        }
    }
}

/// Flags of `embed`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The suffix of --out chooses the form:
  .npy      float32 (cells, width), with one cell id a line in FILE.ids.txt beside it
  .parquet  cell_id and embedding (a list of width floats); the origin in the file's metadata
  .h5ad     a copy of the file that the cells came from, with obsm/X_cellrefine; with --markers, or where the checkpoint was
            refined, also obs/cellrefine_label and obs/cellrefine_score; the origin in uns/cellrefine
Rows of .npy and .parquet come in the order in which the cells were packed, all of them. In an .h5ad cells are found by their \
names; a row that the corpus lacks is NaN, and is counted. A row depends on its cell alone: batch size and threads change nothing.

Examples:
  cellrefine embed --corpus X.cells --checkpoint RUN --out cells.npy
  cellrefine embed --corpus X.cells --checkpoint RUN --out with-embedding.h5ad --h5ad cells.h5ad
  cellrefine embed --corpus X.cells --checkpoint geneformer/ --out last.parquet --layer 0 --pool mean")]
pub struct Flags {
    /// Corpus, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run folder, checkpoint folder or Hugging Face folder.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Output, ending in .npy, .parquet or .h5ad.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// With --out FILE.h5ad: the file to copy. It is not changed.
    #[arg(long, value_name = "SOURCE.h5ad")]
    h5ad: Option<PathBuf>,
    /// With --out FILE.h5ad: label cells by these marker sets, GMT or TSV, as `annotate` does.
    #[arg(long, value_name = "M.gmt", requires = "h5ad")]
    markers: Option<PathBuf>,
    /// What speaks for a label.
    #[arg(long, value_enum, default_value = "prototype", requires = "markers")]
    evidence: Evidence,
    /// Write no labels, even where the checkpoint has prototypes.
    #[arg(long, requires = "h5ad", conflicts_with = "markers")]
    no_labels: bool,
    #[command(flatten)]
    marker: MarkerFlags,
    #[command(flatten)]
    encoder: EncoderFlags,
    #[command(flatten)]
    trace: TraceFlag,
}

/// The form of the output.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Npy,
    Parquet,
    H5ad,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let form = form(flags)?;
    let corpus = Arc::new(Corpus::open(&flags.corpus)?);
    on_backend!(global.device, flags.encoder.dtype, |dev: B, A| write::<B, A>(
        dev, global, flags, form, corpus
    ))
}

fn form(flags: &Flags) -> Result<Form> {
    let out = &flags.out;
    let form = match out.extension().and_then(|e| e.to_str()).unwrap_or("") {
        "npy" => Form::Npy,
        "parquet" => Form::Parquet,
        "h5ad" => Form::H5ad,
        _ => {
            return Err(Error::new(Code::OutputName, "the suffix of --out names no form of embeddings")
                .found(out.display())
                .wanted(".npy, .parquet or .h5ad")
                .next(format!("--out {}", out.with_extension("npy").display())));
        }
    };
    if (form == Form::H5ad) != flags.h5ad.is_some() {
        return Err(match form {
            Form::H5ad => Error::new(Code::FlagConflict, "--out FILE.h5ad is a copy of a file")
                .wanted("--h5ad SOURCE.h5ad: the file that the corpus was packed from"),
            _ => Error::new(Code::FlagConflict, "--h5ad goes with --out FILE.h5ad")
                .found(format!("--out {}", out.display())),
        });
    }
    Ok(form)
}

fn write<B: Backend<A>, A: Act>(
    dev: &B,
    global: &Global,
    flags: &Flags,
    form: Form,
    corpus: Arc<Corpus>,
) -> Result<Output> {
    let start = Instant::now();
    let options = flags.encoder.options(&flags.checkpoint);
    // What can be refused is refused before any cell is embedded.
    let copy = flags.h5ad.as_ref().map(|source| H5adCopy::plan(source, &flags.out, &corpus)).transpose()?;
    let mut embedder = Embedder::<B, A>::open(dev, &flags.checkpoint, corpus.clone(), &options)?;
    let labeller = match &flags.markers {
        Some(markers) => {
            let request = Request {
                corpus: corpus.clone(),
                checkpoint: flags.checkpoint.clone(),
                markers: flags.marker.choice(markers),
                evidence: flags.evidence,
                prototypes: flags.marker.mode(),
                top: 1,
                unknown_below: 0.0,
                temperature: None,
                embed: options,
            };
            Some(Labeller::from_markers(&request, &mut embedder, &|_| {})?)
        }
        None if form == Form::H5ad && !flags.no_labels => Labeller::from_checkpoint(&embedder)?,
        None => None,
    };
    let rows = copy.as_ref().map_or(corpus.cells(), |c| c.cells().len());
    let absent = copy.as_ref().map_or(0, H5adCopy::absent);
    let trace = flags.trace.start()?;
    let progress = global.progress("embed", Some((rows - absent) as u64));
    let embedding = Instant::now();
    match (form, &copy) {
        (Form::Parquet, _) => embedder.write_parquet(&flags.out, |n| progress.add(n))?,
        (Form::H5ad, Some(copy)) => embedder.write_h5ad(copy, labeller.as_ref(), |n| progress.add(n))?,
        _ => embedder.write_npy(&flags.out, |n| progress.add(n))?,
    }
    progress.finish();
    trace.map_or(Ok(()), Trace::finish)?;
    let rate = (rows - absent) as f64 / embedding.elapsed().as_secs_f64().max(1e-9);
    let (out, width) = (flags.out.display(), embedder.width());
    let (layer, pool) = (embedder.layer(), pool_name(embedder.pooling()));
    let ids = (form == Form::Npy).then(|| ids_path(&flags.out));
    let mut text = format!("{out}: float32 ({rows}, {width}), layer {layer}, pool {pool}");
    if let Some(ids) = &ids {
        let _ = write!(text, "; ids in {}", ids.display());
    }
    if let Some(copy) = &copy {
        let _ = write!(text, "\n  obsm/X_cellrefine of a copy of {}", copy.source().display());
        if let Some(labeller) = &labeller {
            let (types, from) = (labeller.names.len(), labeller.origin.unwrap_or("markers alone"));
            let _ = write!(
                text,
                "\n  obs/cellrefine_label and obs/cellrefine_score: {types} types, prototypes from {from}"
            );
        }
        if absent > 0 {
            let _ = write!(text, "\n  {absent} of {rows} rows are not in the corpus: NaN, and no label");
        }
    }
    let _ = write!(text, "\n{rate:.0} cells/s");
    Ok(Output {
        text,
        json: json!({"out": flags.out, "ids": ids, "cells": rows, "cells_absent": absent, "width": width, "layer": layer, "pool": pool,
            "dtype": A::NAME, "checkpoint": embedder.folder(), "labels": labeller.map(|l| l.names),
            "seconds": start.elapsed().as_secs_f64(), "cells_per_s": rate}),
    })
}
