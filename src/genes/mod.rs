//! Genes: vocabulary, gene-id mapping, rank tokenisation, marker sets and scores.

pub mod marker_score;
pub mod markers;
