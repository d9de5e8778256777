//! `bench loader`: cells per second out of a mapped corpus into packed batches.
//!
//! The measured path is the training path: the sampler's epoch, special-token-free batches, block proofs, one copy per cell. Beside
//! it, in the same rounds, a plain loop that copies the same cells in random order with no batch and no look-ahead: what memory
//! gives without any cleverness. The corpus is warm: every block was read once before the first round.

use crate::corpus::{
    Batch, BatchOptions, CellRecord, Corpus, CorpusOptions, CorpusWriter, Genes, Packer, Sampler,
    VocabIdentity,
};
use crate::error::{Code, Error, Result};
use crate::rng::{Philox, site};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What to time.
#[derive(Debug, Clone, Default)]
pub struct LoaderCase {
    /// A corpus to read; `None` makes a synthetic one with log-normal lengths in a temporary folder.
    pub corpus: Option<PathBuf>,
    /// Cells of the synthetic corpus; 0 = 300,000.
    pub cells: usize,
    /// Cells in a batch; 0 = 64.
    pub batch: usize,
    /// Packing threads; 0 = 1.
    pub threads: usize,
    /// Input order in place of random order.
    pub sequential: bool,
    /// Seed.
    pub seed: u64,
}

/// The longest cell that is read whole.
const CONTEXT: usize = 2048;
/// Ids of the synthetic vocabulary, as in Geneformer V1.
const VOCAB: usize = 25_426;
const ROUNDS: usize = 7;

/// Runs the case; the object has `cells_per_s, tokens_per_s, mean_tokens, threads, order` and more.
pub fn run(case: &LoaderCase) -> Result<serde_json::Value> {
    let synthetic = match &case.corpus {
        Some(_) => None,
        None => Some(Synthetic::make(if case.cells == 0 { 300_000 } else { case.cells }, case.seed)?),
    };
    let path =
        case.corpus.as_deref().or(synthetic.as_ref().map(|s| s.path.as_path())).unwrap_or(Path::new(""));
    let corpus = Arc::new(Corpus::open(path)?);
    if corpus.cells() == 0 {
        return Err(Error::new(Code::NoCells, "there are no cells to load").at(path.display()));
    }
    let threads = case.threads.max(1);
    let batch = if case.batch == 0 { 64 } else { case.batch };
    let options = BatchOptions {
        cells: batch,
        tokens: batch * CONTEXT,
        max_tokens: CONTEXT,
        cls: None,
        eos: None,
        values: false,
    };
    let mut packers = (0..threads)
        .map(|rank| packer(&corpus, case, rank, threads, &options))
        .collect::<Result<Vec<_>>>()?;
    // One pass over everything: pages mapped, blocks proved.
    corpus.verify()?;
    for p in &mut packers {
        p.take(&corpus, corpus.cells() / threads)?;
    }
    let per_round = corpus.cells().min(200_000) / threads;
    let (mut ours, mut plain, mut tokens_per_cell) = (Vec::new(), Vec::new(), 0.0);
    for round in 0..ROUNDS {
        let start = Instant::now();
        let done = std::thread::scope(|scope| {
            let running: Vec<_> = packers
                .iter_mut()
                .map(|p| {
                    let corpus = &corpus;
                    scope.spawn(move || p.take(corpus, per_round))
                })
                .collect();
            running
                .into_iter()
                .map(|r| r.join().expect("the packing thread lives"))
                .collect::<Result<Vec<_>>>()
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let cells: usize = done.iter().map(|d| d.0).sum();
        let tokens: usize = done.iter().map(|d| d.1).sum();
        ours.push(cells as f64 / seconds);
        tokens_per_cell = tokens as f64 / cells as f64;
        plain.push(plain_copy(&corpus, case, threads, per_round, round as u64)?);
    }
    ours.sort_by(f64::total_cmp);
    plain.sort_by(f64::total_cmp);
    let median = |v: &[f64]| v[v.len() / 2];
    let width = if corpus.manifest().vocabulary.narrow() { 2.0 } else { 4.0 };
    Ok(json!({
        "cells_per_s": median(&ours),
        "cells_per_s_min": ours[0],
        "cells_per_s_max": ours[ROUNDS - 1],
        "tokens_per_s": median(&ours) * tokens_per_cell,
        "gb_per_s": median(&ours) * tokens_per_cell * width / 1e9,
        "mean_tokens": corpus.tokens() as f64 / corpus.cells() as f64,
        "threads": threads,
        "order": if case.sequential { "sequential" } else { "random" },
        "batch": batch,
        "cells": corpus.cells(),
        "rounds": ROUNDS,
        "plain_copy_cells_per_s": median(&plain),
        "plain_copy_cells_per_s_max": plain[ROUNDS - 1],
        "ratio_to_plain_copy": median(&ours) / median(&plain),
        "corpus": case.corpus.as_ref().map_or("synthetic".into(), |p| p.display().to_string()),
    }))
}

/// One thread's packer with its batch.
struct Lane {
    packer: Packer,
    batch: Batch,
    sequential: Option<(Vec<u32>, BatchOptions)>,
}

fn packer(
    corpus: &Arc<Corpus>,
    case: &LoaderCase,
    rank: usize,
    world: usize,
    options: &BatchOptions,
) -> Result<Lane> {
    let all = 0..corpus.cells() as u32;
    if case.sequential {
        let mine: Vec<u32> = all.skip(rank * corpus.cells() / world).take(corpus.cells() / world).collect();
        let packer = Packer::in_order(corpus.clone(), mine.clone(), options.clone())?;
        return Ok(Lane { packer, batch: Batch::default(), sequential: Some((mine, options.clone())) });
    }
    let sampler = Sampler::of_cells(all.collect(), case.seed)?.for_rank(rank, world)?;
    let packer = Packer::sampled(corpus.clone(), sampler, options.clone())?;
    Ok(Lane { packer, batch: Batch::default(), sequential: None })
}

impl Lane {
    /// Packs at least `cells` cells; returns cells and tokens packed.
    fn take(&mut self, corpus: &Arc<Corpus>, cells: usize) -> Result<(usize, usize)> {
        let (mut done, mut tokens) = (0, 0);
        while done < cells {
            if self.packer.fill(&mut self.batch)? {
                done += self.batch.len();
                tokens += self.batch.tokens();
                std::hint::black_box(&self.batch.gene);
            } else if let Some((mine, options)) = &self.sequential {
                self.packer = Packer::in_order(corpus.clone(), mine.clone(), options.clone())?;
            }
        }
        Ok((done, tokens))
    }
}

/// Copies `cells` cells per thread into a buffer of 64, random or in order, and does nothing else; cells per second.
fn plain_copy(corpus: &Corpus, case: &LoaderCase, threads: usize, cells: usize, round: u64) -> Result<f64> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let copy = |thread: usize| -> Result<()> {
            let mut state =
                (case.seed + round * 1000 + thread as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let mut buffer: Vec<u16> = Vec::with_capacity(64 * CONTEXT);
            let n = corpus.cells();
            let mut cell = thread * n / threads;
            for i in 0..cells {
                if i % 64 == 0 {
                    std::hint::black_box(&buffer);
                    buffer.clear();
                }
                if case.sequential {
                    cell = (cell + 1) % n;
                } else {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    cell = (state % n as u64) as usize;
                }
                match corpus.genes(cell)? {
                    Genes::U16(g) => buffer.extend_from_slice(&g[..g.len().min(CONTEXT)]),
                    Genes::U32(g) => {
                        buffer.extend_from_slice(bytemuck::cast_slice(&g[..g.len().min(CONTEXT)]))
                    }
                }
            }
            std::hint::black_box(&buffer);
            Ok(())
        };
        let running: Vec<_> = (0..threads).map(|t| scope.spawn(move || copy(t))).collect();
        running.into_iter().try_for_each(|r| r.join().expect("the copying thread lives"))
    })?;
    Ok((cells * threads) as f64 / start.elapsed().as_secs_f64())
}

/// A corpus in the temporary folder, removed when dropped.
struct Synthetic {
    path: PathBuf,
}

impl Synthetic {
    /// Log-normal lengths of median 900 and σ .45 between 50 and 2,048 (mean about 980, as of blood cells), random genes.
    fn make(cells: usize, seed: u64) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("cellrefine-loader-{}.cells", std::process::id()));
        let options = CorpusOptions {
            vocab: VocabIdentity { digest: "synthetic".into(), len: VOCAB },
            vocab_file: None,
            values: false,
            shard_cells: 0,
            obs: Vec::new(),
            provenance: json!({"synthetic": cells}),
        };
        let mut writer = CorpusWriter::create(&path, options)?;
        let mut random = Philox::new(seed, 0, site::BENCH);
        let mut state = seed.wrapping_mul(2) | 1;
        let mut gene = Vec::new();
        for i in 0..cells {
            let len = ((900f64.ln() + 0.45 * random.normal()).exp() as usize).clamp(50, CONTEXT);
            gene.clear();
            gene.extend((0..len).map(|_| {
                state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
                (((state >> 40) * (VOCAB as u64 - 2)) >> 24) as u32 + 2
            }));
            writer.push(&CellRecord {
                id: &i.to_string(),
                gene: &gene,
                value: None,
                total_count: 1e4,
                obs: &[],
            })?;
        }
        writer.finish()?;
        Ok(Synthetic { path })
    }
}

impl Drop for Synthetic {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_case_reports_what_it_did_and_leaves_nothing() {
        for (threads, sequential) in [(1, false), (2, true)] {
            let case = LoaderCase { cells: 300, batch: 8, threads, sequential, ..LoaderCase::default() };
            let json = run(&case).unwrap();
            assert_eq!(json["order"], if sequential { "sequential" } else { "random" });
            assert_eq!((&json["threads"], &json["cells"]), (&threads.into(), &300.into()));
            let mean = json["mean_tokens"].as_f64().unwrap();
            assert!((850.0..1150.0).contains(&mean), "{mean}");
            let (tokens, cells) =
                (json["tokens_per_s"].as_f64().unwrap(), json["cells_per_s"].as_f64().unwrap());
            assert!((tokens / cells / mean - 1.0).abs() < 0.1);
        }
        let left = std::env::temp_dir().join(format!("cellrefine-loader-{}.cells", std::process::id()));
        assert!(!left.exists());
    }
}
