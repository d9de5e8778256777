//! The encoder, forward and backward by hand.
//!
//! ```text
//! x_0 = dropout( LN(E_word[gene] + E_pos[position] + E_type[0] (+ E_value[bin])) )
//! layer:  a   = attention(W_qkv x + b_qkv)
//!         n   = LN( x + dropout(W_out a + b_out) )
//!         x'  = LN( n + dropout(W_down relu(W_up n + b_up) + b_down) )
//! ```
//! Post-LN: the residual stream is normalised after every sum. Its gradients are in `encoder/backward.rs`.

mod backward;

use super::activations::Activations;
use super::batch::Input;
use super::config::ModelConfig;
use super::weights::{Layer, Weights};
use crate::device::{Act, Device, Dropout};
use crate::error::{Error, Result};
use crate::ops::{Backend, embed, gene_attention, layernorm, linear};

/// Evaluation, or one of the forward passes of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// No dropout.
    Eval,
    /// Dropout drawn from `(seed, step, view)`; backward takes the same pass as its forward.
    Train {
        /// Seed of the run.
        seed: u64,
        /// Training step.
        step: u32,
        /// Which pass over the cells within the step (0, 1, …, below 32,768): masked and clean passes, and the two views of a
        /// contrastive pair, drop different elements.
        view: u32,
    },
}

/// Dropout sites: `view · 65536 + 4·layer + place`. The embedding counts as place 0 of layer 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Place {
    Embedding = 0,
    Probabilities = 1,
    AttentionOutput = 2,
    FeedForward = 3,
}

impl Pass {
    fn dropout(self, probability: f32, layer: usize, place: Place, first_row: u64) -> Dropout {
        match self {
            Pass::Eval => Dropout::NONE,
            Pass::Train { seed, step, view } => {
                let site = view << 16 | (4 * layer as u32 + place as u32);
                Dropout { probability, seed, step, site, first_row }
            }
        }
    }
}

/// The encoder of one size on one device: a cheap handle without state.
#[derive(Debug, Clone)]
pub struct Encoder<B> {
    /// Where it runs.
    pub dev: B,
    /// Its size.
    pub config: ModelConfig,
}

impl<B: Device> Encoder<B> {
    /// A handle.
    pub fn new(dev: B, config: ModelConfig) -> Self {
        Encoder { dev, config }
    }

    /// Runs the embedding and the first `depth` layers; the result is `acts.hidden(depth)` (N, D).
    ///
    /// # Errors
    /// Bug: a batch larger than the buffers, a depth beyond the layers. What a backend reports.
    pub fn forward<A: Act>(
        &self,
        weights: &Weights<B::Buf<A>>,
        input: Input<'_, B>,
        acts: &mut Activations<B, A>,
        pass: Pass,
        depth: usize,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        let _range = crate::trace::range("forward");
        self.check(input, acts, depth)?;
        let Activations { x, mean, rstd, .. } = acts;
        let out = embed::Out { x: &mut x[0], mean, rstd };
        embed::forward::<A, B>(&self.dev, self.embed_dims(input), self.tables(weights, input, pass), out)?;
        for layer in 0..depth {
            self.layer_forward(layer, &weights.layers[layer], input, acts, pass)?;
        }
        Ok(())
    }

    fn layer_forward<A: Act>(
        &self,
        layer: usize,
        w: &Layer<B::Buf<A>>,
        input: Input<'_, B>,
        acts: &mut Activations<B, A>,
        pass: Pass,
    ) -> Result<()>
    where
        B: Backend<A>,
    {
        let (dev, d, f) = (&self.dev, self.config.width, self.config.ffn);
        let dropout = |place| pass.dropout(self.config.hidden_dropout, layer, place, input.batch.first_row);
        let (states, kept) = (acts.x.len(), acts.layers.len());
        acts.ran = Some(layer);
        let [x, next] = neighbours(&mut acts.x, layer % states, (layer + 1) % states);
        let keep = &mut acts.layers[layer % kept];

        let x_in = linear::In {
            x,
            weight: &w.qkv_weight,
            bias: Some(&w.qkv_bias),
            activation: linear::Activation::None,
        };
        linear::forward::<A, B>(dev, self.linear_dims(input, d, 3 * d), x_in, &mut keep.qkv)?;

        let attention = self.attention_in(&keep.qkv, input, layer, pass);
        gene_attention::forward::<A, B>(
            dev,
            self.attention_dims(input),
            attention,
            &mut keep.attention,
            &mut keep.lse,
        )?;

        let a_in = linear::In {
            x: &keep.attention,
            weight: &w.out_weight,
            bias: Some(&w.out_bias),
            activation: linear::Activation::None,
        };
        linear::forward::<A, B>(dev, self.linear_dims(input, d, d), a_in, &mut keep.sum1)?;

        let norm1 = layernorm::In {
            residual: Some(x),
            weight: &w.norm1_weight,
            bias: &w.norm1_bias,
            dropout: dropout(Place::AttentionOutput),
        };
        let norm1_out = layernorm::Out {
            x_then_sum: &mut keep.sum1,
            y: &mut keep.norm1,
            mean: &mut keep.mean1,
            rstd: &mut keep.rstd1,
        };
        layernorm::forward::<A, B>(dev, self.norm_dims(input), norm1, norm1_out)?;

        let up = linear::In {
            x: &keep.norm1,
            weight: &w.up_weight,
            bias: Some(&w.up_bias),
            activation: linear::Activation::Relu,
        };
        linear::forward::<A, B>(dev, self.linear_dims(input, d, f), up, &mut keep.hidden)?;

        let down = linear::In {
            x: &keep.hidden,
            weight: &w.down_weight,
            bias: Some(&w.down_bias),
            activation: linear::Activation::None,
        };
        linear::forward::<A, B>(dev, self.linear_dims(input, f, d), down, &mut keep.sum2)?;

        let norm2 = layernorm::In {
            residual: Some(&keep.norm1),
            weight: &w.norm2_weight,
            bias: &w.norm2_bias,
            dropout: dropout(Place::FeedForward),
        };
        let norm2_out = layernorm::Out {
            x_then_sum: &mut keep.sum2,
            y: next,
            mean: &mut keep.mean2,
            rstd: &mut keep.rstd2,
        };
        layernorm::forward::<A, B>(dev, self.norm_dims(input), norm2, norm2_out)
    }

    fn check<A: Act>(&self, input: Input<'_, B>, acts: &Activations<B, A>, depth: usize) -> Result<()> {
        let (tokens, cells) = (input.batch.tokens, input.batch.cells);
        if tokens > acts.capacity.tokens || cells > acts.capacity.cells || cells == 0 {
            return Err(Error::bug("a batch does not fit the activations")
                .found(format!("{tokens} tokens, {cells} cells"))
                .wanted(format!(
                    "1 cell to {} tokens, {} cells",
                    acts.capacity.tokens, acts.capacity.cells
                )));
        }
        if depth > self.config.layers {
            return Err(Error::bug("no such layer")
                .found(depth)
                .wanted(format!("at most {}", self.config.layers)));
        }
        Ok(())
    }

    fn embed_dims(&self, input: Input<'_, B>) -> embed::Dims {
        embed::Dims {
            tokens: input.batch.tokens,
            width: self.config.width,
            vocab: self.config.vocab,
            positions: self.config.positions,
            value_bins: self.config.value_bins,
            eps: self.config.layer_norm_eps as f32,
        }
    }
    fn tables<'a, A: Act>(
        &self,
        weights: &'a Weights<B::Buf<A>>,
        input: Input<'a, B>,
        pass: Pass,
    ) -> embed::Tables<'a, B, A> {
        embed::Tables {
            gene: input.gene,
            position: &input.batch.position,
            value_bin: input.batch.value_bin.as_ref(),
            word: &weights.embeddings.word,
            position_table: &weights.embeddings.position,
            type_table: &weights.embeddings.token_type,
            value_table: weights.value.as_ref(),
            weight: &weights.embeddings.norm_weight,
            bias: &weights.embeddings.norm_bias,
            dropout: pass.dropout(self.config.hidden_dropout, 0, Place::Embedding, input.batch.first_row),
        }
    }
    fn linear_dims(&self, input: Input<'_, B>, inputs: usize, outputs: usize) -> linear::Dims {
        linear::Dims { rows: input.batch.tokens, inputs, outputs }
    }
    fn norm_dims(&self, input: Input<'_, B>) -> layernorm::Dims {
        let eps = self.config.layer_norm_eps as f32;
        layernorm::Dims { rows: input.batch.tokens, width: self.config.width, eps }
    }
    fn attention_dims(&self, input: Input<'_, B>) -> gene_attention::Dims {
        gene_attention::Dims {
            tokens: input.batch.tokens,
            cells: input.batch.cells,
            heads: self.config.heads,
            head_width: self.config.head_width(),
            max_len: input.batch.max_len,
            pattern: self.config.attention,
        }
    }
    fn attention_in<'a, A: Act>(
        &self,
        qkv: &'a B::Buf<A>,
        input: Input<'a, B>,
        layer: usize,
        pass: Pass,
    ) -> gene_attention::In<'a, B, A> {
        gene_attention::In {
            qkv,
            cell_start: &input.batch.cell_start,
            global: input.batch.global.as_ref(),
            dropout: pass.dropout(
                self.config.attention_dropout,
                layer,
                Place::Probabilities,
                input.batch.first_row,
            ),
        }
    }
}

/// A layer's input and output state, to read and to write.
fn neighbours<T>(states: &mut [T], input: usize, output: usize) -> [&mut T; 2] {
    states.get_disjoint_mut([input, output]).expect("at least two hidden states where there is a layer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn dropout_sites_are_unique_and_below_the_named_streams() {
        let mut sites = HashSet::new();
        for view in [0, 1, 32_767] {
            let pass = Pass::Train { seed: 1, step: 2, view };
            assert!(sites.insert(pass.dropout(0.1, 0, Place::Embedding, 0).site));
            for layer in 0..64 {
                for place in [Place::Probabilities, Place::AttentionOutput, Place::FeedForward] {
                    assert!(sites.insert(pass.dropout(0.1, layer, place, 0).site));
                }
            }
        }
        assert!(sites.iter().all(|s| *s < crate::rng::site::INIT));
        assert_eq!(Pass::Eval.dropout(0.1, 3, Place::FeedForward, 9), Dropout::NONE);
    }
}
