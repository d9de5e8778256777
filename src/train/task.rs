//! What a stage adds to the trunk: its loss, its own weights, its measure on validation cells, its files.

use super::optimizer::{Moments, Span};
use super::trunk::{Draw, Trunk};
use crate::corpus::Batch;
use crate::device::Act;
use crate::error::Result;
use crate::model::ModelConfig;
use crate::model::snapshot::Snapshot;
use crate::ops::Backend;
use std::path::Path;

/// Loss of a logical batch, by term. Terms are unweighted; `total` is what was minimised.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Loss {
    /// Σ weight · term.
    pub total: f64,
    /// (name, value) of each term that is switched on.
    pub terms: Vec<(&'static str, f64)>,
}

impl Loss {
    /// Adds the loss of another logical batch of the same step.
    pub fn add(&mut self, other: &Loss) {
        if self.terms.is_empty() {
            self.terms = other.terms.iter().map(|(name, _)| (*name, 0.0)).collect();
        }
        self.total += other.total;
        for (mine, theirs) in self.terms.iter_mut().zip(&other.terms) {
            mine.1 += theirs.1;
        }
    }
    /// Mean over `batches` logical batches.
    pub fn divide(&mut self, batches: usize) {
        self.total /= batches as f64;
        for (_, value) in &mut self.terms {
            *value /= batches as f64;
        }
    }
}

/// Weights that a stage trains besides the trunk: classifier, prototypes.
pub struct Own<'a, B: Backend<A>, A: Act> {
    /// Weights.
    pub weight: &'a mut B::Buf<f32>,
    /// Gradient.
    pub grad: &'a mut B::Buf<f32>,
    /// Moments.
    pub moments: &'a mut Moments<B>,
    /// What learns.
    pub spans: &'a [Span],
    /// Elements.
    pub len: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Is the gradient that of the whole batch on every rank already, or a share to be summed?
    pub whole: bool,
    /// What a report of a bad gradient calls them.
    pub name: &'static str,
    /// Moves with the trunk's activation type.
    pub act: std::marker::PhantomData<A>,
}

/// A measure on the validation cells.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Name of the measure that picks the best checkpoint.
    pub measure: &'static str,
    /// Its value.
    pub value: f64,
    /// Is more better?
    pub higher_is_better: bool,
    /// Further measures for the record.
    pub others: Vec<(&'static str, f64)>,
}

impl Evaluation {
    /// Is this better than `other`, a value of the same measure?
    pub fn beats(&self, other: f64) -> bool {
        if self.higher_is_better { self.value > other } else { self.value < other }
    }
}

/// A stage.
pub trait Task<B: Backend<A>, A: Act> {
    /// Adds the gradients of this rank's share of one logical batch to the trunk's and to its own; returns the share's number of
    /// masked tokens. With `sums` the trunk's scalars, which are 0 before, hold what [`Task::loss`] needs: [`LOSS_SLOT`] of the
    /// share, the others of the whole batch. Nothing is read back here.
    ///
    /// [`LOSS_SLOT`]: super::optimizer::LOSS_SLOT
    fn gradients(&mut self, trunk: &mut Trunk<B, A>, batch: &Batch, draw: Draw, sums: bool) -> Result<usize>;

    /// The loss of a logical batch of `cells` cells and `masked` masked tokens, all ranks' together, from the trunk's scalars.
    fn loss(&self, scalars: &[f64], cells: usize, masked: usize) -> Loss;

    /// The stage's own weights, where it has some.
    fn own(&mut self) -> Option<Own<'_, B, A>>;

    /// The measure on `cells`.
    fn evaluate(&mut self, trunk: &mut Trunk<B, A>, cells: &[u32]) -> Result<Evaluation>;

    /// After the last step of an epoch, before its evaluation and checkpoint.
    fn epoch_ended(&mut self, _trunk: &mut Trunk<B, A>) -> Result<()> {
        Ok(())
    }

    /// Adds the stage's own files to a checkpoint.
    fn save(&self, dev: &B, checkpoint: &mut Snapshot, config: &ModelConfig) -> Result<()>;

    /// Reads them back.
    fn restore(&mut self, dev: &B, folder: &Path) -> Result<()>;
}
