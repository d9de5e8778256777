//! A training loop by hand: masked-gene pretraining of a small encoder on the bundled cells.
//!
//!     cargo run --release --example training_loop
//!
//! `cellrefine pretrain` adds schedules, splits, logs, checkpoints and resuming; what happens to the weights is this. There is
//! no autograd: backward is written beside forward, and both read top to bottom.

#[path = "bundled/cells.rs"]
mod bundled;

use cellrefine::corpus::{Batch, BatchOptions, Packer, Sampler};
use cellrefine::cpu::Cpu;
use cellrefine::device::Device;
use cellrefine::error::Result;
use cellrefine::model::config::Vocabulary;
use cellrefine::model::heads::{MaskedGenes, Masking};
use cellrefine::model::ledger::Ledger;
use cellrefine::model::{Activations, Capacity, DeviceBatch, Encoder, Parameters, Pass, Preset, Store};
use cellrefine::ops::{adamw, reduce};

const SEED: u64 = 7;
const STEPS: u32 = 60;

fn main() -> Result<()> {
    let (folder, corpus) = bundled::corpus("training-loop")?;
    let vocab = corpus.vocab()?;

    // The network: `tiny`, narrower, so that this runs in seconds.
    let dev = Cpu;
    let mut config = Preset::named("tiny")?.config(vocab.len(), Vocabulary::of(&vocab));
    (config.width, config.ffn) = (64, 128);
    let mut params = Parameters::<Cpu, f32>::random(&dev, &config, SEED)?;
    let encoder = Encoder::new(dev, config.clone());
    println!("{} parameters over {} tokens", params.layout().parameters(), config.vocab);

    // Everything is allocated once, for the largest batch. A ledger books each buffer by name: `cellrefine plan` prints it.
    let room = Capacity { tokens: 2048, cells: 32 };
    let mut ledger = Ledger::new(&dev);
    let mut acts = Activations::training(&mut ledger, &config, room, false)?;
    let mut head = MaskedGenes::planned(&mut ledger, &config, room, Masking::bert(SEED, 0))?;
    let mut cells = DeviceBatch::planned(&mut ledger, &config, room)?;
    // One memory, two views: the network reads named parts, the optimiser one flat array.
    let mut grads = Store::planned(&mut ledger, "gradients", params.layout())?;
    let mut m = Store::<Cpu, f32>::planned(&mut ledger, "first moments", params.layout())?;
    let mut v = Store::<Cpu, f32>::planned(&mut ledger, "second moments", params.layout())?;
    let mut scalars = dev.zeros::<f64>(1)?;

    // Cells in a seeded order, packed without padding, cut at 64 genes.
    let options = BatchOptions {
        cells: room.cells,
        tokens: room.tokens,
        max_tokens: 64,
        cls: config.vocabulary.cls,
        eos: config.vocabulary.eos,
        values: false,
    };
    let order = Sampler::of_cells((0..corpus.cells() as u32).collect(), SEED)?;
    let mut packer = Packer::sampled(corpus.clone(), order, options)?;
    let mut batch = Batch::default();

    for step in 1..=STEPS {
        packer.fill(&mut batch)?;
        cells.upload(&dev, &config, &batch)?;

        // Random bits have addresses (seed, step, site, element): dropout and masks need no state, and a rerun repeats them.
        let masking = Masking::bert(SEED, step);
        let masked = masking.count(&config, &cells.gene[..cells.tokens], cells.first_row);
        head.mask(&dev, &config, &cells, masking, masked)?;
        let pass = Pass::Train { seed: SEED, step, view: 0 };
        let mean = 1.0 / masked.max(1) as f32;

        encoder.forward(params.network(), head.input(&cells), &mut acts, pass, config.layers)?;
        head.forward(&dev, &config, &params, &cells, &acts, mean)?;
        // Parameter gradients are added to, so that batches can be accumulated: clear them first.
        dev.clear(grads.flat_mut())?;
        head.backward(&dev, &config, &params, &cells, &mut acts, mean, grads.named_mut())?;
        let input = head.input(&cells);
        encoder.backward(params.network(), input, &mut acts, pass, config.layers, grads.named_mut())?;

        // The norm stays on the device; AdamW reads it there, clips, and makes no step when it is not finite.
        let len = params.layout().len();
        reduce::sum_squares(&dev, grads.flat(), len, &mut scalars, 0)?;
        let update = params.update();
        let mut copy = update.copy;
        for (range, weight_decay) in [(update.layout.decayed(), 0.01), (update.layout.undecayed(), 0.0)] {
            let hyper = adamw::Hyper {
                learning_rate: 2e-3,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay,
                step,
                max_norm: 1.0,
                norm_slot: 0,
            };
            let state = adamw::State {
                weight: &mut *update.weight,
                grad: grads.flat(),
                m: m.flat_mut(),
                v: v.flat_mut(),
                copy: copy.as_deref_mut(),
                scalars: &scalars,
            };
            adamw::step::<f32, Cpu>(&dev, range, hyper, state)?;
        }

        if step % 15 == 0 || step == 1 {
            let loss: f32 = dev.download(head.loss())?[..masked].iter().sum();
            println!("step {step:>2}  loss {:.3}  ({masked} masked genes)", loss * mean);
        }
    }
    bundled::remove(&folder)
}
