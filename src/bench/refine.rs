//! `bench step --mode refine`: the whole of `refine`, as a run does it: loader, teacher, objective of all terms, AdamW, log.
//!
//! A corpus of typed cells is made up, whose lengths are those of the batch in random order; an encoder of the preset is started
//! by one step of pretraining, and refined. The result is the median over logged steps, the first left out.

use super::peak::Ceiling;
use super::round4;
use crate::backend::{Choice, Open};
use crate::config::{Precision, Sources};
use crate::corpus::{CellRecord, CorpusOptions, CorpusWriter, ObsKind, ObsSpec, ObsValue, VocabIdentity};
use crate::device::{Act, Device};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::model::Preset;
use crate::rng::{Philox, site};
use crate::train::record::StepRecord;
use crate::train::{Flow, MarkerInputs, Observer, RunInputs, SplitFlags, stages};
use half::bf16;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Genes of a type's own, of which a cell ranks half high.
const OWN: usize = 20;

/// What to run.
#[derive(Debug, Clone)]
pub struct RefineCase {
    /// Size of the network; its vocabulary is the corpus's.
    pub preset: Preset,
    /// Where.
    pub device: Choice,
    /// Activation type.
    pub precision: Precision,
    /// Tokens of cells; the corpus draws from them.
    pub lengths: Vec<usize>,
    /// Cells of the corpus.
    pub cells: usize,
    /// Types of cells, each with a prototype.
    pub types: usize,
    /// Cells of a step.
    pub batch: usize,
    /// Steps between two records.
    pub log_every: usize,
    /// Records, the first left out.
    pub records: usize,
    /// Seed of everything.
    pub seed: u64,
}

/// Keeps what is logged.
#[derive(Default)]
struct Log(Vec<StepRecord>);

impl Observer for Log {
    fn step(&mut self, _: u64, record: Option<&StepRecord>) -> Flow {
        self.0.extend(record.cloned());
        Flow::Continue
    }
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the case and reports it.
///
/// # Errors
/// As `refine`; types of which the vocabulary has too few genes (2).
pub fn run(case: &RefineCase) -> Result<Value> {
    let genes = case.preset.vocab.saturating_sub(2);
    if case.types < 2
        || genes < case.types * OWN + OWN
        || case.cells < 4 * case.types
        || case.lengths.is_empty()
    {
        return Err(Error::new(Code::BenchCase, "too few types, cells or genes to refine")
            .found(format!("{} types, {} cells, {genes} genes", case.types, case.cells))
            .wanted(format!("2 types or more, four cells of each, {OWN} genes of each and {OWN} besides")));
    }
    let root = std::env::temp_dir().join(format!("cellrefine-bench-refine-{}", std::process::id()));
    let scratch = Scratch(root);
    crate::disk::create_folders(&scratch.0).map_err(|e| Error::io(&scratch.0, "make a folder", &e))?;
    let corpus = write_corpus(&scratch.0, case)?;
    let markers = write_markers(&scratch.0, case.types)?;

    let inputs = |out: &str, set: Vec<String>| {
        let all = [
            format!("batch.cells={}", case.batch),
            format!(
                "train.precision={}",
                if case.precision == Precision::Bf16 { bf16::NAME } else { f32::NAME }
            ),
            format!("train.log_every={}", case.log_every),
            "train.checkpoint_every=0".into(),
            "train.eval_every=1000000".into(),
        ];
        RunInputs {
            device: case.device,
            corpus: corpus.clone(),
            out: scratch.0.join(out),
            sources: Sources {
                set: [all.to_vec(), set].concat(),
                seed: Some(case.seed),
                ..Sources::default()
            },
            split: SplitFlags {
                label: Some("cell_type".into()),
                split: Some("train=0.9,val=0.1".into()),
                ..SplitFlags::default()
            },
            ..RunInputs::default()
        }
    };
    let pretrain = RunInputs {
        preset: Some(case.preset.name.into()),
        ..inputs("pretrained", vec!["train.steps=1".into()])
    };
    let checkpoint = stages::pretrain(&pretrain, &mut Log::default())?.out;
    let steps = (case.records + 1) * case.log_every;
    let refine =
        RunInputs { checkpoint: Some(checkpoint), ..inputs("refined", vec![format!("train.steps={steps}")]) };
    let mut log = Log::default();
    stages::refine(&refine, &MarkerInputs { markers, ..MarkerInputs::default() }, &mut log)?;
    report(case, &log.0)
}

/// The medians of the records after the first.
fn report(case: &RefineCase, records: &[StepRecord]) -> Result<Value> {
    let records = records.get(1..).filter(|r| !r.is_empty());
    let records = records.ok_or_else(|| Error::bug("refine logged one step at most"))?;
    if records.iter().any(|r| !r.loss.total.is_finite()) {
        return Err(Error::new(Code::LossNotFinite, "the benchmark's loss is not finite"));
    }
    // The emulator's speed means nothing.
    let timed = case.device != Choice::Emulated;
    let median = |of: &dyn Fn(&StepRecord) -> f64| {
        let mut all: Vec<f64> = records.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        timed.then(|| round4(all[all.len() / 2]))
    };
    let bf16_products = case.precision == Precision::Bf16;
    let (device, peak) = match case.device.open()? {
        Open::Cpu(dev) => (dev.name(), dev.peak(bf16_products)),
        Open::Cuda(dev) => (dev.name(), dev.peak(bf16_products)),
    };
    let fastest = |r: &StepRecord| r.dt_ms;
    Ok(json!({
        "bench": "step",
        "preset": case.preset.name,
        "seq": case.lengths.iter().max(),
        "batch": case.batch,
        "mode": "refine",
        "head": "refine",
        "dtype": if case.precision == Precision::Bf16 { bf16::NAME } else { f32::NAME },
        "device": device,
        "threads": rayon::current_num_threads(),
        "ms_median": median(&fastest),
        "ms_min": timed.then(|| round4(records.iter().map(fastest).fold(f64::INFINITY, f64::min))),
        "runs": records.len(),
        "tokens_per_s": median(&|r| r.tokens_per_s),
        "cells_per_s": median(&|r| r.cells_per_s),
        "gflop_per_s": median(&|r| r.gflop_per_s),
        "peak_gflop_per_s": peak.as_ref().map(|p| round4(p.gflop_per_s)),
        "peak_source": peak.as_ref().map(|p| &p.source),
        "fraction_of_peak": peak.as_ref().zip(median(&|r| r.gflop_per_s)).map(|(p, rate)| round4(rate / p.gflop_per_s)),
        "types": case.types,
        "cells": case.cells,
        "lengths": case.lengths,
        "version": env!("CARGO_PKG_VERSION"),
    }))
}

fn gene(id: usize) -> String {
    format!("ENSG{id:011}")
}

/// Cells whose lengths are drawn from the case's: half of a type's own genes first, then others.
fn write_corpus(folder: &Path, case: &RefineCase) -> Result<PathBuf> {
    let mut tokens = vec!["<pad>".to_string(), "<mask>".to_string()];
    tokens.extend((2..case.preset.vocab).map(gene));
    let median = (0..tokens.len()).map(|id| if id < 2 { 0.0 } else { 1.0 }).collect();
    let vocab = Vocab::from_parts(tokens, median, Vec::new())?;
    let path = folder.join("typed.cells");
    let options = CorpusOptions {
        vocab: VocabIdentity { digest: vocab.digest().into(), len: vocab.len() },
        vocab_file: Some(vocab.to_tsv(&[]).into_bytes()),
        values: false,
        shard_cells: 0,
        obs: vec![ObsSpec { name: "cell_type".into(), kind: ObsKind::Categorical }],
        provenance: json!({"made": "up"}),
    };
    let mut writer = CorpusWriter::create(&path, options)?;
    let mut random = Philox::new(case.seed, 4, site::BENCH);
    let others = case.preset.vocab - 2 - case.types * OWN;
    for cell in 0..case.cells {
        let kind = cell % case.types;
        let own = 2 + kind * OWN;
        let mut row: Vec<u32> = (own..own + OWN).map(|g| g as u32).collect();
        random.shuffle(&mut row);
        row.truncate(OWN / 2);
        let len = case.lengths[random.below(case.lengths.len() as u64) as usize];
        let first = random.below(others as u64) as usize;
        // Every gene at most once: a stretch of the others, from a place of the cell's own.
        let rest = len.saturating_sub(row.len()).min(others);
        row.extend((0..rest).map(|i| (2 + case.types * OWN + (first + i) % others) as u32));
        row.truncate(len.max(1));
        let label = format!("type{kind}");
        let obs = [ObsValue::Category(&label)];
        let id = format!("cell{cell}");
        writer.push(&CellRecord { id: &id, gene: &row, value: None, total_count: 1e4, obs: &obs })?;
    }
    writer.finish()?;
    Ok(path)
}

fn write_markers(folder: &Path, types: usize) -> Result<PathBuf> {
    let path = folder.join("markers.gmt");
    let line = |kind: usize| {
        let own: Vec<String> = (0..OWN).map(|g| gene(2 + kind * OWN + g)).collect();
        format!("type{kind}\tmade up\t{}\n", own.join("\t"))
    };
    let text: String = (0..types).map(line).collect();
    crate::disk::replace(&path, text.as_bytes())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_run_is_reported() {
        let preset = Preset { vocab: 120, ..Preset::named("tiny").unwrap() };
        let case = RefineCase {
            preset,
            device: Choice::Cpu,
            precision: Precision::F32,
            lengths: vec![12, 30],
            cells: 40,
            types: 2,
            batch: 4,
            log_every: 1,
            records: 2,
            seed: 1,
        };
        let report = run(&case).unwrap();
        assert_eq!(
            (&report["mode"], &report["runs"], &report["batch"]),
            (&"refine".into(), &2.into(), &4.into())
        );
        for field in ["ms_median", "cells_per_s", "tokens_per_s", "gflop_per_s"] {
            assert!(report[field].as_f64().unwrap() > 0.0, "{field}: {report}");
        }
        let few = RefineCase { types: 9, ..case };
        assert_eq!(run(&few).unwrap_err().kind().exit_code(), 2);
        let left = std::env::temp_dir().join(format!("cellrefine-bench-refine-{}", std::process::id()));
        assert!(!left.exists());
    }
}
