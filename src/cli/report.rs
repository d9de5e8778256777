//! `cellrefine report`: what runs were and what they reached, side by side, from their records alone.

use super::{Global, Output};
use crate::error::{Error, Result};
use crate::report::jsonl;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Flags of `report`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  cellrefine report runs/pretrain runs/refine\n  cellrefine report runs/* --json"
)]
pub struct Flags {
    /// Run folders.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
}

pub fn run(_global: &Global, flags: &Flags) -> Result<Output> {
    let runs = flags.runs.iter().map(|run| summary(run)).collect::<Result<Vec<Value>>>()?;
    let mut text = format!(
        "{:<28} {:<9} {:>8} {:>9} {:>10} {:>24} {:>9} {:>10}\n",
        "run", "stage", "step", "loss", "seconds", "validation", "cells/s", "tokens/s"
    );
    for run in &runs {
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
    Ok(Output { text, json: json!({"runs": runs}) })
}

/// The last record of a run, its last evaluation, and means over its records.
fn summary(run: &Path) -> Result<Value> {
    let place = run.join("metrics.jsonl");
    if !place.is_file() {
        return Err(Error::input("not a run folder")
            .at(run.display())
            .found("no metrics.jsonl")
            .wanted("a folder that pretrain, refine or finetune wrote"));
    }
    let lines = jsonl::read(&place)?;
    let last = lines.last().ok_or_else(|| Error::input("the run has no record yet").at(place.display()))?;
    let record: Value = std::fs::read_to_string(run.join("run.json"))
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or(Value::Null);
    let sum = |name: &str| lines.iter().filter_map(|line| line[name].as_f64()).sum::<f64>();
    // A record covers the steps since the one before it: its cells over its rate are its seconds.
    let seconds: f64 = lines
        .iter()
        .filter_map(|line| Some(line["cells"].as_f64()? / line["cells_per_s"].as_f64().filter(|r| *r > 0.0)?))
        .sum();
    let evaluation: Map<String, Value> = lines
        .iter()
        .rev()
        .find_map(|line| {
            let found: Map<String, Value> = line
                .as_object()?
                .iter()
                .filter(|(name, _)| name.starts_with("val_"))
                .map(|(n, v)| (n.clone(), v.clone()))
                .collect();
            (!found.is_empty()).then_some(found)
        })
        .unwrap_or_default();
    Ok(json!({"run": run.display().to_string(), "stage": record["stage"], "label": record["label"],
        "corpus": record["corpus"], "checkpoint": record["checkpoint"], "step": last["step"], "loss": last["loss"],
        "evaluation": evaluation, "bad_steps": last["bad_steps"], "cells": sum("cells"), "tokens": sum("tokens"),
        "seconds": seconds, "cells_per_s": sum("cells") / seconds.max(1e-9),
        "tokens_per_s": sum("tokens") / seconds.max(1e-9), "records": lines.len()}))
}
