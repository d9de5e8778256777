//! `cellrefine markers derive` and `cellrefine markers check`.

use super::{Global, Output};
use crate::corpus::splits::{SplitRecord, SplitRule};
use crate::corpus::{Corpus, Labels, Split, SplitSpec};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::genes::markers::{MarkerSets, read_marker_map};
use crate::genes::markers_derive::derive;
use crate::genes::markers_file::RawSets;
use serde_json::json;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Flags of `markers`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cellrefine markers derive --corpus pbmc.cells --label cell_type --out pbmc.gmt
  cellrefine markers check pbmc.gmt --vocab V.tsv --corpus pbmc.cells --label cell_type")]
pub struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Marker sets from the training split, one class versus the rest.
    #[command(after_help = "\
The training cells are those of --split or --holdout with the same --seed and --exclude-label as in training; test cells are never looked at. \
Genes are scored by a Welch statistic times the class's share of the mean, on stored values or else on ranks, and weighted by that score.

Examples:
  cellrefine markers derive --corpus pbmc.cells --label cell_type --exclude-label Other --out pbmc.gmt
  cellrefine markers derive --corpus pancreas.cells --label cell_type --holdout donor=human3 --top 30 --out pancreas.gmt")]
    Derive(Derive),
    /// Which genes and sets of a marker file are usable, how sets overlap, which label goes with which set.
    #[command(after_help = "\
Examples:
  cellrefine markers check markers.gmt --vocab V.tsv
  cellrefine markers check markers.gmt --corpus pbmc.cells --label cell_type --marker-map map.tsv")]
    Check(Check),
}

#[derive(Debug, clap::Args)]
struct Derive {
    /// The corpus.
    #[arg(long, value_name = "X.cells")]
    corpus: PathBuf,
    /// obs column of the classes.
    #[arg(long, value_name = "COL")]
    label: String,
    /// Markers per class, at most.
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top: u32,
    /// Fractions of each class [default: train=0.67,test=0.33, as in training].
    #[arg(long, value_name = "FRACTIONS", conflicts_with_all = ["holdout", "split_of", "all_cells"])]
    split: Option<String>,
    /// Cells whose obs column has this value are left out as test cells.
    #[arg(long, value_name = "COLUMN=VALUE", conflicts_with_all = ["split_of", "all_cells"])]
    holdout: Option<String>,
    /// With --holdout: share of the other cells that validates.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, requires = "holdout")]
    holdout_val: f64,
    /// The split that this run recorded (split.json).
    #[arg(long, value_name = "RUN", conflicts_with = "all_cells")]
    split_of: Option<PathBuf>,
    /// Every labelled cell: for markers that are used on other data alone.
    #[arg(long)]
    all_cells: bool,
    /// Leave out cells with this label (may be repeated).
    #[arg(long, value_name = "LABEL")]
    exclude_label: Vec<String>,
    /// Use at most N labelled cells per class.
    #[arg(long, value_name = "N")]
    labels_per_class: Option<usize>,
    /// The GMT to write, genes with weights.
    #[arg(long, value_name = "M.gmt")]
    out: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Check {
    /// GMT, or a table set<TAB>gene[<TAB>weight]; plain or gzip.
    #[arg(value_name = "M.gmt")]
    markers: PathBuf,
    /// Vocabulary [default: the one of --corpus].
    #[arg(long, value_name = "V.tsv", required_unless_present = "corpus")]
    vocab: Option<PathBuf>,
    /// Symbols to Ensembl ids, TSV, plain or gzip.
    #[arg(long, value_name = "FILE")]
    gene_map: Option<PathBuf>,
    /// A corpus whose labels are to meet the sets.
    #[arg(long, value_name = "X.cells", requires = "label")]
    corpus: Option<PathBuf>,
    /// obs column of the labels.
    #[arg(long, value_name = "COL", requires = "corpus")]
    label: Option<String>,
    /// Leave out this label (may be repeated).
    #[arg(long, value_name = "LABEL", requires = "label")]
    exclude_label: Vec<String>,
    /// Table label<TAB>set name, for labels of another name than their set.
    #[arg(long, value_name = "FILE", requires = "label")]
    marker_map: Option<PathBuf>,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    match &flags.command {
        Command::Derive(flags) => run_derive(global, flags),
        Command::Check(flags) => run_check(flags),
    }
}

fn split(global: &Global, flags: &Derive, corpus: &Corpus) -> Result<Split> {
    let rule = match (&flags.split, &flags.holdout) {
        (Some(text), _) => SplitRule::parse_fractions(text)?,
        (_, Some(text)) => SplitRule::parse_holdout(text, flags.holdout_val)?,
        _ if flags.all_cells => SplitRule::All,
        _ => SplitRule::parse_fractions("train=0.67,test=0.33")?,
    };
    let mut spec = SplitSpec {
        rule,
        label: Some(flags.label.clone()),
        exclude: flags.exclude_label.clone(),
        labels_per_class: flags.labels_per_class,
        seed: global.seed.unwrap_or(0),
    };
    if let Some(run) = &flags.split_of {
        let record = read_split(run)?;
        Split::restore(corpus, &record)?;
        if record.spec.label.as_deref() != Some(&flags.label)
            || !flags.exclude_label.is_empty() && flags.exclude_label != record.spec.exclude
        {
            return Err(Error::new(
                Code::SplitMismatch,
                "the run's split was made with another label column or other labels left out",
            )
            .at(run.display())
            .found(format!("{:?} without {:?}", flags.label, flags.exclude_label))
            .wanted(format!("{:?} without {:?}", record.spec.label, record.spec.exclude)));
        }
        let labels_per_class = flags.labels_per_class.or(record.spec.labels_per_class);
        spec = SplitSpec { labels_per_class, ..record.spec };
    }
    Split::make(corpus, &spec)
}

fn read_split(run: &Path) -> Result<SplitRecord> {
    let path = if run.is_dir() { run.join("split.json") } else { run.to_path_buf() };
    let text = std::fs::read(&path).map_err(|e| Error::io(&path, "read the run's split", &e))?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::new(Code::SplitRecord, "the split's record cannot be read").at(path.display()).found(e)
    })
}

fn run_derive(global: &Global, flags: &Derive) -> Result<Output> {
    let corpus = Corpus::open(&flags.corpus)?;
    let vocab = corpus.vocab()?;
    let split = split(global, flags, &corpus)?;
    let training = split.training();
    if flags.split.is_none() && flags.holdout.is_none() && flags.split_of.is_none() && !flags.all_cells {
        global.note("split train=0.67,test=0.33 (the default of training); give --split, --holdout or --split-of for another");
    }
    let derived = derive(&corpus, &training, flags.top as usize)?;
    let source = if derived.from_values { "expression" } else { "ranks" };
    let markers = &derived.markers;
    markers.write_gmt(&flags.out, &vocab, |k| {
        format!("derived one versus rest from {source} of {} training cells", derived.cells[k])
    })?;
    let mut text = format!(
        "{}: {} sets from {source} of {} training cells",
        flags.out.display(),
        markers.sets.iter().filter(|s| !s.is_empty()).count(),
        derived.cells.iter().sum::<u64>()
    );
    let mut sets = Vec::new();
    for ((name, set), cells) in markers.names.iter().zip(&markers.sets).zip(&derived.cells) {
        let best: Vec<&str> = set.iter().take(5).map(|(t, _)| vocab.name(*t)).collect();
        let _ = write!(text, "\n  {name} ({cells} cells): {}", best.join(", "));
        if set.is_empty() {
            global.note(format!("{name}: no set ({cells} training cells)"));
        }
        sets.push(json!({"name": name, "cells": cells, "genes": set.len(), "best": best}));
    }
    Ok(Output {
        text,
        json: json!({"out": flags.out, "from": source, "split": split.record(), "sets": sets}),
    })
}

fn run_check(flags: &Check) -> Result<Output> {
    let corpus = flags.corpus.as_deref().map(Corpus::open).transpose()?;
    let vocab = match (&flags.vocab, &corpus) {
        (Some(path), _) => Vocab::load(path)?,
        (None, Some(corpus)) => corpus.vocab()?,
        (None, None) => {
            return Err(Error::new(Code::FlagConflict, "markers check needs --vocab or --corpus"));
        }
    };
    if let Some(corpus) = &corpus
        && corpus.manifest().vocabulary.digest != vocab.digest()
    {
        return Err(Error::new(Code::VocabularyMismatch, "the vocabulary is not the corpus's")
            .at(corpus.path().display())
            .found(vocab.digest())
            .wanted(&corpus.manifest().vocabulary.digest)
            .next("leave --vocab out: the corpus carries its own"));
    }
    let raw = RawSets::load(&flags.markers, &vocab, flags.gene_map.as_deref())?;
    let mut out = report_sets(&raw, &vocab, &flags.markers)?;
    if let (Some(corpus), Some(column)) = (&corpus, &flags.label) {
        let map = flags.marker_map.as_deref().map(read_marker_map).transpose()?;
        report_labels(&mut out, &raw, &Labels::read(corpus, column, &flags.exclude_label)?, map.as_deref())?;
    }
    Ok(out)
}

fn report_sets(raw: &RawSets, vocab: &Vocab, path: &Path) -> Result<Output> {
    let all = raw.all()?;
    let usable = all.len();
    let known: usize = raw.sets.iter().map(|s| s.genes.len()).sum();
    let unknown: usize = raw.sets.iter().map(|s| s.unknown.len()).sum();
    let ambiguous: usize = raw.sets.iter().map(|s| s.ambiguous.len()).sum();
    let mut text = format!(
        "{}: {} sets, {usable} usable; {known} genes known, {unknown} unknown, {ambiguous} ambiguous, {} repeated",
        path.display(),
        raw.sets.len(),
        raw.repeated_genes
    );
    let mut sets = Vec::new();
    for set in &raw.sets {
        let weighted = set.genes.iter().any(|(_, w)| w.is_some());
        let genes: Vec<&str> = set.genes.iter().take(5).map(|(t, _)| vocab.name(*t)).collect();
        let _ = write!(text, "\n  {}: {} genes ({})", set.name, set.genes.len(), genes.join(", "));
        if !set.unknown.is_empty() {
            let sample: Vec<&str> = set.unknown.iter().take(3).map(String::as_str).collect();
            let _ = write!(text, "; {} unknown such as {}", set.unknown.len(), sample.join(", "));
        }
        if !set.ambiguous.is_empty() {
            let _ = write!(text, "; ambiguous {}", set.ambiguous.join(", "));
        }
        sets.push(json!({"name": set.name, "known": set.genes.len(), "unknown": set.unknown,
            "ambiguous": set.ambiguous, "repeated": set.repeated, "weighted": weighted}));
    }
    let overlaps = overlaps(&all);
    if !overlaps.is_empty() {
        text += "\noverlaps (weighted Jaccard):";
    }
    for (a, b, jaccard) in overlaps.iter().take(10) {
        let _ = write!(text, "\n  {a} and {b}: {jaccard:.2}");
    }
    let overlaps: Vec<_> = overlaps.iter().map(|(a, b, j)| json!({"a": a, "b": b, "jaccard": j})).collect();
    let json = json!({"markers": path, "usable": usable, "known": known, "unknown": unknown, "ambiguous": ambiguous,
        "repeated": raw.repeated_genes, "sets": sets, "overlaps": overlaps});
    Ok(Output { text, json })
}

/// At most so many sets are compared pair by pair.
const OVERLAP_SETS: usize = 2000;

/// Pairs of sets that share at least a tenth, most alike first.
fn overlaps(all: &MarkerSets) -> Vec<(String, String, f32)> {
    if all.len() > OVERLAP_SETS {
        return Vec::new();
    }
    let (p, jaccard) = (all.len(), all.jaccard());
    let mut pairs: Vec<(String, String, f32)> = (0..p)
        .flat_map(|k| (k + 1..p).map(move |l| (k, l)))
        .filter(|&(k, l)| jaccard[k * p + l] >= 0.1)
        .map(|(k, l)| (all.names[k].clone(), all.names[l].clone(), jaccard[k * p + l]))
        .collect();
    pairs.sort_by(|a, b| b.2.total_cmp(&a.2));
    pairs
}

fn report_labels(
    out: &mut Output,
    raw: &RawSets,
    labels: &Labels,
    map: Option<&[(String, String)]>,
) -> Result<()> {
    let matched = raw.match_labels(&labels.classes, map)?;
    let mut rows = Vec::new();
    out.text += "\nlabels:";
    for (class, set) in labels.classes.iter().zip(matched) {
        let usable = set.is_some_and(|s| !raw.sets[s].genes.is_empty());
        let name = set.map(|s| raw.sets[s].name.as_str());
        let _ = match (name, usable) {
            (Some(name), true) => write!(out.text, "\n  {class} -> {name}"),
            (Some(name), false) => write!(out.text, "\n  {class} -> {name}, of which no gene is known"),
            (None, _) => write!(out.text, "\n  {class} -> no set; nearest {}", raw.nearest(class)),
        };
        rows.push(json!({"label": class, "set": name, "usable": usable}));
    }
    let unmatched = rows.iter().filter(|r| r["usable"] == false).count();
    if unmatched > 0 {
        let _ = write!(
            out.text,
            "\n{unmatched} labels without a usable set: name them in a table label<TAB>set with --marker-map"
        );
    }
    out.json["labels"] = rows.into();
    out.json["unmatched"] = unmatched.into();
    Ok(())
}
