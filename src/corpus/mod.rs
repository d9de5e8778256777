//! The corpus: tokenised cells on disk, and everything that draws cells from it.
//!
//! A cell is a run of gene ids in rank order. [`mod@format`] says how the runs lie on disk, [`writer`] puts them there, [`merge`](mod@merge) joins,
//! [`reader`] maps them back without a copy, [`splits`] divides the cells, [`sampler`] orders them,
//! [`packer`] packs them into [`batch`]es, [`loader`] does so ahead of their use.
//! One CSR throughout: `cell_start` (C+1) over packed `gene` (N), on disk as in a batch.

pub mod batch;
mod faults;
pub mod format;
mod labels;
pub mod loader;
pub mod merge;
pub mod packer;
pub mod part;
mod partial_folder;
pub mod permutation;
pub mod reader;
pub mod sampler;
mod shard;
pub mod splits;
mod spool;
mod strata;
mod training_cells;
pub mod writer;

pub use batch::{Batch, BatchOptions, Tokens};
pub use format::{Column, Manifest, ObsKind, VocabIdentity};
pub use loader::Loader;
pub use packer::Packer;
pub use partial_folder::force_unlock;
pub use reader::{Categorical, Corpus, Genes};
pub use sampler::{Sampler, SamplerState, Sampling};
pub use splits::{Labels, Split, SplitSpec, TrainingCells};
pub use writer::{CellRecord, CorpusOptions, CorpusWriter, ObsSpec, ObsValue};
