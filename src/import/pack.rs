//! Files → corpus.
//!
//! Every input is opened twice: first to agree on columns, genes and cell names, so that a wrong flag is reported before any work
//! is done; then to stream it. Blocks of rows are read and ranked by all threads and pushed in order, so the corpus has the same
//! bytes whatever the number of threads. Nothing in it depends on time, machine or folder.

mod plan;
mod sink;

use super::matrix::Pass;
use super::names::Names;
use super::source::{CellSource, OpenOptions, Source};
use crate::cli::Progress;
use crate::corpus::format::{Manifest, VocabIdentity};
use crate::corpus::part::{Part, PartRecord};
use crate::corpus::writer::{CorpusOptions, CorpusWriter};
use crate::error::{Code, Error, Result};
use crate::genes::mapping::{GeneMapping, MappingOptions, MappingReport, SymbolMap, map_genes};
use crate::genes::tokenize::Tokenizer;
use crate::genes::vocab::Vocab;
use plan::Plan;
use sink::{Ranked, Sink, rank};
use std::path::{Path, PathBuf};

/// What to do with a cell that has no gene of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptyCells {
    /// Leave it out and count it.
    Skip,
    /// Stop.
    Error,
    /// Keep it, with no tokens.
    Keep,
}

/// Options of [`pack`].
#[derive(Debug, Clone)]
pub struct PackOptions<'a> {
    /// `X`, `raw` or `layers/NAME`; absent = `X`.
    pub counts: Option<String>,
    /// The genome to take from a 10x file that holds several.
    pub genome: Option<String>,
    /// Column of gene names; absent = the one with most matches.
    pub genes: Option<String>,
    /// Symbols to Ensembl ids.
    pub gene_map: Option<&'a SymbolMap>,
    /// Least share of matching genes.
    pub min_gene_match: f64,
    /// obs columns to keep; empty = all that are suitable.
    pub obs: Vec<String>,
    /// Leave out cells with this value in this obs column, such as (`cell_type`, `Other`).
    pub drop: Vec<(String, String)>,
    /// Store an expression value per token.
    pub values: bool,
    /// Tokens kept per cell; 0 = all.
    pub max_tokens: usize,
    /// Memory that may be used, in bytes.
    pub memory_bytes: u64,
    /// Cells without tokens.
    pub empty_cells: EmptyCells,
    /// Rank values that are no integers.
    pub allow_non_integer: bool,
    /// Cells per shard; 0 = the default.
    pub shard_cells: usize,
    /// Only this part of the cells, to be merged with the others.
    pub part: Option<Part>,
}

impl PackOptions<'_> {
    fn shard_cells(&self) -> usize {
        if self.shard_cells == 0 { CorpusOptions::SHARD_CELLS } else { self.shard_cells }
    }
}

impl Default for PackOptions<'_> {
    fn default() -> Self {
        PackOptions {
            counts: None,
            genome: None,
            genes: None,
            gene_map: None,
            min_gene_match: 0.5,
            obs: Vec::new(),
            drop: Vec::new(),
            values: false,
            max_tokens: 0,
            memory_bytes: 2 << 30,
            empty_cells: EmptyCells::Skip,
            allow_non_integer: false,
            shard_cells: 0,
            part: None,
        }
    }
}

/// One input, after packing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct FileReport {
    /// Path as given.
    pub file: String,
    /// Its sha256; absent where this part takes no cell from it.
    pub sha256: Option<String>,
    /// Slot and storage of the counts.
    pub counts: String,
    /// Cells in the file.
    pub cells: u64,
    /// Cells without a gene of the vocabulary.
    pub empty: u64,
    /// Cells left out by [`PackOptions::drop`].
    pub dropped: u64,
    /// Gene mapping; absent where the input holds token ids.
    pub genes: Option<MappingReport>,
}

/// What [`pack`] did.
#[derive(Debug)]
pub struct PackReport {
    /// The corpus.
    pub manifest: Manifest,
    /// One entry per input.
    pub files: Vec<FileReport>,
    /// Did names meet across inputs, so that file names stand in front?
    pub prefixed: bool,
    /// Names that came again within an input and got a number.
    pub renamed: u64,
    /// Lines for people about columns left out.
    pub notes: Vec<String>,
}

/// Packs `inputs`, in order, into a corpus at `out`.
///
/// # Errors
/// Input for anything wrong in a file (see [`Source::open`], [`map_genes`]), a column of `obs` that is absent; nothing is left
/// under `out` then.
pub fn pack(
    inputs: &[PathBuf],
    vocab: &Vocab,
    out: &Path,
    options: &PackOptions<'_>,
    progress: &Progress,
) -> Result<PackReport> {
    // The writer refuses this too, but only after every input was read once.
    if out.exists() {
        return Err(Error::new(Code::OutputExists, "the output exists already")
            .at(out.display())
            .next("name another --out, or remove the folder"));
    }
    let plan = Plan::new(inputs, vocab, options)?;
    let sources: Vec<serde_json::Value> = plan
        .files
        .iter()
        .map(|f| {
            let name = Path::new(&f.file).file_name().map_or_else(|| f.file.clone(), |n| n.to_string_lossy().into_owned());
            serde_json::json!({"file": name, "sha256": f.sha256, "counts": f.counts, "cells": f.cells, "genes": f.genes})
        })
        .collect();
    let mut provenance = serde_json::json!({
        "program": concat!("cellrefine ", env!("CARGO_PKG_VERSION")),
        "sources": sources,
        "options": {"values": options.values, "max_tokens": options.max_tokens, "min_gene_match": options.min_gene_match,
            "drop": options.drop, "empty_cells": format!("{:?}", options.empty_cells).to_lowercase(), "allow_non_integer": options.allow_non_integer},
    });
    if let Some(part) = options.part {
        let record = PartRecord { part, job: plan.job(vocab, options, &provenance["options"])? };
        provenance["part"] = serde_json::to_value(record).map_err(|e| Error::bug(e.to_string()))?;
    }
    let left_behind = unfinished(out);
    let writer = CorpusWriter::create(
        out,
        CorpusOptions {
            vocab: VocabIdentity { digest: vocab.digest().to_string(), len: vocab.len() },
            vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
            values: options.values,
            shard_cells: options.shard_cells,
            obs: plan.obs.clone(),
            provenance,
        },
    )?;
    let scratch = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let names = Names::new(plan.repeated, plan.prefixed.then_some(plan.prefixes));
    let mut sink = Sink {
        writer,
        names,
        specs: &plan.obs,
        options,
        drop_hits: vec![0; options.drop.len()],
        wanted: 0..0,
    };
    let mut files = plan.files;
    for (n, (path, report)) in inputs.iter().zip(&mut files).enumerate() {
        sink.wanted = plan.wanted[n].clone();
        if sink.wanted.is_empty() {
            continue;
        }
        let pass = Pass {
            memory_bytes: options.memory_bytes,
            allow_non_integer: options.allow_non_integer,
            scratch,
            rows: (sink.wanted.start, sink.wanted.end),
        };
        sink.names.enter(n);
        match open(path, options)? {
            Source::Counts(source) => {
                sink.skip_names(source.obs())?;
                let mapping = map(source.as_ref(), vocab, options)?;
                let tokenizer = Tokenizer::new(&mapping.token, vocab, options.max_tokens);
                source.for_each_block(&pass, &mut |block| {
                    if !sink.wants(block.first, block.rows()) {
                        return Ok(());
                    }
                    let ranked = rank(block, &tokenizer, options.values);
                    sink.push(block.first, &ranked, source.obs(), report)?;
                    progress.add(block.rows() as u64);
                    Ok(())
                })?;
            }
            Source::Tokens(source) => {
                sink.skip_names(source.obs())?;
                source.for_each_block(vocab, options.max_tokens, &pass, &mut |block| {
                    if !sink.wants(block.first, block.end.len()) {
                        return Ok(());
                    }
                    sink.push(block.first, &[Ranked::of(block)], source.obs(), report)?;
                    progress.add(block.end.len() as u64);
                    Ok(())
                })?;
            }
        }
    }
    let mut notes = plan.notes;
    notes.extend(left_behind);
    for ((column, value), _) in options.drop.iter().zip(&sink.drop_hits).filter(|(_, hits)| **hits == 0) {
        notes.push(format!("no cell has {column}={value}: nothing to leave out"));
    }
    let renamed = sink.names.renamed();
    Ok(PackReport { manifest: sink.writer.finish()?, files, prefixed: plan.prefixed, renamed, notes })
}

/// A line about the corpus that a stopped run left unfinished at `out`, which is started again from its first cell.
fn unfinished(out: &Path) -> Option<String> {
    let hidden = out.with_file_name(format!(".{}.partial", out.file_name()?.to_string_lossy()));
    let shards = std::fs::read_dir(hidden).ok()?.flatten();
    let done = shards.filter(|e| e.file_name().to_string_lossy().starts_with("shard-")).count();
    Some(format!(
        "incomplete corpus {}: an earlier run was stopped after {done} shards; it was started again",
        out.display()
    ))
}

/// Total cells of the inputs, for a progress bar; does not check them.
pub fn count_cells(inputs: &[PathBuf], options: &PackOptions<'_>) -> Option<u64> {
    inputs.iter().map(|p| open(p, options).ok().map(|s| s.cells())).sum()
}

fn open(path: &Path, options: &PackOptions<'_>) -> Result<Source> {
    let open = OpenOptions {
        counts: options.counts.as_deref(),
        genome: options.genome.as_deref(),
        allow_non_integer: options.allow_non_integer,
    };
    Source::open(path, &open)
}

fn map(source: &dyn CellSource, vocab: &Vocab, options: &PackOptions<'_>) -> Result<GeneMapping> {
    let mapping = MappingOptions {
        column: options.genes.as_deref(),
        symbols: options.gene_map,
        min_match: options.min_gene_match,
    };
    map_genes(&source.gene_names()?, vocab, mapping, source.gene_place())
}
