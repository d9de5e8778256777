//! In-silico perturbation (Theodoris et al., 2023): a gene is taken out of a cell's sentence, or put at its front, and the cell vector
//! before and after tell what the network thinks of it.
//!
//! ```text
//! delete       g₁ g₂ g₃ g₄  ->  g₁ g₃ g₄          cells that hold the gene
//! overexpress  g₁ g₂ g₃ g₄  ->  g₃ g₁ g₂ g₄       every cell; a gene that it lacks comes in front, and the last one falls off the context
//! similarity = cos(h', h),   shift_k = cos(h' - c, q_k - c) - cos(h - c, q_k - c)          q_k prototype, c their centre
//! ```
//! A cell is perturbed as the network sees it: cut to the context first. Original and perturbed cells share packed batches, and sums
//! are taken in the order of the cells, so neither batch size nor threads change a number. Memory is genes × prototypes.

mod sentence;
mod table;

pub use sentence::Kind;
pub use table::write;

use super::embed::Embedder;
use super::labeller::Labeller;
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::{Error, Result};
use crate::ops::Backend;
use half::f16;
use sentence::Sentence;
use std::collections::HashMap;
use std::sync::Arc;

/// What to perturb, and where.
pub struct Request {
    /// The cells' corpus.
    pub corpus: Arc<Corpus>,
    /// Corpus indices, in the order in which they are summed.
    pub cells: Vec<u32>,
    /// How.
    pub kind: Kind,
    /// Each is perturbed alone, in every cell: sets of gene tokens, one gene or several at once.
    pub sets: Vec<Vec<u32>>,
}

/// Mean and spread of one number over cells.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Spread {
    sum: f64,
    squares: f64,
    above: u32,
}

impl Spread {
    fn add(&mut self, x: f64) {
        self.sum += x;
        self.squares += x * x;
        self.above += u32::from(x > 0.0);
    }
    /// Mean over `cells`.
    pub fn mean(&self, cells: u32) -> f64 {
        self.sum / cells as f64
    }
    /// Standard deviation over `cells` (n − 1); NaN below two.
    pub fn deviation(&self, cells: u32) -> f64 {
        let n = cells as f64;
        ((self.squares - self.sum * self.sum / n).max(0.0) / (n - 1.0)).sqrt()
    }
    /// Share of `cells` above 0.
    pub fn share_above(&self, cells: u32) -> f64 {
        self.above as f64 / cells as f64
    }
}

/// What a set of genes did.
#[derive(Debug, Clone, PartialEq)]
pub struct Effect {
    /// Cells that it changed.
    pub cells: u32,
    /// cos(h', h).
    pub similarity: Spread,
    /// shift_k, (P).
    pub shift: Vec<Spread>,
}

/// Genes that at least `least` of the cells hold within `room` tokens, ascending: what is worth perturbing one by one.
pub fn present(corpus: &Corpus, cells: &[u32], room: usize, least: u32) -> Result<Vec<u32>> {
    let mut count: HashMap<u32, u32> = HashMap::new();
    for &cell in cells {
        for gene in corpus.genes(cell as usize)?.iter().take(room) {
            *count.entry(gene).or_default() += 1;
        }
    }
    let mut genes: Vec<u32> = count.into_iter().filter(|(_, n)| *n >= least).map(|(gene, _)| gene).collect();
    genes.sort_unstable();
    Ok(genes)
}

/// Rows of the encoder that a request takes: originals and perturbed cells.
pub fn rows(request: &Request, room: usize) -> Result<u64> {
    let mut total = 0;
    for &cell in &request.cells {
        let sentence = Sentence::of(&request.corpus, cell, room)?;
        let changed = request.sets.iter().filter(|set| sentence.changes(request.kind, set)).count() as u64;
        total += if changed > 0 { changed + 1 } else { 0 };
    }
    Ok(total)
}

/// The effect of each set of `request`, in its order; prototypes are those of `labeller`, where there is one.
///
/// # Errors
/// Input: a corpus that fails its checksums.
pub fn perturb<B: Backend<A>, A: Act>(
    embedder: &mut Embedder<B, A>,
    labeller: Option<&Labeller>,
    request: &Request,
    mut progress: impl FnMut(u64),
) -> Result<Vec<Effect>> {
    let types = labeller.map_or(0, |l| l.names.len());
    let effect = Effect { cells: 0, similarity: Spread::default(), shift: vec![Spread::default(); types] };
    let mut effects = vec![effect; request.sets.len()];
    let mut original = Original::default();
    let room = embedder.context();
    let mut waiting = Waiting::default();
    let mut flush = |waiting: &mut Waiting, embedder: &mut Embedder<B, A>| -> Result<()> {
        let width = embedder.width();
        let value = (!waiting.value.is_empty()).then_some(&waiting.value[..]);
        let rows = embedder.packed(&waiting.gene, &waiting.start, value)?;
        let cosine = labeller.map(|l| l.cosines(&rows)).transpose()?.unwrap_or_default();
        for (i, (of, row)) in waiting.of.iter().zip(rows.chunks_exact(width)).enumerate() {
            let cosine = &cosine[i * types..(i + 1) * types];
            match of {
                None => original.set(row, cosine),
                Some(set) => original.compare(row, cosine, &mut effects[*set]),
            }
        }
        progress(waiting.of.len() as u64);
        waiting.clear();
        Ok(())
    };
    for &cell in &request.cells {
        let sentence = Sentence::of(&request.corpus, cell, room)?;
        let mut first = true;
        for (set, genes) in request.sets.iter().enumerate() {
            let Some(perturbed) = sentence.perturbed(request.kind, genes) else { continue };
            // The original comes once, before the first of its perturbations.
            for (of, sentence) in [(None, &sentence), (Some(set), &perturbed)] {
                if of.is_none() && !std::mem::take(&mut first) {
                    continue;
                }
                let special = embedder.config().prefix() + embedder.config().suffix();
                if !embedder.fits(waiting.gene.len() + sentence.len() + special, waiting.of.len() + 1) {
                    flush(&mut waiting, embedder)?;
                }
                waiting.push(of, sentence, embedder)?;
            }
        }
    }
    if !waiting.of.is_empty() {
        flush(&mut waiting, embedder)?;
    }
    Ok(effects)
}

/// The cell before it was perturbed.
#[derive(Default)]
struct Original {
    row: Vec<f32>,
    cosine: Vec<f32>,
}

impl Original {
    fn set(&mut self, row: &[f32], cosine: &[f32]) {
        self.row.clear();
        self.row.extend_from_slice(row);
        self.cosine.clear();
        self.cosine.extend_from_slice(cosine);
    }

    fn compare(&self, row: &[f32], cosine: &[f32], effect: &mut Effect) {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
        let norms = (dot(row, row) * dot(&self.row, &self.row)).sqrt().max(f64::MIN_POSITIVE);
        effect.cells += 1;
        effect.similarity.add((dot(row, &self.row) / norms).clamp(-1.0, 1.0));
        for ((shift, after), before) in effect.shift.iter_mut().zip(cosine).zip(&self.cosine) {
            shift.add(*after as f64 - *before as f64);
        }
    }
}

/// Sentences packed for the encoder.
#[derive(Default)]
struct Waiting {
    gene: Vec<u32>,
    start: Vec<u32>,
    value: Vec<f16>,
    /// The set that a row shows; `None` = the original.
    of: Vec<Option<usize>>,
}

impl Waiting {
    fn push<B: Backend<A>, A: Act>(
        &mut self,
        of: Option<usize>,
        sentence: &Sentence,
        embedder: &Embedder<B, A>,
    ) -> Result<()> {
        let vocabulary = &embedder.config().vocabulary;
        if self.start.is_empty() {
            self.start.push(0);
        }
        self.gene.extend(vocabulary.cls);
        self.gene.extend_from_slice(&sentence.gene);
        self.gene.extend(vocabulary.eos);
        if embedder.config().value_bins > 0 {
            // Special tokens carry no expression.
            self.value.extend(vocabulary.cls.map(|_| f16::ZERO));
            self.value.extend_from_slice(&sentence.value);
            self.value.extend(vocabulary.eos.map(|_| f16::ZERO));
            if self.value.len() != self.gene.len() {
                return Err(Error::bug("a sentence without values for a network that reads them"));
            }
        }
        self.start.push(self.gene.len() as u32);
        self.of.push(of);
        Ok(())
    }

    fn clear(&mut self) {
        self.gene.clear();
        self.start.clear();
        self.value.clear();
        self.of.clear();
    }
}
