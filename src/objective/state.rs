//! The objective between steps: settings, prototypes, targets, teacher, and the buffers of its terms.

use super::buffers::{Cells, Prototypes, Staging};
use super::{CellTargets, ObjectiveConfig, Teacher, imbalance, targets};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::ledger::Ledger;
use crate::ops::normalize::{self, Normalize};

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
    pub(super) config: ObjectiveConfig,
    pub(super) types: usize,
    pub(super) width: usize,
    pub(super) capacity: usize,
    pub(super) entries: usize,
    pub(super) center: B::Buf<f32>, // (D)
    pub(super) prototypes: Prototypes<B>,
    pub(super) cells: Cells<B>,
    pub(super) class_weight: Vec<f32>,
    pub(super) teacher: Teacher,
    pub(super) targets: CellTargets,
    pub(super) staging: Staging,
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

    pub(super) fn structured(&self) -> bool {
        self.config.structure > 0.0 && self.config.trainable && self.types > 1
    }
    pub(super) fn anchored_prototypes(&self) -> bool {
        self.config.anchor > 0.0 && self.config.prototype_anchor > 0.0 && self.config.trainable
    }
    /// Whether the teacher's embeddings of the batch are needed.
    pub(super) fn taught(&self) -> bool {
        self.config.anchor > 0.0 || (self.config.proto > 0.0 && self.config.delta > 0.0)
    }
}

impl<B: Normalize> Objective<B> {
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

    pub(super) fn normalize_prototypes(&mut self, dev: &B) -> Result<()> {
        let own = &mut self.prototypes;
        let dims = normalize::Dims { rows: self.types, width: self.width };
        normalize::forward(dev, dims, &own.q, Some(&self.center), &mut own.p, &mut own.inverse_norm)
    }
}
