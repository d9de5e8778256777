//! The tensors of a Hugging Face model folder, in one safetensors file or in shards, under the names of a `BertForMaskedLM`.
//!
//! A `BertModel` saved alone names its tensors without `bert.` in front (LangCell's cell encoder is one): they are found all the
//! same. Shards are named by `model.safetensors.index.json`, whose names must be those of files in the folder.

use super::tensors::TensorFile;
use crate::error::{Code, Error, Result};
use safetensors::tensor::TensorInfo;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name of the weights in a folder.
pub const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// An index names every tensor once; more is another kind of file.
const INDEX_MAX_BYTES: u64 = 64 << 20;
/// The encoder's place in a `BertForMaskedLM`.
const ENCODER: &str = "bert.";

/// The open files of a folder.
#[derive(Debug)]
pub struct WeightFiles {
    place: PathBuf,
    files: Vec<TensorFile>,
    /// Name as a `BertForMaskedLM` has it → file, name there.
    tensors: BTreeMap<String, (usize, String)>,
}

impl WeightFiles {
    /// Opens the weights of a folder, checked against the files' sizes.
    ///
    /// # Errors
    /// Input: none, none in safetensors (with the line that converts them), damage, an index that names what is not there.
    pub fn open(folder: &Path) -> Result<WeightFiles> {
        let single = folder.join(WEIGHTS);
        let index = folder.join(INDEX);
        if single.exists() {
            return Self::over(single.clone(), vec![TensorFile::open(&single)?]);
        }
        if index.exists() {
            return Self::sharded(folder, index);
        }
        for old in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
            if folder.join(old).exists() {
                let f = folder.display();
                return Err(Error::new(
                    Code::WeightsPickled,
                    "the weights are pickled, and pickles are not executed here",
                )
                .at(&f)
                .found(old)
                .wanted(WEIGHTS)
                .next(format!(
                    "python -c \"from transformers import AutoModelForMaskedLM as M; \
                         M.from_pretrained('{f}').save_pretrained('{f}', safe_serialization=True)\""
                )));
            }
        }
        Self::over(single.clone(), vec![TensorFile::open(&single)?])
    }

    fn sharded(folder: &Path, index: PathBuf) -> Result<WeightFiles> {
        let place = index.display().to_string();
        let io = |e: std::io::Error| Error::io(&index, "read the index of the weights", &e);
        let bytes = std::fs::metadata(&index).map_err(io)?.len();
        if bytes > INDEX_MAX_BYTES {
            return Err(Error::new(Code::FileTooLarge, "too large for an index of weights")
                .at(place)
                .found(format!("{bytes} bytes")));
        }
        let text = std::fs::read(&index).map_err(io)?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| {
            Error::new(Code::NotJson, "the index of the weights is not valid JSON").at(&place).found(e)
        })?;
        let wrong = |found: String| {
            Error::new(Code::WeightsIndex, "the index of the weights cannot be used")
                .at(&place)
                .found(found)
                .wanted("\"weight_map\": {tensor: \"model-00001-of-00002.safetensors\"}, files of the folder alone")
                .next("copy the folder again, or save the model again with save_pretrained")
        };
        let map = json["weight_map"].as_object().ok_or_else(|| wrong("no weight_map".into()))?;
        let mut names: Vec<&str> = Vec::new();
        for (tensor, file) in map {
            let file = file.as_str().ok_or_else(|| wrong(format!("{tensor}: {file}")))?;
            let plain =
                !file.starts_with('.') && !file.contains(['/', '\\', '\0']) && file.ends_with(".safetensors");
            if !plain {
                return Err(wrong(format!("{tensor} in {file:?}")));
            }
            names.push(file);
        }
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Err(wrong("an empty weight_map".into()));
        }
        let files = names.iter().map(|n| TensorFile::open(&folder.join(n))).collect::<Result<Vec<_>>>()?;
        for (tensor, file) in map {
            let at = names.iter().position(|n| file == n).ok_or_else(|| Error::bug("a shard vanished"))?;
            if files[at].info(tensor).is_none() {
                return Err(wrong(format!("{tensor} is not in {file}")));
            }
        }
        Self::over(index, files)
    }

    fn over(place: PathBuf, files: Vec<TensorFile>) -> Result<WeightFiles> {
        let prefixed = files.iter().any(|f| f.names().iter().any(|n| n.starts_with(ENCODER)));
        let mut tensors = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for name in file.names() {
                let encoder =
                    ["embeddings.", "encoder.", "pooler."].iter().any(|part| name.starts_with(part));
                let full = if !prefixed && encoder { format!("{ENCODER}{name}") } else { name.clone() };
                if let Some((other, _)) = tensors.insert(full, (at, name.clone())) {
                    let other: &TensorFile = &files[other];
                    return Err(Error::new(Code::WeightsIndex, "a tensor is in two files")
                        .at(file.path().display())
                        .found(format!("{name}, also in {}", other.path().display())));
                }
            }
        }
        Ok(WeightFiles { place, files, tensors })
    }

    /// The file, or the index of the shards.
    pub fn path(&self) -> &Path {
        &self.place
    }
    /// Bytes of all files.
    ///
    /// # Errors
    /// A file that vanished.
    pub fn stored_bytes(&self) -> Result<u64> {
        let size = |f: &TensorFile| {
            std::fs::metadata(f.path()).map(|m| m.len()).map_err(|e| Error::io(f.path(), "read the size", &e))
        };
        self.files.iter().map(size).sum()
    }
    /// All names, as a `BertForMaskedLM` has them, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }
    /// Type and shape of a tensor, if there is one of this name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let (file, stored) = self.tensors.get(name)?;
        self.files[*file].info(stored)
    }
    fn find(&self, name: &str) -> Result<(&TensorFile, &str)> {
        let found = self.tensors.get(name).map(|(file, stored)| (&self.files[*file], stored.as_str()));
        found.ok_or_else(|| {
            Error::new(Code::TensorMissing, format!("no tensor `{name}`")).at(self.place.display())
        })
    }
    /// The bytes of a tensor.
    ///
    /// # Errors
    /// Input: no such tensor.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let (file, stored) = self.find(name)?;
        file.bytes(stored)
    }
    /// A floating-point tensor of this shape, widened to f32.
    ///
    /// # Errors
    /// Input: absent, of another shape or type.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (file, stored) = self.find(name)?;
        file.floats(stored, shape)
    }
}
