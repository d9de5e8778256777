//! `cellrefine bench`: timings against counted floors.

use super::training::TraceFlag;
use super::{Global, Output};
use crate::backend::Choice;
use crate::bench::{Effort, compare, kernels, loader, step, table};
use crate::config::Precision;
use crate::error::{Error, Result};
use crate::model::Preset;
use crate::on_backend;
use crate::trace::Trace;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Flags of `bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    cellrefine bench cpu --threads 2 --h5ad cells.h5ad --json\n  \
    cellrefine bench step --preset gf-v1-10m --seq 2048 --batch 8 --mode train --threads 2 --json\n  \
    cellrefine bench kernels --preset gf-v1-10m --dtype bf16\n  \
    cellrefine bench loader --corpus pbmc.cells")]
pub struct Flags {
    /// What to time: every op alone, a whole forward or training step, the loader, or all of it as one table (cpu).
    #[arg(value_enum)]
    what: What,
    /// Size of the network: tiny, small, gf-v1-10m, gf-v1-40m, gf-v2-104m, gf-v2-316m.
    #[arg(long, default_value = "gf-v1-10m", value_name = "PRESET")]
    preset: String,
    /// Tokens per cell; the default is 512, or the preset's context where that is shorter.
    #[arg(long, value_name = "L", conflicts_with = "lengths")]
    seq: Option<usize>,
    /// Tokens of each cell, from a file of whole numbers: real lengths in place of --seq and --batch.
    #[arg(long, value_name = "FILE")]
    lengths: Option<PathBuf>,
    /// Cells; for the loader, cells in a batch.
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// Forward alone, or forward, backward and AdamW.
    #[arg(long, value_enum, default_value = "fwd")]
    mode: Mode,
    /// Activation type.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Precision,
    /// Head of a step: none (the gradient of a fixed random projection) or masked genes on 15 % of the tokens.
    #[arg(long, value_enum, default_value = "none")]
    head: Head,
    /// Seconds of samples of a step.
    #[arg(long, default_value_t = 8.0, value_name = "S")]
    seconds: f64,
    /// cpu: one cell a step and two samples; seconds in place of minutes, and no number to quote.
    #[arg(long)]
    quick: bool,
    /// cpu: also pack this file.
    #[arg(long, value_name = "FILE.h5ad")]
    h5ad: Option<PathBuf>,
    /// Loader: a corpus; without it a synthetic one is made.
    #[arg(long, value_name = "X.cells")]
    corpus: Option<PathBuf>,
    /// Loader: cells of the synthetic corpus.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    cells: usize,
    /// Loader: input order in place of random order.
    #[arg(long)]
    sequential: bool,
    #[command(flatten)]
    trace: TraceFlag,
    /// An earlier report (the --json of the same command) to compare with.
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
    /// With --compare: fail (exit 4) when a case takes so much longer, such as 3%.
    #[arg(long, value_name = "SHARE", requires = "compare", value_parser = share)]
    fail_above: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum What {
    Kernels,
    Step,
    Loader,
    Cpu,
}
#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Mode {
    Fwd,
    Train,
}
#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Head {
    None,
    Mlm,
}

/// `3%` or `0.03`.
fn share(text: &str) -> std::result::Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |n| (n, 0.01));
    match number.trim().parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x * unit),
        _ => Err("a share such as 3% or 0.03".into()),
    }
}

pub fn run(global: &Global, flags: &Flags) -> Result<Output> {
    let seed = global.seed.unwrap_or(0);
    if flags.trace.is_set() && flags.what != What::Step {
        return Err(Error::usage("--trace is for bench step"));
    }
    let preset = Preset::named(&flags.preset)?;
    let mut json = match flags.what {
        What::Cpu => {
            if !matches!(global.device, Choice::Auto | Choice::Cpu) {
                return Err(Error::usage("bench cpu times the processor")
                    .found(format!("--device {}", global.device))
                    .next("bench step and bench kernels take any device"));
            }
            let case = match flags.quick {
                true => table::TableCase::quick(preset, seed),
                false => table::TableCase::full(preset, flags.seconds, seed),
            };
            table::run(&table::TableCase { h5ad: flags.h5ad.clone(), ..case }, |what| global.note(what))?
        }
        What::Loader => {
            let case = loader::LoaderCase {
                corpus: flags.corpus.clone(),
                cells: flags.cells,
                batch: flags.batch.unwrap_or(0),
                threads: global.threads,
                sequential: flags.sequential,
                seed,
            };
            loader::run(&case)?
        }
        What::Step => {
            let case = step::StepCase {
                preset,
                lengths: lengths(flags)?,
                train: flags.mode == Mode::Train,
                mlm: flags.head == Head::Mlm,
                effort: Effort::steps(flags.seconds),
                seed,
            };
            let trace = flags.trace.start()?;
            let json = on_backend!(global.device, flags.dtype, |dev: B, A| step::run::<B, A>(dev, &case)?);
            trace.map_or(Ok(()), Trace::finish)?;
            json
        }
        What::Kernels => {
            let effort = Effort::kernels();
            let case = kernels::KernelCase { preset, lengths: lengths(flags)?, effort, seed };
            on_backend!(global.device, flags.dtype, |dev: B, A| kernels::run::<B, A>(dev, &case)?)
        }
    };
    if let Some(old) = &flags.compare {
        compare::compare(&mut json, old, flags.fail_above)?;
    }
    let text = match flags.what {
        What::Cpu => table::to_markdown(&json),
        _ => text(&json),
    };
    Ok(Output { text, json })
}

/// The cells of a step.
fn lengths(flags: &Flags) -> Result<Vec<usize>> {
    match &flags.lengths {
        Some(file) => read_lengths(file),
        None => {
            let seq = match flags.seq {
                Some(seq) => seq,
                None => Preset::named(&flags.preset)?.positions.min(512),
            };
            let batch = flags.batch.unwrap_or(8);
            if seq == 0 || batch == 0 {
                return Err(Error::usage("--seq and --batch are at least 1").found(format!("{seq}, {batch}")));
            }
            Ok(vec![seq; batch])
        }
    }
}

/// Whole numbers separated by spaces, commas or line breaks.
fn read_lengths(file: &Path) -> Result<Vec<usize>> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::io(file, "read the lengths", &e))?;
    let lengths = text
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| match word.parse::<usize>() {
            Ok(len) if (1..=65_536).contains(&len) => Ok(len),
            _ => Err(Error::input("not a length").at(file.display()).found(word).wanted("1 to 65,536")),
        })
        .collect::<Result<Vec<_>>>()?;
    match lengths.is_empty() {
        true => Err(Error::input("no lengths").at(file.display()).wanted("a whole number per cell")),
        false => Ok(lengths),
    }
}

/// The report for people: a table of the kernels, or one line per number.
fn text(json: &Value) -> String {
    let mut out = String::new();
    let plain = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
    for (name, value) in json.as_object().into_iter().flatten() {
        match value {
            Value::Array(rows) if rows.iter().all(Value::is_object) => {
                let Some(first) = rows.first().and_then(Value::as_object) else { continue };
                let columns: Vec<&String> = first.keys().collect();
                let table: Vec<Vec<String>> =
                    std::iter::once(columns.iter().map(|c| c.to_string()).collect())
                        .chain(
                            rows.iter().map(|row| columns.iter().map(|c| plain(&row[c.as_str()])).collect()),
                        )
                        .collect();
                let width = |i: usize| {
                    table.iter().map(|row: &Vec<String>| row[i].chars().count()).max().unwrap_or(0)
                };
                let widths: Vec<usize> = (0..columns.len()).map(width).collect();
                for row in &table {
                    let cells: Vec<String> = row
                        .iter()
                        .zip(&widths)
                        .enumerate()
                        .map(
                            |(i, (cell, w))| {
                                if i < 2 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }
                            },
                        )
                        .collect();
                    let _ = writeln!(out, "{}", cells.join("  ").trim_end());
                }
            }
            value => {
                let _ = writeln!(out, "{name:<18} {}", plain(value));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_lengths() {
        assert_eq!(share("3%"), Ok(0.03));
        assert_eq!(share("0.5"), Ok(0.5));
        assert!(share("much").is_err() && share("-1").is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lengths.txt");
        std::fs::write(&file, "900, 1200\n64").unwrap();
        assert_eq!(read_lengths(&file).unwrap(), [900, 1200, 64]);
        std::fs::write(&file, "900 none").unwrap();
        assert_eq!(read_lengths(&file).unwrap_err().kind().exit_code(), 3);
        std::fs::write(&file, "").unwrap();
        assert!(read_lengths(&file).is_err());
    }
}
