//! The one list of parameters. Name, shape, initial values, weight decay and Hugging Face names are written here and
//! nowhere else; stores, gradients, optimiser ranges, checkpoints and their checks are derived with [`Parts::map`].
//!
//! `qkv` is one (3D, D) matrix in memory, because one GEMM makes q, k and v; on disk it is three tensors.

use super::config::ModelConfig;

/// What there is to know about one parameter tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Name in this program, as in error messages and gradient reports: `layer.3.qkv_weight`.
    pub name: String,
    /// Row-major, (out, in) for matrices.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Does AdamW's weight decay act on it? Matrices and tables yes; biases and LayerNorm no.
    pub decay: bool,
    /// Tensors on disk; several are stacked along the first axis.
    pub stored_as: Vec<String>,
}

impl Parameter {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// No elements?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Shape of each tensor on disk.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        shape[0] /= self.stored_as.len();
        shape
    }
}

/// Initial values, as in Hugging Face's BERT.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// N(0, initializer_range²).
    Normal,
    /// The same, but this row is zero (`<pad>`).
    NormalButRow(usize),
    /// Biases.
    Zero,
    /// LayerNorm weights.
    One,
}

/// A structure with a `T` for every part: buffers, ranges, names. `Of<T>` is that structure.
pub trait Parts {
    /// The structure.
    type Of<T>;
    /// The same structure with `f` applied to each part, in the order of the list.
    fn map<T, U>(parts: Self::Of<T>, f: &mut dyn FnMut(T) -> U) -> Self::Of<U>;
    /// References to the parts.
    fn as_ref<T>(parts: &Self::Of<T>) -> Self::Of<&T>;
    /// Exclusive references to the parts.
    fn as_mut<T>(parts: &mut Self::Of<T>) -> Self::Of<&mut T>;
    /// The parts in the order of the list.
    fn list<T>(parts: Self::Of<T>) -> Vec<T> {
        let mut list = Vec::new();
        Self::map(parts, &mut |part| list.push(part));
        list
    }
}

/// Defines a structure of parts and its `map`, `as_ref`, `as_mut`.
macro_rules! parts {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name<T> { $($(#[$field_meta])* pub $field: T),+ }
        impl<T> $name<T> {
            fn map<U>(self, f: &mut dyn FnMut(T) -> U) -> $name<U> {
                $name { $($field: f(self.$field)),+ }
            }
            fn as_ref(&self) -> $name<&T> {
                $name { $($field: &self.$field),+ }
            }
            fn as_mut(&mut self) -> $name<&mut T> {
                $name { $($field: &mut self.$field),+ }
            }
        }
    };
}

parts! {
    /// Input embedding.
    Embeddings {
        /// (V, D).
        word,
        /// (positions, D).
        position,
        /// (2, D); row 0 is used.
        token_type,
        /// (D) LayerNorm.
        norm_weight,
        /// (D).
        norm_bias,
    }
}
parts! {
    /// One encoder layer.
    Layer {
        /// (3D, D): query, key, value.
        qkv_weight,
        /// (3D).
        qkv_bias,
        /// (D, D): attention output.
        out_weight,
        /// (D).
        out_bias,
        /// (D): LayerNorm after attention.
        norm1_weight,
        /// (D).
        norm1_bias,
        /// (F, D).
        up_weight,
        /// (F).
        up_bias,
        /// (D, F).
        down_weight,
        /// (D).
        down_bias,
        /// (D): LayerNorm after the feed-forward block.
        norm2_weight,
        /// (D).
        norm2_bias,
    }
}
parts! {
    /// Masked-gene head; its decoder is the word table.
    Head {
        /// (D, D).
        dense_weight,
        /// (D).
        dense_bias,
        /// (D).
        norm_weight,
        /// (D).
        norm_bias,
        /// (V): decoder bias.
        bias,
    }
}
parts! {
    /// Classifier over the pooled cell vector.
    Classifier {
        /// (K, D).
        weight,
        /// (K).
        bias,
    }
}

/// The whole network.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights<T> {
    /// Input embedding.
    pub embeddings: Embeddings<T>,
    /// (value_bins, D), where the network reads expression values.
    pub value: Option<T>,
    /// L layers.
    pub layers: Vec<Layer<T>>,
    /// Masked-gene head.
    pub head: Head<T>,
}

/// [`Weights`] as [`Parts`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Network;
impl Parts for Network {
    type Of<T> = Weights<T>;
    fn map<T, U>(w: Weights<T>, f: &mut dyn FnMut(T) -> U) -> Weights<U> {
        Weights {
            embeddings: w.embeddings.map(f),
            value: w.value.map(&mut *f),
            layers: w.layers.into_iter().map(|layer| layer.map(f)).collect(),
            head: w.head.map(f),
        }
    }
    fn as_ref<T>(w: &Weights<T>) -> Weights<&T> {
        Weights {
            embeddings: w.embeddings.as_ref(),
            value: w.value.as_ref(),
            layers: w.layers.iter().map(Layer::as_ref).collect(),
            head: w.head.as_ref(),
        }
    }
    fn as_mut<T>(w: &mut Weights<T>) -> Weights<&mut T> {
        Weights {
            embeddings: w.embeddings.as_mut(),
            value: w.value.as_mut(),
            layers: w.layers.iter_mut().map(Layer::as_mut).collect(),
            head: w.head.as_mut(),
        }
    }
}

/// [`Classifier`] as [`Parts`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Classification;
impl Parts for Classification {
    type Of<T> = Classifier<T>;
    fn map<T, U>(c: Classifier<T>, f: &mut dyn FnMut(T) -> U) -> Classifier<U> {
        c.map(f)
    }
    fn as_ref<T>(c: &Classifier<T>) -> Classifier<&T> {
        c.as_ref()
    }
    fn as_mut<T>(c: &mut Classifier<T>) -> Classifier<&mut T> {
        c.as_mut()
    }
}

/// A matrix or table: decays.
fn matrix(name: String, shape: [usize; 2], stored_as: Vec<String>) -> Parameter {
    Parameter { name, shape: shape.to_vec(), init: Init::Normal, decay: true, stored_as }
}
/// A bias or LayerNorm vector: does not decay.
fn vector(name: String, len: usize, init: Init, stored_as: Vec<String>) -> Parameter {
    Parameter { name, shape: vec![len], init, decay: false, stored_as }
}

impl Weights<Parameter> {
    /// The parameters of a network of this size.
    pub fn of(c: &ModelConfig) -> Self {
        let (d, f) = (c.width, c.ffn);
        let at = |place: &str, leaf: &str| vec![format!("{place}.{leaf}")];
        let e = "bert.embeddings";
        let table = |name: &str, rows: usize| {
            matrix(name.into(), [rows, d], at(e, &format!("{name}_embeddings.weight")))
        };
        let mut word = table("word", c.vocab);
        word.init = Init::NormalButRow(c.pad_token as usize);
        let embeddings = Embeddings {
            word,
            position: table("position", c.positions),
            token_type: table("token_type", 2),
            norm_weight: vector("embeddings.norm_weight".into(), d, Init::One, at(e, "LayerNorm.weight")),
            norm_bias: vector("embeddings.norm_bias".into(), d, Init::Zero, at(e, "LayerNorm.bias")),
        };
        let layers = (0..c.layers)
            .map(|i| {
                let name = |n: &str| format!("layer.{i}.{n}");
                let at = |place: &str, leaf: &str| vec![format!("bert.encoder.layer.{i}.{place}.{leaf}")];
                let qkv = |leaf: &str| {
                    ["query", "key", "value"]
                        .map(|q| format!("bert.encoder.layer.{i}.attention.self.{q}.{leaf}"))
                        .to_vec()
                };
                let zero =
                    |n: &str, len: usize, stored: Vec<String>| vector(name(n), len, Init::Zero, stored);
                let one = |n: &str, stored: Vec<String>| vector(name(n), d, Init::One, stored);
                Layer {
                    qkv_weight: matrix(name("qkv_weight"), [3 * d, d], qkv("weight")),
                    qkv_bias: zero("qkv_bias", 3 * d, qkv("bias")),
                    out_weight: matrix(name("out_weight"), [d, d], at("attention.output.dense", "weight")),
                    out_bias: zero("out_bias", d, at("attention.output.dense", "bias")),
                    norm1_weight: one("norm1_weight", at("attention.output.LayerNorm", "weight")),
                    norm1_bias: zero("norm1_bias", d, at("attention.output.LayerNorm", "bias")),
                    up_weight: matrix(name("up_weight"), [f, d], at("intermediate.dense", "weight")),
                    up_bias: zero("up_bias", f, at("intermediate.dense", "bias")),
                    down_weight: matrix(name("down_weight"), [d, f], at("output.dense", "weight")),
                    down_bias: zero("down_bias", d, at("output.dense", "bias")),
                    norm2_weight: one("norm2_weight", at("output.LayerNorm", "weight")),
                    norm2_bias: zero("norm2_bias", d, at("output.LayerNorm", "bias")),
                }
            })
            .collect();
        let h = "cls.predictions";
        let head = Head {
            dense_weight: matrix("head.dense_weight".into(), [d, d], at(h, "transform.dense.weight")),
            dense_bias: vector("head.dense_bias".into(), d, Init::Zero, at(h, "transform.dense.bias")),
            norm_weight: vector("head.norm_weight".into(), d, Init::One, at(h, "transform.LayerNorm.weight")),
            norm_bias: vector("head.norm_bias".into(), d, Init::Zero, at(h, "transform.LayerNorm.bias")),
            bias: vector("head.bias".into(), c.vocab, Init::Zero, at(h, "bias")),
        };
        let value = (c.value_bins > 0).then(|| {
            matrix("value".into(), [c.value_bins, d], vec!["embeddings.value_embeddings.weight".into()])
        });
        Weights { embeddings, value, layers, head }
    }
}

impl Classifier<Parameter> {
    /// A classifier of `classes` classes over vectors of `width`.
    pub fn of(classes: usize, width: usize) -> Self {
        Classifier {
            weight: matrix("classifier.weight".into(), [classes, width], vec!["classifier.weight".into()]),
            bias: vector("classifier.bias".into(), classes, Init::Zero, vec!["classifier.bias".into()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::{PRESETS, Preset, Vocabulary};

    /// The published parameter counts (method.md §2).
    #[test]
    fn counts_are_those_of_the_published_checkpoints() {
        let count = |name: &str| {
            let p = Preset::named(name).unwrap();
            let w = Weights::of(&p.config(p.vocab, Vocabulary::default()));
            Network::list(w).iter().map(Parameter::len).sum::<usize>()
        };
        assert_eq!(count("gf-v1-10m"), 10_288_722);
        assert_eq!(count("gf-v1-40m"), 39_591_250);
        assert_eq!(count("gf-v2-104m"), 104_386_867);
        assert_eq!(count("gf-v2-316m"), 316_354_867);
    }

    #[test]
    fn names_are_unique_and_map_keeps_the_order() {
        let w = Weights::of(&PRESETS[0].config(100, Vocabulary::default()));
        let names: Vec<String> = Network::list(w.clone()).into_iter().map(|p| p.name).collect();
        let unique: std::collections::HashSet<&String> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        let stored: usize = Network::list(Network::as_ref(&w)).iter().map(|p| p.stored_as.len()).sum();
        assert_eq!(stored, 106 - 4 * 16);
        let lens = Network::map(w, &mut |p| p.len());
        assert_eq!(lens.layers[1].qkv_weight, 3 * 128 * 128);
    }
}
