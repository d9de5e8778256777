//! A checkpoint as a folder that `transformers` and Geneformer's own scripts open.
//!
//! | file | what |
//! |---|---|
//! | `config.json`, `model.safetensors` | a `BertForMaskedLM`, every key and no other |
//! | `vocab.tsv` | our vocabulary, so that the folder is a checkpoint for this program too |
//! | `token_dictionary.pkl`, `.json` | token → id, as Geneformer's `token_dictionary_file` |
//! | `gene_median_dictionary.pkl`, `.json` | gene → non-zero median, as its `gene_median_file` |
//! | `prototypes.safetensors`, `.json` | prototypes with their names, where the checkpoint has some |
//! | `markers.gmt` | the marker sets of the prototypes, where they are given |

use super::pickle::{Number, dictionary};
use crate::disk::write_synced;
use crate::error::{Code, Error, Result};
use crate::genes::markers_file::MarkerFile;
use crate::genes::vocab::{Vocab, is_special};
use crate::model::checkpoint::{CONFIG, ModelTensors, VOCABULARY, WEIGHTS, publish, resolve};
use crate::model::tensors::write;
use crate::objective::prototype_file::{PROTOTYPES, StoredPrototypes};
use serde_json::json;
use std::path::{Path, PathBuf};

/// What [`export`] wrote.
#[derive(Debug)]
pub struct Exported {
    /// The model folder that was read.
    pub source: PathBuf,
    /// Its tensors.
    pub tensors: usize,
    /// Its parameters.
    pub parameters: usize,
    /// Tokens of its vocabulary, where it has one.
    pub tokens: Option<usize>,
    /// Names of its prototypes.
    pub prototypes: Vec<String>,
    /// Lines for people: what could not be taken along.
    pub notes: Vec<String>,
}

/// Writes the checkpoint at `path` (a run, a checkpoint or a model folder) to `out`, which must not exist.
///
/// # Errors
/// Input: no checkpoint, or a broken one; a vocabulary or marker sets that do not fit it. Usage: `out` exists.
pub fn export(path: &Path, out: &Path, markers: Option<&Path>) -> Result<Exported> {
    if out.exists() {
        return Err(Error::new(Code::OutputExists, "the output exists already")
            .at(out.display())
            .next("name another --out, or remove the folder"));
    }
    let source = resolve(path)?;
    let model = ModelTensors::open(&source)?;
    let mut notes = Vec::new();
    if model.config.value_bins > 0 {
        notes.push("the table of value bins was left out: BertForMaskedLM has no place for it".to_string());
    }
    let vocabulary = source.join(VOCABULARY);
    let vocab = vocabulary.is_file().then(|| Vocab::load(&vocabulary)).transpose()?;
    match &vocab {
        Some(vocab) if vocab.len() != model.config.vocab => {
            return Err(Error::new(
                Code::CheckpointVocabulary,
                "the vocabulary beside the checkpoint does not fit it",
            )
            .at(vocabulary.display())
            .found(format!("{} tokens", vocab.len()))
            .wanted(format!("{}, as the word table has rows", model.config.vocab)));
        }
        Some(_) => {}
        None => notes.push("the checkpoint has no vocab.tsv: no dictionaries were written".to_string()),
    }
    let prototypes = StoredPrototypes::read(&source, model.config.width)?;
    if let Some(file) = markers {
        check_markers(file, prototypes.as_ref())?;
    }
    let tensors = model.declared();
    let (count, parameters) =
        (tensors.len(), tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum());
    publish(out, |folder| {
        let mut config = model.config.to_json();
        if model.config.value_bins > 0 {
            config["cellrefine"]["value_bins"] = json!(0);
        }
        write_synced(&folder.join(CONFIG), format!("{config:#}\n").as_bytes())?;
        write(&folder.join(WEIGHTS), &[("format", "pt")], tensors, |t| {
            Ok(bytemuck::cast_slice(&model.values(t)?).to_vec())
        })?;
        if let Some(vocab) = &vocab {
            write_dictionaries(folder, vocab)?;
        }
        if let Some(prototypes) = &prototypes {
            prototypes.write(folder)?;
            let about = json!({"names": prototypes.names, "temperature": prototypes.temperature, "layer": prototypes.layer,
                "pooling": prototypes.pooling, "file": PROTOTYPES});
            write_synced(&folder.join("prototypes.json"), format!("{about:#}\n").as_bytes())?;
        }
        if let Some(file) = markers {
            let bytes = std::fs::read(file).map_err(|e| Error::io(file, "read the marker sets", &e))?;
            write_synced(&folder.join("markers.gmt"), &bytes)?;
        }
        Ok(())
    })?;
    Ok(Exported {
        source,
        tensors: count,
        parameters,
        tokens: vocab.map(|v| v.len()),
        prototypes: prototypes.map(|p| p.names).unwrap_or_default(),
        notes,
    })
}

/// Every prototype has its set.
fn check_markers(file: &Path, prototypes: Option<&StoredPrototypes>) -> Result<()> {
    let sets = MarkerFile::load(file)?.sets;
    let Some(prototypes) = prototypes else {
        return Err(Error::new(
            Code::FlagConflict,
            "--markers belongs to prototypes, and the checkpoint has none",
        )
        .at(file.display()));
    };
    // Labels meet sets by letters and digits, as everywhere.
    let plain = |name: &str| {
        name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect::<String>()
    };
    let known: Vec<String> = sets.iter().map(|s| plain(&s.name)).collect();
    let without: Vec<&str> =
        prototypes.names.iter().map(String::as_str).filter(|n| !known.contains(&plain(n))).collect();
    if without.is_empty() {
        return Ok(());
    }
    Err(Error::new(Code::MarkerLabels, "prototypes without a marker set")
        .at(file.display())
        .found(without.join(", "))
        .wanted("a set for every prototype, by name")
        .next("give the marker file of the refine run"))
}

fn write_dictionaries(folder: &Path, vocab: &Vocab) -> Result<()> {
    write_synced(&folder.join(VOCABULARY), vocab.to_tsv(&[]).as_bytes())?;
    let ids = || vocab.tokens().iter().enumerate().map(|(id, name)| (name.as_str(), id as u32));
    let medians = || {
        let genes = vocab.tokens().iter().zip(vocab.medians()).filter(|(name, _)| !is_special(name));
        genes.map(|(name, &m)| (name.as_str(), m))
    };
    let save = |name: &str, bytes: Vec<u8>| write_synced(&folder.join(name), &bytes);
    save("token_dictionary.pkl", dictionary(ids().map(|(n, id)| (n, Number::Int(id)))))?;
    save("gene_median_dictionary.pkl", dictionary(medians().map(|(n, m)| (n, Number::Float(m)))))?;
    let object = |entries: serde_json::Map<String, serde_json::Value>| {
        format!("{:#}\n", serde_json::Value::Object(entries)).into_bytes()
    };
    save("token_dictionary.json", object(ids().map(|(n, id)| (n.to_string(), json!(id))).collect()))?;
    save("gene_median_dictionary.json", object(medians().map(|(n, m)| (n.to_string(), json!(m))).collect()))
}
