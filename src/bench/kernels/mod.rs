//! `bench kernels`: each op over the shapes it has in a training step, against a counted floor, its result checked first.
//!
//! The floor of an op is the larger of its FLOPs over the measured arithmetic peak and its bytes (each operand read once, each
//! result written once) over the measured copy bandwidth; `fraction_of_peak` is floor time over measured time. Working sets
//! that fit a cache can pass a bandwidth floor: then the fraction is above 1 (on a GPU the cache is cold, see
//! [`clock`]).
//!
//! A [`Kernel`] is one op with its buffers. Outputs start as NaN; after the first run every element has to be a number, and a
//! sample of them has to agree with f64 written out beside each op. On request the op also runs again from the start, many
//! times, and has to give the same bits ([`Trial::repeats`]), or runs on a second device ([`Trial::against`]).

mod attention;
mod check;
mod embed;
mod layernorm;
mod linear;
mod loss;
mod small;
mod sweep;

use super::clock::{self, Cache, Clock};
use super::peak::{Ceiling, Peak};
use super::{Effort, round4};
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::model::config::Preset;
use crate::ops::Backend;
pub use check::Trial;
use serde_json::{Value, json};
use std::time::Instant;
pub use sweep::Sweep;

/// What to time.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelCase {
    /// Size of the network.
    pub preset: Preset,
    /// Tokens of each cell of the batch that every op works on.
    pub lengths: Vec<usize>,
    /// Shapes besides.
    pub sweep: Sweep,
    /// How long to measure each.
    pub effort: Effort,
    /// Seed of the inputs.
    pub seed: u64,
    /// Measure ceilings and times; otherwise results are checked alone.
    pub timed: bool,
    /// How often each runs for its bits, and beside which device.
    pub trial: Trial,
    /// Only kernels whose label holds one of these; all where there are none.
    pub only: Vec<String>,
}

/// Which op on what, and the least it must do.
#[derive(Debug, Clone, PartialEq)]
pub struct About {
    /// Op, direction and place.
    pub name: String,
    /// Sizes, for people.
    pub shape: String,
    /// Floating-point operations of the products.
    pub flop: f64,
    /// Bytes of operands and results, each once.
    pub bytes: f64,
    /// Type of the activations.
    pub act: &'static str,
    /// Largest error, as a share of the largest magnitude.
    pub bound: f64,
    /// A few launches' worth of work: also timed as a graph.
    pub small: bool,
}

/// What an element of a result has to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// Which of [`Kernel::outputs`].
    pub output: usize,
    /// What of it; elements are held against the largest of the same name.
    pub what: &'static str,
    /// (element, value).
    pub elements: Vec<(usize, f64)>,
}

/// One op with its buffers, ready to run.
pub trait Kernel {
    /// Name, shape and floor.
    fn about(&self) -> About;
    /// Queues the op once.
    fn run(&mut self) -> Result<()>;
    /// Every result, widened.
    fn outputs(&self) -> Result<Vec<(&'static str, Vec<f64>)>>;
    /// A sample of the results of the first run, by f64.
    fn expected(&self) -> Result<Vec<Expected>>;
}

/// Makes a kernel on a device.
type Maker<B> = Box<dyn Fn(&B) -> Result<Box<dyn Kernel>>>;

/// A kernel to be made.
struct Make<B> {
    /// Its name, and a shape where it has several: what [`KernelCase::only`] picks by.
    label: String,
    /// The same every time.
    make: Maker<B>,
}

impl<B> Make<B> {
    fn new<K: Kernel + 'static>(label: impl Into<String>, make: impl Fn(&B) -> Result<K> + 'static) -> Self {
        let make = Box::new(move |dev: &B| Ok(Box::new(make(dev)?) as Box<dyn Kernel>));
        Make { label: label.into(), make }
    }
}

/// All kernels of a case, in the order of the report.
fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let mut makes = linear::all::<B, A>(case);
    makes.extend(attention::all::<B, A>(case));
    makes.extend(layernorm::all::<B, A>(case));
    makes.extend(embed::all::<B, A>(case));
    makes.extend(loss::all::<B, A>(case));
    makes.extend(small::all::<B, A>(case));
    makes.retain(|m| case.only.is_empty() || case.only.iter().any(|only| m.label.contains(only)));
    makes
}

/// Ceilings of the run.
struct Ceilings {
    peak: Option<Peak>,
    copy: Option<f64>,
}

impl Ceilings {
    /// The product runs until the clocks have settled.
    fn measure<B: Ceiling>(dev: &B, effort: Effort, bf16: bool) -> Self {
        let start = Instant::now();
        let mut peak = dev.peak(bf16);
        while peak.is_some() && start.elapsed().as_secs_f64() < effort.warm_up_s {
            peak = dev.peak(bf16);
        }
        Ceilings { peak, copy: dev.copy_gb_per_s() }
    }
}

/// Checks and times every op of the network's body and of its heads. `note` hears what comes next.
///
/// # Errors
/// What an op returns. A wrong result is no error here: its row has `ok: false` and no time, and [`wrong`] finds it.
pub fn run<B: Backend<A> + Ceiling + Clock, A: Act>(
    dev: &B,
    case: &KernelCase,
    mut note: impl FnMut(&str),
) -> Result<Value> {
    if case.lengths.is_empty() || case.lengths.contains(&0) {
        return Err(Error::new(Code::BenchCase, "no cells, or a cell without tokens, to time")
            .wanted("lengths of at least 1"));
    }
    note("ceilings");
    let ceilings = match case.timed {
        true => Ceilings::measure(dev, case.effort, !A::IS_F32),
        false => Ceilings { peak: None, copy: None },
    };
    let (mut rows, mut last) = (Vec::new(), String::new());
    for (i, make) in all::<B, A>(case).iter().enumerate() {
        let mut kernel = (make.make)(dev)?;
        let about = kernel.about();
        if about.name != last {
            note(&about.name);
            last.clone_from(&about.name);
        }
        let verdict = case.trial.judge::<B, A>(dev, case, i, kernel.as_mut())?;
        let mut row = json!({"name": about.name, "shape": about.shape, "dtype": about.act});
        if case.timed && verdict["ok"] == true {
            add(&mut row, time(dev, case.effort, &about, kernel.as_mut(), &ceilings)?);
        } else {
            add(
                &mut row,
                json!({"ms_median": null, "gb_per_s": null, "tflop_per_s": null, "fraction_of_peak": null}),
            );
        }
        add(&mut row, verdict);
        rows.push(row);
    }
    let p = case.preset;
    Ok(json!({
        "bench": "kernels",
        "preset": p.name,
        "tokens": case.lengths.iter().sum::<usize>(),
        "cells": case.lengths.len(),
        "sum_len2": case.lengths.iter().map(|l| l * l).sum::<usize>(),
        "lengths": case.lengths,
        "dtype": A::NAME,
        "device": dev.name(),
        "conditions": dev.conditions(),
        "threads": rayon::current_num_threads(),
        "warm_up_s": case.effort.warm_up_s,
        "peak_gflop_per_s": ceilings.peak.as_ref().map(|p| round4(p.gflop_per_s)),
        "peak_source": ceilings.peak.as_ref().map(|p| &p.source),
        "copy_gb_per_s": ceilings.copy.map(round4),
        "kernels": rows,
        "version": env!("CARGO_PKG_VERSION"),
    }))
}

/// Names and shapes of the rows of a report whose result was wrong.
pub fn wrong(report: &Value) -> Vec<String> {
    let rows = report["kernels"].as_array().map_or(&[][..], Vec::as_slice);
    let named = |r: &Value| format!("{} {} {}", r["name"], r["shape"], r["why"]).replace('"', "");
    rows.iter().filter(|r| r["ok"] == false).map(named).collect()
}

/// Fields of `more` into `row`.
fn add(row: &mut Value, more: Value) {
    if let (Value::Object(row), Value::Object(more)) = (row, more) {
        row.extend(more);
    }
}

fn time<B: Clock>(
    dev: &B,
    effort: Effort,
    about: &About,
    kernel: &mut dyn Kernel,
    ceilings: &Ceilings,
) -> Result<Value> {
    let timing = dev.time(effort, Cache::Cold, &mut || kernel.run())?;
    let graph = match about.small {
        true => dev.time_graph(effort, &mut || kernel.run())?.map(|t| t.median_ms()),
        false => None,
    };
    let ms = timing.median_ms();
    let (flops, bytes) = (about.flop / ms / 1e6, about.bytes / ms / 1e6);
    let floor_ms = ceilings
        .peak
        .as_ref()
        .zip(ceilings.copy)
        .map(|(peak, copy)| 1e-6 * (about.flop / peak.gflop_per_s).max(about.bytes / copy));
    let fraction = floor_ms.map(|floor| round4(floor / ms));
    let mut row = json!({
        "ms_median": round4(ms),
        "ms_min": round4(timing.min_ms()),
        "ms_max": round4(timing.max_ms()),
        "gflop_per_s": round4(flops),
        "tflop_per_s": round4(flops / 1e3),
        "gb_per_s": round4(bytes),
        "floor_ms": floor_ms.map(round4),
        "fraction_of_floor": fraction,
        "fraction_of_peak": fraction,
        "graph_ms": graph.map(round4),
    });
    add(&mut row, clock::fields(&timing));
    Ok(row)
}

/// Widened.
fn wide<A: Act>(x: &[A]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// `count` of the numbers below `n`, first and last among them; all where there are no more.
fn spread(n: usize, count: usize) -> Vec<usize> {
    match n <= count {
        true => (0..n).collect(),
        false => (0..count).map(|i| i * (n - 1) / (count - 1)).collect(),
    }
}

/// Where each cell starts, and where the last ends.
fn starts(lengths: &[usize]) -> Vec<u32> {
    let ends = lengths.iter().scan(0, |at, len| {
        *at += *len as u32;
        Some(*at)
    });
    std::iter::once(0).chain(ends).collect()
}

#[cfg(test)]
mod tests;
