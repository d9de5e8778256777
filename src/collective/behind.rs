//! Sums over the ranks that go on behind other work of this rank.
//!
//! One thread takes [pieces](Piece) in the order in which they are handed over, which is the same on every rank. Until they are
//! taken back, it alone speaks to the other ranks: what else this rank exchanged meanwhile would come out of step.

use super::{Collective, Piece};
use crate::error::{Code, Error, Result};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// A piece whose floats are still on their way.
type Handed = (Piece, Box<dyn FnOnce() -> Result<Vec<f32>> + Send>);
/// Its sums.
type Summed = (Piece, Vec<f32>);

/// The thread, and what it was handed. Dropped, it waits until that is done, unheard: a rank must not leave while a thread of its own
/// still speaks for it, and MPI ends on the thread that began it.
#[derive(Debug)]
pub struct Behind {
    /// Until it is dropped.
    pieces: Option<Sender<Handed>>,
    sums: Receiver<Result<Summed>>,
    /// Handed over and not yet taken back.
    waiting: usize,
    thread: Option<JoinHandle<()>>,
}

impl Behind {
    /// Starts the thread.
    ///
    /// # Errors
    /// Environment (4): no thread.
    pub fn begin(ranks: &Collective) -> Result<Behind> {
        let (pieces, handed) = channel::<Handed>();
        let (summed, sums) = channel();
        let ranks = ranks.clone();
        let work = move || {
            for (piece, values) in handed {
                let sum = values().and_then(|mut values| {
                    ranks.sum_piece(&piece, &mut values)?;
                    Ok((piece, values))
                });
                let failed = sum.is_err();
                // After a failure the ranks are out of step, and nobody may be left to hear of it.
                if summed.send(sum).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("ranks".into()).spawn(work);
        let thread = thread.map_err(|e| {
            Error::new(Code::NoThread, "cannot start the thread of the sums over the ranks").found(e)
        })?;
        Ok(Behind { pieces: Some(pieces), sums, waiting: 0, thread: Some(thread) })
    }

    /// Hands a piece over, whose floats `values` will give.
    pub fn add(&mut self, piece: Piece, values: impl FnOnce() -> Result<Vec<f32>> + Send + 'static) {
        self.waiting += 1;
        // A thread that has failed said so; `take` passes it on.
        let _ = self.pieces.as_ref().map(|pieces| pieces.send((piece, Box::new(values))));
    }

    /// All pieces handed over since the last call, and their sums, in that order.
    ///
    /// # Errors
    /// The first that failed, with what [`Collective::sum_piece`] or its floats failed with; none can be handed over after it.
    pub fn take(&mut self) -> Result<Vec<Summed>> {
        let lost = |_| Error::bug("the thread of the sums over the ranks ended");
        (0..std::mem::take(&mut self.waiting)).map(|_| self.sums.recv().map_err(lost)?).collect()
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.pieces = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
