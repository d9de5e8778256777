//! Which matrices are adapted, and where their factors lie in one flat array.

use crate::config::{LoraSettings, LoraTargets};
use crate::error::{Code, Error, Result};
use crate::model::Layout;
use crate::model::weights::Parameter;
use std::ops::Range;

/// Parts start at multiples of so many elements, as in the network's store.
const ALIGN: usize = 32;

/// One adapted matrix (out, in). Query, key and value are three, though one matrix in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Name of the module on disk: `bert.encoder.layer.0.attention.self.query`.
    pub module: String,
    /// Rows of W.
    pub outputs: usize,
    /// Columns of W.
    pub inputs: usize,
    /// Its elements in the network's flat store.
    pub(super) weight: Range<usize>,
    /// W₀ in `base`.
    pub(super) base: Range<usize>,
    /// A in the adapters' flat store.
    pub(super) a: Range<usize>,
    /// B̂ there.
    pub(super) b: Range<usize>,
}

/// The adapters of a network: which, and where their numbers lie.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterLayout {
    /// In the order of the parameter list.
    pub adapters: Vec<Adapter>,
    /// r.
    pub rank: usize,
    /// α.
    pub alpha: f64,
    /// Elements of W₀, all matrices together.
    pub(super) base: usize,
    /// All A, padded; the rest of the store is B̂.
    pub(super) a: Range<usize>,
    pub(super) b: Range<usize>,
}

impl AdapterLayout {
    /// Adapters on the projections that `settings` names, of layers whose parameters `learns` admits.
    ///
    /// # Errors
    /// Usage: a rank beyond the matrices, or nothing to adapt.
    pub fn of(
        layout: &Layout,
        settings: &LoraSettings,
        learns: impl Fn(&Parameter) -> bool,
    ) -> Result<AdapterLayout> {
        let rank = settings.rank;
        let (mut adapters, mut base, mut a) = (Vec::new(), 0usize, 0usize);
        let place = |at: &mut usize, len: usize| {
            let start = *at;
            *at = (start + len).next_multiple_of(ALIGN);
            start..start + len
        };
        for (parameter, range) in layout.list() {
            if !(settings.targets.adapts(&parameter.name) && learns(parameter)) {
                continue;
            }
            let [outputs, inputs] = parameter.stored_shape()[..] else {
                return Err(Error::bug("an adapted parameter is no matrix").found(&parameter.name));
            };
            if rank > outputs.min(inputs) {
                return Err(Error::new(
                    Code::SettingValue,
                    "lora.rank is beyond the matrices that it adapts",
                )
                .at(&parameter.name)
                .found(rank)
                .wanted(format!("at most {}", outputs.min(inputs))));
            }
            for (i, stored) in parameter.stored_as.iter().enumerate() {
                let start = range.start + i * outputs * inputs;
                adapters.push(Adapter {
                    module: stored.strip_suffix(".weight").unwrap_or(stored).to_string(),
                    outputs,
                    inputs,
                    weight: start..start + outputs * inputs,
                    base: place(&mut base, outputs * inputs),
                    a: place(&mut a, rank * inputs),
                    b: 0..0,
                });
            }
        }
        if adapters.is_empty() {
            return Err(Error::new(Code::SettingConflict, "lora.rank is set, and no layer learns")
                .next("lower finetune.freeze_layers, or leave lora.rank out"));
        }
        let mut b = a;
        for adapter in &mut adapters {
            adapter.b = place(&mut b, adapter.outputs * rank);
        }
        Ok(AdapterLayout { adapters, rank, alpha: settings.alpha, base, a: 0..a, b: a..b })
    }

    /// Elements of the adapters' store, gaps included.
    pub fn len(&self) -> usize {
        self.b.end
    }
    /// Never: [`AdapterLayout::of`] refuses to adapt nothing.
    pub fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }
    /// Numbers that learn, gaps not counted.
    pub fn parameters(&self) -> usize {
        self.adapters.iter().map(|m| m.a.len() + m.b.len()).sum()
    }
    /// s = α/r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

impl LoraTargets {
    /// Is the parameter of this name (`layer.3.up_weight`) adapted?
    fn adapts(self, name: &str) -> bool {
        let leaf = name.strip_prefix("layer.").and_then(|rest| rest.split_once('.')).map(|(_, leaf)| leaf);
        let attention = matches!(leaf, Some("qkv_weight" | "out_weight"));
        let feed_forward = matches!(leaf, Some("up_weight" | "down_weight"));
        match self {
            LoraTargets::All => attention || feed_forward,
            LoraTargets::Attention => attention,
            LoraTargets::FeedForward => feed_forward,
        }
    }
}
