//! A run's checkpoints: what of it is copied at the border of a step, and when all ranks hear that it is on the disk.

use super::super::lora_file;
use super::super::optimizer::Moments;
use super::super::record::Writers;
use super::super::saver::{self, Save};
use super::super::state::save_moments;
use super::super::task::Task;
use super::super::trunk::Trunk;
use super::Run;
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::model::snapshot::Snapshot;
use crate::ops::Backend;
use crate::trace;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

impl<B: Backend<A>, A: Act> Run<'_, '_, B, A> {
    /// Begins a checkpoint of the leading rank's: what it holds is copied here, and written while training goes on. All ranks
    /// hear of the one before, whether it is on the disk.
    pub(super) fn publish(&mut self, step: u64, best: bool) -> Result<()> {
        self.settle(None)?;
        let _range = trace::range("checkpoint");
        self.same_weights()?;
        self.saved()?;
        let ranks = self.trunk.ranks.clone();
        let trunk = &*self.trunk;
        let gathered = match &trunk.shard {
            Some(shard) => shard.gather(&trunk.dev, &trunk.moments)?,
            None => None,
        };
        ranks.lead(|| self.begin_checkpoint(step, best, gathered).map(|()| Vec::new()))?;
        self.meter.pause();
        Ok(())
    }

    /// Waits for the checkpoint that is being written; all ranks hear whether it is on the disk.
    pub(super) fn saved(&mut self) -> Result<()> {
        let _range = trace::range("checkpoint");
        let ranks = self.trunk.ranks.clone();
        let saver = &mut self.saver;
        let place = ranks.lead(|| Ok(saver.wait()?.unwrap_or_default().into_os_string().into_vec()))?;
        if !place.is_empty() {
            self.outcome.published = Some(OsString::from_vec(place).into());
        }
        Ok(())
    }

    /// Every rank must hold the same weights, to the bit: what a checkpoint says is true of all of them.
    fn same_weights(&mut self) -> Result<()> {
        let ranks = &self.trunk.ranks;
        if ranks.is_single() {
            return Ok(());
        }
        let mut sum = crc32c::crc32c(bytemuck::cast_slice(
            &self.trunk.dev.download(self.trunk.params.master().flat())?,
        ));
        if let Some(own) = self.task.own() {
            sum = crc32c::crc32c_append(sum, bytemuck::cast_slice(&self.trunk.dev.download(own.weight)?));
        }
        let sums = ranks.messages(&sum.to_le_bytes())?;
        let Some(other) = sums.iter().position(|theirs| *theirs != sums[0]) else { return Ok(()) };
        Err(Error::new(Code::RanksDiffer, "the ranks hold different weights")
            .at(format!("step {}, ranks 0 and {other}", self.state.step))
            .found("CRCs of the weights that differ")
            .wanted("the same bits on every rank: one build, one kind of processor or GPU")
            .next("continue from the last checkpoint with --resume, on machines of one kind"))
    }

    /// `gathered` are the network's moments where they are divided over the ranks.
    fn begin_checkpoint(&mut self, step: u64, best: bool, gathered: Option<[Vec<f32>; 2]>) -> Result<()> {
        let (session, trunk, task) = (&self.session, &mut *self.trunk, &mut *self.task);
        let (config, layout, master) = (&trunk.encoder.config, trunk.params.layout(), trunk.params.master());
        let mut snapshot =
            Snapshot::of_model(&trunk.dev, config, layout, master, session.vocabulary.as_deref())?;
        task.save(&trunk.dev, &mut snapshot, config)?;
        if let Some(adapters) = &trunk.adapters {
            adapters.save(&trunk.dev, &mut snapshot)?;
            lora_file::save(&trunk.dev, &mut snapshot, adapters, session.start.as_deref())?;
        }
        add_moments(&mut snapshot, trunk, task, gathered)?;
        let save = Save {
            step,
            record: self.state.manifest(&session.identity, trunk.ranks.world()),
            snapshot,
            logs: self.writers.as_ref().map(Writers::lasting).unwrap_or_default(),
            best,
            best_step: self.state.best.as_ref().map(|b| b.step),
            keep: self.settings.train.keep,
        };
        self.saver.begin(&session.folder, save)
    }
}

/// Bytes of the checkpoints of a run.
pub(super) fn checkpoint_bytes<B: Backend<A>, A: Act>(trunk: &Trunk<B, A>, task: &mut dyn Task<B, A>) -> u64 {
    let adapters = trunk.adapters.as_ref().map(|a| a.layout().len());
    saver::checkpoint_bytes(trunk.params.layout().len(), adapters, task.own().map_or(0, |own| own.len))
}

fn add_moments<B: Backend<A>, A: Act>(
    snapshot: &mut Snapshot,
    trunk: &Trunk<B, A>,
    task: &mut dyn Task<B, A>,
    gathered: Option<[Vec<f32>; 2]>,
) -> Result<()> {
    let host = |moments: &Moments<B>| -> Result<[Vec<f32>; 2]> {
        Ok([trunk.dev.download(&moments.m)?, trunk.dev.download(&moments.v)?])
    };
    let network = gathered.map_or_else(|| host(&trunk.moments), Ok)?;
    let mut moments = vec![(trunk.learner(), network)];
    if let Some(own) = task.own() {
        moments.push((own.name, host(own.moments)?));
    }
    save_moments(snapshot, moments)
}
