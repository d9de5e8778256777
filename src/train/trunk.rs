//! The trunk: the encoder with its gradient, moments and buffers: what all three stages train.
//!
//! A logical batch is what one loss sees; it is cut into parts of at most `batch.tokens` tokens, whole cells each, and the
//! gradients of the parts add up. Dropout and masks are drawn by the token's place in the logical batch, so the cut changes
//! memory and nothing else.

use super::lora::{AdapterLayout, Adapters};
use super::optimizer::{Moments, SLOTS, Span, spans};
use super::reduction::Reduction;
use super::shard::Shard;
use crate::collective::Collective;
use crate::config::Settings;
use crate::corpus::{Batch, BatchOptions, Corpus};
use crate::device::{Act, StepSizes};
use crate::error::{Code, Error, Result};
use crate::model::batch::Input;
use crate::model::flops::Work;
use crate::model::heads::Masking;
use crate::model::ledger::Ledger;
use crate::model::weights::Parameter;
use crate::model::{
    Activations, Capacity, CellVectors, DeviceBatch, Encoder, Layout, ModelConfig, Parameters, Pass, Store,
};
use crate::ops::Backend;
use crate::ops::gene_attention::Pattern;
use half::f16;
use std::ops::Range;
use std::sync::Arc;

/// Names the random numbers of one logical batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u32,
    /// Tokens of the step before this rank's share: of earlier logical batches, and of lower ranks.
    pub first_row: u64,
}

impl Draw {
    /// The encoder's pass over the cells.
    pub fn pass(self) -> Pass {
        Pass::Train { seed: self.seed, step: self.step, view: 0 }
    }
}

/// A logical batch on the host, widened once.
pub struct Logical<'a> {
    /// The batch.
    pub batch: &'a Batch,
    /// (N) genes.
    pub gene: &'a [u32],
    /// Cells of each part.
    pub parts: Vec<Range<usize>>,
}

impl Logical<'_> {
    /// Tokens of a range of cells.
    pub fn tokens(&self, cells: &Range<usize>) -> Range<usize> {
        self.batch.cell_start[cells.start] as usize..self.batch.cell_start[cells.end] as usize
    }
}

/// The encoder and everything that its training needs.
pub struct Trunk<B: Backend<A>, A: Act> {
    /// Where it runs.
    pub dev: B,
    /// The network's handle and configuration.
    pub encoder: Encoder<B>,
    /// Weights.
    pub params: Parameters<B, A>,
    /// Gradients.
    pub grads: Store<B, f32>,
    /// Moments of what learns: of all weights, or of the adapters.
    pub moments: Moments<B>,
    /// What learns, where all weights may.
    pub spans: Vec<Span>,
    /// What learns instead under `lora.rank`.
    pub adapters: Option<Adapters<B>>,
    /// Activations of one part.
    pub acts: Activations<B, A>,
    /// The part on the device.
    pub part: DeviceBatch<B>,
    /// Takes turns with it: filled while the device works on the part before.
    next: DeviceBatch<B>,
    /// (C, D) vectors of a part's cells, where they are embedded between steps.
    rows: B::Buf<f32>,
    /// Loss and norm sums.
    pub scalars: B::Buf<f64>,
    /// What the corpus batches look like.
    pub options: BatchOptions,
    /// The cells.
    pub corpus: Arc<Corpus>,
    /// The processes that train together; each loads its share of every logical batch.
    pub ranks: Collective,
    /// This rank's slice of the weights, where it holds the moments of that alone.
    pub shard: Option<Shard>,
    /// The sum of `grads` over the ranks.
    pub reduction: Reduction<B>,
    genes: Vec<u32>,
}

impl<B: Backend<A>, A: Act> Trunk<B, A> {
    /// Buffers for training `params` on batches of `corpus` under `settings`; `learns` picks the parameters that change.
    pub fn new(
        dev: &B,
        config: &ModelConfig,
        params: Parameters<B, A>,
        corpus: Arc<Corpus>,
        settings: &Settings,
        ranks: &Collective,
        learns: impl Fn(&Parameter) -> bool,
    ) -> Result<Self> {
        let options = batch_options(config, &corpus, settings)?;
        let capacity = capacity(&options, settings);
        let mut ledger = Ledger::new(dev);
        let layout = params.layout();
        let adapters = adapter_layout(layout, settings, &learns)?
            .map(|layout| Adapters::planned(&mut ledger, layout))
            .transpose()?;
        let sharded = settings.optimizer.sharded && !ranks.is_single() && adapters.is_none();
        let shard = sharded.then(|| Shard::of(ranks, layout.len()));
        // Adapters' gradients are made of the network's, when all of them are there.
        let reduction = Reduction::new(dev, ranks, layout, sharded, adapters.is_none())?;
        Ok(Trunk {
            reduction,
            grads: Store::planned(&mut ledger, "gradients", layout)?,
            moments: match &adapters {
                Some(a) => Moments::planned(&mut ledger, "the adapters", a.layout().len())?,
                None => {
                    let len = shard.as_ref().map_or(layout.len(), |shard| shard.own().len());
                    Moments::planned(&mut ledger, "the network", len)?
                }
            },
            spans: spans(layout, learns),
            adapters,
            acts: Activations::training(&mut ledger, config, capacity, settings.train.recompute)?,
            part: DeviceBatch::planned(&mut ledger, config, capacity)?,
            next: DeviceBatch::planned(&mut ledger, config, capacity)?,
            rows: ledger.zeros("cell vectors of evaluation", "(C, D)", capacity.cells * config.width)?,
            scalars: ledger.zeros("scalars", "()", SLOTS)?,
            encoder: Encoder::new(dev.clone(), config.clone()),
            dev: dev.clone(),
            params,
            options,
            corpus,
            ranks: ranks.clone(),
            shard,
            genes: Vec::new(),
        })
    }

    /// Makes what kernels of this run work in, so that no step allocates: `masked` where there is a masked-gene term, and P
    /// prototypes or classes.
    pub fn reserve(&self, masked: Option<Masking>, types: usize) -> Result<()> {
        let masked = masked.map_or(0, |masking| masking.room(self.capacity().tokens));
        let (longest, parameters) = (self.options.max_tokens, self.params.layout().len());
        let cells = self.options.cells;
        let sizes = step_sizes(self.config(), self.capacity(), cells, longest, masked, types, parameters);
        self.dev.reserve::<A>(&sizes)
    }

    /// The network's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.encoder.config
    }
    /// What the moments on disk belong to.
    pub fn learner(&self) -> &'static str {
        if self.adapters.is_some() { "adapters" } else { "network" }
    }
    /// Largest part.
    pub fn capacity(&self) -> Capacity {
        self.part.capacity()
    }

    /// Σ over the ranks of a count.
    pub fn of_all_ranks(&self, count: usize) -> Result<usize> {
        let mut sum = [count as f64];
        self.ranks.sum(&mut sum)?;
        Ok(sum[0] as usize)
    }

    /// Cuts `batch` into parts and widens its genes; give the genes back with [`Trunk::recycle`].
    pub fn logical<'a>(&mut self, batch: &'a Batch, genes: &'a mut Vec<u32>) -> Logical<'a> {
        batch.gene.widen_into(genes);
        let parts = cut(&batch.cell_start, self.capacity());
        Logical { batch, gene: genes, parts }
    }

    /// Lends the buffer that [`Trunk::logical`] fills.
    pub fn take_genes(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.genes)
    }
    /// Takes it back.
    pub fn recycle(&mut self, genes: Vec<u32>) {
        self.genes = genes;
    }

    /// Copies the cells of one part in, beside the work that is queued on the part before.
    pub fn load(&mut self, logical: &Logical<'_>, cells: &Range<usize>, first_row: u64) -> Result<()> {
        let _range = crate::trace::range("upload");
        let tokens = logical.tokens(cells);
        let start: Vec<u32> = logical.batch.cell_start[cells.start..=cells.end]
            .iter()
            .map(|s| s - tokens.start as u32)
            .collect();
        let value: Option<&[f16]> = logical.batch.value.get(tokens.clone()).filter(|v| !v.is_empty());
        let config = &self.encoder.config;
        let gene = &logical.gene[tokens.clone()];
        self.part.retire(&self.dev)?;
        std::mem::swap(&mut self.part, &mut self.next);
        self.part.fill(&self.dev, config, gene, &start, value)?;
        self.part.first_row = first_row + tokens.start as u64;
        self.part.first_cell = cells.start;
        self.reduction.part(logical.parts.last() == Some(cells));
        Ok(())
    }

    /// Adds the gradients of everything below hidden state `depth`, from dL/d(that state) in `acts.dx`. `gene` are those that the
    /// forward pass read, where they are not the part's own. What is final is summed over the ranks behind it.
    pub fn backward(&mut self, gene: Option<&B::Buf<u32>>, pass: Pass, depth: usize) -> Result<()> {
        let Trunk { dev, encoder, params, part, acts, grads, reduction, .. } = self;
        let weights = params.network();
        let input = Input { batch: part, gene: gene.unwrap_or(&part.gene) };
        let mut top = depth;
        while top > 0 {
            let bottom = reduction.stop_below(top);
            encoder.backward_layers(weights, input, acts, pass, bottom..top, grads.named_mut())?;
            reduction.passed(dev, grads.flat_mut(), bottom)?;
            top = bottom;
        }
        encoder.backward_embeddings(weights, input, acts, pass, grads.named_mut())
    }

    /// Vectors of made-up cells: token lists without special tokens. Marker sentences go through here.
    pub fn embed_lists(&mut self, lists: &[Vec<u32>]) -> Result<Vec<f32>> {
        let room = self.options.max_tokens - self.config().prefix() - self.config().suffix();
        self.vectors()?.of_lists(lists, room)
    }

    /// Cell vectors (C, D) of `cells` in their order, without dropout, from `model.layer` and `model.pooling`. Each rank embeds its
    /// part of them, and all get all.
    pub fn embed(&mut self, cells: &[u32]) -> Result<Vec<f32>> {
        let Capacity { tokens, cells: most } = self.capacity();
        let options = BatchOptions { cells: most, tokens, ..self.options.clone() };
        let (corpus, ranks, width) = (self.corpus.clone(), self.ranks.clone(), self.config().width);
        let at = |rank: usize| cells.len() * rank / ranks.world();
        let own = at(ranks.rank())..at(ranks.rank() + 1);
        let mut all = vec![0.0; cells.len() * width];
        let mut rest = &mut all[own.start * width..own.end * width];
        self.vectors()?.each(&corpus, &cells[own], &options, |_, rows| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(rows.len());
            now.copy_from_slice(rows);
            rest = later;
            Ok(())
        })?;
        let ranges: Vec<_> = (0..ranks.world()).map(|rank| at(rank) * width..at(rank + 1) * width).collect();
        ranks.all_gather_ranges(&mut all, &ranges)?;
        Ok(all)
    }

    /// The network at rest, in the buffers of its training.
    fn vectors(&mut self) -> Result<CellVectors<'_, B, A>> {
        let Trunk { encoder, params, acts, part, rows, .. } = self;
        let (depth, pooling) = (encoder.config.depth(encoder.config.layer)?, encoder.config.pooling);
        Ok(CellVectors { encoder, params, acts, part, rows, depth, pooling })
    }
}

/// Counted work of a batch under the network's attention pattern.
pub fn work(config: &ModelConfig, batch: &Batch, masked: usize) -> Work {
    let lengths = batch.cell_start.windows(2).map(|w| (w[1] - w[0]) as usize);
    let mut work = match config.attention {
        Pattern::Dense => Work::dense(lengths),
        // Global tokens aside: their number depends on the markers, and they are few.
        Pattern::MarkerSparse { window } => lengths.fold(Work::default(), |w, len| Work {
            tokens: w.tokens + len as u64,
            pairs: w.pairs + (len * len.min(2 * window + 1)) as u64,
            ..w
        }),
    };
    work.masked = masked as u64;
    work
}

/// The adapters of a run, where its settings ask for some.
pub(super) fn adapter_layout(
    layout: &Layout,
    settings: &Settings,
    learns: impl Fn(&Parameter) -> bool,
) -> Result<Option<AdapterLayout>> {
    (settings.lora.rank > 0).then(|| AdapterLayout::of(layout, &settings.lora, learns)).transpose()
}

/// The largest sizes of a run over parts of `capacity` and logical batches of `batch_cells`.
pub(super) fn step_sizes(
    config: &ModelConfig,
    capacity: Capacity,
    batch_cells: usize,
    longest: usize,
    masked: usize,
    types: usize,
    parameters: usize,
) -> StepSizes {
    StepSizes {
        tokens: capacity.tokens,
        cells: capacity.cells,
        batch_cells,
        longest,
        masked,
        width: config.width,
        heads: config.heads,
        ffn: config.ffn,
        vocab: config.vocab,
        types,
        parameters,
    }
}

/// What the corpus packs: logical batches, bounded by cells alone.
fn batch_options(config: &ModelConfig, corpus: &Corpus, settings: &Settings) -> Result<BatchOptions> {
    let b = &settings.batch;
    let context = if b.max_tokens == 0 { config.positions } else { b.max_tokens };
    if context > config.positions {
        return Err(Error::new(Code::SettingValue, "batch.max_tokens is beyond the model's context")
            .found(context)
            .wanted(format!("at most {}", config.positions)));
    }
    let special = config.prefix() + config.suffix();
    let longest = corpus.longest_cell() + special;
    let max_tokens = context.min(longest);
    if max_tokens <= special {
        return Err(Error::new(Code::SettingValue, "batch.max_tokens leaves no room for genes")
            .found(context)
            .wanted(format!("more than the {special} special tokens")));
    }
    if config.value_bins > 0 && !corpus.manifest().values {
        return Err(Error::new(
            Code::ValuesMissing,
            "the network reads expression values and the corpus stores none",
        )
        .at(corpus.path().display())
        .found(format!("model.value_bins = {}", config.value_bins))
        .next("pack the corpus again with --values, or --set model.value_bins=0"));
    }
    Ok(BatchOptions {
        cells: b.cells,
        tokens: b.cells.saturating_mul(max_tokens),
        max_tokens,
        cls: config.vocabulary.cls,
        eos: config.vocabulary.eos,
        values: config.value_bins > 0,
    })
}

/// The largest part: `batch.tokens`, but at least one whole cell and at most a whole logical batch.
fn capacity(options: &BatchOptions, settings: &Settings) -> Capacity {
    let tokens = settings.batch.tokens.max(options.max_tokens).min(options.tokens);
    Capacity { tokens, cells: options.cells.min(tokens) }
}

/// Whole cells, in order, as many as fit each part.
fn cut(cell_start: &[u32], capacity: Capacity) -> Vec<Range<usize>> {
    let cells = cell_start.len().saturating_sub(1);
    let (mut parts, mut first) = (Vec::new(), 0);
    for cell in 0..cells {
        let tokens = (cell_start[cell + 1] - cell_start[first]) as usize;
        if cell > first && (tokens > capacity.tokens || cell - first == capacity.cells) {
            parts.push(first..cell);
            first = cell;
        }
    }
    if first < cells {
        parts.push(first..cells);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_hold_whole_cells_and_cover_the_batch() {
        let start = [0, 5, 6, 12, 13, 20];
        let cut = |tokens, cells| cut(&start, Capacity { tokens, cells });
        assert_eq!(cut(100, 100), vec![0..5]);
        assert_eq!(cut(7, 100), [0..2, 2..4, 4..5]);
        assert_eq!(cut(100, 2), [0..2, 2..4, 4..5]);
        assert_eq!(cut(7, 1).len(), 5);
        assert!(super::cut(&[0], Capacity { tokens: 7, cells: 1 }).is_empty());
    }
}
