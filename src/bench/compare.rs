//! `--compare OLD.json --fail-above 3%`: the same cases of an earlier report, slower or faster.

use super::round4;
use crate::error::{Code, Error, Result};
use crate::whole_file;
use serde_json::{Value, json};
use std::path::Path;

/// A report is a few kilobytes.
const MAX_BYTES: u64 = 64 << 20;

/// Adds `compared` to `report`: for each case also found in `old`, the old and new milliseconds and their ratio.
///
/// # Errors
/// Input: not a report. Environment: some case takes more than `1 + fail_above` of its old time.
pub fn compare(report: &mut Value, old: &Path, fail_above: Option<f64>) -> Result<()> {
    let text = whole_file::read(old, "read the earlier report", MAX_BYTES)?;
    let wanted = "a report printed by cellrefine bench --json";
    let earlier: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::new(Code::NotJson, "not valid JSON").at(old.display()).found(e).wanted(wanted))?;
    let (before, now) = (cases(&earlier), cases(report));
    let mut rows = Vec::new();
    let mut slower = Vec::new();
    for (name, ms) in &now {
        let Some((_, old_ms)) = before.iter().find(|(n, _)| n == name) else { continue };
        let ratio = ms / old_ms;
        rows.push(json!({"case": name, "old_ms": old_ms, "ms": ms, "ratio": round4(ratio)}));
        if fail_above.is_some_and(|limit| ratio > 1.0 + limit) {
            slower.push(format!("{name}: {ms} ms, was {old_ms} ms"));
        }
    }
    if rows.is_empty() {
        return Err(Error::new(Code::BenchReport, "the earlier report holds none of these cases")
            .at(old.display())
            .found(before.iter().map(|(n, _)| n.as_str()).take(4).collect::<Vec<_>>().join("; "))
            .wanted(now.iter().map(|(n, _)| n.as_str()).take(4).collect::<Vec<_>>().join("; ")));
    }
    report["compared"] = Value::Array(rows);
    if slower.is_empty() {
        return Ok(());
    }
    Err(Error::new(Code::SlowerThanBefore, "slower than the earlier report")
        .at(old.display())
        .found(slower.join("; "))
        .wanted(format!("at most {:.1} % more time", 100.0 * fail_above.unwrap_or(0.0)))
        .next("run both again, interleaved, on a quiet machine"))
}

/// (name, milliseconds) of each case of a report: its `steps`, `kernels` and `loader` where it has them, else the report itself.
fn cases(report: &Value) -> Vec<(String, f64)> {
    const STEP: [&str; 8] = ["bench", "preset", "seq", "batch", "mode", "head", "dtype", "threads"];
    let named = |case: &Value, fields: &[&str]| {
        let name: Vec<String> = fields
            .iter()
            .map(|f| case[*f].as_str().map_or_else(|| case[*f].to_string(), str::to_string))
            .collect();
        case["ms_median"].as_f64().filter(|ms| *ms > 0.0).map(|ms| (name.join(" "), ms))
    };
    let list = |name: &str| report[name].as_array().map_or(&[][..], Vec::as_slice);
    let steps = list("steps").iter().filter_map(|s| named(s, &STEP));
    let kernels = list("kernels").iter().filter_map(|k| named(k, &["name", "shape", "dtype"]));
    let mut all: Vec<(String, f64)> = steps.chain(kernels).collect();
    // A loader is told by its rate: milliseconds for a million cells.
    let loader = if report["loader"].is_object() { &report["loader"] } else { report };
    if let (Some(order), Some(rate)) = (loader["order"].as_str(), loader["cells_per_s"].as_f64()) {
        all.push((format!("loader {order} {} threads, a million cells", loader["threads"]), 1e9 / rate));
    }
    all.extend(named(&report["pack"], &["bench", "file", "threads"]));
    match all.is_empty() {
        true => named(report, &STEP).into_iter().collect(),
        false => all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slower_case_fails_and_a_foreign_report_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old.json");
        let report = |ms: f64, seq: u32| {
            json!({"bench": "step", "preset": "tiny", "seq": seq, "batch": 8, "mode": "fwd", "head": "none",
                "dtype": "f32", "threads": 2, "ms_median": ms})
        };
        std::fs::write(&path, report(100.0, 512).to_string()).unwrap();
        let mut now = report(104.0, 512);
        compare(&mut now, &path, Some(0.05)).unwrap();
        assert_eq!(now["compared"][0]["ratio"], 1.04);
        let e = compare(&mut now, &path, Some(0.03)).unwrap_err();
        assert!(e.kind().exit_code() == 4 && e.to_string().contains("was 100 ms"));
        assert_eq!(compare(&mut report(1.0, 256), &path, None).unwrap_err().kind().exit_code(), 3);
        std::fs::write(&path, "nonsense").unwrap();
        assert_eq!(compare(&mut now, &path, None).unwrap_err().kind().exit_code(), 3);
    }
}
