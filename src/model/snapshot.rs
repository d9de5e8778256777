//! A checkpoint in host memory: every file of its folder, taken at the border of a step and written later, by whichever thread,
//! while training goes on. Nothing in it is shared with what training changes, so no file can hold half of two steps.
//!
//! Numbers are downloaded once, flat; a tensor is a range of them. Files are hashed as they are written, for the manifest.

use super::checkpoint::{self, CLASSES, CLASSIFIER, CONFIG, VOCABULARY, WEIGHTS};
use super::config::ModelConfig;
use super::store::{Layout, Store};
use super::tensors::{Declared, header};
use super::weights::{Classification, Parts};
use crate::device::Device;
use crate::digest::hex;
use crate::disk::{self, Output};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The files of a folder, by their names in it.
#[derive(Debug, Default)]
pub struct Snapshot {
    files: Vec<(PathBuf, Content)>,
}

#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    /// A safetensors file: its header, and the tensors' numbers in file order.
    Tensors(Vec<u8>, Vec<Numbers>),
}

/// The numbers of a tensor: a range of a download.
#[derive(Debug, Clone)]
pub struct Numbers {
    of: Arc<Vec<f32>>,
    range: Range<usize>,
}

impl Numbers {
    /// All of `values`.
    pub fn all(values: Vec<f32>) -> Numbers {
        Numbers { range: 0..values.len(), of: Arc::new(values) }
    }
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.of[self.range.clone()])
    }
}

impl Snapshot {
    /// A model as Hugging Face keeps it: [`CONFIG`], [`WEIGHTS`] and, where its bytes are given, [`VOCABULARY`].
    pub fn of_model<B: Device>(
        dev: &B,
        config: &ModelConfig,
        layout: &Layout,
        master: &Store<B, f32>,
        vocabulary: Option<&[u8]>,
    ) -> Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        snapshot.json(CONFIG, &config.to_json());
        if let Some(bytes) = vocabulary {
            snapshot.bytes(VOCABULARY, bytes.to_vec());
        }
        snapshot.store(WEIGHTS, dev, layout, master)?;
        Ok(snapshot)
    }

    /// Adds a file of these bytes.
    pub fn bytes(&mut self, name: impl Into<PathBuf>, bytes: Vec<u8>) {
        self.files.push((name.into(), Content::Bytes(bytes)));
    }

    /// Adds a JSON file, indented.
    pub fn json(&mut self, name: impl Into<PathBuf>, value: &Value) {
        self.bytes(name, format!("{value:#}\n").into_bytes());
    }

    /// Adds a safetensors file of f32 tensors.
    ///
    /// # Errors
    /// Bug: numbers that do not fill their shape, or two tensors of one name.
    pub fn tensors(
        &mut self,
        name: impl Into<PathBuf>,
        metadata: &[(&str, &str)],
        tensors: Vec<(Declared, Numbers)>,
    ) -> Result<()> {
        let mut declared: Vec<Declared> = tensors.iter().map(|(d, _)| d.clone()).collect();
        let mut numbers: HashMap<String, Numbers> = tensors.into_iter().map(|(d, n)| (d.name, n)).collect();
        let header = header(&mut declared, metadata)?;
        let mut values = Vec::new();
        for tensor in &declared {
            match numbers.remove(&tensor.name) {
                Some(found) if found.bytes().len() == tensor.bytes() => values.push(found),
                found => {
                    return Err(Error::bug(format!("tensor `{}` has the wrong size", tensor.name))
                        .found(found.map_or(0, |n| n.bytes().len()))
                        .wanted(tensor.bytes()));
                }
            }
        }
        self.files.push((name.into(), Content::Tensors(header, values)));
        Ok(())
    }

    /// Adds every tensor of a store, under its name on disk.
    pub fn store<B: Device, P: Parts>(
        &mut self,
        name: impl Into<PathBuf>,
        dev: &B,
        layout: &Layout<P>,
        store: &Store<B, f32, P>,
    ) -> Result<()> {
        let of = Arc::new(dev.download(store.flat())?);
        let mut tensors = Vec::new();
        for (parameter, range) in layout.list() {
            let shape = parameter.stored_shape();
            let len: usize = shape.iter().product();
            for (part, name) in parameter.stored_as.iter().enumerate() {
                let start = range.start + part * len;
                tensors.push((
                    Declared::f32(name, &shape),
                    Numbers { of: of.clone(), range: start..start + len },
                ));
            }
        }
        self.tensors(name, &[("format", "pt")], tensors)
    }

    /// Adds a classifier, with its class names and the obs column that they came from.
    pub fn classifier<B: Device>(
        &mut self,
        dev: &B,
        layout: &Layout<Classification>,
        classifier: &Store<B, f32, Classification>,
        labels: &[String],
        label_column: &str,
    ) -> Result<()> {
        self.json(CLASSES, &json!({"label": label_column, "classes": labels}));
        self.store(CLASSIFIER, dev, layout, classifier)
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        let size = |content: &Content| match content {
            Content::Bytes(bytes) => bytes.len(),
            Content::Tensors(header, values) => {
                header.len() + values.iter().map(|v| v.bytes().len()).sum::<usize>()
            }
        };
        self.files.iter().map(|(_, content)| size(content) as u64).sum()
    }

    /// Publishes a model folder of these files, as [`checkpoint::publish`] does.
    ///
    /// # Errors
    /// The file system's.
    pub fn publish(&self, folder: &Path) -> Result<()> {
        checkpoint::publish(folder, |to| self.write(to).map(|_| ()))
    }

    /// Writes and syncs all files and the folders below `folder`; not `folder` itself, whose names are durable once it is
    /// published. Returns size and SHA-256 of each, as a manifest lists them.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, folder: &Path) -> Result<Map<String, Value>> {
        let mut list = Map::new();
        for (name, content) in &self.files {
            let path = folder.join(name);
            let written = disk::create_folders(disk::parent(&path)).and_then(|()| content.write(&path));
            let (bytes, sha256) = written.map_err(|e| Error::io(&path, "write the checkpoint", &e))?;
            list.insert(name.to_string_lossy().into_owned(), json!({"bytes": bytes, "sha256": sha256}));
        }
        for below in self.files.iter().filter_map(|(name, _)| name.parent()).filter(|p| *p != Path::new("")) {
            let below = folder.join(below);
            disk::sync_folder(&below).map_err(|e| Error::io(&below, "sync the folder", &e))?;
        }
        list.sort_keys();
        Ok(list)
    }
}

impl Content {
    fn write(&self, path: &Path) -> io::Result<(u64, String)> {
        let mut out = BufWriter::with_capacity(1 << 20, Output::create(path)?);
        let (mut hash, mut size) = (Sha256::new(), 0);
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            size += bytes.len() as u64;
            out.write_all(bytes)
        };
        match self {
            Content::Bytes(bytes) => put(bytes)?,
            Content::Tensors(header, values) => {
                put(header)?;
                values.iter().try_for_each(|numbers| put(numbers.bytes()))?;
            }
        }
        out.into_inner().map_err(|e| e.into_error())?.sync()?;
        Ok((size, hex(&hash.finalize())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tensors::TensorFile;

    #[test]
    fn files_are_written_in_order_and_hashed_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let mut snapshot = Snapshot::default();
        let flat = Numbers::all((0..10).map(|i| i as f32).collect());
        let part = |range| Numbers { range, ..flat.clone() };
        let tensors =
            vec![(Declared::f32("b", &[2, 3]), part(4..10)), (Declared::f32("a", &[4]), part(0..4))];
        snapshot.tensors("deep/t.safetensors", &[("format", "pt")], tensors).unwrap();
        snapshot.json("a.json", &json!({"x": 1}));
        let list = snapshot.write(dir.path()).unwrap();
        assert_eq!(list.keys().collect::<Vec<_>>(), ["a.json", "deep/t.safetensors"]);
        let total: u64 = list.values().map(|entry| entry["bytes"].as_u64().unwrap()).sum();
        assert_eq!(total, snapshot.size());
        for (name, entry) in &list {
            let bytes = std::fs::read(dir.path().join(name)).unwrap();
            assert_eq!(entry["sha256"], crate::digest::sha256(&bytes));
        }
        let file = TensorFile::open(&dir.path().join("deep/t.safetensors")).unwrap();
        assert_eq!(file.floats("a", &[4]).unwrap(), [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(file.floats("b", &[2, 3]).unwrap(), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    }

    #[test]
    fn a_tensor_of_another_size_is_refused() {
        let mut snapshot = Snapshot::default();
        let short = vec![(Declared::f32("a", &[4]), Numbers::all(vec![0.0; 3]))];
        assert!(snapshot.tensors("t.safetensors", &[], short).is_err());
        assert_eq!(snapshot.size(), 0);
    }
}
