//! Vectors of cells, and of token lists that stand in no corpus, from a network at rest: what a stage embeds between its steps and
//! what `embed`, `annotate` and `eval` embed are this one pass.
//!
//! ```text
//! h_c = pool( hidden state `depth` of cell c )         no dropout, special tokens left out of the mean
//! ```
//! Cells are packed end to end without padding, so a cell's row depends on the cell alone: the same bits whatever the budget, the
//! order or the neighbours in the batch. Memory is that of one batch; rows go to a sink as they come.

use super::config::Embedding;
use super::heads;
use super::{Activations, DeviceBatch, Encoder, Parameters, Pass};
use crate::corpus::{Batch, BatchOptions, Corpus, Packer};
use crate::device::Act;
use crate::error::{Error, Result};
use crate::ops::Backend;
use crate::ops::pool::Pooling;
use crate::trace;
use half::f16;
use std::sync::Arc;

/// What stands for the expression of a gene in a list without expression, where the network reads values: ln(1 + 10⁴ · 2·10⁻⁴), a
/// common value.
const VALUE_OF_A_LIST: f32 = 1.1;

/// A network at rest and the buffers it runs in, all borrowed.
pub struct CellVectors<'a, B: Backend<A>, A: Act> {
    /// The network's handle and configuration.
    pub encoder: &'a Encoder<B>,
    /// Its weights.
    pub params: &'a Parameters<B, A>,
    /// Activations, for evaluation or for training.
    pub acts: &'a mut Activations<B, A>,
    /// The batch on the device.
    pub part: &'a mut DeviceBatch<B>,
    /// (C, D) the batch's rows.
    pub rows: &'a mut B::Buf<f32>,
    /// Hidden state that is pooled.
    pub depth: usize,
    /// How.
    pub pooling: Pooling,
}

impl<B: Backend<A>, A: Act> CellVectors<'_, B, A> {
    /// Hands the rows of `cells`, in that order, to `sink` a batch at a time: corpus indices (n), values (n, D). `options` bounds a
    /// batch within the capacity of the buffers.
    pub fn each(
        &mut self,
        corpus: &Arc<Corpus>,
        cells: &[u32],
        options: &BatchOptions,
        mut sink: impl FnMut(&[u32], &[f32]) -> Result<()>,
    ) -> Result<()> {
        let mut packer = Packer::in_order(corpus.clone(), cells.to_vec(), options.clone())?;
        let (mut batch, mut host) = (Batch::default(), Vec::new());
        let mut done = 0;
        loop {
            let packing = trace::range("batch");
            if !packer.fill(&mut batch)? {
                break;
            }
            drop(packing);
            let encoding = trace::range("encode");
            self.part.upload(&self.encoder.dev, &self.encoder.config, &batch)?;
            host.resize(batch.len() * self.encoder.config.width, 0.0);
            self.read(&mut host)?;
            drop(encoding);
            let _taking = trace::range("take rows");
            sink(&batch.cells, &host)?;
            done += batch.len();
        }
        match done == cells.len() {
            true => Ok(()),
            false => Err(Error::bug("embedding lost cells").found(done).wanted(cells.len())),
        }
    }

    /// Rows (lists, D) of lists of genes: marker sentences. Special tokens are added and lists cut to `room` genes, as for a cell.
    pub fn of_lists(&mut self, lists: &[Vec<u32>], room: usize) -> Result<Vec<f32>> {
        let encoder = self.encoder;
        let config = &encoder.config;
        let (before, after) = (config.vocabulary.cls, config.vocabulary.eos);
        let mut rows = vec![0.0; lists.len() * config.width];
        for (list, row) in lists.iter().zip(rows.chunks_exact_mut(config.width)) {
            let gene: Vec<u32> =
                before.into_iter().chain(list.iter().copied().take(room)).chain(after).collect();
            let value: Vec<f16> = match config.embedding {
                Embedding::Rank => vec![f16::from_f32(VALUE_OF_A_LIST); gene.len()],
                // Bins are of the cell's own values: the order of the list is that of its expression.
                Embedding::ValueBins => {
                    let falling = |(i, id): (usize, &u32)| match *id < config.vocabulary.first_gene {
                        true => f16::ZERO,
                        false => f16::from_f32(2.0 - i as f32 / gene.len() as f32),
                    };
                    gene.iter().enumerate().map(falling).collect()
                }
            };
            self.part.upload_cells(&encoder.dev, config, &gene, &[0, gene.len() as u32], Some(&value))?;
            self.read(row)?;
        }
        Ok(rows)
    }

    /// Rows (C, D) of a packed batch within the capacity of the buffers, special tokens included.
    pub fn packed(&mut self, gene: &[u32], cell_start: &[u32], value: Option<&[f16]>) -> Result<Vec<f32>> {
        let encoder = self.encoder;
        self.part.upload_cells(&encoder.dev, &encoder.config, gene, cell_start, value)?;
        let mut rows = vec![0.0; self.part.cells * encoder.config.width];
        self.read(&mut rows)?;
        Ok(rows)
    }

    /// Runs the network over what was uploaded and reads its rows.
    fn read(&mut self, host: &mut [f32]) -> Result<()> {
        let CellVectors { encoder, params, acts, part, rows, depth, pooling } = self;
        encoder.forward(params.network(), part.input(), acts, Pass::Eval, *depth)?;
        heads::pool(&encoder.dev, &encoder.config, *pooling, part, acts, *depth, rows)?;
        encoder.dev.read(rows, host)
    }
}
