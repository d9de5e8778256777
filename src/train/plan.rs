//! What a run will need before it starts: device memory by named buffer, and FLOPs.
//!
//! The buffers are made by the constructors that a run uses, over [`Paper`], a device that only counts; with the corpus at hand
//! their sum is what the run (or each rank of it) allocates, to the byte. What kernels work in is estimated and stated apart. FLOPs are counted as in
//! [`flops`]: real tokens and Σ len² of the corpus where there is one, otherwise cells of full length.

use super::lora::Adapters;
use super::optimizer::{Moments, SLOTS};
use super::pretrain::masking;
use super::saver::checkpoint_bytes;
use super::stages::learns_below;
use super::trunk::{adapter_layout, step_sizes};
use super::{finetune, refine};
use crate::collective::slice;
use crate::config::{Precision, Settings, Stage};
use crate::corpus::Corpus;
use crate::cpu::memory::scratch_estimate;
use crate::device::Act;
use crate::error::Result;
use crate::model::flops::{self, Work};
use crate::model::heads::MaskedGenes;
use crate::model::ledger::{Entry, Ledger, Paper};
use crate::model::{Activations, Capacity, DeviceBatch, Layout, ModelConfig, Parameters, Store};
use crate::objective::Objective;
use crate::ops::gene_attention::Pattern;
use half::bf16;
use serde_json::{Value, json};

/// What is planned.
pub struct PlanCase<'a> {
    /// Stage.
    pub stage: Stage,
    /// The network, settings applied.
    pub config: &'a ModelConfig,
    /// Effective settings.
    pub settings: &'a Settings,
    /// The cells; `None` = every cell fills the context.
    pub corpus: Option<&'a Corpus>,
    /// P of `refine`, K of `finetune`.
    pub types: usize,
    /// Are the cells of `refine` labelled (one target each) or scored by markers (P each)?
    pub labelled: bool,
    /// Processes that train together; what is planned is the one that holds most.
    pub ranks: usize,
}

/// Buffers under the heading they belong to.
struct Group {
    name: &'static str,
    entries: Vec<Entry>,
}

impl Group {
    fn bytes(&self) -> u64 {
        self.entries.iter().map(|e| e.bytes).sum()
    }
}

/// A plan.
pub struct Plan {
    groups: Vec<Group>,
    /// Beside the buffers: what kernels work in.
    scratch: Group,
    threads: usize,
    /// Beside the buffers, on a GPU.
    cuda_workspace: u64,
    /// Of a checkpoint: on the disk, and in host memory until it is there.
    checkpoint: u64,
    capacity: Capacity,
    stage: Stage,
    parameters: usize,
    ranks: usize,
    /// Bytes that each rank sends to others in a step, half of them before its update.
    sent_per_step: f64,
    /// FLOPs of one step, all ranks together, and of the run where its length is known.
    flop_per_step: f64,
    steps: Option<u64>,
    tokens_per_step: f64,
    mean_tokens: f64,
    precision: &'static str,
}

/// Plans a run.
pub fn plan(case: &PlanCase<'_>) -> Result<Plan> {
    match case.settings.train.precision {
        Precision::F32 => plan_for::<f32>(case),
        Precision::Bf16 => plan_for::<bf16>(case),
    }
}

fn plan_for<A: Act>(case: &PlanCase<'_>) -> Result<Plan> {
    let (config, settings) = (case.config, case.settings);
    let batch = &settings.batch;
    let context =
        if batch.max_tokens == 0 { config.positions } else { batch.max_tokens.min(config.positions) };
    let special = config.prefix() + config.suffix();
    let longest = match case.corpus.filter(|c| c.cells() > 0) {
        Some(corpus) => {
            let cells = (0..corpus.cells()).map(|cell| corpus.len_of(cell));
            context.min(cells.max().unwrap_or(0) + special)
        }
        None => context,
    };
    // As the trunk cuts logical batches: at least one whole cell, at most the whole batch.
    let tokens = batch.tokens.max(longest).min(batch.cells * longest);
    let capacity = Capacity { tokens, cells: batch.cells.min(tokens) };
    let masks = match case.stage {
        Stage::Pretrain => true,
        Stage::Refine => settings.objective.mlm > 0.0,
        Stage::Finetune => false,
    };

    let mut groups = Vec::new();
    let mut group =
        |name: &'static str, make: &mut dyn FnMut(&mut Ledger<'_, Paper>) -> Result<()>| -> Result<()> {
            let mut ledger = Ledger::new(&Paper);
            make(&mut ledger)?;
            groups.push(Group { name, entries: ledger.entries().to_vec() });
            Ok(())
        };
    let layout = Layout::network(config);
    group("weights", &mut |l| Parameters::<Paper, A>::planned(l, config).map(drop))?;
    group("gradients", &mut |l| Store::<Paper, f32>::planned(l, "gradients", &layout).map(drop))?;
    let depth = config.depth(config.layer)?;
    let frozen = if case.stage == Stage::Finetune { settings.finetune.freeze_layers } else { 0 };
    let adapters = adapter_layout(&layout, settings, |p| learns_below(p, depth, frozen))?;
    if let Some(adapters) = &adapters {
        group("adapters", &mut |l| Adapters::planned(l, adapters.clone()).map(drop))?;
    }
    group("moments", &mut |l| {
        match &adapters {
            Some(adapters) => Moments::planned(l, "the adapters", adapters.len()),
            None if settings.optimizer.sharded => {
                let slices = (0..case.ranks).map(|rank| slice(layout.len(), rank, case.ranks).len());
                Moments::planned(l, "the network", slices.max().unwrap_or(0))
            }
            None => Moments::planned(l, "the network", layout.len()),
        }
        .map(drop)
    })?;
    let recompute = settings.train.recompute;
    group("activations", &mut |l| {
        Activations::<Paper, A>::training(l, config, capacity, recompute).map(drop)
    })?;
    group("batch", &mut |l| {
        DeviceBatch::planned(l, config, capacity)?;
        DeviceBatch::planned(l, config, capacity)?;
        l.zeros::<f32>("cell vectors of evaluation", "(C, D)", capacity.cells * config.width)?;
        l.zeros::<f64>("scalars", "()", SLOTS).map(drop)
    })?;
    if masks {
        let masking = masking(&settings.mask, 0, 0);
        group("masked-gene head", &mut |l| {
            MaskedGenes::<Paper, A>::planned(l, config, capacity, masking).map(drop)
        })?;
    }
    let (width, cells, types) = (config.width, batch.cells, case.types.max(1));
    match case.stage {
        Stage::Pretrain => {}
        Stage::Refine => group("objective", &mut |l| {
            let entries = if case.labelled { 1 } else { types };
            Objective::planned(l, settings.objective.clone(), types, width, cells, entries)?;
            refine::Buffers::planned(l, types, width, cells, capacity.cells).map(drop)
        })?,
        Stage::Finetune => group("classifier", &mut |l| {
            let classifier = Layout::classifier(types, width);
            finetune::Buffers::planned(l, &classifier, width, capacity.cells).map(drop)
        })?,
    }

    let cut = |len: usize| (len + special).min(longest);
    let attending = |len: usize| match config.attention {
        Pattern::Dense => (len * len) as f64,
        // Global tokens depend on the markers; without them this is the window alone.
        Pattern::MarkerSparse { window } => (len * (2 * window + 1).min(len)) as f64,
    };
    let (mean_tokens, mean_pairs, corpus_cells) = match case.corpus.filter(|c| c.cells() > 0) {
        Some(corpus) => {
            let cells = corpus.cells();
            let sums = (0..cells)
                .map(|c| cut(corpus.len_of(c)))
                .fold((0.0, 0.0), |(t, p), len| (t + len as f64, p + attending(len)));
            (sums.0 / cells as f64, sums.1 / cells as f64, Some(cells))
        }
        None => (longest as f64, attending(longest), None),
    };
    let step_cells = (batch.cells * settings.train.accumulate) as f64;
    let work = |masked: f64| Work {
        tokens: (mean_tokens * step_cells) as u64,
        pairs: (mean_pairs * step_cells) as u64,
        masked: (masked * mean_tokens * step_cells) as u64,
    };
    let masked_pass = flops::training(config, config.layers, work(settings.mask.probability));
    let flop_per_step = match case.stage {
        Stage::Pretrain => masked_pass,
        Stage::Finetune => flops::training(config, depth, work(0.0)),
        Stage::Refine => flops::training(config, depth, work(0.0)) + if masks { masked_pass } else { 0.0 },
    };
    let per_epoch = corpus_cells.map(|cells| cells as f64 / step_cells);
    let steps = match settings.train.steps {
        0 => per_epoch.map(|steps| (steps * settings.train.epochs).ceil() as u64),
        steps => Some(steps),
    };
    let masked = if masks { masking(&settings.mask, 0, 0).room(tokens) } else { 0 };
    let stage_types = if case.stage == Stage::Pretrain { 0 } else { types };
    let sizes = step_sizes(config, capacity, cells, longest, masked, stage_types, layout.len());
    let threads = rayon::current_num_threads();
    let scratch = scratch_estimate(&sizes, threads);
    let scratch = Group {
        name: "scratch of the processor's kernels",
        entries: scratch
            .into_iter()
            .map(|(name, shape, bytes)| Entry { name: name.into(), shape, bytes })
            .collect(),
    };
    let own = match case.stage {
        Stage::Pretrain => 0,
        Stage::Refine => types * width,
        Stage::Finetune => types * (width + 1),
    };
    // A sum sends (n-1)/n of an array and gathers as much; cell vectors are gathered alone, and prototypes' gradients not at all.
    let summed = match case.stage {
        Stage::Finetune => own,
        _ => 0,
    } + adapters.as_ref().map_or(layout.len(), |a| a.len());
    let gathered = match case.stage {
        Stage::Refine => cells * settings.train.accumulate * width,
        _ => 0,
    };
    let others = (case.ranks - 1) as f64 / case.ranks as f64;
    Ok(Plan {
        ranks: case.ranks,
        sent_per_step: others * size_of::<f32>() as f64 * (2 * summed + gathered) as f64,
        checkpoint: checkpoint_bytes(layout.len(), adapters.as_ref().map(|a| a.len()), own),
        groups,
        scratch,
        threads,
        cuda_workspace: crate::cuda::step_bytes::<A>(&sizes, true) as u64,
        capacity,
        stage: case.stage,
        parameters: layout.parameters(),
        flop_per_step,
        steps,
        tokens_per_step: mean_tokens * step_cells,
        mean_tokens,
        precision: A::NAME,
    })
}

impl Plan {
    /// Estimated bytes of what the processor's kernels work in, beside the buffers.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch.bytes()
    }

    /// Bytes of what the CUDA kernels work in, beside the buffers; cuBLASLt's own 32 MiB on a GPU are not counted.
    pub fn cuda_workspace_bytes(&self) -> u64 {
        self.cuda_workspace
    }

    /// Bytes of all buffers: what a run allocates on its device, to the byte.
    pub fn bytes(&self) -> u64 {
        self.groups.iter().map(Group::bytes).sum()
    }

    /// The object for programs: every buffer by name.
    pub fn to_json(&self) -> Value {
        let groups: Vec<Value> = self
            .groups
            .iter()
            .map(|g| json!({"group": g.name, "bytes": g.bytes(), "buffers": g.entries}))
            .collect();
        json!({
            "stage": self.stage.name(),
            "precision": self.precision,
            "parameters": self.parameters,
            "part_tokens": self.capacity.tokens,
            "part_cells": self.capacity.cells,
            "bytes": self.bytes(),
            "groups": groups,
            "scratch": {"bytes": self.scratch_bytes(), "threads": self.threads, "kernels": self.scratch.entries},
            "cuda_workspace": self.cuda_workspace,
            "checkpoint_bytes": self.checkpoint,
            "mean_tokens": self.mean_tokens,
            "tokens_per_step": self.tokens_per_step,
            "ranks": self.ranks,
            "sent_per_step_and_rank": self.sent_per_step,
            "flop_per_step": self.flop_per_step,
            "steps": self.steps,
            "flop": self.steps.map(|s| s as f64 * self.flop_per_step),
        })
    }

    /// The table for people. Buffers of the layers are summed over the layers.
    pub fn to_text(&self) -> String {
        use std::fmt::Write as _;
        let mb = |bytes: u64| format!("{:>10.2} MB", bytes as f64 / 1e6);
        let mut out = format!(
            "{} of {} parameters, {}; parts of at most {} tokens in {} cells\n",
            self.stage.name(),
            self.parameters,
            self.precision,
            self.capacity.tokens,
            self.capacity.cells
        );
        for group in self.groups.iter().chain([&self.scratch]) {
            let _ = writeln!(out, "{:<36} {}", group.name, mb(group.bytes()));
            let mut rows: Vec<(String, &str, u64, usize)> = Vec::new();
            for e in &group.entries {
                // layer.3.qkv and hidden_state.3 are rows of one line.
                let name: Vec<&str> =
                    e.name.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
                let name = name.join(".");
                match rows.iter_mut().find(|(n, ..)| *n == name) {
                    Some(row) => (row.2, row.3) = (row.2 + e.bytes, row.3 + 1),
                    None => rows.push((name, e.shape, e.bytes, 1)),
                }
            }
            for (name, shape, bytes, times) in rows {
                let times = if times > 1 { format!(" x {times}") } else { String::new() };
                let _ = writeln!(out, "  {name:<32} {}  {shape}{times}", mb(bytes));
            }
        }
        let _ = writeln!(out, "{:<36} {}", "buffers in all", mb(self.bytes()));
        let _ = writeln!(
            out,
            "{:<36} {}",
            format!("scratch beside them, {} threads, about", self.threads),
            mb(self.scratch_bytes())
        );
        let _ = writeln!(out, "{:<36} {}", "or what CUDA kernels work in", mb(self.cuda_workspace));
        let _ = writeln!(
            out,
            "{:<36} {}  on the disk, and in host memory until it is there",
            "a checkpoint, about",
            mb(self.checkpoint)
        );
        let _ = writeln!(
            out,
            "a step: {:.4} TFLOP over {:.0} tokens (mean cell {:.0})",
            self.flop_per_step / 1e12,
            self.tokens_per_step,
            self.mean_tokens
        );
        if self.ranks > 1 {
            let _ = writeln!(
                out,
                "divided over {} ranks, each of which holds the above and sends {:.2} MB a step",
                self.ranks,
                self.sent_per_step / 1e6
            );
        }
        if let Some(steps) = self.steps {
            let _ = writeln!(
                out,
                "the run: {steps} steps, {:.2} TFLOP",
                steps as f64 * self.flop_per_step / 1e12
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Preset;
    use crate::model::config::Vocabulary;

    #[test]
    fn parts_bound_memory_and_terms_that_are_off_cost_nothing() {
        let config = Preset::named("tiny").unwrap().config(1_000, Vocabulary::default());
        let mut settings = Settings::defaults(Stage::Refine, &config);
        let of = |settings: &Settings, stage| {
            let case = PlanCase {
                stage,
                config: &config,
                settings,
                corpus: None,
                types: 12,
                labelled: true,
                ranks: 1,
            };
            plan(&case).unwrap()
        };
        settings.objective.mlm = 0.5;
        let with_mask = of(&settings, Stage::Refine);
        settings.objective.mlm = 0.0;
        let without = of(&settings, Stage::Refine);
        assert!(with_mask.bytes() > without.bytes() && with_mask.flop_per_step > 2.0 * without.flop_per_step);
        settings.batch.tokens /= 8;
        let smaller = of(&settings, Stage::Refine);
        assert!(smaller.bytes() < without.bytes() && smaller.flop_per_step == without.flop_per_step);
        let json = with_mask.to_json();
        let sum: u64 = json["groups"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|g| g["buffers"].as_array().unwrap())
            .map(|b| b["bytes"].as_u64().unwrap())
            .sum();
        assert_eq!(Some(sum), json["bytes"].as_u64());
        for stage in [Stage::Pretrain, Stage::Finetune] {
            assert!(of(&settings, stage).to_text().contains("buffers in all"));
        }
    }
}
