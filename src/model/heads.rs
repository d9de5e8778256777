//! What stands on the encoder: pooling to cell vectors and the classifier; the masked-gene head is [`masked_genes`](super::masked_genes).
//!
//! ```text
//! cell vector :  h = x[first token]  or  the mean over a cell's tokens without its special ones      (f32)
//! classifier  :  logits = h · Wᵀ + b,  loss = Σ_c κ_c (lse_c - logit_c)
//! ```
//! Logits are never stored in training: the loss is [`prototype_loss`].

use super::activations::Activations;
use super::batch::DeviceBatch;
use super::config::ModelConfig;
pub use super::masked_genes::{MaskedGenes, Masking};
use super::weights::Classifier;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::ops::Backend;
use crate::ops::pool::{self, Pooling};
use crate::ops::prototype_loss::{self, PrototypeLoss, Target};

/// Cell vectors h (C, D) f32 from hidden state `depth`.
pub fn pool<B: Backend<A>, A: Act>(
    dev: &B,
    config: &ModelConfig,
    pooling: Pooling,
    batch: &DeviceBatch<B>,
    acts: &Activations<B, A>,
    depth: usize,
    h: &mut B::Buf<f32>,
) -> Result<()> {
    pool::forward::<A, B>(dev, pool_dims(config, pooling, batch), acts.hidden(depth), &batch.cell_start, h)
}

/// Sets `acts.dx()` from dh (C, D): the encoder's backward follows, from the depth that was pooled.
pub fn pool_backward<B: Backend<A>, A: Act>(
    dev: &B,
    config: &ModelConfig,
    pooling: Pooling,
    batch: &DeviceBatch<B>,
    dh: &B::Buf<f32>,
    acts: &mut Activations<B, A>,
) -> Result<()> {
    pool::backward::<A, B>(dev, pool_dims(config, pooling, batch), dh, &batch.cell_start, acts.dx()?)
}

fn pool_dims<B: Device>(config: &ModelConfig, pooling: Pooling, batch: &DeviceBatch<B>) -> pool::Dims {
    pool::Dims {
        tokens: batch.tokens,
        cells: batch.cells,
        width: config.width,
        pooling,
        prefix: config.prefix(),
        suffix: config.suffix(),
    }
}

/// One call of the classifier's cross-entropy.
pub struct Classify<'a, B: Device> {
    /// C.
    pub cells: usize,
    /// K.
    pub classes: usize,
    /// D.
    pub width: usize,
    /// Weights (K, D) and bias (K).
    pub classifier: &'a Classifier<B::Buf<f32>>,
    /// (C, D) cell vectors.
    pub h: &'a B::Buf<f32>,
    /// (C) class, or -1 with a row weight of 0.
    pub target: &'a B::Buf<i32>,
    /// (C) weight of the cell's class over the weights' sum in the logical batch.
    pub row_weight: &'a B::Buf<f32>,
}

impl<'a, B: PrototypeLoss<f32>> Classify<'a, B> {
    fn dims(&self) -> prototype_loss::Dims {
        prototype_loss::Dims {
            rows: self.cells,
            columns: self.classes,
            width: self.width,
            gradient_scale: 1.0,
            bias_in_target: true,
        }
    }
    fn input(&self) -> prototype_loss::In<'a, B, f32> {
        prototype_loss::In {
            z: self.h,
            column: &self.classifier.weight,
            scale: None,
            bias: Some(&self.classifier.bias),
            margin: None,
            row_weight: self.row_weight,
            target: Target::Sparse { entries: 1, column: self.target, mass: None, mix: None, teacher: None },
        }
    }
    /// Sets loss (C), lse (C) and dh (C, D).
    pub fn forward(
        &self,
        dev: &B,
        loss: &mut B::Buf<f32>,
        lse: &mut B::Buf<f32>,
        dh: &mut B::Buf<f32>,
    ) -> Result<()> {
        let out = prototype_loss::Out { loss, lse, dz: dh, accumulate_dz: false };
        prototype_loss::forward::<f32, B>(dev, self.dims(), self.input(), out)
    }
    /// Adds the classifier's gradients.
    pub fn backward(&self, dev: &B, lse: &B::Buf<f32>, grads: &mut Classifier<B::Buf<f32>>) -> Result<()> {
        let columns = prototype_loss::ColumnGradients {
            column: &mut grads.weight,
            bias: Some(&mut grads.bias),
            scale: None,
        };
        prototype_loss::backward::<f32, B>(dev, self.dims(), self.input(), lse, columns)
    }
}

/// Logits (C, K) of host vectors `h` (C, D) under host weights: for prediction, where the classes are few.
pub fn logits(h: &[f32], classifier: &Classifier<Vec<f32>>) -> Vec<f32> {
    let classes = classifier.bias.len();
    let width = classifier.weight.len() / classes.max(1);
    let mut logits = Vec::with_capacity(h.len() / width.max(1) * classes);
    for h in h.chunks_exact(width.max(1)) {
        for (w, b) in classifier.weight.chunks_exact(width).zip(&classifier.bias) {
            let dot: f64 = h.iter().zip(w).map(|(h, w)| *h as f64 * *w as f64).sum();
            logits.push((dot + *b as f64) as f32);
        }
    }
    logits
}
