//! `metrics.jsonl`: one JSON object per line, appended and flushed, so that `tail -f` follows a run.
//!
//! A run that resumes from step N drops the lines after step N first: they belong to steps that will be made again.
//! A torn last line (the machine went down in the middle of a write) is dropped with them.

use crate::disk::{self, Output};
use crate::error::{Error, Result};
use crate::whole_file;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Two million records.
pub(super) const MAX_BYTES: u64 = 1 << 30;
/// Fields of a record that are no term of the loss; measures on validation cells begin with `val_`.
pub const NOT_TERMS: [&str; 18] = [
    "step",
    "steps",
    "time",
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "cells",
    "tokens",
    "dt_ms",
    "cells_per_s",
    "tokens_per_s",
    "gflop_per_s",
    "peak_gflop_per_s",
    "bad_steps",
    "spikes",
    "host_memory_bytes",
    "fraction_of_peak",
];

/// An open `metrics.jsonl`.
#[derive(Debug)]
pub struct JsonLines {
    file: Output,
    path: PathBuf,
}

impl JsonLines {
    /// Opens `path` to append. Lines with `"step"` above `last_step`, and lines that are not JSON, are dropped first.
    pub fn open(path: &Path, last_step: u64) -> Result<JsonLines> {
        if path.exists() {
            let kept: String = read(path)?
                .into_iter()
                .filter(|line| line["step"].as_u64().is_none_or(|step| step <= last_step))
                .map(|line| format!("{line}\n"))
                .collect();
            disk::replace(path, kept.as_bytes())?;
        }
        let file = Output::append(path).map_err(|e| Error::io(path, "open the run record", &e))?;
        Ok(JsonLines { file, path: path.to_path_buf() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one object.
    pub fn write(&mut self, object: &Value) -> Result<()> {
        let mut line = object.to_string();
        line.push('\n');
        self.file.append_whole(line.as_bytes()).map_err(|e| Error::io(&self.path, "write the run record", &e))
    }
}

/// The objects of `path`; lines that are not JSON are left out.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let text = whole_file::read_text(path, "read the run record", MAX_BYTES)?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reopening_drops_later_steps_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = JsonLines::open(&path, 0).unwrap();
        for step in 1..=5 {
            log.write(&json!({"step": step, "loss": 1.5})).unwrap();
        }
        drop(log);
        let mut torn = std::fs::read_to_string(&path).unwrap();
        torn.push_str("{\"step\": 3, \"lo");
        std::fs::write(&path, torn).unwrap();
        let mut log = JsonLines::open(&path, 3).unwrap();
        log.write(&json!({"step": 4, "loss": 0.5})).unwrap();
        let steps: Vec<u64> = read(&path).unwrap().iter().map(|l| l["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 4);
    }
}
