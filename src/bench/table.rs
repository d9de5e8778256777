//! `bench cpu`: everything that is claimed about speed on a processor, in one run: steps, loader, packing, kernels, each through the
//! very measurement of its own command, beside ceilings read in the same run.

use super::peak::Ceiling;
use super::step::StepCase;
use super::{Effort, kernels, loader, pack, round4, step};
use crate::cpu::Cpu;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::model::Preset;
use crate::ops::Backend;
use half::bf16;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// What to measure, and for how long.
#[derive(Debug, Clone)]
pub struct TableCase {
    /// Size of the network.
    pub preset: Preset,
    /// Tokens of each cell, one entry per length to time.
    pub seqs: Vec<usize>,
    /// Cells of a step.
    pub batch: usize,
    /// Of a step, and of packing.
    pub steps: Effort,
    /// Of a kernel.
    pub kernels: Effort,
    /// Cells of the loader's synthetic corpus; 0 = its default.
    pub loader_cells: usize,
    /// A file to pack.
    pub h5ad: Option<PathBuf>,
    /// Seed of weights, tokens and orders.
    pub seed: u64,
}

impl TableCase {
    /// Numbers to quote: 512 and 2,048 tokens, 8 cells, `seconds` of samples a step.
    pub fn full(preset: Preset, seconds: f64, seed: u64) -> Self {
        TableCase {
            preset,
            seqs: vec![512, 2048],
            batch: 8,
            steps: Effort::steps(seconds),
            kernels: Effort::kernels(),
            loader_cells: 0,
            h5ad: None,
            seed,
        }
    }

    /// The same rows in seconds: one cell a step, two samples. Does everything run, and about how fast?
    pub fn quick(preset: Preset, seed: u64) -> Self {
        let effort = Effort::quick();
        TableCase {
            batch: 1,
            steps: effort,
            kernels: effort,
            loader_cells: 20_000,
            ..TableCase::full(preset, 0.0, seed)
        }
    }
}

/// Runs the table; `note` hears what comes next.
pub fn run(case: &TableCase, mut note: impl FnMut(&str)) -> Result<Value> {
    let dev = Cpu;
    // First, while the process has held nothing else: its peak memory is that of packing.
    let packed = match &case.h5ad {
        Some(file) => {
            note("pack");
            let mut row = pack::run(file, case.steps)?;
            row["peak_memory_bytes"] = json!(super::peak_memory_bytes());
            row
        }
        None => Value::Null,
    };
    let mut steps = Vec::new();
    for seq in &case.seqs {
        for train in [false, true] {
            note(&format!("step, {} tokens, {}", seq, if train { "train" } else { "forward" }));
            let case = StepCase {
                preset: case.preset,
                lengths: vec![*seq; case.batch],
                train,
                mlm: false,
                graph: false,
                effort: case.steps,
                seed: case.seed,
            };
            steps.push(step::run::<Cpu, f32>(&dev, &case)?);
            steps.push(step::run::<Cpu, bf16>(&dev, &case)?);
        }
    }
    note("loader");
    let loader = loader::run(&loader::LoaderCase {
        cells: case.loader_cells,
        seed: case.seed,
        ..loader::LoaderCase::default()
    })?;
    let mut rows = kernel_rows::<f32>(&dev, case, &mut note)?;
    // Ops that are f32 whatever the activations are stand there already.
    let of = |row: &Value| [&row["name"], &row["shape"], &row["dtype"]].map(Value::to_string);
    let known: Vec<_> = rows.iter().map(of).collect();
    rows.extend(
        kernel_rows::<bf16>(&dev, case, &mut note)?.into_iter().filter(|row| !known.contains(&of(row))),
    );
    let peak = |bf16| {
        let peak = dev.peak(bf16);
        json!({"gflop_per_s": peak.as_ref().map(|p| round4(p.gflop_per_s)), "source": peak.map(|p| p.source)})
    };
    Ok(json!({
        "bench": "cpu",
        "preset": case.preset.name,
        "device": dev.name(),
        "threads": rayon::current_num_threads(),
        "date": today(),
        "version": env!("CARGO_PKG_VERSION"),
        // Set by whoever builds from a repository and wants it told.
        "commit": option_env!("CELLREFINE_COMMIT"),
        "peak_f32": peak(false),
        "peak_bf16": peak(true),
        "copy_gb_per_s": dev.copy_gb_per_s().map(round4),
        "steps": steps,
        "loader": loader,
        "pack": packed,
        "kernels": rows,
    }))
}

/// Rows of `bench kernels` at the first length.
fn kernel_rows<A: Act>(dev: &Cpu, case: &TableCase, note: &mut impl FnMut(&str)) -> Result<Vec<Value>>
where
    Cpu: Backend<A>,
{
    note(&format!("kernels, {}", A::NAME));
    let case = kernels::KernelCase {
        preset: case.preset,
        lengths: vec![case.seqs.first().copied().unwrap_or(512); case.batch],
        sweep: kernels::Sweep::none(),
        effort: case.kernels,
        seed: case.seed,
        timed: true,
        trial: kernels::Trial::default(),
        only: Vec::new(),
    };
    let report = kernels::run::<Cpu, A>(dev, &case, |_| ())?;
    Ok(report["kernels"].as_array().cloned().unwrap_or_default())
}

/// The report as Markdown: a table of the steps, one of the kernels, a line for the rest.
pub fn to_markdown(report: &Value) -> String {
    let mut out = String::new();
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
    let number = |v: &Value| v.as_f64().map_or("–".into(), |x| format!("{x}"));
    let percent = |v: &Value| v.as_f64().map_or("–".into(), |x| format!("{:.1} %", 100.0 * x));
    let rows = |name: &str| report[name].as_array().cloned().unwrap_or_default();
    let commit = report["commit"].as_str().map_or(String::new(), |c| format!(", commit {c}"));
    let _ = writeln!(
        out,
        "{}, {}, cellrefine {}{commit}, {}. Peak: {} GFLOP/s f32, {} bf16; copy {} GB/s, same run.\n",
        text(&report["preset"]),
        text(&report["device"]),
        text(&report["version"]),
        text(&report["date"]),
        number(&report["peak_f32"]["gflop_per_s"]),
        number(&report["peak_bf16"]["gflop_per_s"]),
        number(&report["copy_gb_per_s"]),
    );
    let _ = writeln!(
        out,
        "| step | type | tokens × cells | ms (least) | tokens/s | GFLOP/s | of peak | activations, MB |"
    );
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|");
    for s in rows("steps") {
        let _ = writeln!(
            out,
            "| {} | {} | {} × {} | {} ({}) | {} | {} | {} | {:.1} |",
            text(&s["mode"]),
            text(&s["dtype"]),
            s["seq"],
            s["batch"],
            number(&s["ms_median"]),
            number(&s["ms_min"]),
            number(&s["tokens_per_s"]),
            number(&s["gflop_per_s"]),
            percent(&s["fraction_of_peak"]),
            s["activation_bytes"].as_f64().unwrap_or(0.0) / 1e6,
        );
    }
    let l = &report["loader"];
    let _ = writeln!(
        out,
        "\nLoader, {} order, {} thread, mean {:.0} tokens: {:.2} M cells/s ({:.2} of a plain copy).",
        text(&l["order"]),
        l["threads"],
        l["mean_tokens"].as_f64().unwrap_or(0.0),
        l["cells_per_s"].as_f64().unwrap_or(0.0) / 1e6,
        l["ratio_to_plain_copy"].as_f64().unwrap_or(0.0),
    );
    let p = &report["pack"];
    if p.is_object() {
        let _ = writeln!(
            out,
            "\nPack of {}, {} cells: {} ms, {:.0} MB of memory at the peak.",
            text(&p["file"]),
            p["cells"],
            number(&p["ms_median"]),
            p["peak_memory_bytes"].as_f64().unwrap_or(0.0) / 1e6,
        );
    }
    let _ = writeln!(out, "\n| kernel | type | shape | ms | GFLOP/s | GB/s | of floor |");
    let _ = writeln!(out, "|---|---|---|---|---|---|---|");
    for k in rows("kernels") {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} |",
            text(&k["name"]),
            text(&k["dtype"]),
            text(&k["shape"]),
            number(&k["ms_median"]),
            number(&k["gflop_per_s"]),
            number(&k["gb_per_s"]),
            percent(&k["fraction_of_floor"]),
        );
    }
    out
}

/// Today in UTC, 2026-11-22.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    civil((seconds / 86_400) as i64)
}

/// The Gregorian date of a day counted from 1970-01-01, in eras of 400 years that begin in March.
fn civil(day: i64) -> String {
    let z = day + 719_468;
    let (era, of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let (d, m) = (of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    format!("{:04}-{m:02}-{d:02}", year_of_era + 400 * era + i64::from(m <= 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_dates() {
        let dates = [0, 11_016, 19_782, 20_779].map(civil);
        assert_eq!(dates, ["1970-01-01", "2000-02-29", "2024-02-29", "2026-11-22"]);
    }
}
