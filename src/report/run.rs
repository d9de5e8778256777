//! A run folder as its readers see it: what it was told, what it logged, what it published. Nothing here writes, and a folder
//! that another process fills at this moment is read as far as it has come.

use super::jsonl::{self, NOT_TERMS};
use crate::error::{Code, Error, Result};
use crate::train::folder::{checkpoints, read_manifest};
use crate::whole_file;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A record of a run and its settings are pages of text.
pub(super) const MAX_BYTES: u64 = 16 << 20;

/// One run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The folder, as given.
    pub path: PathBuf,
    /// The shortest end of the path that tells it from the others.
    pub name: String,
    /// `run.json`; null where there is none.
    pub record: Value,
    /// `settings.toml`.
    pub settings: toml::Table,
    /// `split.json`; null where there is none.
    pub split: Value,
    /// `metrics.jsonl`.
    pub steps: Vec<Value>,
    /// Step, folder and manifest of the newest checkpoint.
    pub checkpoint: Option<(u64, PathBuf, Value)>,
}

impl Run {
    /// Reads the folder.
    ///
    /// # Errors
    /// Input: not a run folder, settings that are not TOML.
    pub fn read(path: &Path) -> Result<Run> {
        let log = path.join("metrics.jsonl");
        let settings = path.join("settings.toml");
        if !log.is_file() {
            let e =
                Error::new(Code::RunFolder, "not a run folder").at(path.display()).found("no metrics.jsonl");
            let e = e.wanted("a folder that pretrain, refine or finetune wrote");
            return Err(if settings.is_file() { e.next("wait until the first step is logged") } else { e });
        }
        let json = |name: &str| -> Value {
            let text = whole_file::read_text(&path.join(name), "read the record", MAX_BYTES).ok();
            text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Value::Null)
        };
        let settings = match whole_file::read_text(&settings, "read the settings", MAX_BYTES) {
            Ok(text) => toml::from_str(&text).map_err(|e| {
                Error::new(Code::NotToml, "the run's settings are not TOML")
                    .at(settings.display())
                    .found(e.message())
            })?,
            Err(_) => toml::Table::new(),
        };
        let steps: Vec<Value> = jsonl::read(&log)?.into_iter().filter(|l| l["step"].is_u64()).collect();
        let newest = checkpoints(path)?.into_iter().next();
        let checkpoint = newest.map(|(step, place)| {
            let manifest = read_manifest(&place).unwrap_or(Value::Null);
            (step, place, manifest)
        });
        Ok(Run {
            name: last_part(path),
            path: path.to_path_buf(),
            record: json("run.json"),
            settings,
            split: json("split.json"),
            steps,
            checkpoint,
        })
    }

    /// Reads several, and names them apart.
    ///
    /// # Errors
    /// As [`Run::read`].
    pub fn read_all(paths: &[PathBuf]) -> Result<Vec<Run>> {
        let mut runs = paths.iter().map(|path| Run::read(path)).collect::<Result<Vec<Run>>>()?;
        name_apart(&mut runs);
        Ok(runs)
    }

    /// `pretrain`, `refine` or `finetune`; empty where nothing says.
    pub fn stage(&self) -> &str {
        self.record["stage"].as_str().unwrap_or("")
    }

    /// The last record; null where there is none.
    pub fn last(&self) -> &Value {
        self.steps.last().unwrap_or(&Value::Null)
    }

    /// Names of the loss terms, in the order of the log.
    pub fn terms(&self) -> Vec<String> {
        let mut terms: Vec<String> = Vec::new();
        for line in self.steps.iter().take(1).chain(self.steps.last()) {
            for (name, value) in line.as_object().unwrap_or(&Map::new()) {
                let known = NOT_TERMS.contains(&name.as_str());
                if !known && !name.starts_with("val_") && !value.is_string() && !terms.contains(name) {
                    terms.push(name.clone());
                }
            }
        }
        terms
    }

    /// (step, value) of one field, where it is a number.
    pub fn series(&self, field: &str) -> Vec<(f64, f64)> {
        self.steps.iter().filter_map(|l| Some((l["step"].as_f64()?, l[field].as_f64()?))).collect()
    }

    /// Seconds of training: a record covers the steps since the one before it, so its cells over its rate are its seconds.
    pub fn seconds(&self) -> f64 {
        let of = |l: &Value| Some(l["cells"].as_f64()? / l["cells_per_s"].as_f64().filter(|r| *r > 0.0)?);
        self.steps.iter().filter_map(of).sum()
    }

    /// Sum of one field over all records.
    pub fn sum(&self, field: &str) -> f64 {
        self.steps.iter().filter_map(|line| line[field].as_f64()).sum()
    }

    /// The measures of the last evaluation on validation cells.
    pub fn evaluation(&self) -> Map<String, Value> {
        let measures = |line: &Value| -> Map<String, Value> {
            let fields = line.as_object().into_iter().flatten();
            fields.filter(|(n, _)| n.starts_with("val_")).map(|(n, v)| (n.clone(), v.clone())).collect()
        };
        self.steps.iter().rev().map(measures).find(|found| !found.is_empty()).unwrap_or_default()
    }

    /// What the run started from, where it is still there: as recorded, or beside this folder if both were moved.
    pub fn parent(&self) -> Option<PathBuf> {
        found(&self.path, self.record["checkpoint"].as_str()?)
    }

    /// The corpus that the run read, in the same way.
    pub fn corpus(&self) -> Option<PathBuf> {
        found(&self.path, self.record["corpus"].as_str()?)
    }
}

/// `recorded` where it is, else its last part beside the run folder or one above.
fn found(run: &Path, recorded: &str) -> Option<PathBuf> {
    let recorded = PathBuf::from(recorded);
    let name = recorded.file_name()?.to_os_string();
    let run = std::fs::canonicalize(run).ok()?;
    let above = run.ancestors().skip(1).take(2).map(|folder| folder.join(&name));
    std::iter::once(recorded).chain(above).find(|place| place.exists())
}

fn last_part(path: &Path) -> String {
    let absolute = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    absolute.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// Lengthens names by folders above until no two are equal.
fn name_apart(runs: &mut [Run]) {
    for parts in 2..6 {
        let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
        for (run, name) in runs.iter_mut().zip(&names) {
            if names.iter().filter(|n| *n == name).count() > 1 {
                let absolute = std::fs::canonicalize(&run.path).unwrap_or_else(|_| run.path.clone());
                let all: Vec<_> = absolute.components().collect();
                let tail: PathBuf = all[all.len().saturating_sub(parts)..].iter().collect();
                run.name = tail.display().to_string();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(root: &Path, name: &str) -> PathBuf {
        let path = root.join(name);
        std::fs::create_dir_all(&path).unwrap();
        let lines = "{\"step\":1,\"loss\":3.0,\"mlm\":3.0,\"cells\":10,\"cells_per_s\":5.0}\n{\"step\":2,\"loss\":2.0,\"mlm\":2.0,\
                     \"cells\":10,\"cells_per_s\":10.0,\"val_loss\":2.5}\n{\"step\":3,\"lo";
        std::fs::write(path.join("metrics.jsonl"), lines).unwrap();
        path
    }

    #[test]
    fn a_folder_in_the_making_is_read_as_far_as_it_has_come() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::read(&folder(dir.path(), "a")).unwrap();
        assert_eq!((run.steps.len(), run.terms(), run.seconds()), (2, vec!["mlm".to_string()], 3.0));
        assert_eq!(run.evaluation()["val_loss"], 2.5);
        assert!(run.checkpoint.is_none() && run.parent().is_none() && run.stage().is_empty());
        assert_eq!(Run::read(dir.path()).unwrap_err().kind().exit_code(), 3);
    }

    #[test]
    fn equal_names_are_told_apart_by_their_folders() {
        let dir = tempfile::tempdir().unwrap();
        let paths =
            [folder(dir.path(), "s0/refined"), folder(dir.path(), "s1/refined"), folder(dir.path(), "other")];
        let names: Vec<String> = Run::read_all(&paths).unwrap().into_iter().map(|r| r.name).collect();
        assert_eq!(names, ["s0/refined", "s1/refined", "other"]);
    }
}
