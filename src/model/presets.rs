//! Encoders by name: Geneformer's published sizes, and two small ones.

use super::config::{Embedding, ModelConfig, Vocabulary};
use crate::error::{Code, Error, Result, nearest};
use crate::ops::gene_attention::Pattern;
use crate::ops::pool::Pooling;

/// Named sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    /// L.
    pub layers: usize,
    /// D.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// F.
    pub ffn: usize,
    /// Longest cell.
    pub positions: usize,
    /// Dropout probability in hundredths, attention and hidden.
    pub dropout_percent: u8,
    /// V of the published checkpoint; the default of `bench` and `plan`. A run takes its vocabulary's size.
    pub vocab: usize,
}

/// All presets; the `gf-` ones are Geneformer's published sizes.
pub const PRESETS: [Preset; 6] = [
    preset("tiny", 2, 128, 2, 256, 256, 2, 25_426),
    preset("small", 4, 256, 4, 512, 512, 2, 25_426),
    preset("gf-v1-10m", 6, 256, 4, 512, 2048, 2, 25_426),
    preset("gf-v1-40m", 12, 512, 8, 1024, 2048, 2, 25_426),
    preset("gf-v2-104m", 12, 768, 12, 3072, 4096, 10, 20_275),
    preset("gf-v2-316m", 18, 1152, 18, 4608, 4096, 10, 20_275),
];

#[allow(clippy::too_many_arguments)] // one row of the table above
const fn preset(
    name: &'static str,
    layers: usize,
    width: usize,
    heads: usize,
    ffn: usize,
    positions: usize,
    dropout_percent: u8,
    vocab: usize,
) -> Preset {
    Preset { name, layers, width, heads, ffn, positions, dropout_percent, vocab }
}

impl Preset {
    /// The preset of this name.
    ///
    /// # Errors
    /// Usage, with the nearest name.
    pub fn named(name: &str) -> Result<Preset> {
        PRESETS.iter().find(|p| p.name == name).copied().ok_or_else(|| {
            let names: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
            let e = Error::new(Code::PresetUnknown, "no such preset").found(name).wanted(names.join(", "));
            match nearest(name, names.iter().copied()) {
                Some(near) => e.next(format!("did you mean --preset {near}?")),
                None => e,
            }
        })
    }

    /// The network of this size over a vocabulary of `vocab` ids.
    pub fn config(self, vocab: usize, vocabulary: Vocabulary) -> ModelConfig {
        let dropout = self.dropout_percent as f32 / 100.0;
        // Geneformer's sizes keep its conventions. In a small encoder every layer counts, and a `<cls>` that masked genes never
        // train says little.
        let geneformer = self.name.starts_with("gf-");
        let cls = geneformer && vocabulary.cls.is_some();
        ModelConfig {
            vocab,
            width: self.width,
            layers: self.layers,
            heads: self.heads,
            ffn: self.ffn,
            positions: self.positions,
            hidden_dropout: dropout,
            attention_dropout: dropout,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            pad_token: 0,
            embedding: Embedding::Rank,
            value_bins: 0,
            attention: Pattern::Dense,
            globals: Vec::new(),
            pooling: if cls { Pooling::Cls } else { Pooling::Mean },
            layer: if geneformer { -1 } else { 0 },
            vocabulary,
        }
    }
}
