//! `cellrefine embed`.

use super::{Global, Output};
use crate::config::Precision;
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::{Error, Result};
use crate::eval::embed::{EmbedOptions, Embedder};
use crate::eval::npy::ids_path;
use crate::on_backend;
use crate::ops::Backend;
use crate::ops::pool::Pooling;
use serde_json::json;
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
Rows come in the order in which the cells were packed, all of them. FILE.npy is float32 (cells, width); FILE.ids.txt beside it has one cell \
id a line. A row depends on its cell alone: batch size and threads change nothing.

Examples:
  cellrefine embed --corpus X.cells --checkpoint RUN --out cells.npy
  cellrefine embed --corpus X.cells --checkpoint geneformer/ --out last.npy --layer 0 --pool mean")]
pub struct Flags {
    /// Corpus, from `pack`.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// Run folder, checkpoint folder or Hugging Face folder.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// Output, ending in .npy.
    #[arg(long, value_name = "FILE.npy")]
    out: PathBuf,
    #[command(flatten)]
    encoder: EncoderFlags,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    check_output(&flags.out)?;
    let corpus = Arc::new(Corpus::open(&flags.corpus)?);
    on_backend!(global.device, flags.encoder.dtype, |dev: B, A| write::<B, A>(dev, global, flags, corpus))
}

fn check_output(out: &Path) -> Result<()> {
    let suffix = out.extension().and_then(|e| e.to_str()).unwrap_or("");
    if suffix == "npy" {
        return Ok(());
    }
    let e = Error::usage("embeddings are written as .npy")
        .found(out.display())
        .wanted("an --out that ends in .npy");
    Err(match suffix {
        "h5ad" => e.next(format!(
            "--out {}, then in Python: adata.obsm['X_cellrefine'] = numpy.load(FILE)",
            out.with_extension("npy").display()
        )),
        _ => e.next(format!("--out {}", out.with_extension("npy").display())),
    })
}

fn write<B: Backend<A>, A: Act>(
    dev: &B,
    global: &Global,
    flags: &Flags,
    corpus: Arc<Corpus>,
) -> Result<Output> {
    let options = flags.encoder.options(&flags.checkpoint);
    let mut embedder = Embedder::<B, A>::open(dev, &flags.checkpoint, corpus.clone(), &options)?;
    let progress = global.progress("embed", Some(corpus.cells() as u64));
    let start = Instant::now();
    embedder.write_npy(&flags.out, |n| progress.add(n))?;
    progress.finish();
    let seconds = start.elapsed().as_secs_f64();
    let (cells, width) = (corpus.cells(), embedder.width());
    let ids = ids_path(&flags.out);
    Ok(Output {
        text: format!(
            "{}: float32 ({cells}, {width}), layer {}, pool {}; ids in {}\n{:.0} cells/s",
            flags.out.display(),
            embedder.layer(),
            pool_name(embedder.pooling()),
            ids.display(),
            cells as f64 / seconds.max(1e-9)
        ),
        json: json!({"out": flags.out, "ids": ids, "cells": cells, "width": width, "layer": embedder.layer(),
            "pool": pool_name(embedder.pooling()), "dtype": A::NAME, "checkpoint": embedder.folder(),
            "seconds": seconds, "cells_per_s": cells as f64 / seconds.max(1e-9)}),
    })
}

/// `cls` or `mean`.
pub fn pool_name(pooling: Pooling) -> &'static str {
    match pooling {
        Pooling::Cls => "cls",
        Pooling::Mean => "mean",
    }
}
