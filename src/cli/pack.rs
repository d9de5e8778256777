//! `cellrefine pack`.

use super::{Global, Output};
use crate::corpus::force_unlock;
use crate::corpus::part::Part;
use crate::error::{Code, Error, Result};
use crate::genes::mapping::SymbolMap;
use crate::genes::vocab::Vocab;
use crate::import::pack::{EmptyCells, PackOptions, PackReport, count_cells, pack};
use std::fmt::Write as _;
use std::path::PathBuf;

/// Flags of `pack`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Ranks follow Geneformer: count / total · 10,000 / median, descending, ties by matrix column. Raw counts are required; a file whose X is \
normalised names the slot that holds counts. Names of cells, obs columns and the order of cells are kept. The share that --min-gene-match \
looks at is matched names / min(names in the file, genes in the vocabulary).

Files:
  .h5ad              AnnData: X, raw or a layer as CSR, CSC or dense
  10x .h5            Cell Ranger's feature matrix, version 2 or 3; Gene Expression alone
  10x MTX folder     matrix.mtx, barcodes.tsv, features.tsv or genes.tsv, each gzip or not
  .dataset folder    Geneformer's tokenised cells (save_to_disk); ids must be of --vocab, columns become obs columns

Examples:
  cellrefine pack cells.h5ad --vocab V.tsv --out cells.cells
  cellrefine pack filtered_feature_bc_matrix --vocab V.tsv --out run1.cells
  cellrefine pack tokenised.dataset --vocab V.tsv --out tokenised.cells
  cellrefine pack a.h5ad b.h5ad --vocab V.tsv --out both.cells --counts raw --obs cell_type donor
  cellrefine pack atlas/*.h5ad --vocab V.tsv --shard $SLURM_ARRAY_TASK_ID/64 --out part-$SLURM_ARRAY_TASK_ID.cells
  cellrefine merge part-*.cells --out atlas.cells")]
pub struct Flags {
    /// Inputs, in the order in which their cells are wanted: .h5ad, 10x .h5, 10x MTX folders, Geneformer .dataset folders.
    #[arg(required = true, value_name = "IN")]
    inputs: Vec<PathBuf>,
    /// Vocabulary, from `vocab build` or `vocab convert`.
    #[arg(long, value_name = "V.tsv")]
    vocab: PathBuf,
    /// The corpus to make; must not exist.
    #[arg(long, value_name = "X.cells")]
    out: PathBuf,
    /// obs columns to keep [default: all numbers, booleans, and labels of at most 1,000 distinct values].
    #[arg(long, value_name = "COL", num_args = 1..)]
    obs: Vec<String>,
    /// Leave out cells: --drop cell_type=Other (may be repeated).
    #[arg(long, value_name = "COL=VALUE", value_parser = parse_pair)]
    drop: Vec<(String, String)>,
    /// var column of gene ids or symbols [default: the one that the vocabulary knows most of].
    #[arg(long, value_name = "COL")]
    genes: Option<String>,
    /// Symbols to Ensembl ids, TSV, plain or gzip.
    #[arg(long, value_name = "FILE")]
    gene_map: Option<PathBuf>,
    /// Slot of the raw counts in an .h5ad file: X, raw or layers/NAME [default: X].
    #[arg(long, value_name = "SLOT")]
    counts: Option<String>,
    /// Genome to take from a 10x file that holds several, such as GRCh38.
    #[arg(long, value_name = "NAME")]
    genome: Option<String>,
    /// Least share of matching genes, 0 to 1.
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    min_gene_match: f64,
    /// Store ln(1 + count / total · 10,000) beside every token.
    #[arg(long)]
    values: bool,
    /// Keep the first N tokens of a cell; 0 = all, batches cut to their model's context.
    #[arg(long, default_value_t = 0, value_name = "N")]
    max_tokens: usize,
    /// Cells without a gene of the vocabulary: skip, error or keep.
    #[arg(long, default_value = "skip", value_name = "WHAT", value_parser = ["skip", "error", "keep"])]
    empty_cells: String,
    /// Rank values that are no integers (never negative ones).
    #[arg(long)]
    allow_non_integer: bool,
    /// Memory to use for blocks and transposition: 512M, 2G, …
    #[arg(long, default_value = "2G", value_name = "SIZE", value_parser = parse_memory)]
    memory: u64,
    /// Cells per shard; 0 = the default.
    #[arg(long, default_value_t = 0, value_name = "N")]
    shard_cells: usize,
    /// Pack one part of N alone, counted from 0, for an array job; `merge` joins the parts.
    #[arg(long, value_name = "I/N", value_parser = Part::parse)]
    shard: Option<Part>,
    /// Take over what a writer that was killed on another host left of this corpus.
    #[arg(long)]
    force_unlock: bool,
}

fn parse_pair(text: &str) -> std::result::Result<(String, String), String> {
    let (column, value) = text.split_once('=').ok_or("give COL=VALUE")?;
    Ok((column.to_string(), value.to_string()))
}

/// A size such as `512M`, `2G`, `1.5GiB` or plain bytes.
pub(super) fn parse_memory(text: &str) -> std::result::Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let number = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match lower[number.len()..].trim_end_matches("ib").trim_end_matches('b') {
        "" => 1.0,
        "k" => 1024.0,
        "m" => 1024.0 * 1024.0,
        "g" => 1024.0 * 1024.0 * 1024.0,
        "t" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("unknown unit {other:?}; give 512M, 2G, …")),
    };
    match number.trim().parse::<f64>() {
        Ok(n) if n * unit >= 16.0 * 1024.0 * 1024.0 && n * unit < 1e18 => Ok((n * unit) as u64),
        Ok(_) => Err("at least 16M".into()),
        Err(_) => Err("a size such as 512M or 2G".into()),
    }
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    if !(0.0..=1.0).contains(&flags.min_gene_match) {
        return Err(Error::new(Code::FlagValue, "--min-gene-match is a share")
            .found(flags.min_gene_match)
            .wanted("0 to 1"));
    }
    if flags.force_unlock {
        force_unlock(&flags.out)?;
    }
    let vocab = Vocab::load(&flags.vocab)?;
    let gene_map = flags.gene_map.as_ref().map(SymbolMap::load).transpose()?;
    let options = PackOptions {
        counts: flags.counts.clone(),
        genome: flags.genome.clone(),
        genes: flags.genes.clone(),
        gene_map: gene_map.as_ref(),
        min_gene_match: flags.min_gene_match,
        obs: flags.obs.clone(),
        drop: flags.drop.clone(),
        values: flags.values,
        max_tokens: flags.max_tokens,
        memory_bytes: flags.memory,
        empty_cells: match flags.empty_cells.as_str() {
            "error" => EmptyCells::Error,
            "keep" => EmptyCells::Keep,
            _ => EmptyCells::Skip,
        },
        allow_non_integer: flags.allow_non_integer,
        shard_cells: flags.shard_cells,
        part: flags.shard,
    };
    let start = std::time::Instant::now();
    let progress = global.progress("packing cells", count_cells(&flags.inputs, &options));
    let outcome = pack(&flags.inputs, &vocab, &flags.out, &options, &progress);
    progress.finish();
    let report = outcome?;
    for file in &report.files {
        let Some(genes) = &file.genes else {
            global.note(format!("{} ({}): token ids taken as they are", file.file, file.counts));
            continue;
        };
        global.note(format!("{} ({}): {}", file.file, file.counts, genes.to_text()));
        if 2 * genes.upper_cased > genes.matched {
            global
                .note("  most symbols matched in upper case only: is this file of the vocabulary's species?");
        }
    }
    report.notes.iter().for_each(|n| global.note(n));
    Ok(output(flags, &report, start.elapsed().as_secs_f64()))
}

fn output(flags: &Flags, report: &PackReport, seconds: f64) -> Output {
    let m = &report.manifest;
    let empty: u64 = report.files.iter().map(|f| f.empty).sum();
    let mean = m.tokens as f64 / (m.cells as f64).max(1.0);
    let mut text = format!(
        "{}: {} cells, {} tokens (mean {mean:.0}), {} obs columns, {} shards",
        flags.out.display(),
        m.cells,
        m.tokens,
        m.columns.len(),
        m.shards.len()
    );
    let dropped: u64 = report.files.iter().map(|f| f.dropped).sum();
    if dropped > 0 {
        let _ = write!(text, "\n{dropped} cells left out by --drop");
    }
    if empty > 0 {
        let what = if flags.empty_cells == "keep" { "kept without tokens" } else { "left out" };
        let _ = write!(text, "\n{empty} cells without a gene of the vocabulary {what}");
    }
    if report.prefixed {
        text.push_str("\ncell names met across inputs: every name has its input's file name in front");
    }
    if report.renamed > 0 {
        let _ = write!(text, "\n{} cell names came again within an input and got a number", report.renamed);
    }
    let peak = crate::bench::peak_memory_bytes();
    let _ = write!(text, "\n{seconds:.2} s");
    if let Some(bytes) = peak {
        let _ = write!(text, ", {} MB of memory at the peak", bytes / 1_000_000);
    }
    let json = serde_json::json!({
        "corpus": flags.out, "cells": m.cells, "tokens": m.tokens, "mean_tokens": mean, "digest": m.digest,
        "vocabulary": m.vocabulary.digest, "shards": m.shards.len(),
        "obs": m.columns.iter().map(|c| &c.name).collect::<Vec<_>>(),
        "empty_cells": empty, "dropped_cells": dropped, "prefixed_names": report.prefixed, "renamed_cells": report.renamed, "files": report.files,
        "notes": report.notes, "seconds": seconds, "peak_memory_bytes": peak,
    });
    Output { text, json }
}
