//! `bench kernels`: each op over the shapes it has in a training step of one preset, against a counted floor.
//!
//! The floor of an op is the larger of its FLOPs over the measured arithmetic peak and its bytes (each operand read once, each
//! result written once) over the measured copy bandwidth; `fraction_of_floor` is floor time over measured time. Working sets
//! that fit a cache can pass a bandwidth floor: then the fraction is above 1.

use super::peak::Ceiling;
use super::{Effort, round4, time};
use crate::device::{Act, Dropout};
use crate::error::{Error, Result};
use crate::model::config::Preset;
use crate::ops::gene_attention::Pattern;
use crate::ops::{Backend, adamw, embed, gene_attention, layernorm, linear, prototype_loss, reduce};
use crate::rng::{Philox, site};
use serde_json::{Value, json};

/// What to time.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelCase {
    /// Size of the network.
    pub preset: Preset,
    /// Tokens of each cell.
    pub lengths: Vec<usize>,
    /// How long to measure each.
    pub effort: Effort,
    /// Seed of the inputs.
    pub seed: u64,
}

/// Collects rows of the report.
struct Report {
    peak_gflop_per_s: f64,
    copy_gb_per_s: f64,
    dtype: &'static str,
    effort: Effort,
    rows: Vec<Value>,
}

impl Report {
    fn add(
        &mut self,
        name: &str,
        shape: String,
        flop: f64,
        bytes: f64,
        call: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let timing = time(self.effort, call)?;
        let ms = timing.median_ms();
        let floor_ms = 1e-6 * (flop / self.peak_gflop_per_s).max(bytes / self.copy_gb_per_s);
        self.rows.push(json!({
            "name": name,
            "shape": shape,
            "dtype": self.dtype,
            "ms_median": round4(ms),
            "ms_min": round4(timing.min_ms()),
            "gflop_per_s": round4(flop / ms / 1e6),
            "gb_per_s": round4(bytes / ms / 1e6),
            "floor_ms": round4(floor_ms),
            "fraction_of_floor": round4(floor_ms / ms),
        }));
        Ok(())
    }
}

/// Times every op of the network's body and of its heads.
pub fn run<B: Backend<A> + Ceiling, A: Act>(dev: &B, case: &KernelCase) -> Result<Value> {
    let p = case.preset;
    let (n, d, f, h, v) = (case.lengths.iter().sum::<usize>(), p.width, p.ffn, p.heads, p.vocab);
    let positions = p.positions.max(case.lengths.iter().copied().max().unwrap_or(1));
    let pairs: f64 = case.lengths.iter().map(|l| (l * l) as f64).sum();
    let no_floor = || {
        Error::environment("this device has no measured ceiling to hold kernels against").found(dev.name())
    };
    let peak = dev.peak(!A::IS_F32).ok_or_else(no_floor)?;
    let bandwidth = dev.copy_gb_per_s().ok_or_else(no_floor)?;
    let mut report = Report {
        peak_gflop_per_s: peak.gflop_per_s,
        copy_gb_per_s: bandwidth,
        dtype: A::NAME,
        effort: case.effort,
        rows: Vec::new(),
    };
    let mut random = Philox::new(case.seed, 1, site::BENCH);
    let mut acts = |len: usize| -> Result<B::Buf<A>> {
        let values: Vec<A> = (0..len).map(|_| A::from_f32(random.uniform() as f32 - 0.5)).collect();
        dev.upload(&values)
    };
    let (e, nd) = (size_of::<A>() as f64, (n * d) as f64);

    for (name, inputs, outputs, activation) in [
        ("linear_forward/qkv", d, 3 * d, linear::Activation::None),
        ("linear_forward/out", d, d, linear::Activation::None),
        ("linear_forward/up_relu", d, f, linear::Activation::Relu),
        ("linear_forward/down", f, d, linear::Activation::None),
    ] {
        let dims = linear::Dims { rows: n, inputs, outputs };
        let (x, weight, bias) = (acts(n * inputs)?, acts(outputs * inputs)?, acts(outputs)?);
        let (mut y, mut dx) = (dev.zeros::<A>(n * outputs)?, dev.zeros::<A>(n * inputs)?);
        let (mut dw, mut db) = (dev.zeros::<f32>(outputs * inputs)?, dev.zeros::<f32>(outputs)?);
        let shape = format!("{n}x{inputs}x{outputs}");
        let flop = 2.0 * (n * inputs * outputs) as f64;
        let bytes = e * (n * inputs + n * outputs + inputs * outputs) as f64;
        report.add(name, shape.clone(), flop, bytes, || {
            let input = linear::In { x: &x, weight: &weight, bias: Some(&bias), activation };
            linear::forward::<A, B>(dev, dims, input, &mut y)
        })?;
        report.add(&name.replace("forward", "backward_input"), shape.clone(), flop, bytes, || {
            let input =
                linear::BackwardInput { dy: &y, weight: &weight, relu_output: None, accumulate: false };
            linear::backward_input::<A, B>(dev, dims, input, &mut dx)
        })?;
        report.add(&name.replace("forward", "backward_weight"), shape, flop, bytes, || {
            let input = linear::BackwardWeight { x: &x, dy: &y };
            linear::backward_weight::<A, B>(dev, dims, input, &mut dw, Some(&mut db))
        })?;
    }

    let starts: Vec<u32> = std::iter::once(0)
        .chain(case.lengths.iter().scan(0u32, |at, len| {
            *at += *len as u32;
            Some(*at)
        }))
        .collect();
    let cell_start = dev.upload(&starts)?;
    let dims = gene_attention::Dims {
        tokens: n,
        cells: case.lengths.len(),
        heads: h,
        head_width: d / h,
        max_len: case.lengths.iter().copied().max().unwrap_or(1),
        pattern: Pattern::Dense,
    };
    let (qkv, do_) = (acts(3 * n * d)?, acts(n * d)?);
    let (mut o, mut dqkv) = (dev.zeros::<A>(n * d)?, dev.zeros::<A>(3 * n * d)?);
    let (mut lse, mut delta) = (dev.zeros::<f32>(n * h)?, dev.zeros::<f32>(n * h)?);
    let input =
        || gene_attention::In { qkv: &qkv, cell_start: &cell_start, global: None, dropout: Dropout::NONE };
    let shape = format!("{n} tokens, {} cells, {h}x{}", case.lengths.len(), d / h);
    let flop = 4.0 * d as f64 * pairs;
    report.add("gene_attention_forward", shape.clone(), flop, 4.0 * e * nd, || {
        gene_attention::forward::<A, B>(dev, dims, input(), &mut o, &mut lse)
    })?;
    report.add("gene_attention_backward", shape, 2.5 * flop, 8.0 * e * nd, || {
        let back = gene_attention::BackwardIn { do_: &do_, o: &o, lse: &lse };
        gene_attention::backward::<A, B>(dev, dims, input(), back, &mut dqkv, &mut delta)
    })?;

    let dims = layernorm::Dims { rows: n, width: d, eps: 1e-12 };
    let (weight, bias, residual) = (acts(d)?, acts(d)?, acts(n * d)?);
    let (mut sum, mut y, mut dresidual) = (acts(n * d)?, dev.zeros::<A>(n * d)?, dev.zeros::<A>(n * d)?);
    let (mut mean, mut rstd) = (dev.zeros::<f32>(n)?, dev.zeros::<f32>(n)?);
    let (mut dweight, mut dbias) = (dev.zeros::<f32>(d)?, dev.zeros::<f32>(d)?);
    for (name, probability) in [("layernorm_forward", 0.0), ("layernorm_forward/dropout", 0.1)] {
        let dropout = Dropout { probability, ..Dropout::NONE };
        report.add(name, format!("{n}x{d}"), 0.0, 4.0 * e * nd, || {
            let input = layernorm::In { residual: Some(&residual), weight: &weight, bias: &bias, dropout };
            let out = layernorm::Out { x_then_sum: &mut sum, y: &mut y, mean: &mut mean, rstd: &mut rstd };
            layernorm::forward::<A, B>(dev, dims, input, out)
        })?;
        dev.copy(&residual, &mut sum, n * d)?;
    }
    report.add("layernorm_backward", format!("{n}x{d}"), 0.0, 4.0 * e * nd, || {
        let input = layernorm::BackwardIn {
            dy: &do_,
            sum: &sum,
            mean: &mean,
            rstd: &rstd,
            weight: &weight,
            dropout: Dropout::NONE,
            relu_input: false,
        };
        let grads = layernorm::Gradients {
            dx: &mut y,
            dresidual: Some(&mut dresidual),
            dweight: &mut dweight,
            dbias: &mut dbias,
        };
        layernorm::backward::<A, B>(dev, dims, input, grads)
    })?;

    let (word, position_table, type_table) = (acts(v * d)?, acts(positions * d)?, acts(2 * d)?);
    let genes: Vec<u32> = (0..n).map(|i| (i as u64 * 7_919 % v as u64) as u32).collect();
    let position: Vec<u32> = case.lengths.iter().flat_map(|len| 0..*len as u32).collect();
    let (gene, position) = (dev.upload(&genes)?, dev.upload(&position)?);
    let dims = embed::Dims { tokens: n, width: d, vocab: v, positions, value_bins: 0, eps: 1e-12 };
    let tables = || embed::Tables {
        gene: &gene,
        position: &position,
        value_bin: None,
        word: &word,
        position_table: &position_table,
        type_table: &type_table,
        value_table: None,
        weight: &weight,
        bias: &bias,
        dropout: Dropout::NONE,
    };
    report.add("embed_forward", format!("{n}x{d}"), 0.0, 3.0 * e * nd, || {
        let out = embed::Out { x: &mut y, mean: &mut mean, rstd: &mut rstd };
        embed::forward::<A, B>(dev, dims, tables(), out)
    })?;
    let mut dtables = (dev.zeros::<f32>(v * d)?, dev.zeros::<f32>(positions * d)?, dev.zeros::<f32>(2 * d)?);
    report.add("embed_backward", format!("{n}x{d}"), 0.0, (3.0 * e + 16.0) * nd, || {
        let input = embed::BackwardIn { dx: &do_, mean: &mean, rstd: &rstd };
        let grads = embed::Gradients {
            word: &mut dtables.0,
            position_table: &mut dtables.1,
            type_table: &mut dtables.2,
            value_table: None,
            weight: &mut dweight,
            bias: &mut dbias,
        };
        embed::backward::<A, B>(dev, dims, tables(), input, grads)
    })?;

    let m = (n * 15).div_ceil(100);
    let targets: Vec<i32> = genes[..m].iter().map(|g| *g as i32).collect();
    let (targets, row_weight, z) = (dev.upload(&targets)?, dev.upload(&vec![1.0f32; m])?, acts(m * d)?);
    let mut loss = dev.zeros::<f32>(m)?;
    let (mut lse, mut dz, mut dbias) = (dev.zeros::<f32>(m)?, dev.zeros::<A>(m * d)?, dev.zeros::<f32>(v)?);
    let vocab_bias = dev.zeros::<f32>(v)?;
    let dims = prototype_loss::Dims {
        rows: m,
        columns: v,
        width: d,
        gradient_scale: 1.0 / m as f32,
        bias_in_target: true,
    };
    let input = || prototype_loss::In {
        z: &z,
        column: &word,
        scale: None,
        bias: Some(&vocab_bias),
        margin: None,
        row_weight: &row_weight,
        target: prototype_loss::Target::Sparse {
            entries: 1,
            column: &targets,
            mass: None,
            mix: None,
            teacher: None,
        },
    };
    let (shape, flop) = (format!("{m}x{v}x{d}"), 2.0 * (m * v * d) as f64);
    let bytes = e * ((m + v) * d) as f64;
    report.add("prototype_loss_forward/masked_genes", shape.clone(), 2.0 * flop, bytes, || {
        let out = prototype_loss::Out { loss: &mut loss, lse: &mut lse, dz: &mut dz, accumulate_dz: false };
        prototype_loss::forward::<A, B>(dev, dims, input(), out)
    })?;
    report.add("prototype_loss_backward/masked_genes", shape, 2.0 * flop, bytes, || {
        let grads =
            prototype_loss::ColumnGradients { column: &mut dtables.0, bias: Some(&mut dbias), scale: None };
        prototype_loss::backward::<A, B>(dev, dims, input(), &lse, grads)
    })?;

    let len = v * d;
    let mut weights = (dev.zeros::<f32>(len)?, dev.zeros::<f32>(len)?, dev.zeros::<f32>(len)?);
    let mut copy = if A::IS_F32 { None } else { Some(dev.zeros::<A>(len)?) };
    let mut scalars = dev.zeros::<f64>(1)?;
    let bytes = len as f64 * (28.0 + if A::IS_F32 { 0.0 } else { e });
    report.add("adamw", format!("{len}"), 0.0, bytes, || {
        let hyper = adamw::Hyper {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            step: 1,
            max_norm: f32::INFINITY,
            norm_slot: 0,
        };
        let state = adamw::State {
            weight: &mut weights.0,
            grad: &dtables.0,
            m: &mut weights.1,
            v: &mut weights.2,
            copy: copy.as_mut(),
            scalars: &scalars,
        };
        adamw::step::<A, B>(dev, 0..len, hyper, state)
    })?;
    report.add("reduce_sum_squares", format!("{len}"), 0.0, 4.0 * len as f64, || {
        reduce::sum_squares(dev, &dtables.0, len, &mut scalars, 0)
    })?;

    Ok(json!({
        "bench": "kernels",
        "preset": p.name,
        "tokens": n,
        "cells": case.lengths.len(),
        "dtype": A::NAME,
        "device": dev.name(),
        "threads": rayon::current_num_threads(),
        "peak_gflop_per_s": round4(peak.gflop_per_s),
        "peak_source": peak.source,
        "copy_gb_per_s": round4(bandwidth),
        "kernels": report.rows,
        "version": env!("CARGO_PKG_VERSION"),
    }))
}
