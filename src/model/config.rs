//! Sizes and rates of the network, as Hugging Face's `config.json` of a `BertForMaskedLM`.
//!
//! What `transformers` does not know (vocabulary, special tokens, pooling, attention pattern, value bins) stands in one
//! object `cellrefine` inside the same file, which `transformers` carries along and ignores. A folder from elsewhere has no
//! such object; then the caller says which vocabulary the ids belong to ([`ModelConfig::adopt_vocabulary`]).

pub use super::presets::{PRESETS, Preset};
use crate::error::{Code, Error, Result};
use crate::genes::Vocab;
use crate::ops::gene_attention::Pattern;
use crate::ops::pool::Pooling;

/// The network's sizes, rates and conventions.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// V: rows of the word table (`vocab_size`).
    pub vocab: usize,
    /// D (`hidden_size`).
    pub width: usize,
    /// L (`num_hidden_layers`).
    pub layers: usize,
    /// H (`num_attention_heads`).
    pub heads: usize,
    /// F (`intermediate_size`).
    pub ffn: usize,
    /// Longest cell, special tokens included (`max_position_embeddings`).
    pub positions: usize,
    /// On the embedding and on both branches of a layer (`hidden_dropout_prob`).
    pub hidden_dropout: f32,
    /// On attention probabilities (`attention_probs_dropout_prob`).
    pub attention_dropout: f32,
    /// Added to the variance (`layer_norm_eps`).
    pub layer_norm_eps: f64,
    /// Standard deviation of initial weights (`initializer_range`).
    pub initializer_range: f64,
    /// Id of `<pad>` (`pad_token_id`): its row of the word table starts at zero and no batch holds it.
    pub pad_token: u32,
    /// What tells a gene of a cell from the same gene of another.
    pub embedding: Embedding,
    /// Value bins; 0 = no values.
    pub value_bins: usize,
    /// Which pairs of tokens attend.
    pub attention: Pattern,
    /// Genes that are global tokens under marker-sparse attention, ascending; special tokens always are. Part of the network:
    /// whoever opens a checkpoint runs it with the globals it was trained with.
    pub globals: Vec<u32>,
    /// How a cell vector is made.
    pub pooling: Pooling,
    /// Default layer of embeddings, counted as Geneformer does: 0 = last layer, -1 = the one before it.
    pub layer: i32,
    /// Which vocabulary the ids belong to.
    pub vocabulary: Vocabulary,
}

/// What is added to a gene's own vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Embedding {
    /// Its rank in the cell (Geneformer), and, where there are value bins, the bin of its expression over a fixed range.
    #[default]
    Rank,
    /// The bin of its expression among the cell's own, and no rank (scGPT): the order of the genes says nothing.
    ValueBins,
}

/// Bins of [`Embedding::ValueBins`] where nothing is said: scGPT's.
pub const DEFAULT_VALUE_BINS: usize = 51;

/// The vocabulary a network was trained on, as far as the network must know it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vocabulary {
    /// Digest of the token table; absent in a folder from elsewhere.
    pub digest: Option<String>,
    /// Id of `<mask>`.
    pub mask: u32,
    /// Id of `<cls>`, put before each cell, where there is one.
    pub cls: Option<u32>,
    /// Id of `<eos>`, put after each cell, where there is one.
    pub eos: Option<u32>,
    /// Ids below this are special tokens.
    pub first_gene: u32,
}

impl Vocabulary {
    /// What a network must know of `vocab`.
    pub fn of(vocab: &Vocab) -> Vocabulary {
        let specials = vocab.specials();
        Vocabulary {
            digest: Some(vocab.digest().to_string()),
            mask: specials.mask,
            cls: specials.cls,
            eos: specials.eos,
            first_gene: (0..vocab.len() as u32).find(|id| !vocab.is_special(*id)).unwrap_or(0),
        }
    }
}

impl ModelConfig {
    /// K: width of one head.
    pub fn head_width(&self) -> usize {
        self.width / self.heads
    }
    /// Special tokens before each cell.
    pub fn prefix(&self) -> usize {
        usize::from(self.vocabulary.cls.is_some())
    }
    /// Special tokens after each cell.
    pub fn suffix(&self) -> usize {
        usize::from(self.vocabulary.eos.is_some())
    }

    /// How many layers run for Geneformer's layer number: 0 = all, -1 = all but the last.
    ///
    /// # Errors
    /// Usage: positive, or below the embedding.
    pub fn depth(&self, layer: i32) -> Result<usize> {
        let depth = self.layers as i64 + layer as i64;
        if layer > 0 || depth < 0 {
            return Err(Error::new(Code::SettingValue, "no such layer").found(layer).wanted(format!(
                "0 (last layer's output), -1 (second to last) … -{} (the embedding)",
                self.layers
            )));
        }
        Ok(depth as usize)
    }

    /// Meets this network with the vocabulary of a corpus: the digests must agree; a folder from elsewhere, which names none,
    /// must have as many rows as the vocabulary has ids, and takes the special tokens from it.
    ///
    /// # Errors
    /// Input: another vocabulary.
    pub fn adopt_vocabulary(&mut self, len: usize, vocabulary: &Vocabulary) -> Result<()> {
        if let (Some(mine), Some(theirs)) = (&self.vocabulary.digest, &vocabulary.digest)
            && mine != theirs
        {
            return Err(Error::new(
                Code::CheckpointVocabulary,
                "the checkpoint and the corpus belong to different vocabularies",
            )
            .found(format!("vocabulary {} in the checkpoint, {} in the corpus", short(mine), short(theirs)))
            .wanted("one vocabulary for both")
            .next("pack the corpus again with --vocab CHECKPOINT/vocab.tsv"));
        }
        if len != self.vocab {
            return Err(Error::new(
                Code::CheckpointVocabulary,
                "the checkpoint's word table does not fit the vocabulary",
            )
            .found(format!("{} rows in the checkpoint, {len} ids in the vocabulary", self.vocab))
            .wanted("the vocabulary that the checkpoint was trained with")
            .next("cellrefine vocab convert TOKENS MEDIANS --out V.tsv, then pack with it"));
        }
        if self.vocabulary.digest.is_none() {
            self.vocabulary = vocabulary.clone();
        }
        Ok(())
    }

    /// Refuses sizes that no backend could run.
    pub fn check(&self, place: &str) -> Result<()> {
        let bad = |what: &str, found: String, wanted: &str| {
            Err(Error::new(Code::ModelConfig, what.to_string()).at(place).found(found).wanted(wanted))
        };
        let sizes = [self.vocab, self.width, self.layers, self.heads, self.ffn, self.positions];
        if sizes.contains(&0) {
            return bad(
                "a size is 0",
                format!("{sizes:?} (vocab, width, layers, heads, ffn, positions)"),
                "at least 1",
            );
        }
        // Products of them stay far from overflow, and the list of parameters small, whatever a file says.
        let most = [1 << 31, 1 << 20, 4096, 1 << 20, 1 << 20, usize::MAX];
        if sizes.iter().zip(most).any(|(size, most)| *size > most) || self.value_bins > 1 << 20 {
            return bad(
                "a size is beyond any machine",
                format!(
                    "{sizes:?} (vocab, width, layers, heads, ffn, positions), {} value bins",
                    self.value_bins
                ),
                "at most 4,096 layers, a width of 1,048,576 and 2,147,483,648 gene ids",
            );
        }
        if !self.width.is_multiple_of(self.heads) {
            return bad(
                "the width is not a multiple of the heads",
                format!("{} over {} heads", self.width, self.heads),
                "hidden_size divisible by num_attention_heads",
            );
        }
        for (name, p) in [
            ("hidden_dropout_prob", self.hidden_dropout),
            ("attention_probs_dropout_prob", self.attention_dropout),
        ] {
            if !(0.0..1.0).contains(&p) {
                return bad(&format!("{name} is no probability"), p.to_string(), "at least 0 and below 1");
            }
        }
        if !self.globals.is_sorted_by(|a, b| a < b)
            || self.globals.last().is_some_and(|g| *g as usize >= self.vocab)
        {
            return bad(
                "the global genes are no set of gene ids",
                format!("{} ids, the last {:?}", self.globals.len(), self.globals.last()),
                "ascending ids below vocab_size",
            );
        }
        if self.positions > crate::rng::ATTENTION_ROW_STRIDE as usize {
            return bad("the context is too long", self.positions.to_string(), "at most 65,536 tokens");
        }
        if self.embedding == Embedding::ValueBins && self.value_bins == 0 {
            return bad(
                "an embedding of value bins without bins",
                "value_bins = 0".into(),
                &format!("at least 2, such as {DEFAULT_VALUE_BINS}"),
            );
        }
        if self.value_bins == 1 {
            return bad(
                "a single value bin says nothing",
                "value_bins = 1".into(),
                "0 (no values) or at least 2",
            );
        }
        Ok(())
    }
}

/// The first characters of a digest.
fn short(digest: &str) -> &str {
    &digest[..digest.len().min(12)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tiny() -> ModelConfig {
        let v =
            Vocabulary { digest: Some("ab".repeat(32)), mask: 1, cls: Some(2), eos: Some(3), first_gene: 4 };
        let mut c = Preset::named("tiny").unwrap().config(50, v);
        c.attention = Pattern::MarkerSparse { window: 32 };
        c.globals = vec![4, 9, 49];
        (c.embedding, c.value_bins) = (Embedding::ValueBins, 16);
        c
    }

    #[test]
    fn json_round_trip() {
        let c = tiny();
        assert_eq!(ModelConfig::from_json(&c.to_json(), "config.json").unwrap(), c);
        assert_eq!((c.prefix(), c.suffix(), c.head_width()), (1, 1, 64));
    }

    #[test]
    fn depth_follows_geneformer() {
        let c = tiny();
        assert_eq!([0, -1, -2].map(|l| c.depth(l).unwrap()), [2, 1, 0]);
        assert_eq!(c.depth(1).unwrap_err().kind().exit_code(), 2);
        assert!(c.depth(-3).is_err());
    }

    #[test]
    fn refuses_what_the_network_cannot_be() {
        let change = |name: &str, value: Value| {
            let mut j = tiny().to_json();
            j[name] = value;
            ModelConfig::from_json(&j, "config.json").map_err(|e| e.to_string())
        };
        assert!(change("hidden_act", json!("gelu")).unwrap_err().contains("hidden_act"));
        assert!(change("position_embedding_type", json!("relative_key")).unwrap_err().contains("absolute"));
        assert!(
            change("architectures", json!(["BertForSequenceClassification"]))
                .unwrap_err()
                .contains("BertForMaskedLM")
        );
        assert!(change("num_attention_heads", json!(3)).unwrap_err().contains("multiple"));
        assert!(change("hidden_size", json!(-4)).unwrap_err().contains("hidden_size"));
        assert!(change("type_vocab_size", json!(1)).unwrap_err().contains("type_vocab_size"));
        assert!(change("hidden_dropout_prob", json!(1.5)).unwrap_err().contains("probability"));
        let globals = |ids: Value| {
            let sparse = json!({"marker_sparse": {"window": 3, "globals": ids}});
            let own = json!({"attention": sparse});
            change("cellrefine", own).map(|c| c.globals)
        };
        let own = change("cellrefine", json!({"embedding": "value-bins", "value_bins": 0}));
        assert!(own.unwrap_err().contains("without bins"));
        assert!(change("cellrefine", json!({"embedding": "bag"})).unwrap_err().contains("value-bins"));
        assert_eq!(globals(json!([5, 8])), Ok(vec![5, 8]));
        assert!(globals(json!([8, 5])).unwrap_err().contains("ascending"));
        assert!(globals(json!([5, 50])).unwrap_err().contains("below vocab_size"));
        assert!(globals(json!(["CD3D"])).unwrap_err().contains("attention"));
        let mut j = tiny().to_json();
        j.as_object_mut().unwrap().shift_remove("vocab_size");
        let e = ModelConfig::from_json(&j, "config.json").unwrap_err();
        assert!(e.to_string().contains("`vocab_size` is missing") && e.kind().exit_code() == 3);
    }

    #[test]
    fn a_foreign_folder_takes_the_corpus_vocabulary_and_an_own_one_refuses_another() {
        let mut j = tiny().to_json();
        j.as_object_mut().unwrap().shift_remove("cellrefine");
        let mut foreign = ModelConfig::from_json(&j, "config.json").unwrap();
        let v = tiny().vocabulary;
        assert!(foreign.clone().adopt_vocabulary(51, &v).is_err());
        foreign.adopt_vocabulary(50, &v).unwrap();
        assert_eq!(foreign.vocabulary, v);
        let other = Vocabulary { digest: Some("cd".repeat(32)), ..v };
        assert!(
            foreign.adopt_vocabulary(50, &other).unwrap_err().to_string().contains("different vocabularies")
        );
    }
}
