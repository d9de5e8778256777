//! `cellrefine embed`.

use super::{Global, Output};
use crate::corpus::Corpus;
use crate::cpu::Cpu;
use crate::device::Act;
use crate::error::{Error, Result};
use crate::eval::embed::{EmbedOptions, Embedder};
use crate::eval::npy::ids_path;
use crate::ops::pool::Pooling;
use half::bf16;
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
    #[arg(long, default_value = "f32", value_name = "TYPE", value_parser = ["f32", "bf16"])]
    pub dtype: String,
}

impl EncoderFlags {
    /// The options of an [`Embedder`] for `checkpoint`, whose run may say how long its cells were.
    pub fn options(&self, checkpoint: &Path) -> EmbedOptions {
        EmbedOptions {
            layer: self.layer,
            pooling: self.pool.as_deref().map(|p| if p == "cls" { Pooling::Cls } else { Pooling::Mean }),
            max_tokens: self.max_tokens.or_else(|| crate::eval::embed::run_context(checkpoint)),
            batch_tokens: self.batch_tokens,
            globals: None,
        }
    }
    /// True for `--dtype bf16`.
    pub fn is_bf16(&self) -> bool {
        self.dtype == "bf16"
    }
}

/// Refuses devices that this build has no backend for.
pub fn require_cpu(global: &Global) -> Result<()> {
    match global.device.as_str() {
        "auto" | "cpu" => Ok(()),
        other => Err(Error::environment("this build has no backend for the device")
            .found(other)
            .wanted("auto or cpu")
            .next("cellrefine doctor says what this build and machine can do")),
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
    require_cpu(global)?;
    check_output(&flags.out)?;
    let corpus = Arc::new(Corpus::open(&flags.corpus)?);
    if flags.encoder.is_bf16() {
        write::<bf16>(global, flags, corpus)
    } else {
        write::<f32>(global, flags, corpus)
    }
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

fn write<A: Act>(global: &Global, flags: &Flags, corpus: Arc<Corpus>) -> Result<Output>
where
    Cpu: crate::ops::Backend<A>,
{
    let options = flags.encoder.options(&flags.checkpoint);
    let mut embedder = Embedder::<Cpu, A>::open(&Cpu, &flags.checkpoint, corpus.clone(), &options)?;
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
