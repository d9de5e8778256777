//! The terms on cell vectors, over one logical batch.
//!
//! ```text
//! z = normalize(h - μ),  p = normalize(q - μ)
//! proto       Σ_i κ_i [ lse_k s_ik - Σ_k t_ik s_ik ],  s_ik = (z_i·p_k - m_k 1[k = y_i]) / τ_k + b_k,  κ_i = w_{y_i} / Σ w
//! cell_cell   1/C Σ_i mean_{a∈P(i)} [ lse_{b≠i}(z_i·z_b/τ_c + β_ib) - z_i·z_a/τ_c ],  β_ib = -log max(1, n_b - 1[b∈P(i)])
//! structure   1/(P(P-1)) Σ_{k≠l} (p_k·p_l - φ(J_kl))²
//! anchor      1/C Σ_i (1 - z_i·z⁰_i)  +  γ_q/P Σ_k (1 - p_k·p⁰_k)
//! ```
//! dz and dp are sums over the terms; one normalisation backward each turns them into dh and dq. The first two terms are
//! the same streaming op, [`prototype_loss`]; in the second, cells are rows and columns, so both its passes add to dz.

use super::buffers::{Cells, Prototypes, Staging};
use super::{CellTargets, ObjectiveConfig, Teacher, imbalance, targets};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::ledger::Ledger;
use crate::ops::anchor::{self, Anchor};
use crate::ops::normalize::{self, Normalize};
use crate::ops::prototype_loss::{self, ColumnGradients, In, Mix, Out, PrototypeLoss, Target};
use crate::ops::reduce::{self, Reduce};
use crate::ops::structure::{self, Structure};

/// Scalars that a step sets, from its first slot on: proto, cell_cell, structure, the anchor's sum over cells, the anchor's
/// sum over prototypes. Terms that are switched off leave theirs as they are.
pub const SLOTS: usize = 5;

/// Values of the terms, without their weights; 0 for those that are switched off.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Losses {
    /// L_proto.
    pub proto: f64,
    /// L_cc.
    pub cell_cell: f64,
    /// L_struct.
    pub structure: f64,
    /// L_anchor.
    pub anchor: f64,
    /// Weighted sum of these four (the masked-gene term is the head's).
    pub total: f64,
}

/// What a run starts from.
pub struct Start<'a> {
    /// q⁰ (P, D): also what the prototypes' anchor and the teacher's softmax hold to.
    pub prototypes: &'a [f32],
    /// Weighted Jaccard indices of the marker sets (P, P).
    pub jaccard: &'a [f32],
    /// The frozen encoder's embeddings of the training cells.
    pub teacher: Teacher,
    /// Their targets, in the same order.
    pub targets: CellTargets,
}

/// The refine objective over device `B`: prototypes, targets, teacher and the terms' buffers.
pub struct Objective<B: Device> {
    config: ObjectiveConfig,
    types: usize,
    width: usize,
    capacity: usize,
    entries: usize,
    center: B::Buf<f32>, // (D)
    prototypes: Prototypes<B>,
    cells: Cells<B>,
    class_weight: Vec<f32>,
    teacher: Teacher,
    targets: CellTargets,
    staging: Staging,
}

impl<B: Device> Objective<B> {
    /// Buffers for `types` prototypes of `width` and logical batches of at most `cells`, with `entries` target entries a
    /// cell; all zero until [`Objective::start`].
    pub fn planned(
        ledger: &mut Ledger<'_, B>,
        config: ObjectiveConfig,
        types: usize,
        width: usize,
        cells: usize,
        entries: usize,
    ) -> Result<Self> {
        config.check()?;
        if types == 0 || width == 0 || entries == 0 {
            return Err(Error::bug("objective: no types, width or target entries")
                .found(format!("{types} × {width}, {entries} entries")));
        }
        Ok(Objective {
            center: ledger.zeros("objective.center", "(D)", width)?,
            prototypes: Prototypes::planned(ledger, types, width)?,
            cells: Cells::planned(ledger, cells, width, entries)?,
            class_weight: vec![1.0; types],
            teacher: Teacher::new(width),
            targets: CellTargets::new(&[], None, types, &config)?,
            staging: Staging::default(),
            capacity: cells,
            config,
            types,
            width,
            entries,
        })
    }

    /// The settings.
    pub fn config(&self) -> &ObjectiveConfig {
        &self.config
    }
    /// P.
    pub fn types(&self) -> usize {
        self.types
    }
    /// Targets of the training cells.
    pub fn targets(&self) -> &CellTargets {
        &self.targets
    }
    /// μ (D): what is taken off before cosines; zeros without centring. `annotate` and `eval` need it beside q.
    pub fn center(&self) -> Vec<f32> {
        if self.config.center { self.teacher.mean() } else { vec![0.0; self.width] }
    }
    /// q (P, D), the master parameter, and its gradient, which steps add to. Frozen prototypes have a gradient of 0.
    pub fn parameters(&mut self) -> (&mut B::Buf<f32>, &mut B::Buf<f32>) {
        (&mut self.prototypes.q, &mut self.prototypes.dq)
    }
    /// q (P, D).
    pub fn prototypes(&self) -> &B::Buf<f32> {
        &self.prototypes.q
    }
    /// dq (P, D).
    pub fn gradient(&self) -> &B::Buf<f32> {
        &self.prototypes.dq
    }
    /// Zeroes dq, before the first step that adds to it.
    pub fn clear_gradient(&mut self, dev: &B) -> Result<()> {
        dev.clear(&mut self.prototypes.dq)
    }

    /// The terms' values from a step's scalars (its [`SLOTS`], on the host) and its number of cells.
    pub fn losses(&self, scalars: &[f64], cells: usize) -> Losses {
        let c = &self.config;
        let when = |on: bool, x: f64| if on { x } else { 0.0 };
        let mut l = Losses {
            proto: when(c.proto > 0.0, scalars[0]),
            cell_cell: when(c.cell_cell > 0.0, scalars[1]),
            structure: when(self.structured(), scalars[2]),
            anchor: when(c.anchor > 0.0, scalars[3] / cells.max(1) as f64)
                + when(
                    self.anchored_prototypes(),
                    c.prototype_anchor as f64 * scalars[4] / self.types as f64,
                ),
            total: 0.0,
        };
        l.total = c.proto as f64 * l.proto
            + c.cell_cell as f64 * l.cell_cell
            + c.structure as f64 * l.structure
            + c.anchor as f64 * l.anchor;
        l
    }

    fn structured(&self) -> bool {
        self.config.structure > 0.0 && self.config.trainable && self.types > 1
    }
    fn anchored_prototypes(&self) -> bool {
        self.config.anchor > 0.0 && self.config.prototype_anchor > 0.0 && self.config.trainable
    }
    /// Whether the teacher's embeddings of the batch are needed.
    fn taught(&self) -> bool {
        self.config.anchor > 0.0 || (self.config.proto > 0.0 && self.config.delta > 0.0)
    }
}

impl<B: Normalize + Anchor + Structure + PrototypeLoss<f32> + Reduce> Objective<B> {
    /// Sets prototypes, teacher and targets, and with them class weights, margins, temperatures and biases.
    pub fn start(&mut self, dev: &B, start: Start<'_>) -> Result<()> {
        let (p, d) = (self.types, self.width);
        let Start { prototypes, jaccard, teacher, targets } = start;
        if prototypes.len() != p * d || jaccard.len() != p * p || teacher.width() != d {
            return Err(Error::bug("objective: prototypes, overlaps or teacher of another size")
                .found(format!("{} and {} for {p} × {d}", prototypes.len(), jaccard.len())));
        }
        if targets.types() != p || targets.entries() != self.entries || targets.cells() != teacher.cells() {
            return Err(Error::bug("objective: targets of another size").found(format!(
                "{} cells, {} entries; the teacher has {}",
                targets.cells(),
                targets.entries(),
                teacher.cells()
            )));
        }
        (self.teacher, self.targets) = (teacher, targets);
        let center = self.center();
        dev.write(&mut self.center, &center)?;
        let own = &mut self.prototypes;
        dev.write(&mut own.q, prototypes)?;
        dev.write(&mut own.jaccard, jaccard)?;
        if let Some(overlap) = targets::overlap(jaccard, p, self.config.tau_overlap) {
            dev.write(&mut own.overlap, &overlap)?;
        }
        self.normalize_prototypes(dev)?;
        let own = &mut self.prototypes;
        dev.copy(&own.p, &mut own.start, p * d)?;
        let counts = self.targets.counts();
        let c = &self.config;
        self.class_weight = imbalance::effective_number_weights(&counts, c.beta);
        dev.write(&mut own.margin, &imbalance::ldam_margins(&counts, c.margin))?;
        dev.write(&mut own.bias, &imbalance::logit_adjustment(&counts, c.logit_adjustment))?;
        let tau = if c.spread_temperatures {
            let unit = dev.download(&own.p)?;
            imbalance::spread_temperatures(
                &self.teacher,
                &center,
                self.targets.class(),
                &unit[..p * d],
                c.tau,
            )
        } else {
            vec![c.tau; p]
        };
        dev.write(&mut own.scale, &tau.iter().map(|t| 1.0 / t).collect::<Vec<f32>>())?;
        dev.write(&mut self.cells.scale, &vec![1.0 / c.tau_cell; self.capacity])
    }

    fn normalize_prototypes(&mut self, dev: &B) -> Result<()> {
        let own = &mut self.prototypes;
        let dims = normalize::Dims { rows: self.types, width: self.width };
        normalize::forward(dev, dims, &own.q, Some(&self.center), &mut own.p, &mut own.inverse_norm)
    }

    /// One logical batch: `cells` (rows of the teacher's table), their vectors h (C, D); sets dh (C, D), adds to the
    /// prototypes' gradient, sets [`SLOTS`] scalars from `slot` on.
    pub fn step(
        &mut self,
        dev: &B,
        cells: &[u32],
        h: &B::Buf<f32>,
        dh: &mut B::Buf<f32>,
        scalars: &mut B::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        if cells.len() > self.capacity {
            return Err(Error::bug("objective: more cells than planned")
                .found(cells.len())
                .wanted(format!("at most {}", self.capacity)));
        }
        if let Some(cell) = cells.iter().find(|c| **c as usize >= self.targets.cells()) {
            return Err(Error::bug("objective: no such training cell").found(cell));
        }
        let dims = normalize::Dims { rows: cells.len(), width: self.width };
        let own = &mut self.cells;
        normalize::forward(dev, dims, h, Some(&self.center), &mut own.z, &mut own.inverse_norm)?;
        dev.clear(&mut own.dz)?;
        dev.clear(&mut self.prototypes.dp)?;
        self.normalize_prototypes(dev)?;
        if self.taught() {
            self.teacher.gather(cells, &mut self.staging.teacher_h);
            let own = &mut self.cells;
            dev.write(&mut own.teacher_h, &self.staging.teacher_h)?;
            // The teacher's norms are not needed again; the lse buffer holds them until the losses set it.
            normalize::forward(
                dev,
                dims,
                &own.teacher_h,
                Some(&self.center),
                &mut own.teacher_z,
                &mut own.lse,
            )?;
        }
        if self.config.proto > 0.0 {
            self.prototype_term(dev, cells, scalars, slot)?;
        }
        if self.config.cell_cell > 0.0 {
            self.cell_cell_term(dev, cells, scalars, slot + 1)?;
        }
        if self.structured() {
            self.structure_term(dev, scalars, slot + 2)?;
        }
        if self.config.anchor > 0.0 {
            self.anchor_term(dev, cells.len(), scalars, slot + 3)?;
        }
        let own = &self.cells;
        normalize::backward(dev, dims, &own.dz, &own.z, &own.inverse_norm, false, dh)?;
        if self.config.trainable {
            let own = &mut self.prototypes;
            let dims = normalize::Dims { rows: self.types, width: self.width };
            normalize::backward(dev, dims, &own.dp, &own.p, &own.inverse_norm, true, &mut own.dq)?;
        }
        Ok(())
    }

    fn prototype_term(
        &mut self,
        dev: &B,
        cells: &[u32],
        scalars: &mut B::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        let staging = &mut self.staging;
        let class = self.targets.class();
        staging.row_weight.clear();
        staging.column.clear();
        staging.mass.clear();
        for cell in cells {
            let i = *cell as usize;
            let weight = if class[i] >= 0 { self.class_weight[class[i] as usize] } else { 0.0 };
            staging.row_weight.push(weight);
            staging.column.extend_from_slice(self.targets.columns(i));
            staging.mass.extend_from_slice(self.targets.masses(i));
        }
        let total: f64 = staging.row_weight.iter().map(|w| *w as f64).sum();
        staging.row_weight.iter_mut().for_each(|w| *w = (*w as f64 / total.max(1e-6)) as f32);
        let (own, of) = (&mut self.cells, &mut self.prototypes);
        dev.write(&mut own.row_weight, &staging.row_weight)?;
        dev.write(&mut own.column, &staging.column)?;
        dev.write(&mut own.mass, &staging.mass)?;
        let c = &self.config;
        let dims = prototype_loss::Dims {
            rows: cells.len(),
            columns: self.types,
            width: self.width,
            gradient_scale: c.proto,
            bias_in_target: true,
        };
        if c.delta > 0.0 {
            let lse = &mut own.teacher_lse;
            prototype_loss::lse(dev, dims, &own.teacher_z, &of.start, 1.0 / c.tau, lse)?;
        }
        let input = || In {
            z: &own.z,
            column: &of.p,
            scale: Some(&of.scale),
            bias: (c.logit_adjustment > 0.0).then_some(&of.bias),
            margin: (c.margin > 0.0).then_some(&of.margin),
            row_weight: &own.row_weight,
            target: Target::Sparse {
                entries: self.entries,
                column: &own.column,
                mass: Some(&own.mass),
                // A lone type overlaps with nothing.
                mix: (c.epsilon > 0.0 && self.types > 1)
                    .then_some(Mix { matrix: &of.overlap, share: c.epsilon }),
                teacher: (c.delta > 0.0).then_some(prototype_loss::Teacher {
                    z: &own.teacher_z,
                    column: &of.start,
                    lse: &own.teacher_lse,
                    scale: 1.0 / c.tau,
                    share: c.delta,
                }),
            },
        };
        let out = Out { loss: &mut own.loss, lse: &mut own.lse, dz: &mut own.dz, accumulate_dz: true };
        prototype_loss::forward(dev, dims, input(), out)?;
        if c.trainable {
            let grads = ColumnGradients { column: &mut of.dp, bias: None, scale: None };
            prototype_loss::backward(dev, dims, input(), &own.lse, grads)?;
        }
        reduce::sum(dev, &own.loss, cells.len(), scalars, slot)
    }

    fn cell_cell_term(
        &mut self,
        dev: &B,
        cells: &[u32],
        scalars: &mut B::Buf<f64>,
        slot: usize,
    ) -> Result<()> {
        let staging = &mut self.staging;
        let (class, guess) = (self.targets.class(), self.targets.guess());
        staging.count.clear();
        staging.count.resize(self.types, 0);
        let guesses = cells.iter().map(|c| guess[*c as usize]);
        guesses.clone().filter(|g| *g >= 0).for_each(|g| staging.count[g as usize] += 1);
        staging.label.clear();
        staging.label.extend(cells.iter().map(|c| class[*c as usize]));
        // A cell of unknown class is a class of its own.
        let counts = guesses.map(|g| if g >= 0 { staging.count[g as usize] } else { 1 });
        let minus_log = |n: u32| -(n.max(1) as f32).ln();
        staging.bias.clear();
        staging.same_bias.clear();
        for n in counts {
            staging.bias.push(minus_log(n));
            staging.same_bias.push(minus_log(n - 1));
        }
        staging.row_weight.clear();
        staging.row_weight.resize(cells.len(), 1.0 / cells.len().max(1) as f32);
        let own = &mut self.cells;
        dev.write(&mut own.row_weight, &staging.row_weight)?;
        dev.write(&mut own.label, &staging.label)?;
        dev.write(&mut own.bias, &staging.bias)?;
        dev.write(&mut own.same_bias, &staging.same_bias)?;
        if cells.is_empty() {
            return reduce::sum(dev, &own.loss, 0, scalars, slot);
        }
        let dims = prototype_loss::Dims {
            rows: cells.len(),
            columns: cells.len(),
            width: self.width,
            gradient_scale: self.config.cell_cell,
            bias_in_target: false,
        };
        let input = || In {
            z: &own.z,
            column: &own.z,
            scale: Some(&own.scale),
            bias: Some(&own.bias),
            margin: None,
            row_weight: &own.row_weight,
            target: Target::SameLabel {
                row_label: &own.label,
                column_label: &own.label,
                first_self: 0,
                same_bias: Some(&own.same_bias),
            },
        };
        let out = Out { loss: &mut own.loss, lse: &mut own.lse, dz: &mut own.dz, accumulate_dz: true };
        prototype_loss::forward(dev, dims, input(), out)?;
        let grads = ColumnGradients { column: &mut own.dz, bias: None, scale: None };
        prototype_loss::backward(dev, dims, input(), &own.lse, grads)?;
        reduce::sum(dev, &own.loss, cells.len(), scalars, slot)
    }

    fn structure_term(&mut self, dev: &B, scalars: &mut B::Buf<f64>, slot: usize) -> Result<()> {
        let (c, of) = (&self.config, &mut self.prototypes);
        let dims = structure::Dims {
            prototypes: self.types,
            width: self.width,
            c0: c.overlap_low,
            c1: c.overlap_high,
            scale: c.structure,
        };
        structure::forward_backward(dev, dims, &of.p, &of.jaccard, &mut of.loss, &mut of.dp)?;
        reduce::sum(dev, &of.loss, self.types, scalars, slot)
    }

    fn anchor_term(&mut self, dev: &B, cells: usize, scalars: &mut B::Buf<f64>, slot: usize) -> Result<()> {
        let (c, width) = (&self.config, self.width);
        let own = &mut self.cells;
        let dims = anchor::Dims { rows: cells, width, scale: c.anchor / cells.max(1) as f32 };
        anchor::forward_backward(dev, dims, &own.z, &own.teacher_z, &mut own.loss, &mut own.dz)?;
        reduce::sum(dev, &own.loss, cells, scalars, slot)?;
        if self.anchored_prototypes() {
            let of = &mut self.prototypes;
            let scale = c.anchor * c.prototype_anchor / self.types as f32;
            let dims = anchor::Dims { rows: self.types, width, scale };
            anchor::forward_backward(dev, dims, &of.p, &of.start, &mut of.loss, &mut of.dp)?;
            reduce::sum(dev, &of.loss, self.types, scalars, slot + 1)?;
        }
        Ok(())
    }
}
