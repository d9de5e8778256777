//! The demo: the paper's claim tried on bundled real cells, before and after refine at equal compute.
//!
//! Per seed: split, medians and markers from the training cells alone; pretrain; then
//! ```text
//! before:  pretrain ───────────────▶ fine-tune (refine's epochs + fine-tuning's)
//! after:   pretrain ─▶ refine ─────▶ fine-tune (fine-tuning's epochs)
//! ```
//! Both arms pass over the training cells equally often, with the same class weights. Logistic regression on the
//! log-normalised expression of the same cells stands beside them.

use crate::config::Sources;
use crate::corpus::Corpus;
use crate::corpus::splits::{Split, SplitRule, SplitSpec};
use crate::cpu::Cpu;
use crate::error::{Code, Error, Result};
use crate::eval::evaluate::evaluate;
use crate::eval::frozen::FrozenSettings;
use crate::eval::metrics::{ShareThresholds, classification, group_f1};
use crate::eval::probe::{Probe, ProbeSettings};
use crate::eval::request::{MarkerChoice, Request, SplitChoice};
use crate::eval::rows::Rows;
use crate::eval::summary::Evaluation;
use crate::genes::vocab::Vocab;
use crate::import::medians::{BuildOptions, build};
use crate::import::pack::{PackOptions, pack};
use crate::report::page::{Beside, write as write_report};
use crate::report::{self, run::Run};
use crate::train::{MarkerInputs, RunInputs, SplitFlags, Unwatched, stages};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The bundled cells (data/README.md: origin and licence).
const CELLS: &[u8] = include_bytes!("../data/pbmc700/pbmc700.h5ad");
/// The bundled marker sets.
const MARKERS: &[u8] = include_bytes!("../data/pbmc700/markers.gmt");
/// Label column of the bundled cells.
pub const LABEL: &str = "cell_type";
/// Division of the cells.
const SPLIT: &str = "train=0.67,test=0.33";

/// The page, in the demo's folder.
pub const REPORT: &str = "report.html";

/// How long each stage trains, in passes over the training cells.
#[derive(Debug, Clone, Copy)]
pub struct Epochs {
    /// Masked-gene pretraining.
    pub pretrain: u32,
    /// Refine.
    pub refine: u32,
    /// Fine-tuning after refine; without refine it gets refine's passes as well.
    pub finetune: u32,
}

/// What the demo does.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder for everything.
    pub out: PathBuf,
    /// Seeds: splits, initial weights, masks and orders all follow.
    pub seeds: Vec<u64>,
    /// Training lengths.
    pub epochs: Epochs,
    /// Settings that the user gave (`--set`, `--config`, environment).
    pub sources: Sources,
}

/// The names of the compared values, in the order of the table.
pub const MEASURES: [&str; 6] = [
    "linear probe macro-F1",
    "kNN macro-F1",
    "silhouette",
    "nearest-prototype recall@1",
    "fine-tuned macro-F1",
    "fine-tuned tail F1",
];

/// One seed's values: before refine, after refine, logistic regression (macro-F1, tail F1).
#[derive(Debug, Clone, serde::Serialize)]
pub struct SeedResult {
    /// The seed.
    pub seed: u64,
    /// In the order of [`MEASURES`]; NaN where a measure does not apply.
    pub before: Vec<f64>,
    /// The same after refine.
    pub after: Vec<f64>,
    /// Logistic regression on expression: macro-F1 and tail F1.
    pub regression: [f64; 2],
}

/// Runs the demo; `say` hears what is being done.
///
/// # Errors
/// What the stages fail with; usage when `out` holds something else.
pub fn run(options: &Options, mut say: impl FnMut(&str)) -> Result<Vec<SeedResult>> {
    prepare_folder(&options.out)?;
    let cells = options.out.join("data/pbmc700.h5ad");
    let markers = options.out.join("data/markers.gmt");
    write(&cells, CELLS)?;
    write(&markers, MARKERS)?;

    // A first corpus, with medians of all cells, serves only to draw the splits: they depend on labels and order alone.
    let drawn = options.out.join("data/all.cells");
    pack_cells(&cells, None, &drawn)?;
    let mut results = Vec::new();
    for &seed in &options.seeds {
        results.push(run_seed(options, seed, &cells, &markers, &drawn, &mut say)?);
    }
    say("report");
    report(options)?;
    Ok(results)
}

/// The page over the first seed's runs: what the table says in means, there cell by cell.
fn report(options: &Options) -> Result<()> {
    let folder = options.out.join(format!("seed-{}", options.seeds[0]));
    let runs = Run::read_all(&["refined", "tuned", "refined-tuned"].map(|name| folder.join(name)))?;
    let settings = report::measure::Options {
        markers: Some(options.out.join("data/markers.gmt")),
        seed: options.seeds[0],
        map_cells: 20_000,
        ..Default::default()
    };
    write_report::<Cpu, f32>(&Cpu, &runs, Beside::default(), &settings, &options.out.join(REPORT), &|_| ())?;
    Ok(())
}

fn run_seed(
    options: &Options,
    seed: u64,
    cells: &Path,
    markers: &Path,
    drawn: &Path,
    say: &mut impl FnMut(&str),
) -> Result<SeedResult> {
    let folder = options.out.join(format!("seed-{seed}"));
    let run = |name: &str| folder.join(name);
    let corpus_path = folder.join("pbmc700.cells");
    let training = training_names(&Corpus::open(drawn)?, seed)?;
    pack_cells(cells, Some(&training), &corpus_path)?;

    let stage = |name: &str, start: Option<&str>, epochs: u32| {
        let mut sources = options.sources.clone();
        sources.seed = Some(seed);
        let own = [format!("train.epochs={epochs}"), "batch.cells=16".into(), "batch.max_tokens=128".into()];
        sources.set.splice(0..0, own);
        RunInputs {
            corpus: corpus_path.clone(),
            out: run(name),
            preset: start.is_none().then(|| "tiny".to_string()),
            checkpoint: start.map(run),
            split: SplitFlags {
                split: Some(SPLIT.into()),
                label: Some(LABEL.into()),
                ..SplitFlags::default()
            },
            sources,
            ..RunInputs::default()
        }
    };
    let e = options.epochs;
    say(&format!("seed {seed}: pretrain, {} epochs of masked genes", e.pretrain));
    stages::pretrain(&stage("pretrained", None, e.pretrain), &mut Unwatched)?;
    say(&format!("seed {seed}: refine, {} epochs", e.refine));
    let sets = MarkerInputs { markers: markers.to_path_buf(), ..MarkerInputs::default() };
    stages::refine(&stage("refined", Some("pretrained"), e.refine), &sets, &mut Unwatched)?;
    say(&format!("seed {seed}: fine-tune without refine, {} epochs", e.refine + e.finetune));
    stages::finetune(&stage("tuned", Some("pretrained"), e.refine + e.finetune), &mut Unwatched)?;
    say(&format!("seed {seed}: fine-tune after refine, {} epochs", e.finetune));
    stages::finetune(&stage("refined-tuned", Some("refined"), e.finetune), &mut Unwatched)?;

    say(&format!("seed {seed}: evaluate"));
    let corpus = Arc::new(Corpus::open(&corpus_path)?);
    let measure = |name: &str| -> Result<Evaluation> {
        let request = Request {
            corpus: corpus.clone(),
            checkpoint: run(name),
            label: LABEL.into(),
            split: SplitChoice { seed: Some(seed), ..SplitChoice::default() },
            part: Default::default(),
            markers: Some(MarkerChoice { file: markers.to_path_buf(), ..MarkerChoice::default() }),
            evidence: None,
            prototypes: None,
            batch_key: None,
            thresholds: ShareThresholds::default(),
            embed: Default::default(),
            frozen: FrozenSettings { seed, ..FrozenSettings::default() },
        };
        evaluate::<Cpu, f32>(&Cpu, &request, |_| ())
    };
    let arm = |frozen: &str, tuned: &str| -> Result<Vec<f64>> {
        let (frozen, tuned) = (measure(frozen)?.to_json(), measure(tuned)?.to_json());
        let of = |json: &Value, place: &str| json.pointer(place).and_then(Value::as_f64).unwrap_or(f64::NAN);
        Ok(vec![
            of(&frozen, "/metrics/linear_probe_macro_f1"),
            of(&frozen, "/metrics/knn_macro_f1"),
            of(&frozen, "/metrics/silhouette"),
            of(&frozen, "/metrics/zero_shot/prototype/recall_at/1"),
            of(&tuned, "/metrics/macro_f1"),
            of(&tuned, "/metrics/tail_f1"),
        ])
    };
    Ok(SeedResult {
        seed,
        before: arm("pretrained", "tuned")?,
        after: arm("refined", "refined-tuned")?,
        regression: regression(&corpus, seed)?,
    })
}

/// Vocabulary with medians from `training` (all cells when absent), then the corpus, expression values kept.
fn pack_cells(cells: &Path, training: Option<&HashSet<String>>, out: &Path) -> Result<()> {
    if out.exists() {
        return Ok(());
    }
    let inputs = [cells.to_path_buf()];
    let built = build(&inputs, &BuildOptions { cells: training, ..BuildOptions::default() })?;
    // Reading the file back proves that what travels with the corpus is what a user would pass.
    let file = out.with_extension("vocab.tsv");
    folder_of(&file)?;
    built.vocab.save(&file, &built.notes)?;
    let options = PackOptions { values: true, ..PackOptions::default() };
    pack(&inputs, &Vocab::load(&file)?, out, &options, &crate::cli::Progress::silent())?;
    Ok(())
}

fn split(corpus: &Corpus, seed: u64) -> Result<Split> {
    let rule = SplitRule::parse_fractions(SPLIT)?;
    let spec =
        SplitSpec { rule, label: Some(LABEL.into()), exclude: Vec::new(), labels_per_class: None, seed };
    Split::make(corpus, &spec)
}

fn training_names(corpus: &Corpus, seed: u64) -> Result<HashSet<String>> {
    let split = split(corpus, seed)?;
    split.train.iter().map(|&cell| Ok(corpus.cell_id(cell as usize)?.to_string())).collect()
}

/// Logistic regression on log-normalised expression, same split: (macro-F1, tail F1) on the test cells.
fn regression(corpus: &Corpus, seed: u64) -> Result<[f64; 2]> {
    let split = split(corpus, seed)?;
    let labels = split.labels.as_ref().ok_or_else(|| Error::bug("a labelled split without labels"))?;
    let width = corpus.manifest().vocabulary.len;
    let dense = |cells: &[u32]| -> Result<(Vec<f32>, Vec<usize>)> {
        let mut rows = vec![0f32; cells.len() * width];
        let mut classes = Vec::with_capacity(cells.len());
        for (row, &cell) in rows.chunks_exact_mut(width).zip(cells) {
            let genes = corpus.genes(cell as usize)?;
            let values =
                corpus.values(cell as usize)?.ok_or_else(|| Error::bug("the demo's corpus holds values"))?;
            for (i, value) in values.iter().enumerate() {
                row[genes.get(i) as usize] = value.to_f32();
            }
            classes.push(labels.class(cell as usize).ok_or_else(|| Error::bug("a cell without a label"))?);
        }
        Ok((rows, classes))
    };
    let (train, train_classes) = dense(&split.train)?;
    let (test, test_classes) = dense(&split.test)?;
    let probe = Probe::fit(Rows::new(&train, width)?, &train_classes, ProbeSettings::default())?;
    let predicted = probe.predict(Rows::new(&test, width)?)?;
    let scores = classification(&test_classes, &predicted, labels.classes.len())?;
    let mut counts = vec![0usize; labels.classes.len()];
    train_classes.iter().for_each(|&class| counts[class] += 1);
    let tail = group_f1(&scores, &counts, ShareThresholds::default()).tail;
    Ok([scores.macro_f1, tail.unwrap_or(f64::NAN)])
}

/// A fresh folder, or one that an earlier demo made.
fn prepare_folder(out: &Path) -> Result<()> {
    const MARK: &str = "made-by-cellrefine-demo";
    if out.exists() && !out.join(MARK).exists() {
        let empty = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
        if !empty {
            return Err(Error::new(Code::OutputExists, "the demo's folder holds something else")
                .at(out.display())
                .next("--out NEW_FOLDER"));
        }
    }
    if out.exists() {
        crate::disk::remove_folder(out).map_err(|e| Error::io(out, "clear the demo's folder", &e))?;
    }
    write(&out.join(MARK), b"cellrefine demo clears this folder when it runs again\n")
}

fn folder_of(path: &Path) -> Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    crate::disk::create_folders(folder).map_err(|e| Error::io(folder, "make a folder", &e))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    folder_of(path)?;
    crate::disk::replace(path, bytes)
}

/// Mean and sample standard deviation.
pub fn mean_and_spread(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

/// The results as the JSON object that the command prints.
pub fn to_json(options: &Options, results: &[SeedResult]) -> Value {
    let rows: Vec<Value> = (0..MEASURES.len())
        .map(|i| {
            let (before, after) = (
                mean_and_spread(results.iter().map(move |r| r.before[i])),
                mean_and_spread(results.iter().map(move |r| r.after[i])),
            );
            json!({"measure": MEASURES[i], "before": before.0, "before_spread": before.1,
                "after": after.0, "after_spread": after.1})
        })
        .collect();
    let regression = |i: usize| mean_and_spread(results.iter().map(move |r| r.regression[i])).0;
    json!({"out": options.out, "report": options.out.join(REPORT), "cells": 700, "seeds": options.seeds, "epochs": {"pretrain": options.epochs.pretrain,
        "refine": options.epochs.refine, "finetune": options.epochs.finetune}, "table": rows,
        "logistic_regression": {"macro_f1": regression(0), "tail_f1": regression(1)}, "per_seed": results})
}
