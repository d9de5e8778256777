//! What becomes of a step when its gradient norm has come back: one more update, or a bad step, which is counted and named.

use super::super::optimizer::{BAD_SLOT, NORM_SLOT};
use super::super::task::Loss;
use super::Run;
use crate::device::{Act, Later};
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::ops::Backend;
use crate::trace;
use serde_json::json;

/// A step whose norm is on its way from the device.
pub(super) struct Unsettled {
    pub step: u64,
    /// The trunk's scalars.
    pub scalars: Later<f64>,
    /// Corpus indices, for the report of a bad step.
    pub cells: Vec<u32>,
}

impl<B: Backend<A>, A: Act> Run<'_, '_, B, A> {
    /// Waits for the norm of the step before, where it is still on its way, and counts the update or the bad step. Returns the
    /// norm of the mean gradient. `loss` is that step's, where it is known.
    pub(super) fn settle(&mut self, loss: Option<&Loss>) -> Result<Option<f64>> {
        let Some(Unsettled { step, scalars, cells }) = self.unsettled.take() else { return Ok(None) };
        let range = trace::range("device wait");
        let scalars = scalars()?;
        drop(range);
        let norm = scalars[NORM_SLOT].sqrt() / self.settings.train.accumulate as f64;
        if norm.is_finite() {
            self.state.updates += 1;
            self.state.bad_in_a_row = 0;
        } else {
            let tensor = self.first_bad_tensor(&scalars[BAD_SLOT..]);
            self.bad_step(step, loss, &tensor, &cells)?;
        }
        Ok(Some(norm))
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
        let cells: Vec<&str> =
            cells.iter().filter_map(|cell| self.trunk.corpus.cell_id(*cell as usize).ok()).collect();
        let dump = self.session.folder.path().join(format!("bad-step-{step}.json"));
        let report = json!({"step": step, "first_bad": place, "cell_ids": cells});
        disk::replace(&dump, format!("{report:#}\n").as_bytes())?;
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
