//! Genes as tokens: the vocabulary, gene-id mapping, rank tokenisation, marker sets and scores.
//!
//! | file | what |
//! |---|---|
//! | [`vocab`] | token names, medians, special tokens, symbols, digest; our `V.tsv` |
//! | [`dictionary`] | Geneformer's token and median dictionaries (TSV, JSON, pickle) |
//! | [`mapping`] | which column of a file is which token, and the report that says so |
//! | [`tokenize`] | counts of one cell to gene ids in rank order: pure, exact, no allocation |
//! | [`markers_file`], [`markers`] | marker-set files, read and checked; sets with weights, met with labels |
//! | [`markers_derive`], [`marker_score`] | sets from training cells; how well a cell fits a set, from its ranks |

pub mod dictionary;
pub mod mapping;
pub mod marker_score;
pub mod markers;
pub mod markers_derive;
pub mod markers_file;
mod pickle;
mod symbol_map;
pub mod tokenize;
pub mod vocab;

pub use vocab::{Specials, Vocab};
