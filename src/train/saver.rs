//! Checkpoints written behind the training.
//!
//! A checkpoint costs its step the copy of the state into host memory ([`Snapshot`]); hashing, writing, syncing, verifying and
//! pruning are a thread's. One at a time: a second waits for the first. A checkpoint counts only once [`Saver::wait`] has said so,
//! and one that failed ends the run, with the older ones untouched.

use super::folder::RunFolder;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::model::checkpoint::Pointer;
use crate::model::snapshot::Snapshot;
use crate::trace;
use serde_json::Value;
use std::path::PathBuf;
use std::thread::JoinHandle;

/// Bytes of a checkpoint's numbers, nearly all of it: f32 weights of the network, with both moments or, where adapters learn, with
/// the weights that they start from and theirs twice, and the stage's `own` parameters with moments.
pub fn checkpoint_bytes(network: usize, adapters: Option<usize>, own: usize) -> u64 {
    4 * (network + adapters.map_or(2 * network, |adapters| network + 4 * adapters) + 3 * own) as u64
}

/// A checkpoint to write.
#[derive(Debug)]
pub struct Save {
    /// Its step.
    pub step: u64,
    /// Its manifest, the file list apart.
    pub record: Value,
    /// Its files.
    pub snapshot: Snapshot,
    /// The run's logs, which are to reach as far as the checkpoint whatever happens then.
    pub logs: Vec<PathBuf>,
    /// Is it the best so far?
    pub best: bool,
    /// The step of the best so far, which is kept whatever its age.
    pub best_step: Option<u64>,
    /// How many of the newest are kept.
    pub keep: usize,
}

impl Save {
    /// Publishes, points to it, and only then removes older ones.
    fn run(self, folder: &RunFolder) -> Result<PathBuf> {
        let _range = trace::range("checkpoint write");
        // A log that cannot be synced costs no checkpoint.
        let _ = self
            .logs
            .iter()
            .try_for_each(|log| disk::sync_file(log))
            .and_then(|()| disk::sync_folder(folder.path()));
        let place = folder.publish(self.step, self.record, &self.snapshot)?;
        if self.best {
            folder.point(Pointer::Best, self.step)?;
        }
        folder.prune(self.keep, self.best_step)?;
        Ok(place)
    }
}

/// Writes one checkpoint at a time. Dropped, it ends what it began.
#[derive(Debug, Default)]
pub struct Saver {
    writing: Option<JoinHandle<Result<PathBuf>>>,
    /// What became of the last one, until it is asked for.
    ended: Option<Result<PathBuf>>,
}

impl Saver {
    /// Begins to write a checkpoint; call [`wait`](Self::wait) first.
    ///
    /// # Errors
    /// Environment: no thread.
    pub fn begin(&mut self, folder: &RunFolder, save: Save) -> Result<()> {
        let folder = folder.clone();
        let thread = std::thread::Builder::new().name("checkpoint".into());
        let thread = thread.spawn(move || save.run(&folder));
        self.writing = Some(thread.map_err(|e| {
            Error::new(Code::NoThread, "cannot start the thread that writes checkpoints").found(e)
        })?);
        Ok(())
    }

    /// Has one failed? Never waits.
    pub fn has_failed(&mut self) -> bool {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join();
        }
        matches!(self.ended, Some(Err(_)))
    }

    /// Waits until nothing is being written; the folder of the last checkpoint, where one was begun since this was last asked.
    ///
    /// # Errors
    /// What the writing failed with; the run folder then holds what it held before.
    pub fn wait(&mut self) -> Result<Option<PathBuf>> {
        self.join();
        self.ended.take().transpose()
    }

    fn join(&mut self) {
        if let Some(writing) = self.writing.take() {
            let lost = |_| Err(Error::bug("the thread that writes checkpoints broke off"));
            self.ended = Some(writing.join().unwrap_or_else(lost));
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.join();
    }
}
