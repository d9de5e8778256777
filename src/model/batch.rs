//! Packed cells on the device: the same CSR as on disk, plus what the embedding reads per token.
//!
//! Buffers are made once for a [`Capacity`] and refilled; an upload allocates nothing. `first_row` and `first_cell` place a
//! micro-batch inside its logical batch, so that dropout and masking draw the same bits however the batch is cut.
//!
//! Uploads run on the device's queue of copies. With two batches that take turns, that of the next runs beside the work on this:
//! ```text
//! this.retire(&dev)?;                     // work queued so far may read it
//! swap(&mut this, &mut next);
//! this.fill(&dev, …)?;                    // waits for its own retirement alone, a turn ago
//! ```

use super::activations::Capacity;
use super::config::{Embedding, ModelConfig};
use super::ledger::Ledger;
use crate::corpus::Batch;
use crate::device::{Device, Queue};
use crate::error::{Code, Error, Result};
use crate::ops::gene_attention::Pattern;
use half::f16;

/// Largest value that the corpus stores: ln(1 + 10⁴), a cell with a single expressed gene.
const VALUE_MAX: f32 = 9.210_44;

/// Bin of a log-normalised value: 0 for special tokens (value 0), then `bins - 1` equal steps over (0, ln(1 + 10⁴)].
pub fn value_bin(value: f16, bins: usize) -> u32 {
    let steps = bins.saturating_sub(1);
    let value = value.to_f32();
    if value <= 0.0 || steps == 0 {
        return 0;
    }
    1 + ((value / VALUE_MAX * steps as f32) as usize).min(steps - 1) as u32
}

/// Appends the bins of one cell's values among themselves: 0 for special tokens (value 0), then `1 + ⌊(bins - 1) · b/n⌋`, b of the n
/// values above 0 being smaller. scGPT's quantile bins, but that equal values share one (there they are spread at random).
fn quantile_bins(values: &[f16], bins: usize, sorted: &mut Vec<f16>, out: &mut Vec<u32>) {
    sorted.clear();
    sorted.extend(values.iter().filter(|v| **v > f16::ZERO));
    sorted.sort_unstable_by(f16::total_cmp);
    out.extend(values.iter().map(|v| {
        if *v <= f16::ZERO {
            return 0;
        }
        let below = sorted.partition_point(|x| x < v);
        1 + (below * bins.saturating_sub(1) / sorted.len()) as u32
    }));
}

/// Cells on the device.
pub struct DeviceBatch<B: Device> {
    /// (N) gene ids.
    pub gene: B::Buf<u32>,
    /// (N) position within the cell.
    pub position: B::Buf<u32>,
    /// (N) value bins, where the network has them.
    pub value_bin: Option<B::Buf<u32>>,
    /// (C + 1) token offsets.
    pub cell_start: B::Buf<u32>,
    /// (N) 1 = global token, where attention is marker-sparse.
    pub global: Option<B::Buf<u8>>,
    /// N.
    pub tokens: usize,
    /// C.
    pub cells: usize,
    /// Longest cell.
    pub max_len: usize,
    /// Index of the first token within the logical batch.
    pub first_row: u64,
    /// Index of the first cell within the logical batch.
    pub first_cell: usize,
    capacity: Capacity,
    /// Behind the work that reads what is in the buffers.
    read: B::Event,
    /// Behind the copies that filled them.
    filled: B::Event,
    staging: Staging,
}

/// Host memory of an upload.
#[derive(Default)]
struct Staging {
    gene: Vec<u32>,
    per_token: Vec<u32>,
    sorted: Vec<f16>,
    global: Vec<u8>,
}

/// What the encoder reads: a batch, and its genes as they are or masked.
pub struct Input<'a, B: Device> {
    /// The cells.
    pub batch: &'a DeviceBatch<B>,
    /// (N) genes to read.
    pub gene: &'a B::Buf<u32>,
}

impl<B: Device> Clone for Input<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Device> Copy for Input<'_, B> {}

impl<B: Device> DeviceBatch<B> {
    /// Buffers for batches up to `capacity`.
    pub fn planned(ledger: &mut Ledger<B>, config: &ModelConfig, capacity: Capacity) -> Result<Self> {
        let n = capacity.tokens;
        let values = config.value_bins > 0;
        let sparse = matches!(config.attention, Pattern::MarkerSparse { .. });
        let gene = ledger.zeros("batch.gene", "(N)", n)?;
        let position = ledger.zeros("batch.position", "(N)", n)?;
        let value_bin = values.then(|| ledger.zeros("batch.value_bin", "(N)", n)).transpose()?;
        let cell_start = ledger.zeros("batch.cell_start", "(C + 1)", capacity.cells + 1)?;
        let global = sparse.then(|| ledger.zeros("batch.global", "(N)", n)).transpose()?;
        Ok(DeviceBatch {
            gene,
            position,
            value_bin,
            cell_start,
            global,
            // Behind the zeroing.
            read: ledger.dev().event(Queue::Compute)?,
            filled: ledger.dev().event(Queue::Copies)?,
            tokens: 0,
            cells: 0,
            max_len: 0,
            first_row: 0,
            first_cell: 0,
            capacity,
            staging: Staging::default(),
        })
    }
    /// The same without a ledger.
    pub fn new(dev: &B, config: &ModelConfig, capacity: Capacity) -> Result<Self> {
        Self::planned(&mut Ledger::new(dev), config, capacity)
    }

    /// Copies a host batch in; under marker-sparse attention special tokens and `config.globals` are marked as global. The
    /// batch starts a logical batch of its own; set `first_row` and `first_cell` for a later part.
    ///
    /// # Errors
    /// Input: an id outside the vocabulary, a cell that is empty or longer than the context, no values where the network
    /// reads them. Bug: more than the capacity.
    pub fn upload(&mut self, dev: &B, config: &ModelConfig, host: &Batch) -> Result<()> {
        let mut gene = std::mem::take(&mut self.staging.gene);
        host.gene.widen_into(&mut gene);
        let value = (config.value_bins > 0).then_some(host.value.as_slice());
        let uploaded = self.upload_cells(dev, config, &gene, &host.cell_start, value);
        self.staging.gene = gene;
        uploaded
    }

    /// The same from plain slices: `gene` (N), `cell_start` (C + 1), `value` (N).
    pub fn upload_cells(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        gene: &[u32],
        cell_start: &[u32],
        value: Option<&[f16]>,
    ) -> Result<()> {
        self.retire(dev)?;
        self.fill(dev, config, gene, cell_start, value)
    }

    /// The work queued so far is the last that reads what is in the buffers.
    pub fn retire(&mut self, dev: &B) -> Result<()> {
        dev.record(&mut self.read, Queue::Compute)
    }

    /// The upload itself, behind the work that the batch was retired behind; work queued from now on waits for it.
    pub fn fill(
        &mut self,
        dev: &B,
        config: &ModelConfig,
        gene: &[u32],
        cell_start: &[u32],
        value: Option<&[f16]>,
    ) -> Result<()> {
        let (tokens, cells) = (gene.len(), cell_start.len().saturating_sub(1));
        if tokens > self.capacity.tokens || cells > self.capacity.cells {
            return Err(Error::bug("a batch is larger than its buffers")
                .found(format!("{tokens} tokens, {cells} cells"))
                .wanted(format!("at most {} and {}", self.capacity.tokens, self.capacity.cells)));
        }
        let max_len = check_cells(config, gene, cell_start)?;
        dev.wait(&self.read, Queue::Copies)?;
        dev.write_beside(&mut self.gene, gene)?;
        dev.write_beside(&mut self.cell_start, cell_start)?;
        let per_token = &mut self.staging.per_token;
        per_token.clear();
        for w in cell_start.windows(2) {
            let len = w[1] - w[0];
            match config.embedding {
                Embedding::Rank => per_token.extend(0..len),
                Embedding::ValueBins => per_token.extend((0..len).map(|_| 0)),
            }
        }
        dev.write_beside(&mut self.position, per_token)?;
        if let Some(value_bins) = &mut self.value_bin {
            let value = value.filter(|v| v.len() == tokens).ok_or_else(|| {
                Error::new(
                    Code::ValuesMissing,
                    "the network reads expression values and the corpus stores none",
                )
                .found(format!("value_bins = {} in config.json", config.value_bins))
                .next("pack the corpus again with --values")
            })?;
            per_token.clear();
            let (bins, sorted) = (config.value_bins, &mut self.staging.sorted);
            match config.embedding {
                Embedding::Rank => per_token.extend(value.iter().map(|v| value_bin(*v, bins))),
                Embedding::ValueBins => cell_start.windows(2).for_each(|w| {
                    quantile_bins(&value[w[0] as usize..w[1] as usize], bins, sorted, per_token);
                }),
            }
            dev.write_beside(value_bins, per_token)?;
        }
        if let Some(global) = &mut self.global {
            let is_global =
                |id: u32| id < config.vocabulary.first_gene || config.globals.binary_search(&id).is_ok();
            self.staging.global.clear();
            self.staging.global.extend(gene.iter().map(|id| u8::from(is_global(*id))));
            dev.write_beside(global, &self.staging.global)?;
        }
        dev.record(&mut self.filled, Queue::Copies)?;
        dev.wait(&self.filled, Queue::Compute)?;
        (self.tokens, self.cells, self.max_len) = (tokens, cells, max_len);
        (self.first_row, self.first_cell) = (0, 0);
        Ok(())
    }

    /// The batch with its genes as they are.
    pub fn input(&self) -> Input<'_, B> {
        Input { batch: self, gene: &self.gene }
    }
    /// What this batch's buffers hold at most.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }
}

/// Kernels trust indices: they are checked here, once. Returns the longest cell.
fn check_cells(config: &ModelConfig, gene: &[u32], cell_start: &[u32]) -> Result<usize> {
    if cell_start.first() != Some(&0) || cell_start.last().map(|n| *n as usize) != Some(gene.len()) {
        return Err(Error::bug("cell offsets do not cover the tokens"));
    }
    let mut max_len = 0;
    for (cell, w) in cell_start.windows(2).enumerate() {
        if w[1] <= w[0] {
            return Err(
                Error::new(Code::EmptyCell, "a cell without tokens").at(format!("cell {cell} of the batch"))
            );
        }
        max_len = max_len.max((w[1] - w[0]) as usize);
    }
    if max_len > config.positions {
        return Err(Error::new(Code::CellTooLong, "a cell is longer than the network's context")
            .found(format!("{max_len} tokens"))
            .wanted(format!("at most {}", config.positions))
            .next(format!("--set batch.max_tokens={}", config.positions)));
    }
    if let Some(id) = gene.iter().find(|id| **id as usize >= config.vocab) {
        return Err(Error::new(Code::VocabularyMismatch, "a gene id outside the vocabulary")
            .found(id)
            .wanted(format!("below {}", config.vocab))
            .next("cellrefine inspect CORPUS --verify"));
    }
    Ok(max_len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::model::config::{PRESETS, Vocabulary};

    #[test]
    fn value_bins_cover_the_range() {
        let bin = |v: f32| value_bin(f16::from_f32(v), 16);
        assert_eq!((bin(0.0), bin(1e-3), bin(9.3)), (0, 1, 15));
        assert!((1..90).map(|v| bin(v as f32 / 10.0)).is_sorted());
        assert_eq!(value_bin(f16::from_f32(2.0), 0), 0);
    }

    #[test]
    fn quantile_bins_follow_the_cell_s_own_values() {
        let bins = |values: &[f32], bins: usize| {
            let values: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            let mut out = Vec::new();
            quantile_bins(&values, bins, &mut vec![f16::ONE; 3], &mut out);
            out
        };
        // A special token, then five values, two of them equal: b/n = 4/5, 0, 1/5, 1/5, 3/5 of four steps.
        assert_eq!(bins(&[0.0, 9.0, 0.5, 1.0, 1.0, 2.0], 5), [0, 4, 1, 1, 1, 3]);
        assert_eq!(bins(&[0.0, 90.0, 5.0, 10.0, 10.0, 20.0], 5), [0, 4, 1, 1, 1, 3], "scale says nothing");
        assert_eq!(bins(&[0.0, 0.0], 5), [0, 0]);
        let many: Vec<f32> = (1..=200).map(|v| v as f32).collect();
        let found = bins(&many, 51);
        assert!(found.is_sorted() && found[0] == 1 && found[199] == 50);
        assert!((1..=50).all(|b| found.iter().filter(|x| **x == b).count() == 4));
    }

    #[test]
    fn under_value_bins_a_cell_has_no_places() {
        let mut config = PRESETS[0].config(20, Vocabulary::default());
        (config.embedding, config.value_bins) = (Embedding::ValueBins, 4);
        let mut b = DeviceBatch::new(&Cpu, &config, Capacity { tokens: 8, cells: 3 }).unwrap();
        let value = [1.0, 3.0, 2.0, 7.0, 5.0].map(f16::from_f32);
        b.upload_cells(&Cpu, &config, &[9, 8, 3, 7, 5], &[0, 3, 5], Some(&value)).unwrap();
        assert_eq!(b.position[..5], [0; 5]);
        assert_eq!(b.value_bin.as_ref().unwrap()[..5], [1, 3, 2, 2, 1]);
        assert!(
            b.upload_cells(&Cpu, &config, &[9], &[0, 1], None).unwrap_err().to_string().contains("--values")
        );
    }

    #[test]
    fn upload_derives_positions_and_globals_and_refuses_bad_indices() {
        let vocabulary = Vocabulary { cls: Some(2), eos: Some(3), first_gene: 4, mask: 1, digest: None };
        let mut config = PRESETS[0].config(20, vocabulary);
        config.attention = Pattern::MarkerSparse { window: 2 };
        config.globals = vec![5, 9, 17];
        let capacity = Capacity { tokens: 8, cells: 3 };
        let mut b = DeviceBatch::new(&Cpu, &config, capacity).unwrap();
        b.upload_cells(&Cpu, &config, &[2, 9, 8, 3, 2, 7, 3], &[0, 4, 7], None).unwrap();
        assert_eq!(b.position[..7], [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!(b.global.as_ref().unwrap()[..7], [1, 1, 0, 1, 1, 0, 1]);
        assert_eq!((b.tokens, b.cells, b.max_len), (7, 2, 4));
        let mut refuse = |gene: &[u32], start: &[u32]| {
            b.upload_cells(&Cpu, &config, gene, start, None).unwrap_err().to_string()
        };
        assert!(refuse(&[4, 20], &[0, 2]).contains("outside the vocabulary"));
        assert!(refuse(&[4, 5], &[0, 0, 2]).contains("without tokens"));
        assert!(refuse(&[4; 9], &[0, 9]).contains("larger than its buffers"));
    }
}
