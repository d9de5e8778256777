//! `cellrefine inspect`: what a path holds, its numbers, its health.

use super::{Global, Output};
use crate::corpus::format::MANIFEST;
use crate::corpus::{Corpus, ObsKind};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::genes::markers_file::MarkerFile;
use crate::model::checkpoint;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Flags of `inspect`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cellrefine inspect cells.cells --verify
  cellrefine inspect cells.cells --cells 5 --json")]
pub struct Flags {
    /// A corpus, a checkpoint, a run folder, a vocabulary or a marker file.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Read every byte and check every checksum (corpus).
    #[arg(long)]
    verify: bool,
    /// Print the tokens of the first K cells (corpus).
    #[arg(long, value_name = "K", default_value_t = 0)]
    cells: usize,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let path = &flags.path;
    if !path.exists() {
        return Err(Error::new(Code::FileMissing, "no such file or folder").at(path.display()));
    }
    if path.join(MANIFEST).is_file() || path.extension().is_some_and(|e| e == "cells") {
        return corpus(global, flags);
    }
    if flags.verify || flags.cells > 0 {
        return Err(
            Error::new(Code::FlagConflict, "--verify and --cells are for a corpus").at(path.display())
        );
    }
    if path.is_dir() {
        return if path.join("metrics.jsonl").is_file() || path.join("settings.toml").is_file() {
            run_folder(path)
        } else {
            Ok(object(checkpoint::describe(path)?))
        };
    }
    let mut head = Vec::new();
    let read = std::fs::File::open(path).and_then(|f| f.take(64).read_to_end(&mut head));
    read.map_err(|e| Error::io(path, "read the file", &e))?;
    if head.starts_with(b"# cellrefine-vocabulary") { vocabulary(path) } else { markers(path) }
}

fn corpus(global: &Global, flags: &Flags) -> Result<Output> {
    let corpus = Corpus::open(&flags.path)?;
    let m = corpus.manifest();
    let bytes: u64 = m.shards.iter().map(|s| s.bytes).sum();
    if flags.verify {
        let progress = global.progress("checking bytes", Some(bytes));
        let outcome = corpus.verify_with(&|n| progress.add(n));
        progress.finish();
        outcome?;
    }
    let mut lengths: Vec<usize> = (0..corpus.cells()).map(|c| corpus.len_of(c)).collect();
    lengths.sort_unstable();
    let quantile = |q: f64| lengths.get(((lengths.len().max(1) - 1) as f64 * q).round() as usize).copied();
    let mean = m.tokens as f64 / (m.cells as f64).max(1.0);
    let [shortest, median, longest] = [0.0, 0.5, 1.0].map(quantile);
    let empty = lengths.partition_point(|&l| l == 0);
    let specials = match m.vocab_sha256.is_some() {
        true => {
            let s = corpus.vocab()?.specials();
            json!({"pad": s.pad, "mask": s.mask, "cls": s.cls, "eos": s.eos})
        }
        false => Value::Null,
    };
    let mut text = format!(
        "corpus {}: {} cells, {} tokens\n  length    mean {mean:.1}, median {}, {} to {}; {empty} empty cells\n  \
         vocabulary {} ids, digest {}\n  special   {specials}\n  values    {}\n  shards    {} ({:.1} MB)\n  digest    {}",
        flags.path.display(),
        m.cells,
        m.tokens,
        median.unwrap_or(0),
        shortest.unwrap_or(0),
        longest.unwrap_or(0),
        m.vocabulary.len,
        m.vocabulary.digest,
        if m.values { "ln(1 + 10,000 · count / total) beside every token" } else { "none: ranks alone" },
        m.shards.len(),
        bytes as f64 / 1e6,
        m.digest
    );
    let mut columns = Vec::new();
    for column in &m.columns {
        columns.push(match column.kind {
            ObsKind::Categorical => categorical(&corpus, &column.name, &mut text)?,
            ObsKind::Numeric => numeric(&corpus, &column.name, &mut text)?,
        });
    }
    let health = if flags.verify {
        "every byte checked"
    } else {
        "header and offsets checked; --verify reads every byte"
    };
    let _ = write!(text, "\n  health    {health}");
    let mut json = json!({
        "kind": "corpus", "path": flags.path, "cells": m.cells, "tokens_total": m.tokens, "mean_tokens": mean,
        "shortest": shortest, "median": median, "longest": longest, "empty": empty, "bytes": bytes, "values": m.values,
        "vocabulary": m.vocabulary, "specials": specials, "columns": columns, "shards": m.shards, "digest": m.digest,
        "provenance": m.provenance, "verified": flags.verify,
    });
    if flags.cells > 0 {
        let shown = flags.cells.min(corpus.cells());
        let tokens = (0..shown).map(|c| Ok(corpus.genes(c)?.to_vec())).collect::<Result<Vec<_>>>()?;
        let ids = (0..shown).map(|c| corpus.cell_id(c)).collect::<Result<Vec<_>>>()?;
        for (id, tokens) in ids.iter().zip(&tokens) {
            let first: Vec<String> = tokens.iter().take(16).map(u32::to_string).collect();
            let more = if tokens.len() > 16 { " …" } else { "" };
            let _ = write!(text, "\n  {id} ({} tokens): {}{more}", tokens.len(), first.join(" "));
        }
        json["cell_ids"] = json!(ids);
        json["tokens"] = json!(tokens);
    }
    Ok(Output { text, json })
}

fn categorical(corpus: &Corpus, name: &str, text: &mut String) -> Result<Value> {
    let column = corpus.categorical(name)?;
    let mut count = vec![0u64; column.categories.len()];
    let mut missing = 0u64;
    for &code in &column.codes {
        match usize::try_from(code) {
            Ok(code) => count[code] += 1,
            Err(_) => missing += 1,
        }
    }
    let mut by_size: Vec<(&String, u64)> = column.categories.iter().zip(count).collect();
    by_size.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let shown: Vec<String> = by_size.iter().take(8).map(|(name, n)| format!("{name} {n}")).collect();
    let more = if by_size.len() > 8 { format!(", {} more", by_size.len() - 8) } else { String::new() };
    let _ = write!(
        text,
        "\n  obs       {name}: {} categories ({}{more}); {missing} missing",
        by_size.len(),
        shown.join(", ")
    );
    let categories: serde_json::Map<String, Value> =
        by_size.into_iter().map(|(name, n)| (name.clone(), n.into())).collect();
    Ok(json!({"name": name, "kind": "categorical", "categories": categories, "missing": missing}))
}

fn numeric(corpus: &Corpus, name: &str, text: &mut String) -> Result<Value> {
    let numbers = corpus.numeric(name)?;
    let known: Vec<f64> = numbers.iter().copied().filter(|x| !x.is_nan()).collect();
    let missing = numbers.len() - known.len();
    let (low, high) =
        known.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
    let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
    let _ = write!(text, "\n  obs       {name}: {low} to {high}, mean {mean:.4}; {missing} missing");
    Ok(json!({"name": name, "kind": "numeric", "min": low, "max": high, "mean": mean, "missing": missing}))
}

fn vocabulary(path: &Path) -> Result<Output> {
    let v = Vocab::load(path)?;
    let s = v.specials();
    let specials = json!({"pad": s.pad, "mask": s.mask, "cls": s.cls, "eos": s.eos});
    let symbols = (0..v.len() as u32).filter(|&t| v.symbol(t).is_some()).count();
    let mut sorted: Vec<f64> = v.medians().iter().copied().filter(|m| *m > 0.0).collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.first().copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0));
    let json = json!({"kind": "vocabulary", "path": path, "tokens": v.len(), "genes": v.genes(), "specials": specials,
        "with_symbol": symbols, "median_min": low, "median_max": high, "digest": v.digest()});
    let text = format!(
        "vocabulary {}: {} tokens, {} genes, {symbols} with a symbol\n  special   {specials}\n  medians   {low} to {high}\n  \
         digest    {}",
        path.display(),
        v.len(),
        v.genes(),
        v.digest()
    );
    Ok(Output { text, json })
}

fn markers(path: &Path) -> Result<Output> {
    let file = MarkerFile::load(path)?;
    let genes: usize = file.sets.iter().map(|s| s.genes.len()).sum();
    let weighted = file.sets.iter().filter(|s| s.genes.iter().all(|(_, w)| w.is_some())).count();
    let mut text = format!(
        "marker file {}: {} sets, {genes} genes, {weighted} sets with weights, {} genes repeated",
        path.display(),
        file.sets.len(),
        file.repeated_genes
    );
    let mut sets = Vec::new();
    for (i, set) in file.sets.iter().enumerate() {
        if i < 20 {
            let first: Vec<&str> = set.genes.iter().take(5).map(|(g, _)| g.as_str()).collect();
            let _ = write!(text, "\n  {}: {} genes ({})", set.name, set.genes.len(), first.join(", "));
        }
        sets.push(json!({"name": set.name, "line": set.line, "genes": set.genes.len()}));
    }
    if sets.len() > 20 {
        let _ = write!(text, "\n  and {} more", sets.len() - 20);
    }
    text += "\n  `cellrefine markers check` looks the genes up in a vocabulary";
    let json = json!({"kind": "markers", "path": path, "genes": genes, "weighted": weighted, "repeated": file.repeated_genes,
        "sets": sets});
    Ok(Output { text, json })
}

fn run_folder(path: &Path) -> Result<Output> {
    let read = |name: &str| std::fs::read_to_string(path.join(name)).ok();
    let metrics = read("metrics.jsonl").unwrap_or_default();
    let last: Value = metrics.lines().rev().find_map(|l| serde_json::from_str(l).ok()).unwrap_or(Value::Null);
    let mut steps: Vec<String> = std::fs::read_dir(path.join("checkpoints"))
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| !n.starts_with('.'))
        .collect();
    steps.sort_by_key(|n| (n.len(), n.clone()));
    let pointer = |name: &str| read(name).map(|t| t.trim().to_string());
    let mut json = json!({"kind": "run", "path": path, "logged_steps": metrics.lines().count(), "last_record": last,
        "checkpoints": steps, "best": pointer("best"), "last": pointer("last"),
        "split": read("split.json").and_then(|t| serde_json::from_str::<Value>(&t).ok())});
    if !steps.is_empty() {
        json["checkpoint"] = checkpoint::describe(path)?;
    }
    Ok(object(json))
}

/// A flat object as `name value` lines; lists and objects in JSON.
fn object(json: Value) -> Output {
    let mut text = String::new();
    for (name, value) in json.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        let _ = writeln!(text, "{name:<20} {value}");
    }
    Output { text, json }
}
