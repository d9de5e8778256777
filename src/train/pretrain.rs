//! Masked-gene pretraining: `L = 1/M Σ_m CE(masked gene m)` over the M masked tokens of the logical batch.

use super::optimizer::LOSS_SLOT;
use super::task::{Evaluation, Loss, Own, Task};
use super::trunk::{Draw, Logical, Trunk};
use crate::config::MaskSettings;
use crate::corpus::{Batch, BatchOptions, Packer};
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::model::heads::{MaskedGenes, Masking};
use crate::model::ledger::Ledger;
use crate::model::snapshot::Snapshot;
use crate::model::{Capacity, ModelConfig, Pass};
use crate::ops::{Backend, reduce};
use crate::trace;
use std::path::Path;

/// Step number of the masks under which validation cells are measured: the same at every evaluation.
const EVALUATION_STEP: u32 = u32::MAX;

/// The masked-gene term, alone in `pretrain` and one of five in `refine`.
pub struct MaskedGeneTerm<B: Backend<A>, A: Act> {
    masked: MaskedGenes<B, A>,
    settings: MaskSettings,
}

impl<B: Backend<A>, A: Act> MaskedGeneTerm<B, A> {
    /// Buffers for parts up to `capacity`.
    pub fn new(dev: &B, config: &ModelConfig, capacity: Capacity, settings: &MaskSettings) -> Result<Self> {
        let masking = masking(settings, 0, 0);
        let masked = MaskedGenes::planned(&mut Ledger::new(dev), config, capacity, masking)?;
        Ok(MaskedGeneTerm { masked, settings: settings.clone() })
    }

    /// M of each part of a logical batch.
    pub fn counts(&self, trunk: &Trunk<B, A>, logical: &Logical<'_>, draw: Draw) -> Vec<usize> {
        let _range = trace::range("masks");
        let masking = masking(&self.settings, draw.seed, draw.step);
        let count = |cells| {
            let tokens = logical.tokens(cells);
            let first_row = draw.first_row + tokens.start as u64;
            masking.count(trunk.config(), &logical.gene[tokens], first_row)
        };
        logical.parts.iter().map(count).collect()
    }

    /// Masks `masked` tokens of the part in the trunk and runs the encoder over it, all layers.
    pub fn encode(&mut self, trunk: &mut Trunk<B, A>, draw: Draw, pass: Pass, masked: usize) -> Result<()> {
        let masking = masking(&self.settings, draw.seed, draw.step);
        let Trunk { dev, encoder, params, part, acts, .. } = trunk;
        self.masked.mask(dev, &encoder.config, part, masking, masked)?;
        encoder.forward(params.network(), self.masked.input(part), acts, pass, encoder.config.layers)
    }

    /// The head's loss on the part; with `sum` its Σ over the masked tokens is added to the trunk's [`LOSS_SLOT`].
    pub fn loss(&mut self, trunk: &mut Trunk<B, A>, gradient_scale: f32, sum: bool) -> Result<()> {
        let _range = trace::range("loss");
        let Trunk { dev, encoder, params, part, acts, scalars, .. } = trunk;
        self.masked.forward(dev, &encoder.config, params, part, acts, gradient_scale)?;
        match sum {
            true => reduce::add_sum::<B>(dev, self.masked.loss(), self.masked.masked(), scalars, LOSS_SLOT),
            false => Ok(()),
        }
    }

    /// Gradients of the head and the word table; `acts.dx` is set.
    pub fn backward(&mut self, trunk: &mut Trunk<B, A>, gradient_scale: f32) -> Result<()> {
        let _range = trace::range("backward");
        let Trunk { dev, encoder, params, part, acts, grads, .. } = trunk;
        self.masked.backward(dev, &encoder.config, params, part, acts, gradient_scale, grads.named_mut())
    }

    /// The same, but added to `acts.dx`.
    pub fn backward_onto(&mut self, trunk: &mut Trunk<B, A>, gradient_scale: f32) -> Result<()> {
        let _range = trace::range("backward");
        let Trunk { dev, encoder, params, part, acts, grads, .. } = trunk;
        self.masked.backward_onto(dev, &encoder.config, params, part, acts, gradient_scale, grads.named_mut())
    }

    /// Gradients of the encoder below, from `acts.dx`.
    pub fn encoder_backward(&mut self, trunk: &mut Trunk<B, A>, pass: Pass) -> Result<()> {
        let layers = trunk.config().layers;
        trunk.backward(Some(self.masked.gene()), pass, layers)
    }
}

/// The rates of `settings`, drawn for a step.
pub(super) fn masking(settings: &MaskSettings, seed: u64, step: u32) -> Masking {
    Masking {
        probability: settings.probability as f32,
        mask_share: settings.mask_share as f32,
        random_share: settings.random_share as f32,
        seed,
        step,
    }
}

/// The stage.
pub struct Pretrain<B: Backend<A>, A: Act> {
    term: MaskedGeneTerm<B, A>,
    seed: u64,
}

impl<B: Backend<A>, A: Act> Pretrain<B, A> {
    /// The stage over `trunk`.
    pub fn new(trunk: &Trunk<B, A>, settings: &MaskSettings, seed: u64) -> Result<Self> {
        let term = MaskedGeneTerm::new(&trunk.dev, trunk.config(), trunk.capacity(), settings)?;
        trunk.reserve(Some(masking(settings, 0, 0)), 0)?;
        Ok(Pretrain { term, seed })
    }
}

impl<B: Backend<A>, A: Act> Task<B, A> for Pretrain<B, A> {
    fn gradients(&mut self, trunk: &mut Trunk<B, A>, batch: &Batch, draw: Draw, sums: bool) -> Result<usize> {
        let mut genes = trunk.take_genes();
        let logical = trunk.logical(batch, &mut genes);
        let counts = self.term.counts(trunk, &logical, draw);
        let masked: usize = counts.iter().sum();
        let scale = 1.0 / trunk.of_all_ranks(masked)?.max(1) as f32;
        for (cells, masked) in logical.parts.iter().zip(counts) {
            trunk.load(&logical, cells, draw.first_row)?;
            self.term.encode(trunk, draw, draw.pass(), masked)?;
            self.term.loss(trunk, scale, sums)?;
            self.term.backward(trunk, scale)?;
            self.term.encoder_backward(trunk, draw.pass())?;
        }
        trunk.recycle(genes);
        Ok(masked)
    }

    fn loss(&self, scalars: &[f64], _cells: usize, masked: usize) -> Loss {
        let mlm = scalars[LOSS_SLOT] / masked.max(1) as f64;
        Loss { total: mlm, terms: vec![("mlm", mlm)] }
    }

    fn own(&mut self) -> Option<Own<'_, B, A>> {
        None
    }

    /// Mean loss per masked gene, under masks that do not change from one evaluation to the next.
    fn evaluate(&mut self, trunk: &mut Trunk<B, A>, cells: &[u32]) -> Result<Evaluation> {
        let capacity = trunk.capacity();
        let options =
            BatchOptions { cells: capacity.cells, tokens: capacity.tokens, ..trunk.options.clone() };
        let mut packer = Packer::in_order(trunk.corpus.clone(), cells.to_vec(), options)?;
        let (mut batch, mut genes) = (Batch::default(), Vec::new());
        let mut draw = Draw { seed: self.seed, step: EVALUATION_STEP, first_row: 0 };
        let mut masked = 0;
        let turns = (0..trunk.ranks.world()).cycle();
        trunk.dev.clear(&mut trunk.scalars)?;
        for turn in turns {
            if !packer.fill(&mut batch)? {
                break;
            }
            if turn != trunk.ranks.rank() {
                draw.first_row += batch.tokens() as u64;
                continue;
            }
            let logical = trunk.logical(&batch, &mut genes);
            let counts = self.term.counts(trunk, &logical, draw);
            masked += counts.iter().sum::<usize>();
            for (cells, masked) in logical.parts.iter().zip(counts) {
                trunk.load(&logical, cells, draw.first_row)?;
                self.term.encode(trunk, draw, Pass::Eval, masked)?;
                self.term.loss(trunk, 0.0, true)?;
            }
            draw.first_row += batch.tokens() as u64;
        }
        let mut sums = [trunk.dev.download(&trunk.scalars)?[LOSS_SLOT], masked as f64];
        trunk.ranks.sum(&mut sums)?;
        let [loss, masked] = sums;
        if masked == 0.0 {
            return Err(Error::new(Code::NoLabelledCells, "the validation cells have no gene to mask")
                .found(format!(
                    "{} cells, mask.probability {}",
                    cells.len(),
                    self.term.settings.probability
                )));
        }
        Ok(Evaluation {
            measure: "val_mlm",
            value: loss / masked,
            higher_is_better: false,
            others: Vec::new(),
        })
    }

    fn save(&self, _dev: &B, _checkpoint: &mut Snapshot, _config: &ModelConfig) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _dev: &B, _folder: &Path) -> Result<()> {
        Ok(())
    }
}
