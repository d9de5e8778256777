//! `cellrefine merge`.

use super::{Global, Output};
use crate::corpus::force_unlock;
use crate::corpus::merge::merge;
use crate::error::Result;
use serde_json::json;
use std::path::PathBuf;

/// Flags of `merge`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Cells keep their order: all of the first corpus, then all of the second, and so on. Vocabulary, values and obs columns must agree; category \
names may differ. Shards are linked, not copied, where the file system allows it.

Examples:
  cellrefine merge part-0.cells part-1.cells --out atlas.cells
  cellrefine merge donors/*.cells --out all.cells --json")]
pub struct Flags {
    /// Corpora to join, in order.
    #[arg(required = true, value_name = "X.cells")]
    inputs: Vec<PathBuf>,
    /// The corpus to make; must not exist.
    #[arg(long, value_name = "OUT.cells")]
    out: PathBuf,
    /// Take over what a writer that was killed on another host left of this corpus.
    #[arg(long)]
    force_unlock: bool,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    if flags.force_unlock {
        force_unlock(&flags.out)?;
    }
    let progress = global.progress("linking shards", None);
    let outcome = merge(&flags.inputs, &flags.out, &|n| progress.add(n));
    progress.finish();
    let m = outcome?;
    Ok(Output {
        text: format!(
            "{}: {} cells, {} tokens, {} shards from {} corpora",
            flags.out.display(),
            m.cells,
            m.tokens,
            m.shards.len(),
            flags.inputs.len()
        ),
        json: json!({"out": flags.out, "cells": m.cells, "tokens": m.tokens, "shards": m.shards.len(), "digest": m.digest}),
    })
}
