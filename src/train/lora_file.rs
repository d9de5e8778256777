//! Adapters as PEFT reads them: `adapter/adapter_config.json` and `adapter/adapter_model.safetensors` in a checkpoint, for
//! `PeftModel.from_pretrained(BertForMaskedLM.from_pretrained(BASE), "…/adapter")`.
//!
//! A folder of its own, because `transformers` takes a model folder with an `adapter_config.json` for an adapter, and the
//! checkpoint beside it is the whole network, merged.

use super::lora::{Adapters, Factors};
use crate::device::Device;
use crate::disk::{create_folder, write_synced};
use crate::error::{Error, Result};
use crate::model::tensors::{self, Declared};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Name of the folder in a checkpoint.
pub const FOLDER: &str = "adapter";

/// Writes the adapters into `checkpoint`; `base` is the model folder that they belong on.
pub fn write<B: Device>(
    dev: &B,
    checkpoint: &Path,
    adapters: &Adapters<B>,
    base: Option<&Path>,
) -> Result<()> {
    let folder = checkpoint.join(FOLDER);
    create_folder(&folder).map_err(|e| Error::io(&folder, "create the adapter's folder", &e))?;
    let rank = adapters.layout().rank;
    let (mut declared, mut values) = (Vec::new(), HashMap::new());
    for Factors { adapter: m, a, b } in adapters.host(dev)? {
        for (leaf, shape, thin) in [("lora_A", [rank, m.inputs], a), ("lora_B", [m.outputs, rank], b)] {
            let name = format!("base_model.model.{}.{leaf}.weight", m.module);
            declared.push(Declared::f32(name.clone(), &shape));
            values.insert(name, thin);
        }
    }
    tensors::write(&folder.join("adapter_model.safetensors"), &[("format", "pt")], declared, |tensor| {
        let thin = values.remove(&tensor.name).ok_or_else(|| Error::bug("an adapter without values"))?;
        Ok(bytemuck::cast_slice(&thin).to_vec())
    })?;
    let config = format!("{:#}\n", config(adapters, base));
    write_synced(&folder.join("adapter_config.json"), config.as_bytes())
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
