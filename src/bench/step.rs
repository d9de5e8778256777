//! `bench step`: a forward pass or a whole training step of one preset on random cells.
//!
//! Random weights and tokens, dropout 0. Without a head, training takes the gradient of a fixed random projection of the
//! output; with `mlm`, 15 % of the tokens are masked and the loss is the masked-gene one. A training step is forward,
//! backward and AdamW. FLOPs are those of [`flops`]: real tokens and Σ len², training three times forward.

use super::clock::{self, Cache, Clock};
use super::peak::Ceiling;
use super::{Effort, round4};
use crate::device::{Act, Device};
use crate::error::{Code, Error, Result};
use crate::model::config::Vocabulary;
use crate::model::flops::{self, Work};
use crate::model::heads::{MaskedGenes, Masking};
use crate::model::ledger::Ledger;
use crate::model::{
    Activations, Capacity, DeviceBatch, Encoder, ModelConfig, Parameters, Pass, Preset, Store,
};
use crate::ops::{Backend, adamw};
use crate::rng::{Philox, site};
use crate::trace;
use serde_json::{Value, json};

/// What to time.
#[derive(Debug, Clone, PartialEq)]
pub struct StepCase {
    /// Size of the network.
    pub preset: Preset,
    /// Tokens of each cell.
    pub lengths: Vec<usize>,
    /// Forward, backward and AdamW; otherwise forward alone.
    pub train: bool,
    /// Masked-gene head on 15 % of the tokens.
    pub mlm: bool,
    /// Replay the step as a graph, where the device has them.
    pub graph: bool,
    /// How long to measure.
    pub effort: Effort,
    /// Seed of weights and tokens.
    pub seed: u64,
}

impl StepCase {
    /// The network: the preset without dropout, its context stretched where a cell is longer.
    pub fn config(&self) -> ModelConfig {
        let vocabulary = Vocabulary { mask: 1, first_gene: 2, ..Vocabulary::default() };
        let mut config = self.preset.config(self.preset.vocab, vocabulary);
        (config.hidden_dropout, config.attention_dropout) = (0.0, 0.0);
        config.positions = config.positions.max(self.lengths.iter().copied().max().unwrap_or(0));
        config
    }
}

/// A step ready to run: every buffer made, every input uploaded.
pub struct Step<B: Backend<A>, A: Act> {
    encoder: Encoder<B>,
    params: Parameters<B, A>,
    acts: Activations<B, A>,
    batch: DeviceBatch<B>,
    head: Option<MaskedGenes<B, A>>,
    training: Option<Training<B, A>>,
    /// Bytes of activations (forward and backward buffers).
    pub activation_bytes: u64,
    /// Bytes of everything on the device.
    pub bytes: u64,
    /// Tokens, pairs and masked tokens of the step.
    pub work: Work,
    steps: u32,
}

struct Training<B: Device, A: Act> {
    grads: Store<B, f32>,
    m: Store<B, f32>,
    v: Store<B, f32>,
    scalars: B::Buf<f64>,
    projection: B::Buf<A>,
}

impl<B: Backend<A>, A: Act> Step<B, A> {
    /// Makes the buffers and uploads random cells.
    pub fn prepare(dev: &B, case: &StepCase) -> Result<Self> {
        let config = case.config();
        let tokens: usize = case.lengths.iter().sum();
        let capacity = Capacity { tokens, cells: case.lengths.len() };
        let mut random = Philox::new(case.seed, 0, site::BENCH);
        let masking = Masking::bert(case.seed, 0);
        let mut ledger = Ledger::new(dev);
        let acts = match case.train {
            true => Activations::training(&mut ledger, &config, capacity, false)?,
            false => Activations::evaluation(&mut ledger, &config, capacity)?,
        };
        let activation_bytes = ledger.bytes();
        let mut batch = DeviceBatch::planned(&mut ledger, &config, capacity)?;
        let mut params = Parameters::planned(&mut ledger, &config)?;
        params.write_with(dev, |dev, master, layout| {
            master.randomize(dev, layout, config.initializer_range, case.seed)
        })?;
        let genes: Vec<u32> = (0..tokens).map(|_| 2 + random.below(config.vocab as u64 - 2) as u32).collect();
        let mut cell_start = vec![0u32];
        for len in &case.lengths {
            cell_start.push(cell_start.last().copied().unwrap_or(0) + *len as u32);
        }
        batch.upload_cells(dev, &config, &genes, &cell_start, None)?;
        let head = if case.mlm {
            let mut head = MaskedGenes::planned(&mut ledger, &config, capacity, masking)?;
            head.mask(dev, &config, &batch, masking, masking.count(&config, &genes, 0))?;
            Some(head)
        } else {
            None
        };
        let training = if case.train {
            let mut projection = ledger.zeros("bench.projection", "(N, D)", tokens * config.width)?;
            let values: Vec<A> =
                (0..tokens * config.width).map(|_| A::from_f32(random.uniform() as f32 - 0.5)).collect();
            dev.write(&mut projection, &values)?;
            Some(Training {
                grads: Store::planned(&mut ledger, "gradients", params.layout())?,
                m: Store::planned(&mut ledger, "first moments", params.layout())?,
                v: Store::planned(&mut ledger, "second moments", params.layout())?,
                scalars: ledger.zeros("scalars", "()", 1)?,
                projection,
            })
        } else {
            None
        };
        let masked = head.as_ref().map_or(0, MaskedGenes::masked) as u64;
        let work = Work { masked, ..Work::dense(case.lengths.iter().copied()) };
        let encoder = Encoder::new(dev.clone(), config);
        let bytes = ledger.bytes();
        Ok(Step { encoder, params, acts, batch, head, training, activation_bytes, bytes, work, steps: 0 })
    }

    /// Matmul FLOPs of one step.
    pub fn flop(&self) -> f64 {
        let forward = flops::forward(&self.encoder.config, self.encoder.config.layers, self.work);
        if self.training.is_some() { 3.0 * forward } else { forward }
    }

    /// One step.
    pub fn run(&mut self) -> Result<()> {
        let _range = trace::range("step");
        let Step { encoder, params, acts, batch, head, training, steps, .. } = self;
        let (dev, config) = (&encoder.dev, &encoder.config);
        let depth = config.layers;
        let input = head.as_ref().map_or_else(|| batch.input(), |h| h.input(batch));
        encoder.forward(params.network(), input, acts, Pass::Eval, depth)?;
        let scale = 1.0 / head.as_ref().map_or(1, MaskedGenes::masked).max(1) as f32;
        if let Some(head) = head {
            let _range = trace::range("loss");
            head.forward(dev, config, params, batch, acts, scale)?;
        }
        let Some(t) = training else { return Ok(()) };
        dev.clear(t.grads.flat_mut())?;
        match head {
            Some(head) => {
                let _range = trace::range("backward");
                head.backward(dev, config, params, batch, acts, scale, t.grads.named_mut())?;
            }
            None => dev.copy(&t.projection, acts.dx()?, batch.tokens * config.width)?,
        }
        let input = head.as_ref().map_or_else(|| batch.input(), |h| h.input(batch));
        encoder.backward(params.network(), input, acts, Pass::Eval, depth, t.grads.named_mut())?;
        let _range = trace::range("optimizer");
        *steps += 1;
        let update = params.update();
        let mut copy = update.copy;
        for (range, weight_decay) in [(update.layout.decayed(), 0.01), (update.layout.undecayed(), 0.0)] {
            let hyper = adamw::Hyper {
                learning_rate: 1e-4,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay,
                step: *steps,
                max_norm: f32::INFINITY,
                norm_slot: 0,
            };
            let state = adamw::State {
                weight: update.weight,
                grad: t.grads.flat(),
                m: t.m.flat_mut(),
                v: t.v.flat_mut(),
                copy: copy.as_deref_mut(),
                scalars: &t.scalars,
            };
            adamw::step::<A, B>(dev, range, hyper, state)?;
        }
        Ok(())
    }

    /// Fails unless the output of the last step is finite: a time of nonsense is no result.
    pub fn check(&self) -> Result<()> {
        let output = self.encoder.dev.download(self.acts.hidden(self.encoder.config.layers))?;
        match output.iter().all(|x| x.to_f32().is_finite()) {
            true => Ok(()),
            false => Err(Error::new(Code::LossNotFinite, "the benchmark's output is not finite")),
        }
    }
}

/// Runs the case and reports it.
pub fn run<B: Backend<A> + Ceiling + Clock, A: Act>(dev: &B, case: &StepCase) -> Result<Value> {
    if case.lengths.is_empty() || case.lengths.contains(&0) {
        return Err(Error::new(Code::BenchCase, "no cells, or a cell without tokens, to time")
            .wanted("lengths of at least 1"));
    }
    let mut step = Step::<B, A>::prepare(dev, case)?;
    step.run()?;
    step.check()?;
    let before = dev.peak(!A::IS_F32);
    let graph = match case.graph {
        true => dev.time_graph(case.effort, &mut || step.run())?,
        false => None,
    };
    let timing = match graph.clone() {
        Some(timing) => timing,
        None => dev.time(case.effort, Cache::AsLeft, &mut || step.run())?,
    };
    let after = dev.peak(!A::IS_F32);
    step.check()?;
    let peak = if before > after { before } else { after };
    let (seconds, flop) = (timing.median_ms() / 1e3, step.flop());
    let rate = flop / seconds / 1e9;
    let tokens = step.work.tokens as f64;
    let mut report = json!({
        "bench": "step",
        "preset": case.preset.name,
        "seq": case.lengths.iter().max(),
        "batch": case.lengths.len(),
        "mode": if case.train { "train" } else { "fwd" },
        "head": if case.mlm { "mlm" } else { "none" },
        "dtype": A::NAME,
        "device": dev.name(),
        "threads": rayon::current_num_threads(),
        "ms_median": round4(timing.median_ms()),
        "ms_min": round4(timing.min_ms()),
        "ms_max": round4(timing.max_ms()),
        "graph": graph.is_some(),
        "tokens_per_s": round4(tokens / seconds),
        "cells_per_s": round4(case.lengths.len() as f64 / seconds),
        "gflop": round4(flop / 1e9),
        "gflop_per_s": round4(rate),
        "peak_gflop_per_s": peak.as_ref().map(|p| round4(p.gflop_per_s)),
        "peak_source": peak.as_ref().map(|p| &p.source),
        "fraction_of_peak": peak.as_ref().map(|p| round4(rate / p.gflop_per_s)),
        "tokens": step.work.tokens,
        "sum_len2": step.work.pairs,
        "masked": step.work.masked,
        "activation_bytes": step.activation_bytes,
        "device_bytes": step.bytes,
        "other_load": round4(timing.other_load),
        "lengths": case.lengths,
        "conditions": dev.conditions(),
        "version": env!("CARGO_PKG_VERSION"),
    });
    if let (Value::Object(report), Value::Object(more)) = (&mut report, clock::fields(&timing)) {
        report.extend(more);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use half::bf16;

    #[test]
    fn every_mode_reports_what_the_command_line_promises() {
        let preset = Preset { vocab: 300, ..Preset::named("tiny").unwrap() };
        for (train, mlm) in [(false, false), (false, true), (true, false), (true, true)] {
            let effort = Effort::quick();
            let case = StepCase { preset, lengths: vec![9, 300], train, mlm, graph: false, effort, seed: 1 };
            assert_eq!(case.config().positions, 300);
            let (a, b) = (run::<Cpu, f32>(&Cpu, &case).unwrap(), run::<Cpu, bf16>(&Cpu, &case).unwrap());
            for report in [a, b] {
                for field in
                    ["ms_median", "ms_min", "tokens_per_s", "cells_per_s", "gflop_per_s", "peak_gflop_per_s"]
                {
                    assert!(report[field].as_f64().unwrap() > 0.0, "{field}: {report}");
                }
                assert!(report["runs"].as_u64().unwrap() >= 2 && report["peak_source"].is_string());
                assert_eq!(report["sum_len2"], 81 + 90_000);
            }
        }
    }
}
