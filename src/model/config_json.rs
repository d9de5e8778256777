//! `config.json`: written as `transformers` reads it, read strictly.

use super::config::{Embedding, ModelConfig, Vocabulary};
use crate::error::{Code, Error, Result};
use crate::ops::gene_attention::Pattern;
use crate::ops::pool::Pooling;
use serde_json::{Map, Value, json};

/// Fields of the object `cellrefine`.
const OWN_FIELDS: [&str; 6] = ["vocabulary", "pooling", "layer", "attention", "embedding", "value_bins"];

impl ModelConfig {
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
                "embedding": self.embedding,
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
            && !a.as_array().is_some_and(|a| a.iter().any(|a| a == "BertForMaskedLM" || a == "BertModel"))
        {
            return Err(Error::new(Code::ModelConfig, "not a masked language model")
                .at(format!("{place}:architectures"))
                .found(a)
                .wanted("[\"BertForMaskedLM\"], the class of Geneformer's checkpoints, or [\"BertModel\"], LangCell's")
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
            embedding: Embedding::Rank,
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
            if !OWN_FIELDS.contains(&key.as_str()) {
                return Err(Error::new(Code::ModelConfig, "unknown field")
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
        if let Some(v) = fields.map.get("embedding") {
            self.embedding = serde_json::from_value(v.clone())
                .map_err(|_| fields.unsupported("embedding", "\"rank\" or \"value-bins\""))?;
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

/// A probability as it was typed: 0.02, not 0.019999999552965164.
fn round6(p: f32) -> f64 {
    (p as f64 * 1e6).round() / 1e6
}

fn object<'a>(json: &'a Value, place: &str) -> Result<&'a Map<String, Value>> {
    json.as_object().ok_or_else(|| Error::new(Code::ModelConfig, "not a JSON object").at(place))
}

/// Fields of one JSON object, with errors that name them.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    place: &'a str,
}

impl Fields<'_> {
    fn missing(&self, name: &str) -> Error {
        Error::new(Code::ModelConfig, format!("`{name}` is missing"))
            .at(self.place)
            .found(self.map.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
            .wanted("the config.json that transformers wrote beside the weights")
    }
    fn unsupported(&self, name: &str, wanted: &str) -> Error {
        Error::new(Code::ModelConfig, format!("`{name}` is not supported"))
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
