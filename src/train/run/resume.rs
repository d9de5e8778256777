//! A run goes on: what a checkpoint gives back, and where the run then stands among its cells.

use super::super::folder::verify;
use super::super::state::{LoopState, read_moments};
use super::super::task::Task;
use super::super::trunk::Trunk;
use super::{Session, total_steps};
use crate::corpus::Sampler;
use crate::device::Act;
use crate::error::Result;
use crate::ops::Backend;
use std::path::Path;

/// Loads moments, the stage's own weights and the loop's state from the checkpoint at `place`; the trunk's weights were
/// loaded from there when it was made.
pub(super) fn restore<B: Backend<A>, A: Act>(
    session: &mut Session<'_>,
    place: &Path,
    trunk: &mut Trunk<B, A>,
    task: &mut dyn Task<B, A>,
    sampler: &mut Sampler,
) -> Result<LoopState> {
    let manifest = verify(place)?;
    let mut state = LoopState::read(&manifest, &session.identity, place, session.allow)?;
    let (before, now) = (manifest["world_size"].as_u64().unwrap_or(1), trunk.ranks.world() as u64);
    if before != now {
        session.observer.note(&format!(
            "started by {before} ranks, continued by {now}: the same cells, masks and dropout in every step; sums over ranks are \
             rounded elsewhere, so the last bits differ from those of {before} ranks"
        ));
    }
    task.restore(&trunk.dev, place)?;
    if let Some(adapters) = &mut trunk.adapters {
        adapters.restore(&trunk.dev, place)?;
    }
    let own = task.own();
    let (len, learner) = (trunk.params.layout().len(), trunk.learner());
    let (whole, slice) = match (&trunk.adapters, &trunk.shard) {
        (Some(adapters), _) => (adapters.layout().len(), 0..adapters.layout().len()),
        (None, Some(shard)) => (len, shard.own()),
        (None, None) => (len, 0..len),
    };
    let mut moments = vec![(learner, &mut trunk.moments, whole, slice)];
    if let Some(own) = own {
        moments.push((own.name, own.moments, own.len, 0..own.len));
    }
    read_moments(&trunk.dev, place, moments)?;
    let other_corpus = manifest["identity"]["corpus"] != session.identity["corpus"];
    goes_on(session, &mut state, sampler, other_corpus).map_err(|e| match e.place() {
        Some(_) => e,
        None => e.at(place.display()),
    })?;
    Ok(state)
}

/// Where a resumed run stands among its cells and how long it is, with what was allowed to be new.
fn goes_on(
    session: &mut Session<'_>,
    state: &mut LoopState,
    sampler: &mut Sampler,
    other_corpus: bool,
) -> Result<()> {
    let now = sampler.state();
    let place = &state.sampler;
    let other_order = (now.seed, now.sampling, now.order) != (place.seed, place.sampling, place.order);
    if other_corpus || (other_order && session.allow.settings) {
        // A position means nothing among other cells, or in another order of them.
        session.observer.note(&format!(
            "{}: its cells come from the first epoch on; step {} of {} is next",
            if other_corpus { "another corpus" } else { "another order of the cells" },
            state.step + 1,
            state.steps
        ));
        state.sampler = now;
    } else {
        sampler.restore(&state.sampler)?;
    }
    if other_corpus {
        // Measured on other cells.
        state.best = None;
    }
    let steps = total_steps(&session.settings, sampler.epoch_len());
    let epochs_of_another = other_corpus && session.settings.train.steps == 0;
    if session.allow.settings && !epochs_of_another && steps != state.steps {
        session.observer.note(&format!("the run has {steps} steps; it had {}", state.steps));
        state.steps = steps;
    }
    Ok(())
}
