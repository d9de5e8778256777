//! The encoder as settings: a flat view of [`ModelConfig`] with the preset's or the checkpoint's values as defaults.

use crate::error::{Code, Error, Result};
use crate::model::ModelConfig;
use crate::model::config::{DEFAULT_VALUE_BINS, Embedding};
use crate::ops::gene_attention::Pattern;
use crate::ops::pool::Pooling;
use serde::{Deserialize, Serialize};

/// Which pairs of tokens attend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionKind {
    /// All.
    Dense,
    /// Marker genes with all, others within `model.window` ranks.
    MarkerSparse,
}

/// The encoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettings {
    /// L.
    pub layers: usize,
    /// D.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// F.
    pub ffn: usize,
    /// Longest cell, special tokens included.
    pub positions: usize,
    /// What is added to a gene's vector: `rank`, its place in the cell; `value-bins`, the bin of its expression among the cell's
    /// own, and no place (scGPT).
    pub embedding: Embedding,
    /// Bins of expression values; 0 = none, 51 where `embedding` needs some. The corpus must store values.
    pub value_bins: usize,
    /// Dropout on the embedding and on both branches of a layer.
    pub hidden_dropout: f64,
    /// Dropout on attention probabilities.
    pub attention_dropout: f64,
    /// Attention pattern.
    pub attention: AttentionKind,
    /// Rank window of the marker-sparse pattern.
    pub window: usize,
    /// How a cell vector is made.
    pub pooling: Pooling,
    /// Layer of the cell vector: 0 = the last layer's output, -1 = the one before it, and so on.
    pub layer: i32,
}

/// Window shown where the pattern is dense.
const DEFAULT_WINDOW: usize = 64;

impl ModelSettings {
    /// The settings that describe `config`.
    pub fn of(config: &ModelConfig) -> ModelSettings {
        let (attention, window) = match config.attention {
            Pattern::Dense => (AttentionKind::Dense, DEFAULT_WINDOW),
            Pattern::MarkerSparse { window } => (AttentionKind::MarkerSparse, window),
        };
        // 0.02, not the 0.0199999995 of its f32.
        let as_typed = |p: f32| (p as f64 * 1e6).round() / 1e6;
        ModelSettings {
            layers: config.layers,
            width: config.width,
            heads: config.heads,
            ffn: config.ffn,
            positions: config.positions,
            embedding: config.embedding,
            value_bins: config.value_bins,
            hidden_dropout: as_typed(config.hidden_dropout),
            attention_dropout: as_typed(config.attention_dropout),
            attention,
            window,
            pooling: config.pooling,
            layer: config.layer,
        }
    }

    /// Value bins: those set, or as many as the embedding needs.
    fn bins(&self) -> usize {
        match (self.embedding, self.value_bins) {
            (Embedding::ValueBins, 0) => DEFAULT_VALUE_BINS,
            (_, bins) => bins,
        }
    }

    /// Puts these settings into `config`. A network with `fixed` sizes (it has weights) keeps them.
    ///
    /// # Errors
    /// Usage: another size than the fixed one. What [`ModelConfig::check`] refuses.
    pub fn apply_to(&self, config: &mut ModelConfig, fixed: bool) -> Result<()> {
        let sizes = [
            ("model.layers", self.layers, &mut config.layers),
            ("model.width", self.width, &mut config.width),
            ("model.heads", self.heads, &mut config.heads),
            ("model.ffn", self.ffn, &mut config.ffn),
            ("model.positions", self.positions, &mut config.positions),
            ("model.value_bins", self.bins(), &mut config.value_bins),
        ];
        for (name, wanted, size) in sizes {
            if fixed && *size != wanted {
                return Err(Error::new(
                    Code::SettingFixed,
                    format!("{name} cannot differ from the checkpoint"),
                )
                .found(wanted)
                .wanted(*size)
                .next("leave it out, or pretrain an encoder of that size"));
            }
            *size = wanted;
        }
        if fixed && config.embedding != self.embedding {
            return Err(Error::new(Code::SettingFixed, "model.embedding cannot differ from the checkpoint")
                .found(format!("{:?}", self.embedding))
                .wanted(format!("{:?}", config.embedding))
                .next("leave it out, or pretrain an encoder of that kind"));
        }
        config.embedding = self.embedding;
        config.hidden_dropout = self.hidden_dropout as f32;
        config.attention_dropout = self.attention_dropout as f32;
        config.attention = match self.attention {
            AttentionKind::Dense => Pattern::Dense,
            AttentionKind::MarkerSparse => Pattern::MarkerSparse { window: self.window },
        };
        if config.attention == Pattern::Dense {
            config.globals.clear();
        }
        config.pooling = self.pooling;
        config.layer = self.layer;
        config.depth(self.layer)?;
        config.check("settings:model")
    }
}
