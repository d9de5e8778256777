//! `cellrefine export`.

use super::{Global, Output};
use crate::corpus::Corpus;
use crate::corpus::format::MANIFEST;
use crate::error::{Code, Error, Result};
use crate::export::{dataset, model};
use serde_json::json;
use std::path::PathBuf;

/// Flags of `export`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A corpus becomes the folder that datasets.load_from_disk and Geneformer's scripts open: input_ids with the vocabulary's special tokens, length, \
the obs columns, cell_id and total_count. Cells are cut as Geneformer's tokenizer cuts them: 4,096 tokens with <cls>, 2,048 without.
A checkpoint becomes the folder that transformers' from_pretrained opens, with Geneformer's token and median dictionaries (pickle and JSON) \
and the prototypes beside it. A run's best checkpoint is taken.

Examples:
  cellrefine export cells.cells --out cells.dataset
  cellrefine export runs/refine --out hf-model --markers blood.gmt")]
pub struct Flags {
    /// A corpus, or a run, checkpoint or model folder.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The folder to make; must not exist.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Corpus: tokens of a cell at most, special ones included; 0 = all [default: 4096 with <cls>, else 2048].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Checkpoint: the marker sets of its prototypes, taken along.
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    if flags.path.join(MANIFEST).is_file() || flags.path.extension().is_some_and(|e| e == "cells") {
        if flags.markers.is_some() {
            return Err(
                Error::new(Code::FlagConflict, "--markers is for a checkpoint").at(flags.path.display())
            );
        }
        return corpus(global, flags);
    }
    if flags.max_tokens.is_some() {
        return Err(Error::new(Code::FlagConflict, "--max-tokens is for a corpus").at(flags.path.display()));
    }
    let exported = model::export(&flags.path, &flags.out, flags.markers.as_deref())?;
    exported.notes.iter().for_each(|n| global.note(n));
    let out = flags.out.display();
    let mut text = format!(
        "{out}: {} tensors, {} parameters, from {}",
        exported.tensors,
        exported.parameters,
        exported.source.display()
    );
    if let Some(tokens) = exported.tokens {
        text += &format!("\n{tokens} tokens: vocab.tsv, token_dictionary.pkl, gene_median_dictionary.pkl");
    }
    if !exported.prototypes.is_empty() {
        text += &format!("\n{} prototypes: {}", exported.prototypes.len(), exported.prototypes.join(", "));
    }
    let json = json!({"kind": "model", "out": flags.out, "source": exported.source, "tensors": exported.tensors,
        "parameters": exported.parameters, "tokens": exported.tokens, "prototypes": exported.prototypes, "notes": exported.notes});
    Ok(Output { text, json })
}

fn corpus(global: &Global, flags: &Flags) -> Result<Output> {
    let corpus = Corpus::open(&flags.path)?;
    let progress = global.progress("writing cells", Some(corpus.cells() as u64));
    let outcome = dataset::export(&corpus, &flags.out, flags.max_tokens, &|cells| progress.add(cells));
    progress.finish();
    let e = outcome?;
    if e.cut > 0 {
        let n = e.max_tokens;
        global.note(format!(
            "{} cells were cut to {n} tokens, Geneformer's limit; --max-tokens 0 keeps all",
            e.cut
        ));
    }
    let text = format!(
        "{}: {} cells, {} tokens, {} Arrow files; columns {}",
        flags.out.display(),
        e.cells,
        e.tokens,
        e.files,
        e.columns.join(", ")
    );
    let json = json!({"kind": "dataset", "out": flags.out, "cells": e.cells, "tokens": e.tokens, "files": e.files, "cut": e.cut,
        "max_tokens": e.max_tokens, "columns": e.columns});
    Ok(Output { text, json })
}
