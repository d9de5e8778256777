//! Adding a term to the loss: cells of one batch pushed apart on the sphere, beside the masked genes.
//!
//!     cargo run --release --example loss_term
//!
//! ```text
//! z_i = h_i / |h_i|                                   h_i: mean of the cell's token vectors (C, D)
//! L   = 1/(C(C−1)) Σ_{i≠j} (z_i·z_j)²                 0 where all cells are orthogonal, 1 where they are one
//! ```
//! A term is a value and a gradient with respect to what it reads. Both exist here as ops already: refine uses this formula to
//! space its *prototypes* (`ops::structure`, wanted cosine 0), and the op does not care whose rows they are. So the new term is
//! four calls, it runs on every backend, and what is left is to prove the gradient: by a finite difference, as all of ours are.

#[path = "bundled/cells.rs"]
mod bundled;

use cellrefine::corpus::{Batch, BatchOptions, Packer};
use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::error::Result;
use cellrefine::model::config::Vocabulary;
use cellrefine::model::ledger::Ledger;
use cellrefine::model::{
    Activations, Capacity, DeviceBatch, Encoder, ModelConfig, Parameters, Pass, Preset, Store, heads,
};
use cellrefine::ops::pool::Pooling;
use cellrefine::ops::{Backend, normalize, structure};

/// The term and its buffers, made once.
struct Spread<B: Backend<f32>> {
    cells: usize,
    h: B::Buf<f32>,            // (C, D)
    z: B::Buf<f32>,            // (C, D)
    inverse_norm: B::Buf<f32>, // (C)
    overlap: B::Buf<f32>,      // (C, C): zero, cells are wanted orthogonal
    loss: B::Buf<f32>,         // (C)
    dz: B::Buf<f32>,           // (C, D)
    dh: B::Buf<f32>,           // (C, D)
}

impl<B: Backend<f32>> Spread<B> {
    fn new(dev: &B, cells: usize, width: usize) -> Result<Self> {
        let table = || dev.zeros::<f32>(cells * width);
        Ok(Spread {
            cells,
            h: table()?,
            z: table()?,
            inverse_norm: dev.zeros(cells)?,
            overlap: dev.zeros(cells * cells)?,
            loss: dev.zeros(cells)?,
            dz: table()?,
            dh: table()?,
        })
    }

    /// L over the cells that the encoder just ran over; sets the gradient of the encoder's output, times `weight`.
    fn step(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        batch: &DeviceBatch<B>,
        acts: &mut Activations<B, f32>,
        weight: f32,
    ) -> Result<f64> {
        let (depth, rows) = (config.layers, normalize::Dims { rows: self.cells, width: config.width });
        heads::pool(dev, config, Pooling::Mean, batch, acts, depth, &mut self.h)?;
        normalize::forward(dev, rows, &self.h, None, &mut self.z, &mut self.inverse_norm)?;
        dev.clear(&mut self.dz)?; // the op adds
        let dims =
            structure::Dims { prototypes: self.cells, width: config.width, c0: 0.0, c1: 0.0, scale: weight };
        structure::forward_backward(dev, dims, &self.z, &self.overlap, &mut self.loss, &mut self.dz)?;
        normalize::backward(dev, rows, &self.dz, &self.z, &self.inverse_norm, false, &mut self.dh)?;
        heads::pool_backward(dev, config, Pooling::Mean, batch, &self.dh, acts)?;
        Ok(dev.download(&self.loss)?.iter().map(|l| *l as f64).sum())
    }
}

fn main() -> Result<()> {
    let (folder, corpus) = bundled::corpus("loss-term")?;
    let vocab = corpus.vocab()?;
    let dev = Cpu;
    let mut config = Preset::named("tiny")?.config(vocab.len(), Vocabulary::of(&vocab));
    (config.width, config.ffn) = (64, 128);
    let mut params = Parameters::<Cpu, f32>::random(&dev, &config, 3)?;
    let encoder = Encoder::new(dev, config.clone());

    // Sixteen cells, once.
    let (c, room) = (16, Capacity { tokens: 1024, cells: 16 });
    let vocabulary = &config.vocabulary;
    let options = BatchOptions {
        cells: c,
        tokens: room.tokens,
        max_tokens: 64,
        cls: vocabulary.cls,
        eos: vocabulary.eos,
        values: false,
    };
    let mut batch = Batch::default();
    Packer::in_order(corpus, (0..c as u32).collect(), options)?.fill(&mut batch)?;
    let mut ledger = Ledger::new(&dev);
    let mut acts = Activations::training(&mut ledger, &config, room, false)?;
    let mut cells = DeviceBatch::planned(&mut ledger, &config, room)?;
    let mut grads = Store::planned(&mut ledger, "gradients", params.layout())?;
    cells.upload(&dev, &config, &batch)?;
    let mut spread = Spread::<Cpu>::new(&dev, c, config.width)?;

    // Value and gradient of the whole network under the term. A second term would add to acts.dx before `backward`:
    // `MaskedGenes::backward_onto` does just that.
    let mut value = |params: &Parameters<Cpu, f32>, grads: Option<&mut Store<Cpu, f32>>| -> Result<f64> {
        encoder.forward(params.network(), cells.input(), &mut acts, Pass::Eval, config.layers)?;
        let loss = spread.step(&dev, &config, &cells, &mut acts, 1.0)?;
        if let Some(grads) = grads {
            let (input, depth) = (cells.input(), config.layers);
            encoder.backward(params.network(), input, &mut acts, Pass::Eval, depth, grads.named_mut())?;
        }
        Ok(loss)
    };
    let before = value(&params, Some(&mut grads))?;
    println!("mean squared cosine between cells {before:.4}");

    // One small step along −gradient: the loss falls by step · |gradient|², if the gradient is right.
    let gradient = dev.download(grads.flat())?;
    let square: f64 = gradient.iter().map(|g| (*g as f64).powi(2)).sum();
    let step = 1e-3 / square;
    params.write_with(&dev, |dev, master, _| {
        let moved = dev.download(master.flat())?;
        let moved: Vec<f32> = moved.iter().zip(&gradient).map(|(w, g)| w - step as f32 * g).collect();
        dev.write(master.flat_mut(), &moved)
    })?;
    let after = value(&params, None)?;
    let (fell, predicted) = (before - after, step * square);
    println!("one step along the gradient: fell by {fell:.6}, predicted {predicted:.6}");
    assert!((fell / predicted - 1.0).abs() < 0.05, "the gradient is not that of the loss");
    bundled::remove(&folder)
}
