//! Cell embeddings: the frozen encoder over a corpus, one f32 row a cell, in the order asked for.
//! One pass of [`CellVectors`] over buffers for evaluation; what a row is made of (layer, pooling, context) is the checkpoint's unless
//! the caller says otherwise.

use super::h5ad::{ABSENT, H5adCopy, RowLabels};
use super::labeller::Labeller;
use super::npy::NpyWriter;
use super::parquet::ParquetWriter;
use super::provenance::{Provenance, weights_sha256};
use super::zero_shot::top;
use crate::corpus::{BatchOptions, Corpus};
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::model::checkpoint::{self, LoadOptions};
use crate::model::config::Vocabulary;
use crate::model::ledger::Ledger;
use crate::model::{Activations, Capacity, CellVectors, DeviceBatch, Encoder, ModelConfig, Parameters};
use crate::ops::Backend;
use crate::ops::pool::Pooling;
use half::f16;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How cells become rows.
#[derive(Debug, Clone, Default)]
pub struct EmbedOptions {
    /// Layer, counted as Geneformer does (0 = last, −1 = second to last); `None` = the checkpoint's own.
    pub layer: Option<i32>,
    /// Pooling; `None` = the checkpoint's own.
    pub pooling: Option<Pooling>,
    /// Longest cell, special tokens included; `None` = the model's context.
    pub max_tokens: Option<usize>,
    /// Tokens of a batch; `None` = [`BATCH_TOKENS`]. Memory and speed, never results.
    pub batch_tokens: Option<usize>,
}

/// Tokens of a batch where nothing is said: enough work for every thread, and some 50 MB of activations at width 256.
pub const BATCH_TOKENS: usize = 16_384;

/// A frozen encoder with its buffers, over one corpus.
pub struct Embedder<B: Backend<A>, A: Act> {
    dev: B,
    encoder: Encoder<B>,
    params: Parameters<B, A>,
    acts: Activations<B, A>,
    part: DeviceBatch<B>,
    rows: B::Buf<f32>, // (C, D)
    corpus: Arc<Corpus>,
    batch: BatchOptions,
    depth: usize,
    layer: i32,
    pooling: Pooling,
    folder: PathBuf,
}

impl<B: Backend<A>, A: Act> Embedder<B, A> {
    /// Loads the checkpoint that `path` means (run folder, checkpoint folder, Hugging Face folder) for cells of `corpus`.
    ///
    /// # Errors
    /// Input: no such checkpoint, a damaged one, another vocabulary than the corpus's. Usage: a layer that is not there.
    pub fn open(dev: &B, path: &Path, corpus: Arc<Corpus>, options: &EmbedOptions) -> Result<Self> {
        let folder = checkpoint::resolve(path)?;
        let (mut config, params) = checkpoint::load::<B, A>(dev, &folder, LoadOptions::default())?;
        let vocab = Vocab::load(corpus.path().join(checkpoint::VOCABULARY))?;
        config.adopt_vocabulary(vocab.len(), &Vocabulary::of(&vocab))?;
        let layer = options.layer.unwrap_or(config.layer);
        let pooling = options.pooling.unwrap_or(config.pooling);
        let depth = config.depth(layer)?;
        if pooling == Pooling::Cls && config.vocabulary.cls.is_none() && options.pooling.is_some() {
            return Err(Error::new(
                Code::FlagConflict,
                "--pool cls needs a <cls> token, and the vocabulary has none",
            )
            .next("--pool mean"));
        }
        let batch = batch_options(&config, &corpus, options)?;
        let capacity = Capacity { tokens: batch.tokens, cells: batch.cells };
        let mut ledger = Ledger::new(dev);
        // Here both N and C follow from one flag.
        let refused = |e: Error| match e.is_out_of_memory() {
            true => e.next("lower --batch-tokens, and below the longest cell --max-tokens"),
            false => e,
        };
        Ok(Embedder {
            acts: Activations::evaluation(&mut ledger, &config, capacity).map_err(refused)?,
            part: DeviceBatch::planned(&mut ledger, &config, capacity).map_err(refused)?,
            rows: ledger.zeros("cell vectors", "(C, D)", capacity.cells * config.width).map_err(refused)?,
            encoder: Encoder::new(dev.clone(), config),
            dev: dev.clone(),
            params,
            corpus,
            batch,
            depth,
            layer,
            pooling,
            folder,
        })
    }

    /// D.
    pub fn width(&self) -> usize {
        self.encoder.config.width
    }
    /// The network's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.encoder.config
    }
    /// The layer that rows come from, counted as Geneformer does.
    pub fn layer(&self) -> i32 {
        self.layer
    }
    /// How a row is made from tokens.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }
    /// Genes of a cell that the encoder takes, special tokens not counted.
    pub fn context(&self) -> usize {
        self.batch.max_tokens - self.encoder.config.prefix() - self.encoder.config.suffix()
    }
    /// Word embeddings on the host, (V, D).
    pub fn word_table(&self) -> Result<Vec<f32>> {
        let mut word = self.dev.download(&self.params.master().named().embeddings.word)?;
        word.truncate(self.encoder.config.vocab * self.width());
        Ok(word)
    }
    /// The model folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn vectors(&mut self) -> CellVectors<'_, B, A> {
        let Embedder { encoder, params, acts, part, rows, depth, pooling, .. } = self;
        CellVectors { encoder, params, acts, part, rows, depth: *depth, pooling: *pooling }
    }

    /// Hands the rows of `cells`, in that order, to `sink` a batch at a time: corpus indices (n), values (n, D).
    pub fn each(&mut self, cells: &[u32], sink: impl FnMut(&[u32], &[f32]) -> Result<()>) -> Result<()> {
        let (corpus, batch) = (self.corpus.clone(), self.batch.clone());
        self.vectors().each(&corpus, cells, &batch, sink)
    }

    /// All rows of `cells`, (C, D).
    pub fn collect(&mut self, cells: &[u32], mut progress: impl FnMut(u64)) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(cells.len() * self.width());
        self.each(cells, |cells, rows| {
            all.extend_from_slice(rows);
            progress(cells.len() as u64);
            Ok(())
        })?;
        Ok(all)
    }

    /// Is there room for a batch of so many tokens and cells?
    pub fn fits(&self, tokens: usize, cells: usize) -> bool {
        let Capacity { tokens: most, cells: most_cells } = self.part.capacity();
        tokens <= most && cells <= most_cells
    }

    /// Rows (C, D) of a packed batch that stands in no corpus, special tokens included: `gene` (N), `start` (C + 1), and `value` (N)
    /// where the network reads values.
    pub fn packed(&mut self, gene: &[u32], start: &[u32], value: Option<&[f16]>) -> Result<Vec<f32>> {
        self.vectors().packed(gene, start, value)
    }

    /// Rows of token lists that stand in no corpus, (lists, D): marker sentences.
    pub fn sentences(&mut self, lists: &[Vec<u32>]) -> Result<Vec<f32>> {
        let room = self.context();
        self.vectors().of_lists(lists, room)
    }

    /// Where the rows of this embedder come from.
    pub fn provenance(&self) -> Result<Provenance> {
        Ok(Provenance {
            checkpoint: self.folder.display().to_string(),
            checkpoint_sha256: weights_sha256(&self.folder)?,
            layer: self.layer,
            pool: pool_name(self.pooling),
            dtype: A::NAME,
            max_tokens: self.batch.max_tokens,
            corpus: self.corpus.path().display().to_string(),
            corpus_digest: self.corpus.digest().to_string(),
            vocabulary_digest: self.corpus.manifest().vocabulary.digest.clone(),
        })
    }

    /// Hands rows and ids of all cells, in input order, to `append`.
    fn with_ids(
        &mut self,
        mut append: impl FnMut(&[f32], &[&str]) -> Result<()>,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        let corpus = self.corpus.clone();
        let cells: Vec<u32> = (0..corpus.cells() as u32).collect();
        self.each(&cells, |cells, rows| {
            let ids = cells.iter().map(|&c| corpus.cell_id(c as usize)).collect::<Result<Vec<_>>>()?;
            append(rows, &ids)?;
            progress(cells.len() as u64);
            Ok(())
        })
    }

    /// Writes the rows of all cells, in input order, to `out` (`.npy`) and their ids beside it.
    pub fn write_npy(&mut self, out: &Path, progress: impl FnMut(u64)) -> Result<()> {
        let mut file = NpyWriter::create(out, self.corpus.cells(), self.width())?;
        self.with_ids(|rows, ids| file.append(rows, ids), progress)?;
        file.finish()
    }

    /// Writes ids and rows of all cells, in input order, to `out` (`.parquet`).
    pub fn write_parquet(&mut self, out: &Path, progress: impl FnMut(u64)) -> Result<()> {
        let mut file = ParquetWriter::create(out, self.width(), &self.provenance()?)?;
        self.with_ids(|rows, ids| file.append(rows, ids), progress)?;
        file.finish()
    }

    /// Writes a copy of an `.h5ad` file with the rows of its cells, and their labels where there is a labeller.
    pub fn write_h5ad(
        &mut self,
        copy: &H5adCopy,
        labeller: Option<&Labeller>,
        mut progress: impl FnMut(u64),
    ) -> Result<()> {
        let (corpus, width, provenance) = (self.corpus.clone(), self.width(), self.provenance()?);
        // Cells go through the encoder in the order of the file's rows; a row that the corpus lacks is NaN and has no label.
        let rows_present: Vec<usize> =
            (0..copy.cells().len()).filter(|&r| copy.cells()[r] != ABSENT).collect();
        let cells: Vec<u32> = rows_present.iter().map(|&r| copy.cells()[r]).collect();
        let mut table = f32::NAN.to_le_bytes().repeat(copy.cells().len() * width); // (rows of the file, D)
        let mut labels = labeller.map(|l| RowLabels {
            names: l.names.clone(),
            codes: vec![-1; copy.cells().len()],
            scores: vec![f32::NAN; copy.cells().len()],
            origin: format!(
                "evidence {}, prototypes from {}, temperature {}",
                l.evidence.name(),
                l.origin.unwrap_or("nothing"),
                l.temperature
            ),
        });
        let mut done = 0;
        self.each(&cells, |cells, rows| {
            let at = &rows_present[done..done + cells.len()];
            for (&r, row) in at.iter().zip(rows.chunks_exact(width)) {
                let bytes = table[4 * r * width..][..4 * width].chunks_exact_mut(4);
                bytes.zip(row).for_each(|(b, x)| b.copy_from_slice(&x.to_le_bytes()));
            }
            if let (Some(labels), Some(labeller)) = (&mut labels, labeller) {
                let scores = labeller.scores(&corpus, cells, Some(rows))?;
                for (&r, row) in at.iter().zip(scores.probability.chunks_exact(labels.names.len().max(1))) {
                    let best = top(row, 1)[0];
                    (labels.codes[r], labels.scores[r]) = (best as i32, row[best]);
                }
            }
            done += cells.len();
            progress(cells.len() as u64);
            Ok(())
        })?;
        copy.write(table, width, labels.as_ref(), &provenance)
    }
}

fn batch_options(config: &ModelConfig, corpus: &Corpus, options: &EmbedOptions) -> Result<BatchOptions> {
    let special = config.prefix() + config.suffix();
    let max_tokens = options.max_tokens.unwrap_or(config.positions);
    if max_tokens > config.positions || max_tokens <= special {
        return Err(Error::new(Code::SettingValue, "--max-tokens does not fit the model's context")
            .found(max_tokens)
            .wanted(format!("{} to {}", special + 1, config.positions)));
    }
    if config.value_bins > 0 && !corpus.manifest().values {
        return Err(Error::new(
            Code::ValuesMissing,
            "the network reads expression values and the corpus stores none",
        )
        .at(corpus.path().display())
        .found(format!("value_bins = {} in config.json", config.value_bins))
        .next("pack the corpus again with --values"));
    }
    let tokens = options.batch_tokens.unwrap_or(BATCH_TOKENS).max(max_tokens);
    Ok(BatchOptions {
        cells: tokens / (special + 1),
        tokens,
        max_tokens,
        cls: config.vocabulary.cls,
        eos: config.vocabulary.eos,
        values: config.value_bins > 0,
    })
}

/// `cls` or `mean`.
pub fn pool_name(pooling: Pooling) -> &'static str {
    match pooling {
        Pooling::Cls => "cls",
        Pooling::Mean => "mean",
    }
}

/// The run folder that `checkpoint` is or lies in (`RUN` or `RUN/checkpoints/step-N`), where it is one.
pub fn run_folder(checkpoint: &Path) -> Option<PathBuf> {
    let absolute = std::fs::canonicalize(checkpoint).ok()?;
    let above = absolute.parent().and_then(Path::parent).map(Path::to_path_buf);
    [Some(absolute), above].into_iter().flatten().find(|p| p.join("settings.toml").is_file())
}

/// Tokens per cell that the run of `checkpoint` trained with (`batch.max_tokens`), where it set a number of its own: its
/// embeddings are those of cells cut there.
pub fn run_context(checkpoint: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(run_folder(checkpoint)?.join("settings.toml")).ok()?;
    let table: toml::Table = toml::from_str(&text).ok()?;
    let tokens = table.get("batch")?.get("max_tokens")?.as_integer()?;
    usize::try_from(tokens).ok().filter(|t| *t > 0)
}
