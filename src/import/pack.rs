//! Files → corpus.
//!
//! Every input is opened twice: first to agree on columns, genes and cell names, so that a wrong flag is reported before any work
//! is done; then to stream it. Blocks of rows are read and ranked by all threads and pushed in order, so the corpus has the same
//! bytes whatever the number of threads. Nothing in it depends on time, machine or folder.
//!
//! Cell names are those of `obs`. If a name occurs in several inputs, all names get the input's file name in front
//! (`pbmc8k:AAACCTG-1`); a name that comes again within one input gets `-1`, `-2`, … behind, as anndata's
//! `obs_names_make_unique` does. Both are said in the report.

use super::frame::{Column, ColumnValues, Frame};
use super::h5ad::{CellSource, H5ad};
use super::matrix::{Pass, RowBlock};
use crate::cli::Progress;
use crate::corpus::format::{Manifest, ObsKind, VocabIdentity};
use crate::corpus::writer::{CellRecord, CorpusOptions, CorpusWriter, ObsSpec, ObsValue};
use crate::error::{Error, Result};
use crate::genes::mapping::{GeneMapping, MappingOptions, MappingReport, SymbolMap, map_genes};
use crate::genes::tokenize::{Scratch, Tokenizer};
use crate::genes::vocab::{Vocab, hex};
use half::f16;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

/// Without `--obs`, a text column is kept up to this many distinct values: more is a name, not a label.
pub const MAX_CATEGORIES: usize = 1_000;
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
    /// Column of gene names; absent = the one with most matches.
    pub genes: Option<String>,
    /// Symbols to Ensembl ids.
    pub gene_map: Option<&'a SymbolMap>,
    /// Least share of matching genes.
    pub min_gene_match: f64,
    /// obs columns to keep; empty = all that are suitable.
    pub obs: Vec<String>,
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
}

impl Default for PackOptions<'_> {
    fn default() -> Self {
        PackOptions {
            counts: None,
            genes: None,
            gene_map: None,
            min_gene_match: 0.5,
            obs: Vec::new(),
            values: false,
            max_tokens: 0,
            memory_bytes: 2 << 30,
            empty_cells: EmptyCells::Skip,
            allow_non_integer: false,
            shard_cells: 0,
        }
    }
}

/// One input, after packing.
#[derive(Debug, Clone, serde::Serialize)]
pub struct FileReport {
    /// Path as given.
    pub file: String,
    /// Its sha256.
    pub sha256: String,
    /// Slot and storage of the counts.
    pub counts: String,
    /// Cells in the file.
    pub cells: u64,
    /// Cells without a gene of the vocabulary.
    pub empty: u64,
    /// Gene mapping.
    pub genes: MappingReport,
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
/// Input for anything wrong in a file (see [`H5ad::open`], [`map_genes`]), a column of `obs` that is absent; nothing is left
/// under `out` then.
pub fn pack(
    inputs: &[PathBuf],
    vocab: &Vocab,
    out: &Path,
    options: &PackOptions<'_>,
    progress: &Progress,
) -> Result<PackReport> {
    let plan = Plan::new(inputs, vocab, options)?;
    let sources: Vec<serde_json::Value> = plan
        .files
        .iter()
        .map(|f| {
            let name = Path::new(&f.file).file_name().map_or_else(|| f.file.clone(), |n| n.to_string_lossy().into_owned());
            serde_json::json!({"file": name, "sha256": f.sha256, "counts": f.counts, "cells": f.cells, "genes": f.genes})
        })
        .collect();
    let provenance = serde_json::json!({
        "program": concat!("cellrefine ", env!("CARGO_PKG_VERSION")),
        "sources": sources,
        "options": {"values": options.values, "max_tokens": options.max_tokens, "min_gene_match": options.min_gene_match,
            "empty_cells": format!("{:?}", options.empty_cells).to_lowercase(), "allow_non_integer": options.allow_non_integer},
    });
    let mut writer = CorpusWriter::create(
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
    let pass =
        Pass { memory_bytes: options.memory_bytes, allow_non_integer: options.allow_non_integer, scratch };
    let mut names = Names::new(&plan);
    let mut files = plan.files.clone();
    for (n, path) in inputs.iter().enumerate() {
        let source = open(path, options)?;
        let mapping = map(&source, vocab, options)?;
        let tokenizer = Tokenizer::new(&mapping.token, vocab, options.max_tokens);
        names.file = n;
        let mut empty = 0;
        source.for_each_block(&pass, &mut |block| {
            let ranked = rank(block, &tokenizer, options.values);
            empty += push(&mut writer, block, &ranked, source.obs(), &plan.obs, &mut names, options)?;
            progress.add(block.rows() as u64);
            Ok(())
        })?;
        files[n].empty = empty;
    }
    let renamed = names.renamed;
    Ok(PackReport { manifest: writer.finish()?, files, prefixed: plan.prefixed, renamed, notes: plan.notes })
}

/// Total cells of the inputs, for a progress bar; does not check them.
pub fn count_cells(inputs: &[PathBuf], options: &PackOptions<'_>) -> Option<u64> {
    inputs.iter().map(|p| open(p, options).ok().map(|s| s.cells())).sum()
}

fn open(path: &Path, options: &PackOptions<'_>) -> Result<H5ad> {
    H5ad::open(path, options.counts.as_deref(), options.allow_non_integer)
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
}

impl Plan {
    fn new(inputs: &[PathBuf], vocab: &Vocab, options: &PackOptions<'_>) -> Result<Plan> {
        if inputs.is_empty() {
            return Err(Error::usage("no input files"));
        }
        let digests: Vec<Result<String>> = inputs.par_iter().map(|p| sha256(p)).collect();
        let mut plan = Plan {
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
            if let Some(first) = seen.insert(digest.clone(), path) {
                return Err(Error::usage("an input is given twice")
                    .at(path.display())
                    .found(format!("the same bytes as {}", first.display()))
                    .next("leave one out: the same cells in two splits would spoil every score"));
            }
            let genes = map(&source, vocab, options)?.report;
            plan.files.push(FileReport {
                file: path.display().to_string(),
                sha256: digest,
                counts: source.describe(),
                cells: source.cells(),
                empty: 0,
                genes,
            });
            columns.add(source.obs(), &options.obs)?;
            let (own, repeated) = name_hashes(source.obs())?;
            names.extend(own);
            plan.repeated.push(repeated);
        }
        (plan.obs, plan.notes) = columns.finish();
        names.par_sort_unstable();
        plan.prefixed = names.windows(2).any(|w| w[0] == w[1]);
        let stems: Vec<String> = inputs
            .iter()
            .map(|p| p.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned()))
            .collect();
        plan.prefixes = (0..stems.len())
            .map(|n| {
                let shared = stems.iter().filter(|s| **s == stems[n]).count() > 1;
                if shared { format!("{}.{}", stems[n], n + 1) } else { stems[n].clone() }
            })
            .collect();
        Ok(plan)
    }
}

/// Distinct name hashes of one input, and those that come more than once; both sorted.
fn name_hashes(obs: &Frame) -> Result<(Vec<u64>, Vec<u64>)> {
    let mut all = Vec::new();
    for (start, rows) in obs.windows() {
        all.extend(obs.read_texts(obs.index(), start, rows)?.iter().map(|name| name_hash(name)));
    }
    all.par_sort_unstable();
    let mut repeated: Vec<u64> = all.windows(2).filter(|w| w[0] == w[1]).map(|w| w[0]).collect();
    repeated.dedup();
    all.dedup();
    Ok((all, repeated))
}

fn name_hash(name: &str) -> u64 {
    // SipHash with fixed keys: the same in every run.
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// Gives cells their final names.
struct Names<'a> {
    plan: &'a Plan,
    file: usize,
    /// How often a repeated name has come, per (input, name).
    times: HashMap<(usize, String), u64>,
    renamed: u64,
}

impl<'a> Names<'a> {
    fn new(plan: &'a Plan) -> Self {
        Names { plan, file: 0, times: HashMap::new(), renamed: 0 }
    }

    fn unique(&mut self, name: String) -> String {
        let mut unique = name;
        if self.plan.repeated[self.file].binary_search(&name_hash(&unique)).is_ok() {
            let times = self.times.entry((self.file, unique.clone())).or_insert(0);
            if *times > 0 {
                unique = format!("{unique}-{times}");
                self.renamed += 1;
            }
            *times += 1;
        }
        if self.plan.prefixed { format!("{}:{unique}", self.plan.prefixes[self.file]) } else { unique }
    }
}

/// The obs columns that all inputs agree on.
#[derive(Default)]
struct ObsChoice {
    specs: Vec<ObsSpec>,
    /// Columns left out, with the reason.
    left_out: Vec<(String, String)>,
}

impl ObsChoice {
    fn add(&mut self, obs: &Frame, wanted: &[String]) -> Result<()> {
        if !wanted.is_empty() {
            for name in wanted {
                let column = obs.column(name).map_err(|e| {
                    e.next("name one of these with --obs, or leave --obs out to keep all suitable ones")
                })?;
                let kind = kind_of(column);
                match self.specs.iter().find(|s| s.name == *name) {
                    Some(spec) if spec.kind != kind => {
                        return Err(Error::input(format!(
                            "column {name:?} is {kind:?} here and {:?} in an earlier input",
                            spec.kind
                        ))
                        .at(column.place())
                        .wanted("one kind of values in all inputs")
                        .next("store it as strings (or numbers) in all files, or leave it out of --obs"));
                    }
                    Some(_) => {}
                    None => self.specs.push(ObsSpec { name: name.clone(), kind }),
                }
            }
            return Ok(());
        }
        for column in obs.columns() {
            match unsuitable(obs, column)? {
                Some(why) => self.leave_out(&column.name, why),
                None => {
                    let kind = kind_of(column);
                    match self.specs.iter().find(|s| s.name == column.name) {
                        Some(spec) if spec.kind != kind => {
                            self.leave_out(&column.name, "numbers in one input and names in another".into())
                        }
                        Some(_) => {}
                        None => self.specs.push(ObsSpec { name: column.name.clone(), kind }),
                    }
                }
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, name: &str, why: String) {
        if self.left_out.iter().all(|(n, _)| n != name) {
            self.left_out.push((name.to_string(), why));
        }
    }

    fn finish(mut self) -> (Vec<ObsSpec>, Vec<String>) {
        self.specs.retain(|s| self.left_out.iter().all(|(n, _)| *n != s.name));
        let notes = self.left_out.into_iter().map(|(name, why)| format!("obs column {name} left out: {why}"));
        (self.specs, notes.collect())
    }
}

fn kind_of(column: &Column) -> ObsKind {
    if column.is_number() { ObsKind::Numeric } else { ObsKind::Categorical }
}

/// Why a column is not kept unless asked for.
fn unsuitable(obs: &Frame, column: &Column) -> Result<Option<String>> {
    if !column.is_readable() {
        return Ok(Some("it cannot be read".into()));
    }
    let too_many = |n: usize| {
        format!("more than {MAX_CATEGORIES} distinct values ({n}); --obs {} keeps it", column.name)
    };
    if let Some(names) = column.categories() {
        return Ok((names.len() > MAX_CATEGORIES).then(|| too_many(names.len())));
    }
    if column.is_text() {
        let mut distinct = std::collections::HashSet::new();
        for (start, rows) in obs.windows() {
            distinct.extend(obs.read_texts(column, start, rows)?);
            if distinct.len() > MAX_CATEGORIES {
                return Ok(Some(too_many(distinct.len())));
            }
        }
    }
    Ok(None)
}

/// Some consecutive cells, ranked.
struct Ranked {
    gene: Vec<u32>,
    value: Vec<f16>,
    /// End of each cell in `gene`.
    end: Vec<usize>,
    total: Vec<f32>,
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

/// Pushes the cells of a block in order; returns how many had no tokens.
fn push(
    writer: &mut CorpusWriter,
    block: &RowBlock,
    ranked: &[Ranked],
    obs: &Frame,
    specs: &[ObsSpec],
    names: &mut Names<'_>,
    options: &PackOptions<'_>,
) -> Result<u64> {
    let (first, rows) = (block.first, block.rows() as u64);
    let cell_names = obs.read_texts(obs.index(), first, rows)?;
    // A column that this input lacks is missing for all its cells.
    let columns: Vec<Option<(&Column, ColumnValues)>> = specs
        .iter()
        .map(|s| match obs.columns().iter().find(|c| c.name == s.name) {
            Some(column) => Ok(Some((column, obs.read(column, first, rows)?))),
            None => Ok(None),
        })
        .collect::<Result<_>>()?;
    let mut empty = 0;
    let mut row = 0usize;
    let mut values: Vec<ObsValue<'_>> = Vec::with_capacity(specs.len());
    for part in ranked {
        let mut from = 0;
        for (&end, &total) in part.end.iter().zip(&part.total) {
            let cell = std::mem::replace(&mut from, end)..end;
            let name = names.unique(cell_names[row].clone());
            if cell.is_empty() {
                empty += 1;
                if options.empty_cells == EmptyCells::Error {
                    return Err(Error::input("a cell has no gene of the vocabulary")
                        .at(format!("{}, row {} (from 0), cell {name}", obs.place(), first + row as u64))
                        .found(format!("a total count of {total}"))
                        .next("--empty-cells skip leaves such cells out, and counts them"));
                }
            }
            if !cell.is_empty() || options.empty_cells == EmptyCells::Keep {
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
                writer.push(&CellRecord {
                    id: &name,
                    gene: &part.gene[cell.clone()],
                    value: options.values.then(|| &part.value[cell]),
                    total_count: total,
                    obs: &values,
                })?;
            }
            row += 1;
        }
    }
    Ok(empty)
}

/// sha256 of a file, hexadecimal.
fn sha256(path: &Path) -> Result<String> {
    use std::io::Read;
    let fail = |e: std::io::Error| Error::io(path, "read the file", &e);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let n = file.read(&mut buffer).map_err(fail)?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}
