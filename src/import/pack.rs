//! Files → corpus.
//!
//! Every input is opened twice: first to agree on columns, genes and cell names, so that a wrong flag is reported before any work
//! is done; then to stream it. Blocks of rows are read and ranked by all threads and pushed in order, so the corpus has the same
//! bytes whatever the number of threads. Nothing in it depends on time, machine or folder.

use super::frame::{Column, ColumnValues, Frame};
use super::hf_dataset::TokenBlock;
use super::matrix::{Pass, RowBlock};
use super::names::{Names, name_hashes};
use super::obs_choice::ObsChoice;
use super::source::{CellSource, OpenOptions, Source, digest, stem};
use crate::cli::Progress;
use crate::corpus::format::{Manifest, VocabIdentity};
use crate::corpus::part::{Part, PartRecord, within};
use crate::corpus::writer::{CellRecord, CorpusOptions, CorpusWriter, ObsSpec, ObsValue};
use crate::digest::sha256;
use crate::error::{Code, Error, Result};
use crate::genes::mapping::{GeneMapping, MappingOptions, MappingReport, SymbolMap, map_genes};
use crate::genes::tokenize::{Scratch, Tokenizer};
use crate::genes::vocab::Vocab;
use half::f16;
use rayon::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Rows ranked by one task.
const ROWS_PER_TASK: usize = 64;

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

/// What all inputs agree on.
struct Plan {
    files: Vec<FileReport>,
    obs: Vec<ObsSpec>,
    /// Hashes of names that come more than once within an input, per input; sorted.
    repeated: Vec<Vec<u64>>,
    /// What stands in front of names, per input, if anything does.
    prefixes: Vec<String>,
    prefixed: bool,
    notes: Vec<String>,
    /// Rows to take, per input.
    wanted: Vec<Range<u64>>,
}

impl Plan {
    fn new(inputs: &[PathBuf], vocab: &Vocab, options: &PackOptions<'_>) -> Result<Plan> {
        if inputs.is_empty() {
            return Err(Error::new(Code::NoInputs, "no input files"));
        }
        let counts: Vec<u64> =
            inputs.iter().map(|p| open(p, options).map(|s| s.cells())).collect::<Result<_>>()?;
        let all = 0..counts.iter().sum::<u64>();
        let rows = match options.part {
            Some(part) => part.rows(all.end, options.shard_cells() as u64)?,
            None => all,
        };
        let mut first = 0;
        let wanted: Vec<Range<u64>> = counts
            .iter()
            .map(|&n| {
                let own = within(&rows, first, n);
                first += n;
                own
            })
            .collect();
        // An input that no cell is taken from is another part's to read.
        let digests: Vec<Result<Option<String>>> = inputs
            .par_iter()
            .zip(&wanted)
            .map(|(p, w)| if w.is_empty() && options.part.is_some() { Ok(None) } else { digest(p).map(Some) })
            .collect();
        let mut plan = Plan {
            wanted,
            files: Vec::new(),
            obs: Vec::new(),
            repeated: Vec::new(),
            prefixes: Vec::new(),
            prefixed: false,
            notes: Vec::new(),
        };
        let mut seen: HashMap<String, &PathBuf> = HashMap::new();
        let mut names: Vec<u64> = Vec::new();
        let mut columns = ObsChoice::default();
        for (path, digest) in inputs.iter().zip(digests) {
            let source = open(path, options)?;
            let digest = digest?;
            if let Some(digest) = &digest
                && let Some(first) = seen.insert(digest.clone(), path)
            {
                return Err(Error::new(Code::InputTwice, "an input is given twice")
                    .at(path.display())
                    .found(format!("the same bytes as {}", first.display()))
                    .next("leave one out: the same cells in two splits would spoil every score"));
            }
            let genes = match &source {
                Source::Counts(source) => Some(map(source.as_ref(), vocab, options)?.report),
                Source::Tokens(source) => {
                    if options.values {
                        return Err(Error::new(
                            Code::FlagConflict,
                            "--values needs counts, and a tokenised data set has none",
                        )
                        .at(path.display())
                        .next("leave --values out, or pack the file that the data set was made from"));
                    }
                    source.check_vocabulary(vocab)?;
                    None
                }
            };
            plan.files.push(FileReport {
                file: path.display().to_string(),
                sha256: digest,
                counts: source.describe(),
                cells: source.cells(),
                empty: 0,
                dropped: 0,
                genes,
            });
            columns.add(source.obs(), &options.obs)?;
            for (column, _) in &options.drop {
                source.obs().column(column)?;
            }
            let (own, repeated) = name_hashes(source.obs())?;
            names.extend(own);
            plan.repeated.push(repeated);
        }
        (plan.obs, plan.notes) = columns.finish();
        names.par_sort_unstable();
        plan.prefixed = names.windows(2).any(|w| w[0] == w[1]);
        let stems: Vec<String> = inputs.iter().map(|p| stem(p)).collect();
        plan.prefixes = (0..stems.len())
            .map(|n| {
                let shared = stems.iter().filter(|s| **s == stems[n]).count() > 1;
                if shared { format!("{}.{}", stems[n], n + 1) } else { stems[n].clone() }
            })
            .collect();
        Ok(plan)
    }

    /// What all parts of one corpus have in common, digested.
    fn job(&self, vocab: &Vocab, options: &PackOptions<'_>, written: &serde_json::Value) -> Result<String> {
        let file = |f: &FileReport| {
            let path = Path::new(&f.file);
            let bytes =
                std::fs::metadata(path).map(|m| m.len()).map_err(|e| Error::io(path, "read the size", &e))?;
            Ok(serde_json::json!([
                path.file_name().map(|n| n.to_string_lossy()),
                bytes,
                f.cells,
                f.counts,
                f.genes
            ]))
        };
        let files = self.files.iter().map(file).collect::<Result<Vec<_>>>()?;
        let obs: Vec<_> = self.obs.iter().map(|o| serde_json::json!([o.name, o.kind])).collect();
        let job =
            serde_json::json!([vocab.digest(), files, obs, written, options.shard_cells(), self.prefixed]);
        Ok(sha256(job.to_string()))
    }
}

/// Some consecutive cells, ranked.
struct Ranked {
    gene: Vec<u32>,
    value: Vec<f16>,
    /// End of each cell in `gene`.
    end: Vec<usize>,
    total: Vec<f32>,
}

impl Ranked {
    /// Cells that were ranked before.
    fn of(block: &TokenBlock) -> Ranked {
        Ranked {
            gene: block.gene.clone(),
            value: Vec::new(),
            end: block.end.clone(),
            total: block.total.clone(),
        }
    }
}

fn rank(block: &RowBlock, tokenizer: &Tokenizer, values: bool) -> Vec<Ranked> {
    let tasks = block.rows().div_ceil(ROWS_PER_TASK);
    let one = |scratch: &mut Scratch, task: usize| {
        let rows = task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(block.rows());
        let entries = block.start[rows.end] - block.start[rows.start];
        let mut out = Ranked {
            gene: Vec::with_capacity(entries),
            value: Vec::with_capacity(if values { entries } else { 0 }),
            end: Vec::with_capacity(rows.len()),
            total: Vec::with_capacity(rows.len()),
        };
        for row in rows {
            let (columns, counts) = block.row(row);
            let total: f64 = counts.iter().sum();
            tokenizer.rank(columns, counts, total, scratch, &mut out.gene, values.then_some(&mut out.value));
            out.end.push(out.gene.len());
            out.total.push(total as f32);
        }
        out
    };
    (0..tasks).into_par_iter().map_init(Scratch::default, |scratch, task| one(scratch, task)).collect()
}

/// Where ranked cells go, in order.
struct Sink<'a> {
    writer: CorpusWriter,
    names: Names,
    specs: &'a [ObsSpec],
    options: &'a PackOptions<'a>,
    /// Cells that each drop rule took.
    drop_hits: Vec<u64>,
    /// Rows of the present input to take.
    wanted: Range<u64>,
}

impl Sink<'_> {
    /// Is one of these rows to be taken?
    fn wants(&self, first: u64, rows: usize) -> bool {
        first < self.wanted.end && first + rows as u64 > self.wanted.start
    }

    /// Counts the names of the rows before the wanted ones, so that names that come again get the numbers that they would have
    /// in one run over everything.
    fn skip_names(&mut self, obs: &Frame) -> Result<()> {
        for (start, rows) in obs.windows() {
            let rows = rows.min(self.wanted.start.saturating_sub(start));
            if rows > 0 {
                for name in obs.read_texts(obs.index(), start, rows)? {
                    self.names.pass_over(&name);
                }
            }
        }
        Ok(())
    }

    /// Pushes the cells of a block, `first` the first of them, in order; counts in `report` those without tokens and those left out.
    fn push(&mut self, first: u64, ranked: &[Ranked], obs: &Frame, report: &mut FileReport) -> Result<()> {
        let rows = ranked.iter().map(|part| part.end.len() as u64).sum();
        let cell_names = obs.read_texts(obs.index(), first, rows)?;
        // A column that this input lacks is missing for all its cells.
        let columns: Vec<Option<(&Column, ColumnValues)>> = self
            .specs
            .iter()
            .map(|s| match obs.columns().iter().find(|c| c.name == s.name) {
                Some(column) => Ok(Some((column, obs.read(column, first, rows)?))),
                None => Ok(None),
            })
            .collect::<Result<_>>()?;
        let drops = self
            .options
            .drop
            .iter()
            .map(|(column, _)| obs.read_texts(obs.column(column)?, first, rows))
            .collect::<Result<Vec<_>>>()?;
        let mut row = 0usize;
        let mut values: Vec<ObsValue<'_>> = Vec::with_capacity(self.specs.len());
        for part in ranked {
            let mut from = 0;
            for (&end, &total) in part.end.iter().zip(&part.total) {
                let cell = std::mem::replace(&mut from, end)..end;
                if !self.wanted.contains(&(first + row as u64)) {
                    row += 1;
                    continue;
                }
                let name = self.names.unique(&cell_names[row]);
                let dropped =
                    self.options.drop.iter().zip(&drops).position(|((_, value), texts)| texts[row] == *value);
                if let Some(rule) = dropped {
                    self.drop_hits[rule] += 1;
                    report.dropped += 1;
                    row += 1;
                    continue;
                }
                if cell.is_empty() {
                    report.empty += 1;
                    if self.options.empty_cells == EmptyCells::Error {
                        return Err(Error::new(Code::EmptyCell, "a cell has no gene of the vocabulary")
                            .at(format!("{}, row {} (from 0), cell {name}", obs.place(), first + row as u64))
                            .found(format!("a total count of {total}"))
                            .next("--empty-cells skip leaves such cells out, and counts them"));
                    }
                }
                if !cell.is_empty() || self.options.empty_cells == EmptyCells::Keep {
                    values.clear();
                    values.extend(columns.iter().map(|column| match column {
                        None => ObsValue::Missing,
                        Some((_, ColumnValues::Number(v))) if v[row].is_nan() => ObsValue::Missing,
                        Some((_, ColumnValues::Number(v))) => ObsValue::Number(v[row]),
                        Some((_, ColumnValues::Text(v))) if v[row].is_empty() => ObsValue::Missing,
                        Some((_, ColumnValues::Text(v))) => ObsValue::Category(&v[row]),
                        Some((column, ColumnValues::Codes(v))) => match usize::try_from(v[row]) {
                            Ok(code) => match column.categories().and_then(|names| names.get(code)) {
                                Some(name) if !name.is_empty() => ObsValue::Category(name),
                                _ => ObsValue::Missing,
                            },
                            Err(_) => ObsValue::Missing,
                        },
                    }));
                    self.writer.push(&CellRecord {
                        id: &name,
                        gene: &part.gene[cell.clone()],
                        value: self.options.values.then(|| &part.value[cell]),
                        total_count: total,
                        obs: &values,
                    })?;
                }
                row += 1;
            }
        }
        Ok(())
    }
}
