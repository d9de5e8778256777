//! Cells of a corpus → packed batches.
//!
//! The copy is one pass over mapped memory, in random order bound by memory latency: pulling the next cells into the cache by hand was
//! tried (1, 2 and 4 cells ahead) and changed nothing on Zen 4, where the core's own reordering spans the short cells already.

use super::batch::{Batch, BatchOptions, Tokens};
use super::reader::Corpus;
use super::sampler::{Sampler, SamplerState};
use crate::error::{Code, Error, Result};
use half::f16;
use std::sync::Arc;

#[derive(Debug)]
enum Source {
    Sampled(Box<Sampler>),
    InOrder { cells: Vec<u32>, next: usize },
}

impl Source {
    fn upcoming(&mut self) -> &[u32] {
        match self {
            Source::Sampled(s) => s.upcoming(),
            Source::InOrder { cells, next } => &cells[*next..],
        }
    }
    fn advance(&mut self, n: usize) {
        match self {
            Source::Sampled(s) => s.advance(n),
            Source::InOrder { next, .. } => *next += n,
        }
    }
    fn state(&self) -> Option<SamplerState> {
        match self {
            Source::Sampled(s) => Some(s.state()),
            Source::InOrder { .. } => None,
        }
    }
}

/// Fills batches on the calling thread.
#[derive(Debug)]
pub struct Packer {
    corpus: Arc<Corpus>,
    source: Source,
    pub(super) options: BatchOptions,
    /// (rank, world): which share of every batch is loaded.
    share: (usize, usize),
}

impl Packer {
    /// Endless batches in the sampler's order; a batch never spans two epochs, so the last of an epoch may be short.
    pub fn sampled(corpus: Arc<Corpus>, sampler: Sampler, options: BatchOptions) -> Result<Self> {
        options.check(&corpus)?;
        Ok(Packer { corpus, source: Source::Sampled(Box::new(sampler)), options, share: (0, 1) })
    }

    /// Batches over `cells` in the given order, once.
    pub fn in_order(corpus: Arc<Corpus>, cells: Vec<u32>, options: BatchOptions) -> Result<Self> {
        options.check(&corpus)?;
        Ok(Packer { corpus, source: Source::InOrder { cells, next: 0 }, options, share: (0, 1) })
    }

    /// Every batch is the same on all `world` ranks; of each, this one loads the cells that are its share: a run of them, of about
    /// as many tokens as every other rank's. A share may be empty.
    pub fn for_rank(self, rank: usize, world: usize) -> Self {
        Packer { share: (rank, world), ..self }
    }

    /// Where the sampler stands; `None` in input order.
    pub fn state(&self) -> Option<SamplerState> {
        self.source.state()
    }

    /// How many of `upcoming` fit one batch; calls `cell` with each one's length in tokens.
    fn plan(
        corpus: &Corpus,
        options: &BatchOptions,
        upcoming: &[u32],
        mut cell: impl FnMut(u32, usize),
    ) -> usize {
        let specials = options.specials();
        let mut tokens = 0;
        let mut taken = 0;
        for &c in upcoming.iter().take(options.cells) {
            let len = (corpus.len_of(c as usize) + specials).min(options.max_tokens);
            if tokens + len > options.tokens {
                break;
            }
            tokens += len;
            taken += 1;
            cell(c, len);
        }
        taken
    }

    /// Fills `batch`, reusing its buffers; false at the end of an ordered pass. Errors: a damaged block of the corpus, a cell
    /// without any token.
    pub fn fill(&mut self, batch: &mut Batch) -> Result<bool> {
        let upcoming = self.source.upcoming();
        if upcoming.is_empty() {
            return Ok(false);
        }
        let whole = &mut batch.whole;
        whole.cells.clear();
        batch.cell_start.clear();
        batch.cell_start.push(0);
        let mut end = 0;
        let taken = Self::plan(&self.corpus, &self.options, upcoming, |cell, len| {
            end += len;
            whole.cells.push(cell);
            batch.cell_start.push(end as u32);
        });
        let (rank, world) = self.share;
        whole.shares.clear();
        whole.shares.extend(shares(&batch.cell_start, world));
        let own = whole.shares[rank]..whole.shares[rank + 1];
        (whole.tokens, whole.first_cell) = (end, own.start);
        whole.first_token = batch.cell_start[own.start] as usize;
        batch.cells.clear();
        batch.cells.extend_from_slice(&whole.cells[own.clone()]);
        batch.cell_start.truncate(own.end + 1);
        batch.cell_start.drain(..own.start);
        let first = batch.cell_start[0];
        batch.cell_start.iter_mut().for_each(|start| *start -= first);
        batch.max_len = batch.cell_start.windows(2).map(|w| (w[1] - w[0]) as usize).max().unwrap_or(0);
        if let Some(empty) = batch.cell_start.windows(2).position(|w| w[0] == w[1]) {
            let cell = batch.cells[empty] as usize;
            return Err(Error::new(
                Code::EmptyCell,
                "a cell has no gene of the vocabulary, and the model adds no special token",
            )
            .at(format!("{}: cell {cell} ({:?})", self.corpus.path().display(), self.corpus.cell_id(cell)?))
            .next("pack again without empty cells (--empty-cells skip)"));
        }
        if self.corpus.manifest().vocabulary.narrow() {
            let mut gene = match std::mem::take(&mut batch.gene) {
                Tokens::U16(gene) => gene,
                Tokens::U32(_) => Vec::new(),
            };
            let copied = self.copy(&batch.cells, &batch.cell_start, &mut gene, |token| token as u16);
            batch.gene = Tokens::U16(gene);
            copied?;
        } else {
            let mut gene = match std::mem::take(&mut batch.gene) {
                Tokens::U32(gene) => gene,
                Tokens::U16(_) => Vec::new(),
            };
            let copied = self.copy(&batch.cells, &batch.cell_start, &mut gene, |token| token);
            batch.gene = Tokens::U32(gene);
            copied?;
        }
        self.copy_values(batch)?;
        self.source.advance(taken);
        batch.after = self.source.state();
        Ok(true)
    }

    /// Copies the genes of `cells` to their places, special tokens around them.
    fn copy<T: bytemuck::Pod>(
        &self,
        cells: &[u32],
        cell_start: &[u32],
        gene: &mut Vec<T>,
        token: impl Fn(u32) -> T,
    ) -> Result<()> {
        gene.clear();
        gene.reserve(cell_start[cells.len()] as usize);
        let (cls, eos) = (self.options.cls.map(&token), self.options.eos.map(&token));
        let room = self.options.max_tokens - self.options.specials();
        for &cell in cells {
            let (shard, local) = self.corpus.locate(cell as usize);
            let mut span = shard.gene_span(local);
            span.end = span.end.min(span.start + room * size_of::<T>());
            gene.extend(cls);
            gene.extend_from_slice(shard.read::<T>(span)?);
            gene.extend(eos);
        }
        Ok(())
    }

    fn copy_values(&self, batch: &mut Batch) -> Result<()> {
        batch.value.clear();
        if !self.options.values {
            return Ok(());
        }
        let room = self.options.max_tokens - self.options.specials();
        for &cell in &batch.cells {
            let value = self.corpus.values(cell as usize)?.unwrap_or_default();
            batch.value.extend(self.options.cls.map(|_| f16::ZERO));
            batch.value.extend_from_slice(&value[..value.len().min(room)]);
            batch.value.extend(self.options.eos.map(|_| f16::ZERO));
        }
        Ok(())
    }

    /// Batches of the sampler's whole epoch `epoch`, or that remain of an ordered pass. Reads lengths only.
    pub fn batches_in_epoch(&self, epoch: u64) -> usize {
        let plan = |rest: &[u32]| Self::plan(&self.corpus, &self.options, rest, |_, _| ());
        let mut batches = 0;
        match &self.source {
            Source::Sampled(s) => {
                let mut s = s.at_epoch(epoch);
                while s.epoch() == epoch {
                    let taken = plan(s.upcoming());
                    s.advance(taken);
                    batches += 1;
                }
            }
            Source::InOrder { cells, next } => {
                let mut rest = &cells[*next..];
                while !rest.is_empty() {
                    rest = &rest[plan(rest)..];
                    batches += 1;
                }
            }
        }
        batches
    }

    /// Asks the kernel for the pages of the cells that follow the next `from` cells, up to `to` cells from now.
    pub(super) fn advise(&mut self, from: usize, to: usize) {
        let upcoming = self.source.upcoming();
        self.corpus.will_need(&upcoming[from.min(upcoming.len())..to.min(upcoming.len())]);
    }
}

/// Where the shares of `world` ranks start: at the first cells that start at or after their parts of the tokens; then C.
fn shares(cell_start: &[u32], world: usize) -> impl Iterator<Item = usize> {
    let (cells, tokens) = (cell_start.len() - 1, *cell_start.last().unwrap_or(&0) as u64);
    let before =
        move |rank: usize| move |start: &u32| (*start as u64) * (world as u64) < tokens * rank as u64;
    let inner: Vec<usize> =
        (0..world).map(|rank| cell_start[..cells].partition_point(before(rank))).collect();
    inner.into_iter().chain([cells])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_cells_in_order_and_near_equal_in_tokens() {
        let starts = |lens: &[u32]| -> Vec<u32> {
            std::iter::once(0)
                .chain(lens.iter().scan(0, |end, len| {
                    Some({
                        *end += len;
                        *end
                    })
                }))
                .collect()
        };
        for lens in [&[7, 1, 1, 9, 4, 2, 2, 6][..], &[5], &[], &[3, 3], &[100, 1, 1, 1]] {
            let start = starts(lens);
            for world in 1..6 {
                let shares: Vec<usize> = shares(&start, world).collect();
                assert!(shares.len() == world + 1 && shares[0] == 0 && shares[world] == lens.len());
                assert!(shares.is_sorted());
                let (total, longest) =
                    (lens.iter().sum::<u32>() as f64, lens.iter().max().copied().unwrap_or(0));
                for own in shares.windows(2) {
                    let tokens = (start[own[1]] - start[own[0]]) as f64;
                    assert!(tokens <= total / world as f64 + longest as f64);
                }
            }
        }
    }
}
