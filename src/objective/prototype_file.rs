//! `prototypes.safetensors`: the prototypes that travel with a refined checkpoint, and the space they live in.
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `prototypes` | (P, D) | q_k as trained, before centring and normalisation |
//! | `centre` | (D) | the teacher's mean embedding μ: cosines are those of h − μ and q − μ |
//!
//! The names of the types, the temperature, the layer and the pooling stand in the header's metadata. A file of its own, so that
//! `transformers` finds no unexpected key in `model.safetensors`.

use crate::error::{Code, Error, Result};
use crate::model::snapshot::{Numbers, Snapshot};
use crate::model::tensors::{Declared, TensorFile};
use crate::ops::pool::Pooling;
use std::path::Path;

/// Name of the file in a checkpoint folder.
pub const PROTOTYPES: &str = "prototypes.safetensors";

/// Prototypes on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredPrototypes {
    /// Name of each type, (P).
    pub names: Vec<String>,
    /// (P, D).
    pub vectors: Vec<f32>,
    /// Teacher mean, (D); zeros where cosines are not centred.
    pub centre: Vec<f32>,
    /// Temperature τ of the prototype softmax.
    pub temperature: f32,
    /// Layer of the cell vectors, counted as Geneformer does.
    pub layer: i32,
    /// How a cell vector is made.
    pub pooling: Pooling,
}

impl StoredPrototypes {
    /// D.
    pub fn width(&self) -> usize {
        self.centre.len()
    }

    /// Writes [`PROTOTYPES`] into `folder`, synced.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut snapshot = Snapshot::default();
        self.add_to(&mut snapshot)?;
        snapshot.write(folder).map(|_| ())
    }

    /// Adds [`PROTOTYPES`] to a checkpoint.
    ///
    /// # Errors
    /// Bug: vectors that do not fit the names.
    pub fn add_to(&self, snapshot: &mut Snapshot) -> Result<()> {
        let (p, d) = (self.names.len(), self.width());
        let names =
            serde_json::to_string(&self.names).map_err(|e| Error::bug(format!("prototype names: {e}")))?;
        let pooling = match self.pooling {
            Pooling::Cls => "cls",
            Pooling::Mean => "mean",
        };
        let (temperature, layer) = (self.temperature.to_string(), self.layer.to_string());
        let metadata = [
            ("format", "pt"),
            ("layer", layer.as_str()),
            ("names", names.as_str()),
            ("pooling", pooling),
            ("temperature", temperature.as_str()),
        ];
        let vectors = (Declared::f32("prototypes", &[p, d]), Numbers::all(self.vectors.clone()));
        let centre = (Declared::f32("centre", &[d]), Numbers::all(self.centre.clone()));
        snapshot.tensors(PROTOTYPES, &metadata, vec![vectors, centre])
    }

    /// The prototypes beside the model in `folder`, whose width is `width`; `None` where there are none.
    ///
    /// # Errors
    /// Input: damaged, of another width, without names, not finite.
    pub fn read(folder: &Path, width: usize) -> Result<Option<StoredPrototypes>> {
        let path = folder.join(PROTOTYPES);
        if !path.exists() {
            return Ok(None);
        }
        let file = TensorFile::open(&path)?;
        let metadata = file.metadata();
        let bad = |what: &str, found: String| {
            Error::new(Code::CheckpointDamaged, format!("the prototypes {what}"))
                .at(path.display())
                .found(found)
                .next("refine again: cellrefine refine …")
        };
        let entry = |key: &str| {
            metadata.get(key).ok_or_else(|| bad("lack an entry of their header", format!("no `{key}`")))
        };
        let names: Vec<String> =
            serde_json::from_str(entry("names")?).map_err(|e| bad("have unreadable names", e.to_string()))?;
        let temperature: f32 = entry("temperature")?
            .parse()
            .map_err(|_| bad("have no temperature", metadata["temperature"].clone()))?;
        let layer: i32 =
            entry("layer")?.parse().map_err(|_| bad("have no layer", metadata["layer"].clone()))?;
        let pooling = match entry("pooling")?.as_str() {
            "cls" => Pooling::Cls,
            "mean" => Pooling::Mean,
            other => return Err(bad("have an unknown pooling", other.to_string())),
        };
        let vectors = file.floats("prototypes", &[names.len(), width])?;
        let centre = file.floats("centre", &[width])?;
        if !(vectors.iter().chain(&centre).all(|x| x.is_finite())
            && temperature.is_finite()
            && temperature > 0.0)
        {
            return Err(bad(
                "hold a value that is not finite, or a temperature that is not positive",
                temperature.to_string(),
            ));
        }
        Ok(Some(StoredPrototypes { names, vectors, centre, temperature, layer, pooling }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(StoredPrototypes::read(folder.path(), 3).unwrap(), None);
        let stored = StoredPrototypes {
            names: vec!["B \"cells\"".into(), "T\tcells".into()],
            vectors: vec![1.0, 2.0, 3.0, -1.0, 0.5, 0.25],
            centre: vec![0.5, 0.0, -1.0],
            temperature: 0.07,
            layer: -1,
            pooling: Pooling::Mean,
        };
        stored.write(folder.path()).unwrap();
        assert_eq!(StoredPrototypes::read(folder.path(), 3).unwrap().unwrap(), stored);
        assert_eq!(StoredPrototypes::read(folder.path(), 4).unwrap_err().kind().exit_code(), 3);
        StoredPrototypes { vectors: vec![f32::NAN; 6], ..stored.clone() }.write(folder.path()).unwrap();
        assert_eq!(StoredPrototypes::read(folder.path(), 3).unwrap_err().kind().exit_code(), 3);
        std::fs::write(folder.path().join(PROTOTYPES), b"").unwrap();
        assert_eq!(StoredPrototypes::read(folder.path(), 3).unwrap_err().kind().exit_code(), 3);
    }
}
