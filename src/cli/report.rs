//! `cellrefine report`: what runs were and what they reached: a table on stdout, and with `--out` a page.

use super::{Global, Output};
use crate::config::Precision;
use crate::error::{Code, Error, Result};
use crate::on_backend;
use crate::report::measure::Options;
use crate::report::page::{Beside, write};
use crate::report::run::Run;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Flags of `report`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The page evaluates each run, and the checkpoint that it started from, on the corpus and the split that the run recorded: before and after. \
It is one file that needs no network.

Examples:
  cellrefine report runs/refined --out report.html
  cellrefine report runs/refined runs/tuned runs/refined-tuned --bench kernels.json --out report.html")]
pub struct Flags {
    /// Run folders.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The page; without it the table is all.
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
    /// Timings for the roofline: the JSON of `bench kernels --out`, or of scripts/gpu-check.sh.
    #[arg(long, value_name = "FILE.json", requires = "out")]
    bench: Option<PathBuf>,
    /// Trace for the time by range: the file of a training command's --trace.
    #[arg(long, value_name = "FILE.json", requires = "out")]
    trace: Option<PathBuf>,
    /// What genes do in silico: the table of `perturb`.
    #[arg(long, value_name = "FILE.tsv", requires = "out")]
    perturb: Option<PathBuf>,
    /// Corpus instead of the one that the runs recorded.
    #[arg(long, value_name = "X.cells")]
    corpus: Option<PathBuf>,
    /// Label column instead of the one that the runs recorded.
    #[arg(long, value_name = "COL")]
    label: Option<String>,
    /// Marker sets instead of those that the runs used.
    #[arg(long, value_name = "M.gmt")]
    markers: Option<PathBuf>,
    /// Most cells of a map: every cell of tail classes, a sample of the others.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(4..=200_000))]
    map_cells: u32,
    /// No measures and no maps: what the run folders hold, in a second.
    #[arg(long)]
    records_only: bool,
    /// Arithmetic of the encoder.
    #[arg(long, value_enum, default_value_t = Precision::F32, value_name = "TYPE")]
    dtype: Precision,
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let runs = Run::read_all(&flags.runs)?;
    let rows = runs.iter().map(summary).collect::<Result<Vec<Value>>>()?;
    let mut output = Output { text: text(&rows), json: json!({"runs": rows}) };
    if let Some(out) = &flags.out {
        let options = Options {
            corpus: flags.corpus.clone(),
            label: flags.label.clone(),
            markers: flags.markers.clone(),
            seed: global.seed.unwrap_or(0),
            map_cells: flags.map_cells as usize,
            records_only: flags.records_only,
        };
        let beside = Beside {
            bench: flags.bench.as_deref(),
            trace: flags.trace.as_deref(),
            perturbations: flags.perturb.as_deref(),
        };
        let measures = on_backend!(global.device, flags.dtype, |dev: B, A| write::<B, A>(
            dev,
            &runs,
            beside,
            &options,
            out,
            &|what| global.note(what)
        ))?;
        let missing: Vec<Value> = (measures.models.iter())
            .filter_map(|m| Some(json!({"model": m.name, "why": m.found.as_ref().err()?})))
            .collect();
        output.text += &format!("\nreport: {}\n", out.display());
        output.json["report"] = json!(out);
        output.json["not_measured"] = json!(missing);
    }
    Ok(output)
}

fn text(rows: &[Value]) -> String {
    let mut text = format!(
        "{:<28} {:<9} {:>8} {:>9} {:>10} {:>24} {:>9} {:>10}\n",
        "run", "stage", "step", "loss", "seconds", "validation", "cells/s", "tokens/s"
    );
    for run in rows {
        let number = |name: &str, digits: usize| {
            run[name].as_f64().map_or("-".to_string(), |x| format!("{x:.digits$}"))
        };
        let validation = run["evaluation"].as_object().and_then(|e| e.iter().next());
        let validation = validation.map_or("-".to_string(), |(name, value)| {
            format!("{} {:.4}", name.trim_start_matches("val_"), value.as_f64().unwrap_or(f64::NAN))
        });
        text += &format!(
            "{:<28} {:<9} {:>8} {:>9} {:>10} {:>24} {:>9} {:>10}\n",
            run["run"].as_str().unwrap_or("-"),
            run["stage"].as_str().unwrap_or("-"),
            number("step", 0),
            number("loss", 4),
            number("seconds", 1),
            validation,
            number("cells_per_s", 0),
            number("tokens_per_s", 0)
        );
    }
    text
}

/// The last record of a run, its last evaluation, and means over its records.
fn summary(run: &Run) -> Result<Value> {
    let last = run.last();
    if last.is_null() {
        let log = run.path.join("metrics.jsonl");
        return Err(Error::new(Code::RunFolder, "the run has no record yet").at(log.display()));
    }
    let (cells, tokens, seconds) = (run.sum("cells"), run.sum("tokens"), run.seconds());
    let record = &run.record;
    Ok(json!({"run": run.path.display().to_string(), "stage": record["stage"], "label": record["label"],
        "corpus": record["corpus"], "checkpoint": record["checkpoint"], "step": last["step"], "loss": last["loss"],
        "evaluation": run.evaluation(), "bad_steps": last["bad_steps"], "cells": cells, "tokens": tokens,
        "seconds": seconds, "cells_per_s": cells / seconds.max(1e-9),
        "tokens_per_s": tokens / seconds.max(1e-9), "records": run.steps.len()}))
}
