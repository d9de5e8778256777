//! Sums over the ranks that go on behind other work of this rank.
//!
//! One thread takes [pieces](Piece) in the order in which they are handed over, which is the same on every rank. Until they are
//! taken back, it alone speaks to the other ranks: what else this rank exchanged meanwhile would come out of step.

use super::{Collective, Piece};
use crate::error::{Code, Error, Result};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

/// A piece whose floats are still on their way.
type Handed = (Piece, Box<dyn FnOnce() -> Result<Vec<f32>> + Send>);
/// Its sums.
type Summed = (Piece, Vec<f32>);

/// Sums on their way. One that is dropped ends what it was handed, unheard.
#[derive(Debug)]
pub struct Behind {
    pieces: Sender<Handed>,
    thread: JoinHandle<Result<Vec<Summed>>>,
}

impl Behind {
    /// Waits for pieces.
    ///
    /// # Errors
    /// Environment (4): no thread.
    pub fn begin(ranks: &Collective) -> Result<Behind> {
        let (pieces, handed) = channel::<Handed>();
        let ranks = ranks.clone();
        let sum = move || {
            handed
                .iter()
                .map(|(piece, values)| {
                    let mut values = values()?;
                    ranks.sum_piece(&piece, &mut values)?;
                    Ok((piece, values))
                })
                .collect()
        };
        let thread = std::thread::Builder::new().name("ranks".into()).spawn(sum).map_err(|e| {
            Error::new(Code::NoThread, "cannot start the thread of the sums over the ranks").found(e)
        })?;
        Ok(Behind { pieces, thread })
    }

    /// Hands a piece over, whose floats `values` will give.
    pub fn add(&self, piece: Piece, values: impl FnOnce() -> Result<Vec<f32>> + Send + 'static) {
        // A thread that failed says so at the end.
        let _ = self.pieces.send((piece, Box::new(values)));
    }

    /// All pieces and their sums, in the order of handing over.
    ///
    /// # Errors
    /// The first that failed, with what [`Collective::sum_piece`] or its floats failed with.
    pub fn end(self) -> Result<Vec<(Piece, Vec<f32>)>> {
        drop(self.pieces);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(Error::bug("the thread of the sums over the ranks panicked")))
    }
}
