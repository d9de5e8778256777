//! The encoder's gradients: `forward` read from the bottom to the top.
//!
//! Attention probabilities, embedding sums and dropout masks are computed again; and whole layers, where the activations keep one
//! alone.

use super::{Encoder, Pass, Place};
use crate::device::{Act, Device};
use crate::error::{Error, Result};
use crate::model::activations::Activations;
use crate::model::batch::Input;
use crate::model::weights::{Layer, Weights};
use crate::ops::{Backend, embed, gene_attention, layernorm, linear};
use std::ops::Range;

impl<B: Device> Encoder<B> {
    /// Adds the gradients of everything below hidden state `depth` to `grads`, from dL/d(that state) in `acts.dx()`, which is
    /// overwritten. `pass` and `depth` are those of the forward pass.
    ///
    /// # Errors
    /// Bug: buffers made for evaluation. What a backend reports.
    pub fn backward<A: Act>(
        &self,
        weights: &Weights<B::Buf<A>>,
        input: Input<'_, B>,
        acts: &mut Activations<B, A>,
        pass: Pass,
        depth: usize,
        grads: &mut Weights<B::Buf<f32>>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        self.backward_layers(weights, input, acts, pass, 0..depth, grads)?;
        self.backward_embeddings(weights, input, acts, pass, grads)
    }

    /// The part of [`Encoder::backward`] that belongs to `layers`; those above them went before.
    ///
    /// # Errors
    /// As [`Encoder::backward`].
    pub fn backward_layers<A: Act>(
        &self,
        weights: &Weights<B::Buf<A>>,
        input: Input<'_, B>,
        acts: &mut Activations<B, A>,
        pass: Pass,
        layers: Range<usize>,
        grads: &mut Weights<B::Buf<f32>>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        let _range = crate::trace::range("backward");
        self.check(input, acts, layers.end)?;
        if !acts.trains() {
            return Err(evaluation_buffers());
        }
        for layer in layers.rev() {
            // One set of buffers for all layers holds the last one that ran.
            if acts.ran != Some(layer) && acts.layers.len() == 1 {
                self.layer_forward(layer, &weights.layers[layer], input, acts, pass)?;
            }
            self.layer_backward(layer, &weights.layers[layer], input, acts, pass, &mut grads.layers[layer])?;
        }
        Ok(())
    }

    /// The rest of [`Encoder::backward`], when all layers are done.
    ///
    /// # Errors
    /// As [`Encoder::backward`].
    pub fn backward_embeddings<A: Act>(
        &self,
        weights: &Weights<B::Buf<A>>,
        input: Input<'_, B>,
        acts: &Activations<B, A>,
        pass: Pass,
        grads: &mut Weights<B::Buf<f32>>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        let _range = crate::trace::range("backward");
        let (mean, rstd) = (&acts.mean, &acts.rstd);
        let Some(back) = &acts.backward else { return Err(evaluation_buffers()) };
        embed::backward::<A, B>(
            &self.dev,
            self.embed_dims(input),
            self.tables(weights, input, pass),
            embed::BackwardIn { dx: &back.dx, mean, rstd },
            embed::Gradients {
                word: &mut grads.embeddings.word,
                position_table: &mut grads.embeddings.position,
                type_table: &mut grads.embeddings.token_type,
                value_table: grads.value.as_mut(),
                weight: &mut grads.embeddings.norm_weight,
                bias: &mut grads.embeddings.norm_bias,
            },
        )
    }

    fn layer_backward<A: Act>(
        &self,
        layer: usize,
        w: &Layer<B::Buf<A>>,
        input: Input<'_, B>,
        acts: &mut Activations<B, A>,
        pass: Pass,
        dw: &mut Layer<B::Buf<f32>>,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        let (dev, d, f) = (&self.dev, self.config.width, self.config.ffn);
        let dropout = |place| pass.dropout(self.config.hidden_dropout, layer, place, input.batch.first_row);
        let Activations { x, layers, backward, .. } = acts;
        let (x, keep) = (&x[layer], &layers[layer % layers.len()]);
        let Some(back) = backward else { return Err(evaluation_buffers()) };

        // x' = LN(norm1 + dropout(down))
        let norm2 = layernorm::BackwardIn {
            dy: &back.dx,
            sum: &keep.sum2,
            mean: &keep.mean2,
            rstd: &keep.rstd2,
            weight: &w.norm2_weight,
            dropout: dropout(Place::FeedForward),
            relu_input: false,
        };
        let norm2_out = layernorm::Gradients {
            dx: &mut back.dbranch,
            dresidual: Some(&mut back.dnorm1),
            dweight: &mut dw.norm2_weight,
            dbias: &mut dw.norm2_bias,
        };
        layernorm::backward::<A, B>(dev, self.norm_dims(input), norm2, norm2_out)?;

        // down = W_down hidden + b_down
        let dims = self.linear_dims(input, f, d);
        let down = linear::BackwardWeight { x: &keep.hidden, dy: &back.dbranch };
        linear::backward_weight::<A, B>(dev, dims, down, &mut dw.down_weight, Some(&mut dw.down_bias))?;
        let down = linear::BackwardInput {
            dy: &back.dbranch,
            weight: &w.down_weight,
            relu_output: Some(&keep.hidden),
            accumulate: false,
        };
        linear::backward_input::<A, B>(dev, dims, down, &mut back.dhidden)?;

        // hidden = relu(W_up norm1 + b_up)
        let dims = self.linear_dims(input, d, f);
        let up = linear::BackwardWeight { x: &keep.norm1, dy: &back.dhidden };
        linear::backward_weight::<A, B>(dev, dims, up, &mut dw.up_weight, Some(&mut dw.up_bias))?;
        let up = linear::BackwardInput {
            dy: &back.dhidden,
            weight: &w.up_weight,
            relu_output: None,
            accumulate: true,
        };
        linear::backward_input::<A, B>(dev, dims, up, &mut back.dnorm1)?;

        // norm1 = LN(x + dropout(out))
        let norm1 = layernorm::BackwardIn {
            dy: &back.dnorm1,
            sum: &keep.sum1,
            mean: &keep.mean1,
            rstd: &keep.rstd1,
            weight: &w.norm1_weight,
            dropout: dropout(Place::AttentionOutput),
            relu_input: false,
        };
        let norm1_out = layernorm::Gradients {
            dx: &mut back.dbranch,
            dresidual: Some(&mut back.dx),
            dweight: &mut dw.norm1_weight,
            dbias: &mut dw.norm1_bias,
        };
        layernorm::backward::<A, B>(dev, self.norm_dims(input), norm1, norm1_out)?;

        // out = W_out attention + b_out
        let dims = self.linear_dims(input, d, d);
        let out = linear::BackwardWeight { x: &keep.attention, dy: &back.dbranch };
        linear::backward_weight::<A, B>(dev, dims, out, &mut dw.out_weight, Some(&mut dw.out_bias))?;
        let out = linear::BackwardInput {
            dy: &back.dbranch,
            weight: &w.out_weight,
            relu_output: None,
            accumulate: false,
        };
        linear::backward_input::<A, B>(dev, dims, out, &mut back.dattention)?;

        // attention = softmax(q kᵀ) v
        let attention = self.attention_in(&keep.qkv, input, layer, pass);
        let attention_in =
            gene_attention::BackwardIn { do_: &back.dattention, o: &keep.attention, lse: &keep.lse };
        let dims = self.attention_dims(input);
        gene_attention::backward::<A, B>(
            dev,
            dims,
            attention,
            attention_in,
            &mut back.dqkv,
            &mut back.delta,
        )?;

        // qkv = W_qkv x + b_qkv
        let dims = self.linear_dims(input, d, 3 * d);
        let qkv = linear::BackwardWeight { x, dy: &back.dqkv };
        linear::backward_weight::<A, B>(dev, dims, qkv, &mut dw.qkv_weight, Some(&mut dw.qkv_bias))?;
        let qkv = linear::BackwardInput {
            dy: &back.dqkv,
            weight: &w.qkv_weight,
            relu_output: None,
            accumulate: true,
        };
        linear::backward_input::<A, B>(dev, dims, qkv, &mut back.dx)
    }
}

fn evaluation_buffers() -> Error {
    Error::bug("backward over buffers made for evaluation")
}
