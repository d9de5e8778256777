//! The masked-gene head.
//!
//! ```text
//! y = LN(relu(W_t x[masked] + b_t)),  logits = y · E_wordᵀ + b,  loss = (weight / M) Σ_m (lse_m - logit_m)
//! ```
//! The decoder is the word table itself, so the head adds to the table's gradient. Logits are never stored: the loss is
//! [`prototype_loss`]. M is the number of masked tokens of the whole logical batch, so micro-batches add up to it.

use super::activations::{Activations, Capacity};
use super::batch::{DeviceBatch, Input};
use super::config::ModelConfig;
use super::ledger::Ledger;
use super::store::Parameters;
use super::weights::Weights;
use crate::device::{Act, Device, Dropout, Len};
use crate::error::Result;
use crate::ops::prototype_loss::{self, Target};
use crate::ops::{Backend, layernorm, linear, mask_tokens, rows};

/// How tokens are masked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Masking {
    /// Share of tokens chosen.
    pub probability: f32,
    /// Of the chosen, share replaced by `<mask>`.
    pub mask_share: f32,
    /// Of the chosen, share replaced by a random gene; the rest stays.
    pub random_share: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u32,
}

impl Masking {
    /// BERT's rates: 15 % chosen; of these 80 % masked, 10 % random, 10 % as they are.
    pub fn bert(seed: u64, step: u32) -> Self {
        Masking { probability: 0.15, mask_share: 0.8, random_share: 0.1, seed, step }
    }
    fn dims(self, config: &ModelConfig, tokens: usize, first_row: u64) -> mask_tokens::Dims {
        mask_tokens::Dims {
            tokens,
            vocab: config.vocab,
            first_gene: config.vocabulary.first_gene,
            mask_id: config.vocabulary.mask,
            probability: self.probability,
            mask_share: self.mask_share,
            random_share: self.random_share,
            seed: self.seed,
            step: self.step,
            first_row,
        }
    }
    /// How many of these tokens will be masked: for the M of a logical batch before its first part runs.
    pub fn count(self, config: &ModelConfig, gene: &[u32], first_row: u64) -> usize {
        mask_tokens::count(self.dims(config, gene.len(), first_row), gene)
    }
    /// Rows to make room for: the mean and eight standard deviations. Beyond it the buffers grow.
    pub fn room(self, tokens: usize) -> usize {
        let mean = tokens as f64 * self.probability as f64;
        ((mean + 8.0 * (mean * (1.0 - self.probability as f64)).sqrt()).ceil() as usize + 32).min(tokens)
    }
}

/// The masked-gene head's buffers.
pub struct MaskedGenes<B: Device, A: Act> {
    gene: B::Buf<u32>,
    index: B::Buf<u32>,
    target: B::Buf<i32>,
    masked: usize,
    width: usize,
    rows: HeadRows<B, A>,
}

/// Buffers over the masked tokens.
struct HeadRows<B: Device, A: Act> {
    gathered: B::Buf<A>,
    dense: B::Buf<A>,
    norm: B::Buf<A>,
    mean: B::Buf<f32>,
    rstd: B::Buf<f32>,
    one: B::Buf<f32>,
    loss: B::Buf<f32>,
    lse: B::Buf<f32>,
    dnorm: B::Buf<A>,
    ddense: B::Buf<A>,
    dgathered: B::Buf<A>,
}

impl<B: Device, A: Act> HeadRows<B, A> {
    fn planned(ledger: &mut Ledger<B>, m: usize, d: usize) -> Result<Self> {
        let mut one = ledger.zeros("masked.row_weight", "(M)", m)?;
        // On paper there is nothing to write to.
        let _ = ledger.dev().write(&mut one, &vec![1.0; m]);
        Ok(HeadRows {
            gathered: ledger.zeros("masked.gathered", "(M, D)", m * d)?,
            dense: ledger.zeros("masked.dense", "(M, D)", m * d)?,
            norm: ledger.zeros("masked.norm", "(M, D)", m * d)?,
            mean: ledger.zeros("masked.mean", "(M)", m)?,
            rstd: ledger.zeros("masked.rstd", "(M)", m)?,
            one,
            loss: ledger.zeros("masked.loss", "(M)", m)?,
            lse: ledger.zeros("masked.lse", "(M)", m)?,
            dnorm: ledger.zeros("masked.dnorm", "(M, D)", m * d)?,
            ddense: ledger.zeros("masked.ddense", "(M, D)", m * d)?,
            dgathered: ledger.zeros("masked.dgathered", "(M, D)", m * d)?,
        })
    }
}

impl<B: Device, A: Act> MaskedGenes<B, A> {
    /// Buffers for batches up to `capacity`, masked at `masking`'s rate.
    pub fn planned(
        ledger: &mut Ledger<B>,
        config: &ModelConfig,
        capacity: Capacity,
        masking: Masking,
    ) -> Result<Self> {
        Ok(MaskedGenes {
            gene: ledger.zeros("masked.gene", "(N)", capacity.tokens)?,
            index: ledger.zeros("masked.index", "(N)", capacity.tokens)?,
            target: ledger.zeros("masked.target", "(N)", capacity.tokens)?,
            masked: 0,
            width: config.width,
            rows: HeadRows::planned(ledger, masking.room(capacity.tokens), config.width)?,
        })
    }
    /// M of this batch.
    pub fn masked(&self) -> usize {
        self.masked
    }
    /// (M) loss per masked token, neither weighted nor divided; sum it with [`reduce::sum`](crate::ops::reduce::sum).
    pub fn loss(&self) -> &B::Buf<f32> {
        &self.rows.loss
    }
    /// (N) the genes, masked.
    pub fn gene(&self) -> &B::Buf<u32> {
        &self.gene
    }
    /// The batch with its genes masked, for the encoder.
    pub fn input<'a>(&'a self, batch: &'a DeviceBatch<B>) -> Input<'a, B> {
        Input { batch, gene: &self.gene }
    }

    /// Masks a batch, of which `masked` tokens are chosen: what [`Masking::count`] says of its genes.
    pub fn mask(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        batch: &DeviceBatch<B>,
        masking: Masking,
        masked: usize,
    ) -> Result<()>
    where
        B: mask_tokens::MaskTokens,
    {
        let dims = masking.dims(config, batch.tokens, batch.first_row);
        let out = mask_tokens::Out { gene: &mut self.gene, index: &mut self.index, target: &mut self.target };
        mask_tokens::mask(dev, dims, &batch.gene, out)?;
        self.masked = masked;
        self.make_room(dev)
    }

    /// Takes a masking made elsewhere: genes to read (N), token indices (M, ascending, distinct) and the genes that stood there.
    pub fn given(&mut self, dev: &B, gene: &[u32], index: &[u32], target: &[i32]) -> Result<()> {
        dev.write(&mut self.gene, gene)?;
        dev.write(&mut self.index, index)?;
        dev.write(&mut self.target, target)?;
        self.masked = index.len();
        self.make_room(dev)
    }

    fn make_room(&mut self, dev: &B) -> Result<()> {
        if self.masked > self.rows.one.len() {
            self.rows = HeadRows::planned(&mut Ledger::new(dev), self.masked, self.width)?;
        }
        Ok(())
    }

    /// Loss of each masked token, from the last hidden state in `acts`, and the gradient of the head's output on the way.
    /// `gradient_scale` is the term's weight over the M of the logical batch.
    pub fn forward(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        params: &Parameters<B, A>,
        batch: &DeviceBatch<B>,
        acts: &Activations<B, A>,
        gradient_scale: f32,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        if self.masked == 0 {
            return Ok(());
        }
        let (w, d, r) = (&params.network().head, config.width, &mut self.rows);
        let gather = rows::Dims { rows: batch.tokens, gathered: self.masked, width: d };
        rows::gather::<A, B>(dev, gather, acts.hidden(config.layers), &self.index, &mut r.gathered)?;
        let dense = linear::In {
            x: &r.gathered,
            weight: &w.dense_weight,
            bias: Some(&w.dense_bias),
            activation: linear::Activation::Relu,
        };
        linear::forward::<A, B>(dev, square(self.masked, d), dense, &mut r.dense)?;
        let norm = layernorm::In {
            residual: None,
            weight: &w.norm_weight,
            bias: &w.norm_bias,
            dropout: Dropout::NONE,
        };
        let out =
            layernorm::Out { x_then_sum: &mut r.dense, y: &mut r.norm, mean: &mut r.mean, rstd: &mut r.rstd };
        layernorm::forward::<A, B>(dev, norm_dims(config, self.masked), norm, out)?;
        let input = decoder(params, &r.norm, &r.one, &self.target);
        let out = prototype_loss::Out {
            loss: &mut r.loss,
            lse: &mut r.lse,
            dz: &mut r.dnorm,
            accumulate_dz: false,
        };
        prototype_loss::forward::<A, B>(dev, decoder_dims(config, self.masked, gradient_scale), input, out)
    }

    /// Sets `acts.dx()` to the gradient of the last hidden state and adds to the gradients of the head and the word table.
    /// Follows [`forward`](Self::forward) with the same scale.
    #[allow(clippy::too_many_arguments)] // the operands of one pass; a struct would only rename them
    pub fn backward(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        params: &Parameters<B, A>,
        batch: &DeviceBatch<B>,
        acts: &mut Activations<B, A>,
        gradient_scale: f32,
        grads: &mut Weights<B::Buf<f32>>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        dev.clear(acts.dx()?)?;
        self.backward_onto(dev, config, params, batch, acts, gradient_scale, grads)
    }

    /// The same, but added to what `acts.dx()` holds: a pooled loss on the same forward pass.
    #[allow(clippy::too_many_arguments)] // as above
    pub fn backward_onto(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        params: &Parameters<B, A>,
        batch: &DeviceBatch<B>,
        acts: &mut Activations<B, A>,
        gradient_scale: f32,
        grads: &mut Weights<B::Buf<f32>>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        if self.masked == 0 {
            return Ok(());
        }
        let (w, dw, d, r) = (&params.network().head, &mut grads.head, config.width, &mut self.rows);
        let columns = prototype_loss::ColumnGradients {
            column: &mut grads.embeddings.word,
            bias: Some(&mut dw.bias),
            scale: None,
        };
        let input = decoder(params, &r.norm, &r.one, &self.target);
        prototype_loss::backward::<A, B>(
            dev,
            decoder_dims(config, self.masked, gradient_scale),
            input,
            &r.lse,
            columns,
        )?;
        let norm = layernorm::BackwardIn {
            dy: &r.dnorm,
            sum: &r.dense,
            mean: &r.mean,
            rstd: &r.rstd,
            weight: &w.norm_weight,
            dropout: Dropout::NONE,
            relu_input: true,
        };
        let norm_out = layernorm::Gradients {
            dx: &mut r.ddense,
            dresidual: None,
            dweight: &mut dw.norm_weight,
            dbias: &mut dw.norm_bias,
        };
        layernorm::backward::<A, B>(dev, norm_dims(config, self.masked), norm, norm_out)?;
        let dims = square(self.masked, d);
        let dense = linear::BackwardWeight { x: &r.gathered, dy: &r.ddense };
        linear::backward_weight::<A, B>(dev, dims, dense, &mut dw.dense_weight, Some(&mut dw.dense_bias))?;
        let dense = linear::BackwardInput {
            dy: &r.ddense,
            weight: &w.dense_weight,
            relu_output: None,
            accumulate: false,
        };
        linear::backward_input::<A, B>(dev, dims, dense, &mut r.dgathered)?;
        let gather = rows::Dims { rows: batch.tokens, gathered: self.masked, width: d };
        rows::scatter_add::<A, B>(dev, gather, &r.dgathered, &self.index, acts.dx()?)
    }
}

fn square(rows: usize, width: usize) -> linear::Dims {
    linear::Dims { rows, inputs: width, outputs: width }
}

fn norm_dims(config: &ModelConfig, rows: usize) -> layernorm::Dims {
    layernorm::Dims { rows, width: config.width, eps: config.layer_norm_eps as f32 }
}

fn decoder_dims(config: &ModelConfig, rows: usize, gradient_scale: f32) -> prototype_loss::Dims {
    prototype_loss::Dims {
        rows,
        columns: config.vocab,
        width: config.width,
        gradient_scale,
        bias_in_target: true,
    }
}

fn decoder<'a, B: Device, A: Act>(
    params: &'a Parameters<B, A>,
    z: &'a B::Buf<A>,
    row_weight: &'a B::Buf<f32>,
    target: &'a B::Buf<i32>,
) -> prototype_loss::In<'a, B, A> {
    prototype_loss::In {
        z,
        column: &params.network().embeddings.word,
        scale: None,
        bias: Some(&params.master().named().head.bias),
        margin: None,
        row_weight,
        target: Target::Sparse { entries: 1, column: target, mass: None, mix: None, teacher: None },
    }
}
