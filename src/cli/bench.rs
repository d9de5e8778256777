//! `cellrefine bench`: timings against counted floors.

use super::training::TraceFlag;
use super::{Global, Output};
use crate::backend::Choice;
use crate::bench::lengths::{self, LogNormal};
use crate::bench::{Effort, compare, kernels, loader, refine, step, table};
use crate::config::Precision;
use crate::error::{Code, Error, Result};
use crate::model::Preset;
use crate::on_backend;
use crate::trace::Trace;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Flags of `bench`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:\n  \
    cellrefine bench cpu --threads 2 --h5ad cells.h5ad --json\n  \
    cellrefine bench step --preset gf-v1-10m --seq 2048 --batch 8 --mode train --threads 2 --json\n  \
    cellrefine bench kernels --preset gf-v1-10m --dtype bf16\n  \
    cellrefine bench kernels --device cuda --dtype bf16 --corpus blood.cells --out new.json --compare old.json --fail-above 3%\n  \
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
    /// Tokens of each cell in place of --seq and --batch: a file of whole numbers, or a mixture of median and σ.
    #[arg(long, value_name = "FILE|lognormal:M,S")]
    lengths: Option<String>,
    /// Tokens of a batch whose lengths are drawn (from a mixture or a corpus), and of each batch of --sweep.
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    tokens: usize,
    /// Ids of the vocabulary, in place of the preset's.
    #[arg(long, value_name = "V")]
    vocab: Option<usize>,
    /// Cells; for the loader, cells in a batch.
    #[arg(long, value_name = "B")]
    batch: Option<usize>,
    /// Forward alone; forward, backward and AdamW; or the whole of refine on a made-up corpus.
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
    /// kernels: also attention over cells of 200 to 4,096 tokens and the prototype loss from 256 × 100 to 8,192 × 100,000. The
    /// default on a GPU where no lengths are named.
    #[arg(long)]
    sweep: bool,
    /// kernels: only those whose name (and shape, where there are several) holds this; may be repeated.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// kernels: run each N times from the start and want the same bits.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    repeat: usize,
    /// kernels: a second device that has to agree.
    #[arg(long, value_name = "DEVICE")]
    against: Option<Choice>,
    /// kernels: check results alone: no ceilings, no times.
    #[arg(long)]
    untimed: bool,
    /// step: record the step as a graph and time its replays, where the device has graphs.
    #[arg(long)]
    graph: bool,
    /// GPU: seconds of the same work before it is timed.
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    warm_up: f64,
    /// Two samples, one cell a step, tiny shapes for --sweep: seconds in place of minutes, and no number to quote.
    #[arg(long)]
    quick: bool,
    /// cpu: also pack this file.
    #[arg(long, value_name = "FILE.h5ad")]
    h5ad: Option<PathBuf>,
    /// Loader: a corpus; without it a synthetic one is made. kernels, step: draw the cells' lengths from it.
    #[arg(long, value_name = "X.cells")]
    corpus: Option<PathBuf>,
    /// Loader, --mode refine: cells of the synthetic corpus.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    cells: usize,
    /// Loader: input order in place of random order.
    #[arg(long)]
    sequential: bool,
    #[command(flatten)]
    trace: TraceFlag,
    /// Also write the report here, before anything in it is judged.
    #[arg(long, value_name = "FILE.json")]
    out: Option<PathBuf>,
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
    Refine,
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
        return Err(Error::new(Code::FlagConflict, "--trace is for bench step"));
    }
    let mut preset = Preset::named(&flags.preset)?;
    preset.vocab = flags.vocab.unwrap_or(preset.vocab);
    if preset.vocab < 3 {
        return Err(Error::new(Code::FlagValue, "--vocab is at least 3").found(preset.vocab));
    }
    let gpu = matches!(global.device, Choice::Cuda(_));
    let mut json = match flags.what {
        What::Cpu => {
            if !matches!(global.device, Choice::Auto | Choice::Cpu) {
                return Err(Error::new(Code::FlagConflict, "bench cpu times the processor")
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
        What::Step if flags.mode == Mode::Refine => {
            let batch = flags.batch.unwrap_or(if flags.quick { 4 } else { 32 });
            refine::run(&refine::RefineCase {
                preset,
                device: global.device,
                precision: flags.dtype,
                // Of the mixture, unless a length or a file is named; --batch is the cells of a step here.
                lengths: match names_lengths(&Flags { batch: None, ..flags.clone() }) {
                    true => lengths(flags, &preset, gpu, seed)?,
                    false => LogNormal::of(&preset).draw(flags.tokens.max(1), preset.positions, seed),
                },
                cells: if flags.cells > 0 { flags.cells } else { (24 * batch).max(64) },
                types: if flags.quick { 2 } else { 12 },
                batch,
                log_every: if flags.quick { 1 } else { 5 },
                records: if flags.quick { 1 } else { 10 },
                seed,
            })?
        }
        What::Step => {
            let case = step::StepCase {
                preset,
                lengths: lengths(flags, &preset, gpu, seed)?,
                train: flags.mode == Mode::Train,
                mlm: flags.head == Head::Mlm,
                graph: flags.graph,
                effort: match (flags.quick, gpu) {
                    (true, _) => Effort::quick(),
                    (_, true) => Effort { total_s: flags.seconds, ..Effort::on_gpu(flags.warm_up) },
                    _ => Effort::steps(flags.seconds),
                },
                seed,
            };
            let trace = flags.trace.start()?;
            let json = on_backend!(global.device, flags.dtype, |dev: B, A| step::run::<B, A>(dev, &case)?);
            trace.map_or(Ok(()), Trace::finish)?;
            json
        }
        What::Kernels => {
            let case = kernels::KernelCase {
                preset,
                lengths: lengths(flags, &preset, gpu, seed)?,
                sweep: sweep(flags, &preset, gpu),
                effort: match (flags.quick, gpu) {
                    (true, _) => Effort::quick(),
                    (_, true) => Effort::on_gpu(flags.warm_up),
                    _ => Effort::kernels(),
                },
                seed,
                timed: !flags.untimed,
                trial: kernels::Trial { repeats: flags.repeat, against: flags.against },
                only: flags.only.clone(),
            };
            on_backend!(global.device, flags.dtype, |dev: B, A| {
                kernels::run::<B, A>(dev, &case, |what| global.note(what))?
            })
        }
    };
    write(&json, flags.out.as_deref())?;
    let wrong = kernels::wrong(&json);
    if !wrong.is_empty() {
        return Err(Error::new(Code::KernelWrong, "a kernel's result is wrong").found(wrong.join("; ")));
    }
    if let Some(old) = &flags.compare {
        let compared = compare::compare(&mut json, old, flags.fail_above);
        write(&json, flags.out.as_deref())?;
        compared?;
    }
    let text = match flags.what {
        What::Cpu => table::to_markdown(&json),
        _ => text(&json),
    };
    Ok(Output { text, json })
}

/// The report, where it is asked for.
fn write(json: &Value, out: Option<&Path>) -> Result<()> {
    let Some(out) = out else { return Ok(()) };
    crate::disk::replace(out, format!("{json:#}\n").as_bytes())
}

/// Are any lengths named?
fn names_lengths(flags: &Flags) -> bool {
    flags.lengths.is_some() || flags.corpus.is_some() || flags.seq.is_some() || flags.batch.is_some()
}

/// The cells of a batch. Kernels on a GPU take the preset's mixture where nothing else is said.
fn lengths(flags: &Flags, preset: &Preset, gpu: bool, seed: u64) -> Result<Vec<usize>> {
    let (tokens, context) = (flags.tokens.max(1), preset.positions);
    if let Some(named) = &flags.lengths {
        return match named.strip_prefix("lognormal:") {
            Some(mixture) => Ok(LogNormal::parse(mixture)?.draw(tokens, context, seed)),
            None => lengths::read(Path::new(named)),
        };
    }
    if let Some(corpus) = &flags.corpus {
        return lengths::of_corpus(corpus, tokens, context, seed);
    }
    if gpu && flags.what == What::Kernels && !names_lengths(flags) {
        return Ok(LogNormal::of(preset).draw(tokens, context, seed));
    }
    let seq = flags.seq.unwrap_or(context.min(512));
    let batch = flags.batch.unwrap_or(if flags.quick { 1 } else { 8 });
    if seq == 0 || batch == 0 {
        return Err(
            Error::new(Code::FlagValue, "--seq and --batch are at least 1").found(format!("{seq}, {batch}"))
        );
    }
    Ok(vec![seq; batch])
}

/// The shapes besides.
fn sweep(flags: &Flags, preset: &Preset, gpu: bool) -> kernels::Sweep {
    match flags.sweep || (gpu && !names_lengths(flags)) {
        false => kernels::Sweep::none(),
        true if flags.quick => kernels::Sweep::tiny(),
        true => kernels::Sweep::full(flags.tokens.max(1), preset.positions, preset.width),
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
    fn shares() {
        assert_eq!(share("3%"), Ok(0.03));
        assert_eq!(share("0.5"), Ok(0.5));
        assert!(share("much").is_err() && share("-1").is_err());
    }
}
