//! Adapters as PEFT reads them: `adapter/adapter_config.json` and `adapter/adapter_model.safetensors` in a checkpoint, for
//! `PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(BASE), "…/adapter")`.
//!
//! A folder of its own, because `transformers` takes a model folder with an `adapter_config.json` for an adapter, and the
//! checkpoint beside it is the whole network, merged.

use super::lora::{Adapters, Factors};
use crate::device::Device;
use crate::error::Result;
use crate::model::snapshot::{Numbers, Snapshot};
use crate::model::tensors::Declared;
use serde_json::{Value, json};
use std::path::Path;

/// Name of the folder in a checkpoint.
pub const FOLDER: &str = "adapter";

/// Adds the adapters to a checkpoint; `base` is the model folder that they belong on.
pub fn save<B: Device>(
    dev: &B,
    checkpoint: &mut Snapshot,
    adapters: &Adapters<B>,
    base: Option<&Path>,
) -> Result<()> {
    let folder = Path::new(FOLDER);
    let rank = adapters.layout().rank;
    let mut tensors = Vec::new();
    for Factors { adapter: m, a, b } in adapters.host(dev)? {
        for (leaf, shape, thin) in [("lora_A", [rank, m.inputs], a), ("lora_B", [m.outputs, rank], b)] {
            let name = format!("base_model.model.{}.{leaf}.weight", m.module);
            tensors.push((Declared::f32(name, &shape), Numbers::all(thin)));
        }
    }
    checkpoint.tensors(folder.join("adapter_model.safetensors"), &[("format", "pt")], tensors)?;
    checkpoint.json(folder.join("adapter_config.json"), &config(adapters, base));
    Ok(())
}

/// PEFT's `LoraConfig`. Modules by their full names: query and key of frozen layers have no adapter.
fn config<B: Device>(adapters: &Adapters<B>, base: Option<&Path>) -> Value {
    let layout = adapters.layout();
    let modules: Vec<&str> = layout.adapters.iter().map(|m| m.module.as_str()).collect();
    json!({
        "peft_type": "LORA",
        "task_type": null,
        "base_model_name_or_path": base.map(|b| b.display().to_string()),
        "r": layout.rank,
        "lora_alpha": layout.alpha,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "use_rslora": false,
        "use_dora": false,
    })
}
