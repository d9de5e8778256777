//! `metrics.prom`: the last record in Prometheus' text format, for node_exporter's textfile collector.
//!
//! ```sh
//! ln -s "$PWD/runs/refined/metrics.prom" /var/lib/node_exporter/textfile_collector/refined.prom
//! ```
//! The file is replaced by rename, so a scrape never meets half of it; no samples carry a timestamp, which the collector refuses.

use crate::disk;
use crate::error::Result;
use crate::whole_file;
use serde_json::Value;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Name of the file in a run folder.
pub const FILE: &str = "metrics.prom";

/// (field of the record, metric, help), in base units.
const GAUGES: [(&str, &str, &str); 12] = [
    ("step", "cellrefine_step", "Steps made."),
    ("steps", "cellrefine_steps_planned", "Steps of the whole run."),
    ("epoch", "cellrefine_epochs", "Passes over the training cells that are finished."),
    ("loss", "cellrefine_loss", "Loss of the last logged step."),
    ("learning_rate", "cellrefine_learning_rate", "Learning rate of the encoder."),
    ("grad_norm", "cellrefine_gradient_norm", "Norm of the gradient before clipping."),
    ("cells_per_s", "cellrefine_cells_per_second", "Training cells per second since the record before."),
    ("tokens_per_s", "cellrefine_tokens_per_second", "Real tokens per second since the record before."),
    ("fraction_of_peak", "cellrefine_peak_ratio", "Share of the arithmetic peak measured at the start."),
    ("bad_steps", "cellrefine_skipped_steps", "Steps skipped for a NaN or an infinity in the gradient."),
    ("host_memory_bytes", "cellrefine_resident_memory_bytes", "Resident memory of the process."),
    ("time", "cellrefine_last_record_timestamp_seconds", "Unix time of the last record."),
];

/// Where a run's metrics go.
#[derive(Debug)]
pub struct PromFile {
    path: PathBuf,
    labels: String,
}

impl PromFile {
    /// For the run in `folder`; nothing is written yet.
    pub fn new(folder: &Path) -> PromFile {
        let absolute = std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_path_buf());
        let text = whole_file::read_text(&folder.join("run.json"), "read the record", super::run::MAX_BYTES);
        let text = text.unwrap_or_default();
        let record: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        let stage = record["stage"].as_str().unwrap_or_default();
        let labels =
            format!("run=\"{}\",stage=\"{}\"", escaped(&absolute.display().to_string()), escaped(stage));
        PromFile { path: folder.join(FILE), labels }
    }

    /// Replaces the file by `record`, a line of metrics.jsonl.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, record: &Value, terms: &[(&str, f64)]) -> Result<()> {
        disk::replace_unsynced(&self.path, self.text(record, terms).as_bytes())
    }

    fn text(&self, record: &Value, terms: &[(&str, f64)]) -> String {
        let mut out = String::new();
        let mut family = |metric: &str, help: &str, samples: &[(String, f64)]| {
            if samples.is_empty() {
                return;
            }
            let _ = write!(out, "# HELP {metric} {help}\n# TYPE {metric} gauge\n");
            for (labels, value) in samples {
                let _ = writeln!(out, "{metric}{{{}{labels}}} {}", self.labels, sample(*value));
            }
        };
        let version = format!(",version=\"{}\"", env!("CARGO_PKG_VERSION"));
        family("cellrefine_run_info", "A run that is logged here.", &[(version, 1.0)]);
        for (field, metric, help) in GAUGES {
            // A loss that is not finite is null in the record, and NaN here: an alarm wants to see it.
            let value = match &record[field] {
                Value::Null if field == "loss" || field == "grad_norm" => Some(f64::NAN),
                value => value.as_f64(),
            };
            let samples: Vec<(String, f64)> = value.into_iter().map(|v| (String::new(), v)).collect();
            family(metric, help, &samples);
        }
        let by_term: Vec<(String, f64)> =
            terms.iter().map(|(n, v)| (format!(",term=\"{}\"", escaped(n)), *v)).collect();
        family("cellrefine_loss_term", "Terms of the loss of the last logged step.", &by_term);
        let fields = record.as_object().into_iter().flatten();
        let validation: Vec<(String, f64)> = fields
            .filter_map(|(n, v)| {
                Some((format!(",measure=\"{}\"", escaped(n.strip_prefix("val_")?)), v.as_f64()?))
            })
            .collect();
        family("cellrefine_validation", "Measures of an evaluation at the last logged step.", &validation);
        out
    }
}

fn sample(value: f64) -> String {
    match value {
        v if v.is_nan() => "NaN".into(),
        v if v.is_infinite() => if v > 0.0 { "+Inf" } else { "-Inf" }.into(),
        v => v.to_string(),
    }
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_format_is_prometheus_own() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a \"b\"\\c");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("run.json"), "{\"stage\":\"refine\"}").unwrap();
        let record =
            json!({"step": 30, "steps": 120, "loss": null, "cells_per_s": 12.5, "val_macro_f1": 0.5});
        PromFile::new(&folder).write(&record, &[("proto", 1.5), ("mlm", f64::INFINITY)]).unwrap();
        let text = std::fs::read_to_string(folder.join(FILE)).unwrap();
        let labels = format!(
            "run=\"{}\",stage=\"refine\"",
            escaped(&std::fs::canonicalize(&folder).unwrap().display().to_string())
        );
        for line in [
            "# TYPE cellrefine_step gauge".to_string(),
            format!("cellrefine_step{{{labels}}} 30"),
            format!("cellrefine_loss{{{labels}}} NaN"),
            format!("cellrefine_loss_term{{{labels},term=\"mlm\"}} +Inf"),
            format!("cellrefine_validation{{{labels},measure=\"macro_f1\"}} 0.5"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line:?} in\n{text}");
        }
        assert!(
            !text.contains("epochs")
                && text.ends_with('\n')
                && std::fs::read_dir(&folder).unwrap().count() == 2
        );
        // Each family once, its HELP before its TYPE before its samples.
        let helps: Vec<&str> = text.lines().filter(|l| l.starts_with("# HELP")).collect();
        let mut unique = helps.clone();
        unique.dedup();
        assert_eq!(helps, unique);
    }
}
