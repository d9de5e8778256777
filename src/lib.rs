//! `cellrefine`: prototype-guided post-pretraining of single-cell transformers.
//!
//! A cell is a sentence of genes in rank order. Between pretraining and fine-tuning, the *refine* stage pulls cells towards
//! prototypes made from marker-gene sets, so that rare cell types and shifted data are handled better (CellRefine,
//! arXiv 2605.07938).
//!
//! # A tour
//! | module | what it holds |
//! |---|---|
//! | [`import`] | sources of cells (`.h5ad`, 10x, Geneformer's data sets), a block of rows at a time, in bounded memory |
//! | [`mod@export`] | corpora as Geneformer's data sets, checkpoints as Hugging Face folders |
//! | [`genes`] | vocabulary, gene-id mapping, rank tokenisation, marker sets |
//! | [`corpus`] | the memory-mapped corpus: writer, reader, sampler, packed batches |
//! | [`backend`], [`device`], [`ops`], [`cpu`] | the backend boundary: buffers, the maths of each op with its shape checks, the CPU's kernels |
//! | [`model`] | the BERT encoder, forward and backward by hand, over one flat parameter store |
//! | [`objective`] | prototypes and the five terms of the refine loss |
//! | [`collective`] | several processes as one: transports, sums in a fixed order, which rank this is |
//! | [`train`] | steps, schedules, optimiser, run folders, resume |
//! | [`eval`] | embeddings (`.npy`, Parquet, into a copy of the `.h5ad`), metrics, probes, splits, zero-shot annotation |
//! | [`report`], [`mod@bench`] | run records; timings against counted floors |
//! | [`mod@digest`] | SHA-256 as text |
//! | [`disk`] | durable files: written beside, synced, renamed; faults on purpose |
//! | [`lock`] | one writer to a folder |
//! | [`trace`] | ranges of time for Perfetto and NVTX |
//! | [`cli`] | one file per command |
//!
//! `examples/` shows them at work, each in a page: `pack_and_read`, `one_op_two_backends`, `training_loop`, `loss_term`.
//!
//! Shape letters, everywhere: N packed tokens, C cells, L layers, D width, H heads, K head width, F feed-forward width,
//! V vocabulary, P prototypes, M masked tokens.

// Module pages point at their private parts: whoever reads them reads the source as well.
#![allow(rustdoc::private_intra_doc_links)]

#[cfg(test)]
extern crate self as cellrefine; // as the harness in tests/common says

pub mod backend;
pub mod bench;
pub mod cli;
pub mod collective;
pub mod config;
pub mod corpus;
pub mod cpu;
pub mod cuda;
pub mod demo;
pub mod device;
pub mod digest;
pub mod disk;
pub mod error;
pub mod eval;
pub mod export;
pub mod genes;
pub mod import;
pub mod lock;
pub mod model;
pub mod objective;
pub mod ops;
pub mod report;
pub mod rng;
pub mod trace;
pub mod train;
mod whole_file;
