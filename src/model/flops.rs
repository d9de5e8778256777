//! Counted work: matmul FLOPs (2·m·n·k) of real tokens and of Σ len² of the real cells, never of padding or recomputation.
//!
//! ```text
//! layer     : 2 (4D² + 2DF) N + 4 D Σ len²         (marker-sparse attention is counted by the pairs it holds)
//! masked    : (2D² + 2DV) M
//! training  : three times forward
//! ```

use super::config::ModelConfig;

/// What a batch asks of the network.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// N.
    pub tokens: u64,
    /// Pairs of tokens that attend: Σ len² where attention is dense.
    pub pairs: u64,
    /// M.
    pub masked: u64,
}

impl Work {
    /// Cells of these lengths under dense attention.
    pub fn dense(lengths: impl IntoIterator<Item = usize>) -> Self {
        lengths.into_iter().fold(Work::default(), |w, len| Work {
            tokens: w.tokens + len as u64,
            pairs: w.pairs + (len * len) as u64,
            ..w
        })
    }
}

/// FLOPs of a forward pass through `depth` layers, and the masked-gene head where `masked > 0`.
pub fn forward(config: &ModelConfig, depth: usize, work: Work) -> f64 {
    let (d, f, v) = (config.width as f64, config.ffn as f64, config.vocab as f64);
    let (n, pairs, m) = (work.tokens as f64, work.pairs as f64, work.masked as f64);
    depth as f64 * (2.0 * (4.0 * d * d + 2.0 * d * f) * n + 4.0 * d * pairs) + 2.0 * m * (d * d + d * v)
}

/// FLOPs of forward and backward.
pub fn training(config: &ModelConfig, depth: usize, work: Work) -> f64 {
    3.0 * forward(config, depth, work)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::{Preset, Vocabulary};

    /// method.md §10: 0.039 TFLOP for a full-length V1 cell, two thirds of it attention.
    #[test]
    fn v1_cell() {
        let p = Preset::named("gf-v1-10m").unwrap();
        let c = p.config(p.vocab, Vocabulary::default());
        let work = Work::dense([2048]);
        let total = forward(&c, 6, work);
        let attention = total - forward(&c, 6, Work { pairs: 0, ..work });
        assert!((total / 1e12 - 0.039).abs() < 5e-4 && (attention / total - 0.67).abs() < 5e-3);
        assert_eq!(Work::dense([3, 4]), Work { tokens: 7, pairs: 25, masked: 0 });
    }
}
