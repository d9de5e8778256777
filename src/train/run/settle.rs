//! What becomes of a step when its gradient norm has come back: one more update, a bad step, which is counted and named, or a spike,
//! which is met as `train.spike_policy` says.
//!
//! Every rank has the same norm and loss, to the bit, and so decides the same without asking.

use super::super::optimizer::{BAD_SLOT, NORM_SLOT};
use super::super::spikes::{Spike, WINDOW};
use super::super::task::Loss;
use super::Run;
use crate::config::SpikePolicy;
use crate::device::{Act, Later};
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::ops::Backend;
use crate::trace;
use serde_json::json;
use std::path::PathBuf;

/// A step whose norm is on its way from the device.
pub(super) struct Unsettled {
    pub step: u64,
    /// The trunk's scalars.
    pub scalars: Later<f64>,
    /// Corpus indices, for the report of a bad step.
    pub cells: Vec<u32>,
    /// Was its update left out for a spike?
    pub skipped: bool,
}

impl<B: Backend<A>, A: Act> Run<'_, '_, B, A> {
    /// Waits for the norm of the step before, where it is still on its way, and counts the update or the bad step. Returns the
    /// norm of the mean gradient. `loss` is that step's, where it is known.
    pub(super) fn settle(&mut self, loss: Option<&Loss>) -> Result<Option<f64>> {
        let Some(Unsettled { step, scalars, cells, skipped }) = self.unsettled.take() else {
            return Ok(None);
        };
        let range = trace::range("device wait");
        let scalars = scalars()?;
        drop(range);
        let norm = self.mean_norm(&scalars);
        if norm.is_finite() {
            self.state.bad_in_a_row = 0;
            self.state.updates += u64::from(!skipped);
            if self.settings.train.spike_policy != SpikePolicy::Skip {
                self.norm_spikes(step, norm, &cells)?;
            }
        } else {
            let tensor = self.first_bad_tensor(&scalars[BAD_SLOT..]);
            self.bad_step(step, loss, &tensor, &cells)?;
        }
        if let Some(loss) = loss.map(|loss| loss.total).filter(|loss| loss.is_finite()) {
            self.loss_spikes(step, loss, &cells)?;
        }
        Ok(Some(norm))
    }

    /// Puts `value` into one element of the gradient, of a weight that learns in this run.
    pub(super) fn inject(&mut self, value: f32) -> Result<()> {
        let trunk = &mut *self.trunk;
        if trunk.adapters.is_none() {
            return trunk.dev.write(trunk.grads.flat_mut(), &[value]);
        }
        // The first element is no adapter's.
        let list = trunk.params.layout().list();
        let adapted = list.iter().find(|(parameter, _)| parameter.name == "layer.0.qkv_weight");
        let place = adapted.map_or(0, |(_, range)| range.start);
        let mut gradient = trunk.dev.download(trunk.grads.flat())?;
        gradient[place] = value;
        trunk.dev.write(trunk.grads.flat_mut(), &gradient)
    }

    /// Of the gradient averaged over the step's logical batches.
    fn mean_norm(&self, scalars: &[f64]) -> f64 {
        scalars[NORM_SLOT].sqrt() / self.settings.train.accumulate as f64
    }

    /// Is the update of `step` to be left out? Only `train.spike_policy = "skip"` needs the norm for that, and waits for it here.
    pub(super) fn held_back(&mut self, step: u64, scalars: Later<f64>) -> Result<(Later<f64>, bool)> {
        let train = &self.settings.train;
        if train.spike_policy != SpikePolicy::Skip || train.spike_z == 0.0 {
            return Ok((scalars, false));
        }
        let range = trace::range("device wait");
        let scalars = scalars()?;
        drop(range);
        let norm = self.mean_norm(&scalars);
        let skipped = norm.is_finite() && self.norm_spikes(step, norm, &[])?;
        self.state.spikes.skipped += u64::from(skipped);
        Ok((Box::new(move || Ok(scalars)), skipped))
    }

    /// Takes the norm of `step` into its window. Is it a spike? Then that is said, or the run stops.
    fn norm_spikes(&mut self, step: u64, norm: f64, cells: &[u32]) -> Result<bool> {
        let z = self.settings.train.spike_z;
        let spike = (z > 0.0).then(|| self.state.spikes.norms.take(norm, z)).flatten();
        let Some(spike) = spike else { return Ok(false) };
        let skips = self.settings.train.spike_policy == SpikePolicy::Skip;
        self.spike(step, "gradient norm", spike, if skips { "; its update is left out" } else { "" }, cells)?;
        Ok(true)
    }

    fn loss_spikes(&mut self, step: u64, loss: f64, cells: &[u32]) -> Result<()> {
        let z = self.settings.train.spike_z;
        let spike = (z > 0.0).then(|| self.state.spikes.losses.take(loss, z)).flatten();
        spike.map_or(Ok(()), |spike| self.spike(step, "loss", spike, "", cells))
    }

    /// Counts and names a spike; stops under `train.spike_policy = "stop"`.
    fn spike(&mut self, step: u64, what: &str, spike: Spike, then: &str, cells: &[u32]) -> Result<()> {
        self.state.spikes.seen += 1;
        let found = format!(
            "{what} {:.4}, z = {:.1} against the {WINDOW} before it, whose mean is {:.4}",
            spike.value, spike.z, spike.mean
        );
        let train = &self.settings.train;
        if train.spike_policy != SpikePolicy::Stop {
            let all = self.state.spikes.seen;
            self.session.observer.note(&format!("step {step}: a spike: {found}{then} ({all} so far)"));
            return Ok(());
        }
        let error = Error::new(Code::TrainingSpike, format!("the {what} spiked at step {step}"))
            .wanted(format!("z of at most train.spike_z = {}", train.spike_z))
            .next(
                "go on from the last checkpoint, without this step: --resume --allow-settings --set train.spike_policy=skip; \
                 or with a lower optimizer.learning_rate",
            );
        if !self.trunk.ranks.leads() {
            return Err(error.found(found));
        }
        let place = self.dump("spike-step", step, what, cells)?;
        Err(error.found(format!("{found}; its cell ids are in {}", place.display())))
    }

    /// Writes the cells of `step` beside the checkpoints.
    fn dump(&self, name: &str, step: u64, place: &str, cells: &[u32]) -> Result<PathBuf> {
        let ids: Vec<&str> =
            cells.iter().filter_map(|cell| self.trunk.corpus.cell_id(*cell as usize).ok()).collect();
        let file = self.session.folder.path().join(format!("{name}-{step}.json"));
        let report = json!({"step": step, "first_bad": place, "cell_ids": ids});
        disk::replace(&file, format!("{report:#}\n").as_bytes())?;
        Ok(file)
    }

    /// Counts and names a step whose gradient is not finite; stops after too many in a row.
    fn bad_step(&mut self, step: u64, loss: Option<&Loss>, tensor: &str, cells: &[u32]) -> Result<()> {
        self.state.bad_in_a_row += 1;
        self.state.bad_steps += 1;
        let term = loss.iter().flat_map(|l| &l.terms).find(|(_, value)| !value.is_finite());
        let place = match term {
            Some((term, _)) => format!("loss term {term}; gradient of {tensor}"),
            None => format!("gradient of {tensor}"),
        };
        let in_a_row = self.state.bad_in_a_row;
        self.session.observer.note(&format!(
            "step {step} skipped: NaN or infinity in the {place} ({in_a_row} in a row, {} in all)",
            self.state.bad_steps
        ));
        if in_a_row < self.settings.train.max_bad_steps {
            return Ok(());
        }
        if !self.trunk.ranks.leads() {
            return Err(stopped(in_a_row, step, &place, self.settings.train.max_bad_steps));
        }
        let dump = self.dump("bad-step", step, &place, cells)?;
        Err(stopped(in_a_row, step, &place, self.settings.train.max_bad_steps)
            .found(format!("cell ids of the last of them in {}", dump.display())))
    }

    /// The tensor that holds the first bad element, given the place in each group's flat gradient.
    fn first_bad_tensor(&mut self, places: &[f64]) -> String {
        let layout = self.trunk.params.layout();
        let place = places[0] as usize;
        if let Some(module) = self.trunk.adapters.as_ref().and_then(|a| a.name_of(place)) {
            return format!("the adapter of {module}");
        }
        let network = self.trunk.adapters.is_none();
        let held = layout.list().into_iter().find(|(_, range)| network && range.contains(&place));
        if let Some((parameter, _)) = held {
            return parameter.name.clone();
        }
        match self.task.own() {
            Some(own) if (places[1] as usize) < own.len => own.name.into(),
            _ => "every tensor taken together (the sum of squares overflows)".into(),
        }
    }
}

fn stopped(in_a_row: u64, step: u64, place: &str, most: u64) -> Error {
    Error::new(Code::LossNotFinite, format!("{in_a_row} steps in a row with a NaN or an infinity"))
        .at(format!("step {step}, {place}"))
        .wanted(format!("fewer than train.max_bad_steps = {most}"))
        .next("lower optimizer.learning_rate, and go on from the last checkpoint with --resume")
}
