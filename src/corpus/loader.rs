//! Batches filled ahead of their use, by a thread.

use super::batch::Batch;
use super::packer::Packer;
use super::sampler::SamplerState;
use crate::error::{Code, Error, Result};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

/// A [`Packer`] on a thread of its own, a bounded number of batches ahead.
///
/// Dropping it stops the thread and waits for it. An error of the packer comes out of [`Loader::next_batch`] in its place.
#[derive(Debug)]
pub struct Loader {
    filled: Option<Receiver<Result<Option<Batch>>>>,
    used: Sender<Batch>,
    thread: Option<JoinHandle<()>>,
    state: Option<SamplerState>,
    ended: bool,
}

/// Batches whose pages are asked for ahead of the packer.
const ADVISE_BATCHES: usize = 4;

impl Loader {
    /// Starts filling; at most `ahead` finished batches wait (at least 1).
    pub fn spawn(packer: Packer, ahead: usize) -> Result<Self> {
        let (filled, receive) = sync_channel(ahead.max(1));
        let (used, reuse) = channel();
        let state = packer.state();
        let thread = std::thread::Builder::new()
            .name("cell loader".into())
            .spawn(move || fill_ahead(packer, filled, reuse))
            .map_err(|e| Error::new(Code::NoThread, "cannot start the loader thread").found(e))?;
        Ok(Loader { filled: Some(receive), used, thread: Some(thread), state, ended: false })
    }

    /// The next batch; `None` at the end of an ordered pass.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.ended {
            return Ok(None);
        }
        let received = self.filled.as_ref().and_then(|f| f.recv().ok());
        let batch = received.unwrap_or_else(|| Err(Error::bug("the loader thread ended without a word")));
        match &batch {
            Ok(Some(batch)) => self.state = batch.after.clone(),
            _ => self.ended = true,
        }
        batch
    }

    /// Gives a batch's buffers back for reuse.
    pub fn recycle(&mut self, batch: Batch) {
        let _ = self.used.send(batch);
    }

    /// Where the sampler stands after the batches handed out so far: what to save. Batches waiting in the queue do not count.
    pub fn state(&self) -> Option<SamplerState> {
        self.state.clone()
    }
}

fn fill_ahead(mut packer: Packer, filled: SyncSender<Result<Option<Batch>>>, reuse: Receiver<Batch>) {
    let per_batch = packer.options.cells;
    packer.advise(0, per_batch * ADVISE_BATCHES);
    loop {
        let mut batch = reuse.try_recv().unwrap_or_default();
        packer.advise(per_batch * ADVISE_BATCHES, per_batch * (ADVISE_BATCHES + 1));
        let outcome = packer.fill(&mut batch).map(|more| more.then_some(batch));
        let last = !matches!(outcome, Ok(Some(_)));
        // A closed queue means that the loader was dropped.
        if filled.send(outcome).is_err() || last {
            return;
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.filled = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
