//! `cellrefine vocab`.

use super::{Global, Output};
use crate::error::{Error, Result};
use crate::genes::dictionary::convert;
use crate::genes::mapping::SymbolMap;
use crate::genes::vocab::Vocab;
use crate::import::medians::{BuildOptions, build};
use serde_json::json;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Flags of `vocab`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cellrefine vocab build cells.h5ad --out V.tsv
  cellrefine vocab convert token_dictionary.pkl gene_median_dictionary.pkl --symbols symbols.tsv.gz --out V.tsv")]
pub struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// From data: the genes of the inputs and the exact non-zero median of each.
    #[command(after_help = "\
A gene's median is taken over the cells that have it, of counts scaled to 10,000 per cell. Genes without a count get no token. Tokens are \
Ensembl ids where a column of var holds them; symbols beside them are kept.

Examples:
  cellrefine vocab build cells.h5ad --out V.tsv
  cellrefine vocab build filtered_feature_bc_matrix.h5 --out V.tsv
  cellrefine vocab build a.h5ad b.h5ad --counts raw --min-cells 10 --out V.tsv")]
    Build(Build),
    /// From Geneformer's token dictionary and medians (TSV, JSON or pickle), or symbols added to a vocabulary.
    #[command(after_help = "\
Ids and special tokens are the dictionary's own. Pickles are read without executing anything.

Examples:
  cellrefine vocab convert token_dictionary.pkl gene_median_dictionary.pkl --out V.tsv
  cellrefine vocab convert V.tsv --symbols symbols.tsv.gz --out V-with-symbols.tsv")]
    Convert(Convert),
}

#[derive(Debug, clap::Args)]
struct Build {
    /// Inputs: .h5ad, 10x .h5, 10x MTX folders.
    #[arg(required = true, value_name = "IN")]
    inputs: Vec<PathBuf>,
    /// The vocabulary to write.
    #[arg(long, value_name = "V.tsv")]
    out: PathBuf,
    /// var column of gene ids [default: the one of Ensembl ids, or else the index].
    #[arg(long, value_name = "COL")]
    genes: Option<String>,
    /// Slot of the raw counts in an .h5ad file: X, raw or layers/NAME [default: X].
    #[arg(long, value_name = "SLOT")]
    counts: Option<String>,
    /// Genome to take from a 10x file that holds several, such as GRCh38.
    #[arg(long, value_name = "NAME")]
    genome: Option<String>,
    /// Text file of cell names, one a line: medians from these cells alone, such as the training part.
    #[arg(long, value_name = "FILE")]
    cells: Option<PathBuf>,
    /// Special tokens: v1 = pad, mask; v2 = pad, mask, cls, eos.
    #[arg(long, default_value = "v2", value_name = "SET", value_parser = ["v1", "v2"])]
    specials: String,
    /// Symbols to add, TSV of symbol and Ensembl id, plain or gzip.
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Genes seen in fewer cells get no token.
    #[arg(long, default_value_t = 1, value_name = "N")]
    min_cells: u64,
    /// Accept values that are no integers (never negative ones).
    #[arg(long)]
    allow_non_integer: bool,
    /// Memory to use: 512M, 2G, … Less means more passes over the inputs, never another result.
    #[arg(long, default_value = "2G", value_name = "SIZE", value_parser = super::pack::parse_memory)]
    memory: u64,
}

#[derive(Debug, clap::Args)]
struct Convert {
    /// Token dictionary: token → id.
    tokens: PathBuf,
    /// Medians: gene → non-zero median [default: 1 for every gene].
    medians: Option<PathBuf>,
    /// The vocabulary to write.
    #[arg(long, value_name = "V.tsv")]
    out: PathBuf,
    /// Symbols to add: TSV of symbol and Ensembl id (plain or gzip), or a dictionary of them (JSON, pickle).
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
}

pub fn run(_global: &Global, flags: &Flags) -> Result<Output> {
    match &flags.command {
        Command::Build(f) => run_build(f),
        Command::Convert(f) => {
            let converted = convert(&f.tokens, f.medians.as_deref(), f.symbols.as_deref())?;
            converted.vocab.save(&f.out, &[])?;
            Ok(output(&f.out, &converted.vocab, &converted.notes, json!({})))
        }
    }
}

fn run_build(f: &Build) -> Result<Output> {
    let symbols = f.symbols.as_ref().map(SymbolMap::load).transpose()?;
    let specials: &[&str] =
        if f.specials == "v1" { &["<pad>", "<mask>"] } else { &["<pad>", "<mask>", "<cls>", "<eos>"] };
    let cells = f.cells.as_deref().map(read_names).transpose()?;
    let options = BuildOptions {
        counts: f.counts.clone(),
        genome: f.genome.clone(),
        genes: f.genes.clone(),
        specials: specials.iter().map(|s| s.to_string()).collect(),
        symbols: symbols.as_ref(),
        min_cells: f.min_cells,
        memory_bytes: f.memory,
        allow_non_integer: f.allow_non_integer,
        cells: cells.as_ref(),
    };
    let built = build(&f.inputs, &options)?;
    built.vocab.save(&f.out, &[format!("built from {} cells", built.cells)])?;
    let mut notes = built.notes;
    if built.unseen > 0 {
        notes.push(format!(
            "{} genes are in fewer than {} cells and have no token",
            built.unseen,
            f.min_cells.max(1)
        ));
    }
    Ok(output(
        &f.out,
        &built.vocab,
        &notes,
        json!({"cells": built.cells, "passes": built.passes, "unseen_genes": built.unseen}),
    ))
}

/// Names, one a line.
fn read_names(path: &Path) -> Result<HashSet<String>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read the cells' names", &e))?;
    Ok(text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect())
}

fn output(out: &Path, vocab: &Vocab, notes: &[String], more: serde_json::Value) -> Output {
    let s = vocab.specials();
    let optional = |id: Option<u32>| id.map_or("none".to_string(), |id| id.to_string());
    let mut text = format!(
        "{}: {} tokens, {} genes; pad {}, mask {}, cls {}, eos {}; digest {}",
        out.display(),
        vocab.len(),
        vocab.genes(),
        s.pad,
        s.mask,
        optional(s.cls),
        optional(s.eos),
        &vocab.digest()[..12]
    );
    for note in notes {
        text.push('\n');
        text.push_str(note);
    }
    let mut json = json!({
        "vocabulary": out, "tokens": vocab.len(), "genes": vocab.genes(), "digest": vocab.digest(),
        "specials": {"pad": s.pad, "mask": s.mask, "cls": s.cls, "eos": s.eos}, "notes": notes,
    });
    if let (Some(all), Some(more)) = (json.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    Output { text, json }
}
