//! The refine stage: masked genes and cell vectors in one forward pass, prototypes learning beside the encoder.
//!
//! ```text
//! h = pool(encoder(masked cells)),   L = λ_mlm L_mlm + objective(h, prototypes, teacher, targets)
//! ```
//! A logical batch that does not fit the device at once goes through by gradient caching: a first pass over all parts for h,
//! the objective on the whole of it, a second pass that draws the same dropout and masks and takes each part's dL/dh down.
//! The loss sees the whole batch either way.

use super::optimizer::{LOSS_SLOT, Moments, Span, TERM_SLOT};
use super::pretrain::{MaskedGeneTerm, masking};
use super::task::{Evaluation, Loss, Own, Task};
use super::trunk::{Draw, Logical, Trunk};
use crate::config::MaskSettings;
use crate::corpus::Batch;
use crate::device::{Act, Device};
use crate::error::{Code, Error, Result};
use crate::eval::metrics::recall_at;
use crate::eval::rows::centred_unit_rows;
use crate::model::heads;
use crate::model::ledger::Ledger;
use crate::model::snapshot::Snapshot;
use crate::objective::{Objective, StoredPrototypes};
use crate::ops::Backend;
use std::ops::Range;
use std::path::Path;

/// What validation cells are measured against.
pub enum Truth {
    /// Class per corpus cell, below P, or negative.
    Labels(Vec<i32>),
    /// Marker scores decide: the best type per corpus cell. Label-free runs have nothing better.
    Markers(Vec<i32>),
}

/// The stage.
pub struct Refine<B: Backend<A>, A: Act> {
    objective: Objective<B>,
    masked: Option<MaskedGeneTerm<B, A>>,
    /// Corpus indices of the teacher's rows, ascending.
    training: Vec<u32>,
    names: Vec<String>,
    truth: Truth,
    /// Cells (rows of the teacher's table) that each prototype is refreshed from after an epoch; empty = never.
    refresh: Vec<Vec<u32>>,
    spans: Vec<Span>,
    learning_rate: f64,
    depth: usize,
    buffers: Buffers<B>,
}

/// The stage's memory, besides the objective's and the masked-gene head's.
pub struct Buffers<B: Device> {
    /// Of the prototypes (P, D).
    moments: Moments<B>,
    /// (C, D) cell vectors of the logical batch.
    h: B::Buf<f32>,
    /// (C, D) their gradient.
    dh: B::Buf<f32>,
    /// (C, D) of a part: its cell vectors, then their gradient.
    part_h: B::Buf<f32>,
}

impl<B: Device> Buffers<B> {
    /// For P `types`, D `width`, `cells` of a logical batch and `part_cells` of a part.
    pub fn planned(
        ledger: &mut Ledger<B>,
        types: usize,
        width: usize,
        cells: usize,
        part_cells: usize,
    ) -> Result<Self> {
        Ok(Buffers {
            moments: Moments::planned(ledger, "the prototypes", types * width)?,
            h: ledger.zeros("cell vectors", "(C, D)", cells * width)?,
            dh: ledger.zeros("gradient of cell vectors", "(C, D)", cells * width)?,
            part_h: ledger.zeros("cell vectors of a part", "(C, D)", part_cells * width)?,
        })
    }
}

/// What the stage is made of.
pub struct Parts<B: Device> {
    /// Started.
    pub objective: Objective<B>,
    /// Corpus indices of the training cells, ascending.
    pub training: Vec<u32>,
    /// (P).
    pub names: Vec<String>,
    /// For validation cells.
    pub truth: Truth,
    /// Cells that refresh each prototype; empty = never.
    pub refresh: Vec<Vec<u32>>,
    /// Peak learning rate of the prototypes.
    pub learning_rate: f64,
}

impl<B: Backend<A>, A: Act> Refine<B, A> {
    /// The stage over `trunk`.
    pub fn new(trunk: &Trunk<B, A>, parts: Parts<B>, mask: &MaskSettings) -> Result<Self> {
        let (dev, config) = (&trunk.dev, trunk.config());
        let Parts { objective, training, names, truth, refresh, learning_rate } = parts;
        let (depth, width, cells) = (config.depth(config.layer)?, config.width, trunk.options.cells);
        let mlm = objective.config().mlm > 0.0;
        if mlm && depth != config.layers {
            return Err(Error::new(
                Code::SettingConflict,
                "the masked-gene term reads the last layer, and so must the cell vector",
            )
            .found(format!("model.layer = {}", config.layer))
            .next("--set model.layer=0, or --set objective.mlm=0"));
        }
        let masked = match mlm {
            true => Some(MaskedGeneTerm::new(dev, config, trunk.capacity(), mask)?),
            false => None,
        };
        let types = objective.types();
        trunk.reserve(mlm.then(|| masking(mask, 0, 0)), types)?;
        let ledger = &mut Ledger::new(dev);
        Ok(Refine {
            masked,
            training,
            names,
            truth,
            refresh,
            // Prototypes are points, not maps: they do not decay.
            spans: vec![Span { range: 0..types * width, decay: false }],
            learning_rate,
            depth,
            buffers: Buffers::planned(ledger, types, width, cells, trunk.capacity().cells)?,
            objective,
        })
    }

    /// Loads and encodes one part, of whose tokens `masked` are masked; its vectors are in `part_h`.
    fn encode(
        &mut self,
        trunk: &mut Trunk<B, A>,
        logical: &Logical<'_>,
        cells: &Range<usize>,
        draw: Draw,
        masked: usize,
    ) -> Result<()> {
        trunk.load(logical, cells, draw.first_row)?;
        match &mut self.masked {
            Some(term) => term.encode(trunk, draw, draw.pass(), masked)?,
            None => {
                let Trunk { encoder, params, part, acts, .. } = &mut *trunk;
                encoder.forward(params.network(), part.input(), acts, draw.pass(), self.depth)?;
            }
        }
        let Trunk { dev, encoder, part, acts, .. } = &mut *trunk;
        let config = &encoder.config;
        heads::pool(dev, config, config.pooling, part, acts, self.depth, &mut self.buffers.part_h)
    }

    /// Gradients of the encoded part from dL/dh of its cells in `part_h`; with `sums` its masked-gene loss is added up.
    fn backward(&mut self, trunk: &mut Trunk<B, A>, draw: Draw, mlm_scale: f32, sums: bool) -> Result<()> {
        if let Some(term) = &mut self.masked {
            term.loss(trunk, mlm_scale, sums)?;
        }
        let Trunk { dev, encoder, part, acts, .. } = &mut *trunk;
        let config = &encoder.config;
        heads::pool_backward(dev, config, config.pooling, part, &self.buffers.part_h, acts)?;
        match &mut self.masked {
            Some(term) => {
                term.backward_onto(trunk, mlm_scale)?;
                term.encoder_backward(trunk, draw.pass())
            }
            None => trunk.backward(None, draw.pass(), self.depth),
        }
    }

    /// The objective on the vectors in `h`, to which every rank adds its own; dL/dh is in `dh`, its terms' sums are in the trunk's
    /// scalars. Each rank reckons the whole batch: prototypes and their gradients are the same everywhere without a message.
    fn step(&mut self, trunk: &mut Trunk<B, A>, batch: &Batch) -> Result<()> {
        let (width, whole) = (trunk.config().width, &batch.whole);
        let ranges: Vec<_> = whole.shares.windows(2).map(|w| w[0] * width..w[1] * width).collect();
        trunk.dev.all_gather(&trunk.ranks, &mut self.buffers.h, &ranges)?;
        let _range = crate::trace::range("loss");
        let rows: Vec<u32> = whole
            .cells
            .iter()
            .map(|cell| self.training.binary_search(cell).map(|row| row as u32))
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| Error::bug("a batch holds a cell that does not train"))?;
        let (dev, scalars) = (&trunk.dev, &mut trunk.scalars);
        let Buffers { h, dh, .. } = &mut self.buffers;
        self.objective.step(dev, &rows, h, dh, scalars, TERM_SLOT)
    }

    /// Cosines (cells, P) of `cells` with the prototypes.
    fn cosines(&self, trunk: &mut Trunk<B, A>, cells: &[u32]) -> Result<Vec<f32>> {
        let width = trunk.config().width;
        let centre: Vec<f64> = self.objective.center().iter().map(|x| *x as f64).collect();
        let h = trunk.embed(cells)?;
        let q = trunk.dev.download(self.objective.prototypes())?;
        let unit =
            |rows: &[f32]| Ok::<_, Error>(centred_unit_rows(crate::eval::Rows::new(rows, width)?, &centre));
        let (z, p) = (unit(&h)?, unit(&q)?);
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() as f32;
        Ok(z.chunks_exact(width).flat_map(|z| p.chunks_exact(width).map(move |p| dot(z, p))).collect())
    }
}

impl<B: Backend<A>, A: Act> Task<B, A> for Refine<B, A> {
    fn gradients(&mut self, trunk: &mut Trunk<B, A>, batch: &Batch, draw: Draw, sums: bool) -> Result<usize> {
        let mut genes = trunk.take_genes();
        let logical = trunk.logical(batch, &mut genes);
        let width = trunk.config().width;
        let counts = match &self.masked {
            Some(term) => term.counts(trunk, &logical, draw),
            None => vec![0; logical.parts.len()],
        };
        let masked: usize = counts.iter().sum();
        let mlm_scale = match &self.masked {
            Some(_) => self.objective.config().mlm / trunk.of_all_ranks(masked)?.max(1) as f32,
            None => 0.0,
        };
        let parts: Vec<_> = logical.parts.iter().zip(counts).collect();
        // Rows of the whole batch.
        let place = |cells: &Range<usize>| {
            (batch.whole.first_cell + cells.start) * width..(batch.whole.first_cell + cells.end) * width
        };
        for (cells, masked) in &parts {
            self.encode(trunk, &logical, cells, draw, *masked)?;
            let Buffers { h, part_h, .. } = &mut self.buffers;
            trunk.dev.copy_part(part_h, 0..cells.len() * width, h, place(cells).start)?;
        }
        self.step(trunk, batch)?;
        for (cells, masked) in &parts {
            // The only part is still encoded.
            if parts.len() > 1 {
                self.encode(trunk, &logical, cells, draw, *masked)?;
            }
            let Buffers { dh, part_h, .. } = &mut self.buffers;
            trunk.dev.copy_part(dh, place(cells), part_h, 0)?;
            self.backward(trunk, draw, mlm_scale, sums)?;
        }
        trunk.recycle(genes);
        Ok(masked)
    }

    fn loss(&self, scalars: &[f64], cells: usize, masked: usize) -> Loss {
        let (c, mlm) = (self.objective.config(), scalars[LOSS_SLOT] / masked.max(1) as f64);
        let losses = self.objective.losses(&scalars[TERM_SLOT..], cells);
        let terms = [
            ("proto", c.proto, losses.proto),
            ("mlm", c.mlm, mlm),
            ("cell_cell", c.cell_cell, losses.cell_cell),
            ("structure", c.structure, losses.structure),
            ("anchor", c.anchor, losses.anchor),
        ];
        let on = terms.into_iter().filter(|(_, weight, _)| *weight > 0.0);
        let total = losses.total + c.mlm as f64 * mlm;
        Loss { total, terms: on.map(|(name, _, value)| (name, value)).collect() }
    }

    fn own(&mut self) -> Option<Own<'_, B, A>> {
        if !self.objective.config().trainable {
            return None;
        }
        let (weight, grad) = self.objective.parameters();
        Some(Own {
            weight,
            grad,
            moments: &mut self.buffers.moments,
            len: self.spans[0].range.end,
            spans: &self.spans,
            learning_rate: self.learning_rate,
            whole: true,
            name: "prototypes",
            act: std::marker::PhantomData,
        })
    }

    /// Recall@1 of the nearest prototype, mean over classes.
    fn evaluate(&mut self, trunk: &mut Trunk<B, A>, cells: &[u32]) -> Result<Evaluation> {
        let (truth, measure, other) = match &self.truth {
            Truth::Labels(truth) => (truth, "val_macro_recall_at_1", "val_recall_at_1"),
            Truth::Markers(truth) => (truth, "val_macro_marker_agreement", "val_marker_agreement"),
        };
        let known: Vec<u32> = cells.iter().copied().filter(|cell| truth[*cell as usize] >= 0).collect();
        let truth: Vec<Option<usize>> =
            known.iter().map(|cell| Some(truth[*cell as usize] as usize)).collect();
        let recall =
            recall_at(&self.cosines(trunk, &known)?, self.names.len(), &truth, &[1])?.ok_or_else(|| {
                Error::new(Code::NoLabelledCells, "no validation cell has a label")
                    .next("leave val= out of --split")
            })?;
        Ok(Evaluation {
            measure,
            value: recall.macro_[0],
            higher_is_better: true,
            others: vec![(other, recall.micro[0])],
        })
    }

    /// `q ← r q + (1 - r) · mean of its cells under the current encoder`, where `objective.refresh` = r is set.
    fn epoch_ended(&mut self, trunk: &mut Trunk<B, A>) -> Result<()> {
        let keep = self.objective.config().refresh as f64;
        if keep == 0.0 || self.refresh.is_empty() {
            return Ok(());
        }
        let width = trunk.config().width;
        let mut q = trunk.dev.download(self.objective.prototypes())?;
        for (q, rows) in q.chunks_exact_mut(width).zip(&self.refresh) {
            let cells: Vec<u32> = rows.iter().map(|row| self.training[*row as usize]).collect();
            let h = trunk.embed(&cells)?;
            for (d, q) in q.iter_mut().enumerate() {
                let mean =
                    h.iter().skip(d).step_by(width).map(|x| *x as f64).sum::<f64>() / cells.len() as f64;
                *q = (keep * *q as f64 + (1.0 - keep) * mean) as f32;
            }
        }
        trunk.dev.write(self.objective.parameters().0, &q)
    }

    fn save(&self, dev: &B, checkpoint: &mut Snapshot, config: &crate::model::ModelConfig) -> Result<()> {
        StoredPrototypes {
            names: self.names.clone(),
            vectors: dev.download(self.objective.prototypes())?,
            centre: self.objective.center(),
            temperature: self.objective.config().tau,
            layer: config.layer,
            pooling: config.pooling,
        }
        .add_to(checkpoint)
    }

    fn restore(&mut self, dev: &B, folder: &Path) -> Result<()> {
        let width = self.spans[0].range.end / self.names.len();
        let stored = StoredPrototypes::read(folder, width)?.ok_or_else(|| {
            Error::new(Code::CheckpointLacksPrototypes, "the checkpoint holds no prototypes")
                .at(folder.display())
        })?;
        if stored.names != self.names {
            return Err(Error::new(
                Code::CheckpointPrototypes,
                "the checkpoint's prototypes are of other types",
            )
            .at(folder.display())
            .found(stored.names.join(", "))
            .wanted(self.names.join(", ")));
        }
        dev.write(self.objective.parameters().0, &stored.vectors)
    }
}
