//! Sizes and rates of the network, as Hugging Face's `config.json` of a `BertForMaskedLM`.
//!
//! What `transformers` does not know (vocabulary, special tokens, pooling, attention pattern, value bins) stands in one
//! object `cellrefine` inside the same file, which `transformers` carries along and ignores. A folder from elsewhere has no
//! such object; then the caller says which vocabulary the ids belong to ([`ModelConfig::adopt_vocabulary`]).

use crate::error::{Error, Result, nearest};
use crate::genes::Vocab;
use crate::ops::gene_attention::Pattern;
use crate::ops::pool::Pooling;
use serde_json::{Map, Value, json};

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
    /// Value bins; 0 = ranks alone.
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
            let e = Error::usage("no such preset").found(name).wanted(names.join(", "));
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
            value_bins: 0,
            attention: Pattern::Dense,
            globals: Vec::new(),
            pooling: if cls { Pooling::Cls } else { Pooling::Mean },
            layer: if geneformer { -1 } else { 0 },
            vocabulary,
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
            return Err(Error::usage("no such layer").found(layer).wanted(format!(
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
            return Err(Error::input("the checkpoint and the corpus belong to different vocabularies")
                .found(format!(
                    "vocabulary {} in the checkpoint, {} in the corpus",
                    short(mine),
                    short(theirs)
                ))
                .wanted("one vocabulary for both")
                .next("pack the corpus again with --vocab CHECKPOINT/vocab.tsv"));
        }
        if len != self.vocab {
            return Err(Error::input("the checkpoint's word table does not fit the vocabulary")
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
            Err(Error::input(what.to_string()).at(place).found(found).wanted(wanted))
        };
        let sizes = [self.vocab, self.width, self.layers, self.heads, self.ffn, self.positions];
        if sizes.contains(&0) {
            return bad(
                "a size is 0",
                format!("{sizes:?} (vocab, width, layers, heads, ffn, positions)"),
                "at least 1",
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
        if self.value_bins == 1 {
            return bad(
                "a single value bin says nothing",
                "value_bins = 1".into(),
                "0 (ranks alone) or at least 2",
            );
        }
        Ok(())
    }

    /// `config.json` as `transformers` reads it.
    pub fn to_json(&self) -> Value {
        let v = &self.vocabulary;
        let attention = match self.attention {
            Pattern::Dense => json!("dense"),
            Pattern::MarkerSparse { window } => {
                json!({"marker_sparse": {"window": window, "globals": self.globals}})
            }
        };
        json!({
            "architectures": ["BertForMaskedLM"],
            "attention_probs_dropout_prob": round6(self.attention_dropout),
            "hidden_act": "relu",
            "hidden_dropout_prob": round6(self.hidden_dropout),
            "hidden_size": self.width,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.ffn,
            "layer_norm_eps": self.layer_norm_eps,
            "max_position_embeddings": self.positions,
            "model_type": "bert",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": self.pad_token,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": true,
            "torch_dtype": "float32",
            "type_vocab_size": 2,
            "vocab_size": self.vocab,
            "cellrefine": {
                "vocabulary": {"digest": v.digest, "file": "vocab.tsv", "mask": v.mask, "cls": v.cls, "eos": v.eos,
                    "first_gene": v.first_gene},
                "pooling": self.pooling,
                "layer": self.layer,
                "attention": attention,
                "value_bins": self.value_bins,
            },
        })
    }

    /// Reads `config.json`; `place` names the file in errors.
    ///
    /// # Errors
    /// Input: a missing size, another architecture, activation, position type or number of segments.
    pub fn from_json(json: &Value, place: &str) -> Result<ModelConfig> {
        let fields = Fields { map: object(json, place)?, place };
        fields.same("model_type", "bert", "bert")?;
        if let Some(a) = fields.map.get("architectures")
            && !a.as_array().is_some_and(|a| a.iter().any(|a| a == "BertForMaskedLM"))
        {
            return Err(Error::input("not a masked language model")
                .at(format!("{place}:architectures"))
                .found(a)
                .wanted("[\"BertForMaskedLM\"], the class of Geneformer's checkpoints")
                .next("save the model with its masked-token head, or take the checkpoint it was fine-tuned from"));
        }
        if !fields.map.contains_key("hidden_act") {
            return Err(fields.missing("hidden_act"));
        }
        fields.same("hidden_act", "relu", "")?;
        fields.same("position_embedding_type", "absolute", "absolute")?;
        for (name, wanted) in
            [("tie_word_embeddings", true), ("is_decoder", false), ("add_cross_attention", false)]
        {
            if fields.map.get(name).is_some_and(|v| v != wanted) {
                return Err(fields.unsupported(name, &wanted.to_string()));
            }
        }
        if fields.size_or("type_vocab_size", 2)? != 2 {
            return Err(fields.unsupported("type_vocab_size", "2"));
        }
        let mut config = ModelConfig {
            vocab: fields.size("vocab_size")?,
            width: fields.size("hidden_size")?,
            layers: fields.size("num_hidden_layers")?,
            heads: fields.size("num_attention_heads")?,
            ffn: fields.size("intermediate_size")?,
            positions: fields.size("max_position_embeddings")?,
            hidden_dropout: fields.number_or("hidden_dropout_prob", 0.1)? as f32,
            attention_dropout: fields.number_or("attention_probs_dropout_prob", 0.1)? as f32,
            layer_norm_eps: fields.number_or("layer_norm_eps", 1e-12)?,
            initializer_range: fields.number_or("initializer_range", 0.02)?,
            pad_token: fields.size_or("pad_token_id", 0)? as u32,
            value_bins: 0,
            attention: Pattern::Dense,
            globals: Vec::new(),
            pooling: Pooling::Mean,
            layer: -1,
            vocabulary: Vocabulary { mask: 1, first_gene: 2, ..Vocabulary::default() },
        };
        if let Some(own) = fields.map.get("cellrefine") {
            config.read_own(own, &format!("{place}:cellrefine"))?;
        }
        config.check(place)?;
        Ok(config)
    }

    /// The `cellrefine` object.
    fn read_own(&mut self, own: &Value, place: &str) -> Result<()> {
        let fields = Fields { map: object(own, place)?, place };
        for key in fields.map.keys() {
            if !["vocabulary", "pooling", "layer", "attention", "value_bins"].contains(&key.as_str()) {
                return Err(Error::input("unknown field")
                    .at(format!("{place}.{key}"))
                    .next("update cellrefine"));
            }
        }
        if let Some(v) = fields.map.get("vocabulary") {
            let place = format!("{place}.vocabulary");
            let f = Fields { map: object(v, &place)?, place: &place };
            self.vocabulary = Vocabulary {
                digest: f.map.get("digest").and_then(Value::as_str).map(str::to_string),
                mask: f.size("mask")? as u32,
                cls: f.optional_id("cls")?,
                eos: f.optional_id("eos")?,
                first_gene: f.size("first_gene")? as u32,
            };
        }
        if let Some(v) = fields.map.get("pooling") {
            self.pooling = serde_json::from_value(v.clone())
                .map_err(|_| fields.unsupported("pooling", "\"cls\" or \"mean\""))?;
        }
        if let Some(v) = fields.map.get("layer") {
            self.layer = v
                .as_i64()
                .and_then(|v| i32::try_from(v).ok())
                .ok_or_else(|| fields.unsupported("layer", "an integer"))?;
        }
        self.value_bins = fields.size_or("value_bins", 0)?;
        if let Some(v) = fields.map.get("attention") {
            let sparse = || {
                let own = v.get("marker_sparse")?;
                // Checkpoints of the first version name no globals.
                let ids = own.get("globals").map_or(Some(Vec::new()), |ids| {
                    ids.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
                })?;
                Some((own.get("window")?.as_u64()? as usize, ids))
            };
            (self.attention, self.globals) = match (v.as_str(), sparse()) {
                (Some("dense"), _) => (Pattern::Dense, Vec::new()),
                (_, Some((window, globals))) => (Pattern::MarkerSparse { window }, globals),
                _ => {
                    let wanted = "\"dense\" or {\"marker_sparse\": {\"window\": n, \"globals\": [ids]}}";
                    return Err(fields.unsupported("attention", wanted));
                }
            };
        }
        Ok(())
    }
}

/// The first characters of a digest.
fn short(digest: &str) -> &str {
    &digest[..digest.len().min(12)]
}

/// A probability as it was typed: 0.02, not 0.019999999552965164.
fn round6(p: f32) -> f64 {
    (p as f64 * 1e6).round() / 1e6
}

fn object<'a>(json: &'a Value, place: &str) -> Result<&'a Map<String, Value>> {
    json.as_object().ok_or_else(|| Error::input("not a JSON object").at(place))
}

/// Fields of one JSON object, with errors that name them.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    place: &'a str,
}

impl Fields<'_> {
    fn missing(&self, name: &str) -> Error {
        Error::input(format!("`{name}` is missing"))
            .at(self.place)
            .found(self.map.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
            .wanted("the config.json that transformers wrote beside the weights")
    }
    fn unsupported(&self, name: &str, wanted: &str) -> Error {
        Error::input(format!("`{name}` is not supported"))
            .at(format!("{}:{name}", self.place))
            .found(self.map.get(name).unwrap_or(&Value::Null))
            .wanted(wanted)
    }
    fn number_or(&self, name: &str, default: f64) -> Result<f64> {
        match self.map.get(name) {
            None => Ok(default),
            Some(v) => v.as_f64().ok_or_else(|| self.unsupported(name, "a number")),
        }
    }
    fn size_or(&self, name: &str, default: usize) -> Result<usize> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.size(name),
        }
    }
    fn size(&self, name: &str) -> Result<usize> {
        let v = self.map.get(name).ok_or_else(|| self.missing(name))?;
        v.as_u64()
            .filter(|v| *v <= u32::MAX as u64)
            .map(|v| v as usize)
            .ok_or_else(|| self.unsupported(name, "a whole number"))
    }
    fn optional_id(&self, name: &str) -> Result<Option<u32>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.size(name).map(|v| Some(v as u32)),
        }
    }
    /// `name` must be `wanted`; when absent, `default` is what it means.
    fn same(&self, name: &str, wanted: &str, default: &str) -> Result<()> {
        match self.map.get(name) {
            Some(v) if v == wanted => Ok(()),
            None if default == wanted => Ok(()),
            _ => Err(self.unsupported(name, &format!("{wanted:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> ModelConfig {
        let v =
            Vocabulary { digest: Some("ab".repeat(32)), mask: 1, cls: Some(2), eos: Some(3), first_gene: 4 };
        let mut c = Preset::named("tiny").unwrap().config(50, v);
        c.attention = Pattern::MarkerSparse { window: 32 };
        c.globals = vec![4, 9, 49];
        c.value_bins = 16;
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
            let own = json!({"attention": sparse, "value_bins": 0});
            change("cellrefine", own).map(|c| c.globals)
        };
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
