//! Where an embedding comes from, as it is written beside the numbers: program, checkpoint, layer, pooling, corpus.
//!
//! The date is left out: the same cells and the same weights give the same file.

use crate::digest::sha256_of_file;
use crate::error::Result;
use std::path::Path;

/// Origin of an embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// Folder of the model, as resolved.
    pub checkpoint: String,
    /// SHA-256 of its `model.safetensors`, or of the index of a sharded one.
    pub checkpoint_sha256: String,
    /// Layer, counted as Geneformer does.
    pub layer: i32,
    /// `cls` or `mean`.
    pub pool: &'static str,
    /// Arithmetic of the encoder.
    pub dtype: &'static str,
    /// Longest cell, special tokens included.
    pub max_tokens: usize,
    /// Corpus folder, as given.
    pub corpus: String,
    /// Digest of the corpus.
    pub corpus_digest: String,
    /// Digest of the vocabulary.
    pub vocabulary_digest: String,
}

impl Provenance {
    /// (key, value) in a fixed order, numbers in words.
    pub fn pairs(&self) -> Vec<(&'static str, String)> {
        vec![
            ("program", concat!("cellrefine ", env!("CARGO_PKG_VERSION")).into()),
            ("checkpoint", self.checkpoint.clone()),
            ("checkpoint_sha256", self.checkpoint_sha256.clone()),
            ("layer", self.layer.to_string()),
            ("pool", self.pool.into()),
            ("dtype", self.dtype.into()),
            ("max_tokens", self.max_tokens.to_string()),
            ("corpus", self.corpus.clone()),
            ("corpus_digest", self.corpus_digest.clone()),
            ("vocabulary_digest", self.vocabulary_digest.clone()),
        ]
    }
}

/// SHA-256, in hex, of the weights in a model folder.
pub fn weights_sha256(folder: &Path) -> Result<String> {
    let names = ["model.safetensors", "model.safetensors.index.json"];
    let path =
        names.iter().map(|n| folder.join(n)).find(|p| p.is_file()).unwrap_or_else(|| folder.join(names[0]));
    sha256_of_file(&path)
}
