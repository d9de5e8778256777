//! Checkpoints are Hugging Face folders: `config.json` and `model.safetensors`, whole or in shards (and, beside them, `vocab.tsv`
//! and, after fine-tuning, `classifier.safetensors` with `classifier.json`).
//!
//! Read strictly: every missing, unexpected or misshapen tensor is named. Four exceptions have reasons: `position_ids` is a
//! constant that old versions of `transformers` stored; `cls.predictions.decoder.*` is tolerated where it is equal to the
//! tensors it is tied to; a pooler, which masked language models do not train, is left out; and a `BertModel` saved without a
//! head (LangCell's cell encoder) gets a fresh masked-gene head, a function of its sizes alone. Written into a temporary folder, synced, then renamed, so that a kill leaves the old folder or the
//! new one; `transformers` opens the result with no missing and no unexpected key.

use super::config::ModelConfig;
use super::store::{Layout, Parameters, initial};
use super::tensors::{Declared, TensorFile};
pub use super::weight_files::WEIGHTS;
use super::weight_files::WeightFiles;
use super::weights::{Classifier, Network, Parameter, Parts};
use crate::device::Act;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::ops::adamw::AdamW;
use crate::whole_file;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Name of the settings in a folder.
pub const CONFIG: &str = "config.json";
/// Name of the token table in a folder.
pub const VOCABULARY: &str = "vocab.tsv";
pub(super) const CLASSIFIER: &str = "classifier.safetensors";
pub(super) const CLASSES: &str = "classifier.json";
/// Settings and class names are pages of text.
const JSON_MAX_BYTES: u64 = 64 << 20;

/// A pointer of a run folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pointer {
    /// The checkpoint of the best evaluation.
    Best,
    /// The newest one.
    Last,
}

impl Pointer {
    fn file(self) -> &'static str {
        match self {
            Pointer::Best => "best",
            Pointer::Last => "last",
        }
    }
}

/// Finds the model folder that a user means: a folder with `config.json`, or a run folder, whose `best` (else `last`) pointer
/// is followed.
///
/// # Errors
/// Input: nothing there, or a folder without a checkpoint, with what was found instead.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.join(CONFIG).is_file() {
        return Ok(path.to_path_buf());
    }
    for pointer in [Pointer::Best, Pointer::Last] {
        if let Some(folder) = pointed(path, pointer)? {
            return Ok(folder);
        }
    }
    let e = match fs::metadata(path) {
        Err(e) => return Err(Error::io(path, "open the checkpoint", &e)),
        Ok(m) if m.is_file() => {
            Error::new(Code::FileKind, "a checkpoint is a folder").at(path.display()).found("a file")
        }
        Ok(_) => {
            let names = fs::read_dir(path).map_err(|e| Error::io(path, "list the folder", &e))?;
            let mut names: Vec<String> =
                names.filter_map(|n| n.ok()?.file_name().into_string().ok()).take(12).collect();
            names.sort();
            Error::new(Code::CheckpointMissing, "no checkpoint in this folder").at(path.display()).found(
                match names.is_empty() {
                    true => "an empty folder".to_string(),
                    false => names.join(", "),
                },
            )
        }
    };
    Err(e.wanted(
        "a run folder, a checkpoint folder or a Hugging Face folder (config.json and model.safetensors)",
    ))
}

/// The folder a run's pointer names; `None` when there is no such pointer.
pub fn pointed(run: &Path, pointer: Pointer) -> Result<Option<PathBuf>> {
    let file = run.join(pointer.file());
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(e)
            if e.kind() == std::io::ErrorKind::NotFound || e.kind() == std::io::ErrorKind::NotADirectory =>
        {
            return Ok(None);
        }
        Err(e) => return Err(Error::io(&file, "read the pointer", &e)),
    };
    let name = text.trim();
    let folder = run.join("checkpoints").join(name);
    if name.is_empty() || name.contains(['/', '\\']) || name == ".." || !folder.join(CONFIG).is_file() {
        return Err(Error::new(Code::CheckpointMissing, "the run's pointer names no checkpoint")
            .at(file.display())
            .found(format!("{name:?}"))
            .wanted("the name of a folder under checkpoints/")
            .next(format!("name the folder itself: {}/checkpoints/step-N", run.display())));
    }
    Ok(Some(folder))
}

/// Points a run at one of its checkpoints (`name` is a folder under `checkpoints/`), atomically.
pub fn point(run: &Path, pointer: Pointer, name: &str) -> Result<()> {
    disk::replace(&run.join(pointer.file()), format!("{name}\n").as_bytes())
}

/// Writes a folder through `fill` under a temporary name beside `folder`, syncs it and renames it. An older `folder` is
/// replaced; after a failure it is still there and the temporary one is gone.
pub fn publish(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(folder, "create the folder", &e);
    let temporary = disk::beside(folder, &format!("{}.tmp", std::process::id()))?;
    disk::create_folders(disk::parent(folder)).map_err(failed)?;
    disk::remove_folder(&temporary).and_then(|()| disk::create_folder(&temporary)).map_err(failed)?;
    let done = fill(&temporary).and_then(|()| disk::publish_folder(&temporary, folder));
    if done.is_err() {
        let _ = disk::remove_folder(&temporary);
    }
    done
}

/// The settings of a model folder.
pub fn read_config(folder: &Path) -> Result<ModelConfig> {
    ModelConfig::from_json(&read_json(folder)?, &folder.join(CONFIG).display().to_string())
}

fn read_json(folder: &Path) -> Result<Value> {
    let path = folder.join(CONFIG);
    let text = whole_file::read(&path, "read the model's settings", JSON_MAX_BYTES)?;
    serde_json::from_slice(&text).map_err(|e| {
        Error::new(Code::NotJson, "not valid JSON")
            .at(path.display())
            .found(e)
            .wanted("Hugging Face's config.json")
    })
}

/// The tensors of a checkpoint, one at a time, under Hugging Face's names: what a model folder is written from.
pub struct ModelTensors {
    /// The network's settings.
    pub config: ModelConfig,
    file: WeightFiles,
    parameters: Vec<Parameter>,
}

impl ModelTensors {
    /// Opens a model folder (already [resolved](resolve)), its names checked.
    ///
    /// # Errors
    /// Input: as [`load`]; an encoder without a head, which has nothing to export.
    pub fn open(folder: &Path) -> Result<ModelTensors> {
        let config = read_config(folder)?;
        let file = WeightFiles::open(folder)?;
        let layout = Layout::network(&config);
        check_names(&file, &layout.list(), false, false)?;
        let parameters = layout.list().into_iter().map(|(p, _)| p.clone()).collect();
        Ok(ModelTensors { config, file, parameters })
    }

    /// Every tensor that a `BertForMaskedLM` has, in f32; the table of value bins is none of them.
    pub fn declared(&self) -> Vec<Declared> {
        let bert = self.parameters.iter().filter(|p| p.name != "value");
        bert.flat_map(|p| p.stored_as.iter().map(|n| Declared::f32(n, &p.stored_shape()))).collect()
    }

    /// The values of one of them.
    ///
    /// # Errors
    /// Input: damage.
    pub fn values(&self, tensor: &Declared) -> Result<Vec<f32>> {
        self.file.floats(&tensor.name, &tensor.shape)
    }
}

/// What a loader may change on the way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// Give a rank-only checkpoint so many value bins; their table starts at zero, so that nothing changes at first.
    pub value_bins: Option<usize>,
}

/// Loads a model folder (already [resolved](resolve)) onto a device.
///
/// # Errors
/// Input: what `config.json` or the weights lack, have too much or have in another shape or type, by name.
pub fn load<B: AdamW<A>, A: Act>(
    dev: &B,
    folder: &Path,
    options: LoadOptions,
) -> Result<(ModelConfig, Parameters<B, A>)> {
    let mut config = read_config(folder)?;
    let mut fresh_values = false;
    if let Some(bins) = options.value_bins.filter(|bins| *bins != config.value_bins) {
        if config.value_bins != 0 {
            return Err(Error::new(
                Code::CheckpointDamaged,
                "the checkpoint has another number of value bins",
            )
            .at(folder.display())
            .found(config.value_bins)
            .wanted(bins));
        }
        config.value_bins = bins;
        fresh_values = true;
        config.check("value bins")?;
    }
    let file = WeightFiles::open(folder)?;
    let headless = is_headless(folder, &file)?;
    // Before anything is allocated: the sizes are those of the file that holds them.
    check_names(&file, &Layout::network(&config).list(), fresh_values, headless)?;
    let mut params = Parameters::zeros(dev, &config)?;
    params.write_with(dev, |dev, master, layout| {
        let buffers = Network::list(Network::as_mut(master.named_mut()));
        for (index, ((parameter, _), buf)) in layout.list().into_iter().zip(buffers).enumerate() {
            if headless && is_head(parameter) {
                dev.write(buf, &initial(parameter, config.initializer_range, 0, index as u32))?;
            } else if !(fresh_values && parameter.name == "value") {
                dev.write(buf, &read_parameter(&file, parameter)?)?;
            }
        }
        Ok(())
    })?;
    Ok((config, params))
}

/// Is this the encoder alone: a `BertModel` by its settings, without any tensor of a head?
fn is_headless(folder: &Path, file: &WeightFiles) -> Result<bool> {
    let architectures = &read_json(folder)?["architectures"];
    let encoder = architectures.as_array().is_some_and(|a| a.iter().any(|a| a == "BertModel"));
    Ok(encoder && !file.names().any(|n| n.starts_with("cls.")))
}

fn is_head(parameter: &Parameter) -> bool {
    parameter.name.starts_with("head.")
}

/// Every name that must be there is, with its shape and a type that can be read; and nothing else.
fn check_names(
    file: &WeightFiles,
    expected: &[&(Parameter, std::ops::Range<usize>)],
    fresh_values: bool,
    headless: bool,
) -> Result<()> {
    let mut wrong = Vec::new();
    let mut known = std::collections::HashSet::new();
    for (parameter, _) in expected {
        for name in &parameter.stored_as {
            known.insert(name.as_str());
            match file.info(name) {
                None if fresh_values && parameter.name == "value" => {}
                None if headless && is_head(parameter) => {}
                None => wrong.push(format!("missing {name} {:?}", parameter.stored_shape())),
                Some(info) if info.shape != parameter.stored_shape() => {
                    wrong.push(format!("{name} is {:?}, not {:?}", info.shape, parameter.stored_shape()));
                }
                Some(info) => {
                    use safetensors::Dtype::{BF16, F16, F32};
                    if ![F32, F16, BF16].contains(&info.dtype) {
                        wrong.push(format!("{name} is {:?}, not F32, F16 or BF16", info.dtype));
                    }
                }
            }
        }
    }
    for name in file.names() {
        let tied = match name {
            "bert.embeddings.position_ids" | "bert.pooler.dense.weight" | "bert.pooler.dense.bias" => {
                continue;
            }
            "cls.predictions.decoder.weight" => "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias" => "cls.predictions.bias",
            other if known.contains(other) => continue,
            _ => {
                wrong.push(format!("unexpected {name}"));
                continue;
            }
        };
        if file.info(tied).is_some() && file.bytes(name)? != file.bytes(tied)? {
            wrong.push(format!("{name} differs from {tied}, to which it should be tied"));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let more = wrong.len().saturating_sub(8);
    let shown = wrong[..wrong.len() - more].join("; ");
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Err(Error::new(
        Code::CheckpointDamaged,
        "the tensors are not those of the model that config.json describes",
    )
    .at(file.path().display())
    .found(format!("{shown}{more}"))
    .wanted("a BertForMaskedLM of the sizes in config.json"))
}

fn read_parameter(file: &WeightFiles, parameter: &Parameter) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(parameter.len());
    for name in &parameter.stored_as {
        values.append(&mut file.floats(name, &parameter.stored_shape())?);
    }
    Ok(values)
}

/// A fine-tuned classifier on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedClassifier {
    /// (K, D) and (K).
    pub weights: Classifier<Vec<f32>>,
    /// (K) class names.
    pub labels: Vec<String>,
    /// The obs column they came from.
    pub label_column: String,
}

/// The classifier beside a model, if the model was fine-tuned.
pub fn read_classifier(folder: &Path, width: usize) -> Result<Option<LoadedClassifier>> {
    let path = folder.join(CLASSES);
    if !path.exists() {
        return Ok(None);
    }
    let text = whole_file::read(&path, "read the class names", JSON_MAX_BYTES)?;
    let bad = |found: String| {
        Error::new(Code::CheckpointDamaged, "the class names cannot be read").at(path.display()).found(found)
    };
    let json: Value = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    let labels: Vec<String> =
        serde_json::from_value(json["classes"].clone()).map_err(|e| bad(format!("classes: {e}")))?;
    let label_column = json["label"].as_str().ok_or_else(|| bad("no label column".into()))?.to_string();
    let file = TensorFile::open(&folder.join(CLASSIFIER))?;
    let weights = Classifier {
        weight: file.floats("classifier.weight", &[labels.len(), width])?,
        bias: file.floats("classifier.bias", &[labels.len()])?,
    };
    Ok(Some(LoadedClassifier { weights, labels, label_column }))
}

/// What a checkpoint is, for `inspect`.
pub fn describe(path: &Path) -> Result<Value> {
    let folder = resolve(path)?;
    let config = read_config(&folder)?;
    let file = WeightFiles::open(&folder)?;
    let headless = is_headless(&folder, &file)?;
    let layout = Layout::network(&config);
    check_names(&file, &layout.list(), false, headless)?;
    let stored = file.stored_bytes()?;
    let classifier = read_classifier(&folder, config.width)?;
    let mut finite = true;
    for (parameter, _) in layout.list().into_iter().filter(|(p, _)| !(headless && is_head(p))) {
        finite &= read_parameter(&file, parameter)?.iter().all(|x| x.is_finite());
    }
    Ok(json!({
        "kind": "checkpoint",
        "folder": folder.display().to_string(),
        "parameters": layout.parameters(),
        "tensors": file.names().count(),
        "masked_gene_head": if headless { "none: a fresh one is made" } else { "trained" },
        "bytes": stored,
        "finite": finite,
        "config": config.to_json(),
        "vocabulary_digest": config.vocabulary.digest,
        "has_vocabulary_file": folder.join(VOCABULARY).is_file(),
        "classes": classifier.map(|c| json!({"label": c.label_column, "names": c.labels})),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::{Preset, Vocabulary};
    use crate::model::tensors::header;
    use crate::model::weights::Weights;
    use safetensors::Dtype;

    /// Header and data of the published checkpoints, byte for byte in size (method.md §2). The V1 file also holds the
    /// constant `position_ids`, which we skip when reading and do not write.
    #[test]
    fn file_sizes_are_those_of_the_published_checkpoints() {
        for (preset, tensors, bytes) in [
            ("gf-v1-10m", 107, 41_183_536),
            ("gf-v2-104m", 202, 417_571_156),
            ("gf-v2-316m", 298, 1_265_455_076),
        ] {
            let p = Preset::named(preset).unwrap();
            let config = p.config(p.vocab, Vocabulary::default());
            let mut declared: Vec<Declared> = Network::list(Weights::of(&config))
                .iter()
                .flat_map(|p| p.stored_as.iter().map(|name| Declared::f32(name, &p.stored_shape())))
                .collect();
            if preset == "gf-v1-10m" {
                let name = "bert.embeddings.position_ids".to_string();
                declared.push(Declared { name, dtype: Dtype::I64, shape: vec![1, 2048] });
            }
            let header = header(&mut declared, &[("format", "pt")]).unwrap();
            let size = header.len() + declared.iter().map(Declared::bytes).sum::<usize>();
            assert_eq!((declared.len(), size), (tensors, bytes), "{preset}");
        }
    }
}
