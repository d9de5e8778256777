//! Every buffer of a forward and backward pass, made once for the largest batch.
//!
//! Training keeps what backward needs: per token and layer `8D + F` activations (qkv 3D, attention output D, the two sums
//! D + D, the two LayerNorm outputs D + D, feed-forward F) and `H + 4` statistics. Training that recomputes keeps the hidden states,
//! D per token and layer, and one layer that is run again before its backward. Evaluation keeps one layer and two hidden states that
//! take turns. Softmax and ReLU are undone from what is kept; nothing is ever (L × L).

use super::config::ModelConfig;
use super::ledger::Ledger;
use crate::device::{Act, Device};
use crate::error::Result;

/// The largest batch that buffers are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// N.
    pub tokens: usize,
    /// C.
    pub cells: usize,
}

/// What one layer keeps between forward and backward.
pub struct LayerActivations<B: Device, A: Act> {
    /// (N, 3D).
    pub qkv: B::Buf<A>,
    /// (N, D): attention output, before its projection.
    pub attention: B::Buf<A>,
    /// (N, H): log-sum-exp of the attention scores.
    pub lse: B::Buf<f32>,
    /// (N, D): projection, then residual + dropout(projection).
    pub sum1: B::Buf<A>,
    /// (N, D): LayerNorm of sum1.
    pub norm1: B::Buf<A>,
    /// (N).
    pub mean1: B::Buf<f32>,
    /// (N).
    pub rstd1: B::Buf<f32>,
    /// (N, F): after ReLU.
    pub hidden: B::Buf<A>,
    /// (N, D): feed-forward output, then norm1 + dropout(feed-forward output). Its LayerNorm is the next hidden state.
    pub sum2: B::Buf<A>,
    /// (N).
    pub mean2: B::Buf<f32>,
    /// (N).
    pub rstd2: B::Buf<f32>,
}

/// Gradients on their way back; one set serves all layers.
pub struct BackwardBuffers<B: Device, A: Act> {
    /// (N, D): gradient of the hidden state that backward stands at; on entry dL/d(hidden state of `depth`).
    pub dx: B::Buf<A>,
    /// (N, D): gradient of norm1.
    pub dnorm1: B::Buf<A>,
    /// (N, D): gradient of a branch, before its dropout: the projection's or the feed-forward block's output.
    pub dbranch: B::Buf<A>,
    /// (N, F).
    pub dhidden: B::Buf<A>,
    /// (N, D).
    pub dattention: B::Buf<A>,
    /// (N, 3D).
    pub dqkv: B::Buf<A>,
    /// (N, H): row sums of dattention ∘ attention.
    pub delta: B::Buf<f32>,
}

/// All buffers of the encoder.
pub struct Activations<B: Device, A: Act> {
    pub(super) capacity: Capacity,
    /// Hidden states (N, D): 0 is the embedding, i the output of layer i. All L + 1 in training, two in evaluation.
    pub(super) x: Vec<B::Buf<A>>,
    /// Embedding LayerNorm (N).
    pub(super) mean: B::Buf<f32>,
    /// Embedding LayerNorm (N).
    pub(super) rstd: B::Buf<f32>,
    /// L in training; one in evaluation and where training recomputes: the last one that ran.
    pub(super) layers: Vec<LayerActivations<B, A>>,
    /// The layer that ran last.
    pub(super) ran: Option<usize>,
    pub(super) backward: Option<BackwardBuffers<B, A>>,
}

impl<B: Device, A: Act> Activations<B, A> {
    /// Buffers for forward and backward. With `recompute`, all layers share one set and backward runs each layer again: the
    /// same bits, about a third more work, `L - 1` layers' buffers less.
    pub fn training(
        ledger: &mut Ledger<B>,
        config: &ModelConfig,
        capacity: Capacity,
        recompute: bool,
    ) -> Result<Self> {
        let kept = if recompute { config.layers.min(1) } else { config.layers };
        let mut acts = Self::with(ledger, config, capacity, config.layers + 1, kept)?;
        let (n, d) = (capacity.tokens, config.width);
        acts.backward = Some(BackwardBuffers {
            dx: ledger.zeros("backward.dx", "(N, D)", n * d)?,
            dnorm1: ledger.zeros("backward.dnorm1", "(N, D)", n * d)?,
            dbranch: ledger.zeros("backward.dbranch", "(N, D)", n * d)?,
            dhidden: ledger.zeros("backward.dhidden", "(N, F)", n * config.ffn)?,
            dattention: ledger.zeros("backward.dattention", "(N, D)", n * d)?,
            dqkv: ledger.zeros("backward.dqkv", "(N, 3D)", n * 3 * d)?,
            delta: ledger.zeros("backward.delta", "(N, H)", n * config.heads)?,
        });
        Ok(acts)
    }

    /// Buffers for forward alone.
    pub fn evaluation(ledger: &mut Ledger<B>, config: &ModelConfig, capacity: Capacity) -> Result<Self> {
        Self::with(ledger, config, capacity, 2.min(config.layers + 1), config.layers.min(1))
    }

    fn with(
        ledger: &mut Ledger<B>,
        config: &ModelConfig,
        capacity: Capacity,
        states: usize,
        layers: usize,
    ) -> Result<Self> {
        let (n, d, h) = (capacity.tokens, config.width, config.heads);
        let x = (0..states)
            .map(|i| ledger.zeros(format!("hidden_state.{i}"), "(N, D)", n * d))
            .collect::<Result<Vec<_>>>()?;
        let mean = ledger.zeros("embedding.mean", "(N)", n)?;
        let rstd = ledger.zeros("embedding.rstd", "(N)", n)?;
        let layers = (0..layers)
            .map(|i| {
                let name = |n: &str| format!("layer.{i}.{n}");
                Ok(LayerActivations {
                    qkv: ledger.zeros(name("qkv"), "(N, 3D)", n * 3 * d)?,
                    attention: ledger.zeros(name("attention"), "(N, D)", n * d)?,
                    lse: ledger.zeros(name("lse"), "(N, H)", n * h)?,
                    sum1: ledger.zeros(name("sum1"), "(N, D)", n * d)?,
                    norm1: ledger.zeros(name("norm1"), "(N, D)", n * d)?,
                    mean1: ledger.zeros(name("mean1"), "(N)", n)?,
                    rstd1: ledger.zeros(name("rstd1"), "(N)", n)?,
                    hidden: ledger.zeros(name("hidden"), "(N, F)", n * config.ffn)?,
                    sum2: ledger.zeros(name("sum2"), "(N, D)", n * d)?,
                    mean2: ledger.zeros(name("mean2"), "(N)", n)?,
                    rstd2: ledger.zeros(name("rstd2"), "(N)", n)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Activations { capacity, x, mean, rstd, layers, ran: None, backward: None })
    }

    /// The largest batch these buffers hold.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }
    /// Hidden state `depth` (N, D): 0 is the embedding, i the output of layer i. In evaluation only the last one of a pass is
    /// there to be read: ask for the depth that the pass ran to.
    pub fn hidden(&self, depth: usize) -> &B::Buf<A> {
        &self.x[depth % self.x.len()]
    }
    /// Made for backward too?
    pub fn trains(&self) -> bool {
        self.backward.is_some()
    }
    /// dL/d(hidden state) (N, D), to be set before backward.
    ///
    /// # Errors
    /// Bug: buffers made for evaluation.
    pub fn dx(&mut self) -> Result<&mut B::Buf<A>> {
        match &mut self.backward {
            Some(back) => Ok(&mut back.dx),
            None => Err(crate::error::Error::bug("backward over buffers made for evaluation")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Element, Len, Queue};
    use crate::model::config::{PRESETS, Vocabulary};
    use crate::model::ledger::Paper;
    use half::bf16;
    use std::ops::Range;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A device that counts bytes itself, apart from the ledger.
    #[derive(Clone, Default)]
    struct Counting(Arc<AtomicU64>);
    struct Counted(usize);
    impl Len for Counted {
        fn len(&self) -> usize {
            self.0
        }
    }
    impl Device for Counting {
        type Buf<T: Element> = Counted;
        type Event = ();
        fn name(&self) -> String {
            "counting".into()
        }
        fn zeros<T: Element>(&self, len: usize) -> Result<Counted> {
            self.0.fetch_add((len * size_of::<T>()) as u64, Ordering::Relaxed);
            Ok(Counted(len))
        }
        fn write<T: Element>(&self, _: &mut Counted, _: &[T]) -> Result<()> {
            Ok(())
        }
        fn event(&self, _: Queue) -> Result<()> {
            Ok(())
        }
        fn record(&self, _: &mut (), _: Queue) -> Result<()> {
            Ok(())
        }
        fn wait(&self, _: &(), _: Queue) -> Result<()> {
            Ok(())
        }
        fn write_beside<T: Element>(&self, _: &mut Counted, _: &[T]) -> Result<()> {
            Ok(())
        }
        fn read<T: Element>(&self, _: &Counted, _: &mut [T]) -> Result<()> {
            Ok(())
        }
        fn clear<T: Element>(&self, _: &mut Counted) -> Result<()> {
            Ok(())
        }
        fn copy<T: Element>(&self, _: &Counted, _: &mut Counted, _: usize) -> Result<()> {
            Ok(())
        }
        unsafe fn part<T: Element>(&self, _: &Counted, r: Range<usize>) -> Counted {
            Counted(r.len())
        }
    }

    #[test]
    fn the_plan_is_what_is_allocated_and_linear_in_tokens() {
        let config = PRESETS[2].config(1000, Vocabulary::default());
        let bytes = |tokens: usize, recompute: bool| {
            let capacity = Capacity { tokens, cells: 8 };
            let device = Counting::default();
            Activations::<_, bf16>::training(&mut Ledger::new(&device), &config, capacity, recompute)
                .unwrap();
            let mut plan = Ledger::new(&Paper);
            Activations::<_, bf16>::training(&mut plan, &config, capacity, recompute).unwrap();
            assert_eq!(plan.bytes(), device.0.load(Ordering::Relaxed));
            plan.bytes()
        };
        let (d, f, h, l) = (256, 512, 4, 6);
        let per_layer = (8 * d + f) * 2 + (h + 4) * 4;
        let once = 2 * d + 2 * 4 + (7 * d + f) * 2 + h * 4;
        assert_eq!(bytes(1, false), (l * per_layer + once) as u64);
        assert_eq!(bytes(4096, false), 4096 * bytes(1, false));
        assert_eq!(bytes(1, true), (l * 2 * d + per_layer - 2 * d + once) as u64);
    }

    #[test]
    fn evaluation_keeps_one_layer() {
        let config = PRESETS[2].config(1000, Vocabulary::default());
        let capacity = Capacity { tokens: 10, cells: 1 };
        let mut plan = Ledger::new(&Paper);
        let acts = Activations::<_, f32>::evaluation(&mut plan, &config, capacity).unwrap();
        assert_eq!((acts.x.len(), acts.layers.len(), acts.trains()), (2, 1, false));
    }
}
