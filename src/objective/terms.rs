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

use super::state::Objective;
use crate::error::{Error, Result};
use crate::ops::anchor::{self, Anchor};
use crate::ops::normalize::{self, Normalize};
use crate::ops::prototype_loss::{self, ColumnGradients, In, Mix, Out, PrototypeLoss, Target};
use crate::ops::reduce::{self, Reduce};
use crate::ops::structure::{self, Structure};

impl<B: Normalize + Anchor + Structure + PrototypeLoss<f32> + Reduce> Objective<B> {
    /// One logical batch: `cells` (rows of the teacher's table), their vectors h (C, D); sets dh (C, D), adds to the
    /// prototypes' gradient, sets [`super::SLOTS`] scalars from `slot` on.
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
