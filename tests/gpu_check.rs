//! `scripts/gpu-check.sh --dry-run`: the whole flow on the emulator yields the file that a GPU's run will yield, with every name that
//! the command line's contract promises. The names stand here apart from the script's own list.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

const CHECKS: [&str; 11] = [
    "doctor",
    "oracle",
    "emulator",
    "determinism",
    "sanitizer/memcheck",
    "sanitizer/racecheck",
    "sanitizer/initcheck",
    "sanitizer/synccheck",
    "bench_kernels",
    "bench_step",
    "peers",
];
const RATIOS: [&str; 9] = [
    "attention_forward/sdpa_default",
    "attention_forward/cudnn",
    "attention_backward/sdpa_default",
    "attention_backward/cudnn",
    "padded_sdpa",
    "marker_sparse/flex",
    "prototype_loss/compile",
    "prototype_loss/eager",
    "refine/hf_geneformer",
];

fn python() -> Option<Command> {
    let there = Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        eprintln!("skipped: no python3");
    }
    there.then(|| Command::new("python3"))
}

fn script(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}

fn names(report: &Value, list: &str) -> Vec<String> {
    report[list].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap().into()).collect()
}

#[cfg(emulator)]
#[test]
fn a_dry_run_yields_every_check_and_every_ratio() {
    if python().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(script("gpu-check.sh"));
    command.args(["--dry-run", "--program", env!("CARGO_BIN_EXE_cellrefine"), "--out"]).arg(folder.path());
    let out = command.output().unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{told}");
    let file = folder.path().join("gpu-dry-run.json");
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for field in ["date", "commit", "device", "driver"] {
        assert!(report[field].as_str().is_some_and(|s| !s.is_empty()), "{field}");
    }
    for (list, wanted) in [("checks", &CHECKS[..]), ("ratios", &RATIOS[..])] {
        let found = names(&report, list);
        assert!(wanted.iter().all(|name| found.iter().any(|f| f == name)), "{list}: {found:?}");
    }
    for check in report["checks"].as_array().unwrap() {
        let needs_more =
            check["name"] == "oracle" || check["name"].as_str().unwrap().starts_with("sanitizer");
        assert!(check["ok"] == true || (needs_more && check["ok"].is_null()), "{check}");
    }
    assert!(report["kernels"].as_array().unwrap().len() > 30);
    for row in report["kernels"].as_array().unwrap() {
        // The emulator's speed means nothing: no number may look like one.
        for field in ["ms_median", "gb_per_s", "tflop_per_s", "fraction_of_peak"] {
            assert!(row.get(field).is_some_and(Value::is_null), "{field}: {row}");
        }
        assert!(row["ok"] == true && row["shape"].is_string(), "{row}");
    }
    for ratio in report["ratios"].as_array().unwrap() {
        assert!(
            ratio["ratio"].is_null() && ratio["skipped"].is_string() && ratio["unit"].is_string(),
            "{ratio}"
        );
    }
    let markdown = std::fs::read_to_string(folder.path().join("gpu-dry-run.md")).unwrap();
    assert_eq!(markdown.matches("not yet measured on a GPU").count(), 20);
}

/// A program that answers wrongly fails the checks, and the flow goes on to its end and says so.
#[test]
fn a_broken_program_is_recorded_and_does_not_stop_the_flow() {
    if python().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken");
    let answer = "#!/bin/sh\ncase $1 in doctor) echo '{\"cuda\": {\"driver\": \"CUDA 13.0\"}}';; *) echo broken >&2; exit 1;; esac\n";
    std::fs::write(&broken, answer).unwrap();
    std::process::Command::new("chmod").arg("+x").arg(&broken).status().unwrap();
    let mut command = Command::new(script("gpu-check.sh"));
    let out = command
        .args(["--dry-run", "--program"])
        .arg(&broken)
        .arg("--out")
        .arg(folder.path())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    let file = std::fs::read(folder.path().join("gpu-dry-run.json")).unwrap();
    let report: Value = serde_json::from_slice(&file).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let ok = |name: &str| checks.iter().find(|c| c["name"] == name).unwrap()["ok"].clone();
    assert_eq!(
        (ok("doctor"), ok("emulator"), ok("bench_kernels"), ok("bench_step")),
        (true.into(), false.into(), false.into(), false.into())
    );
    assert!(RATIOS.iter().all(|name| names(&report, "ratios").iter().any(|n| n == name)));
}

#[test]
fn schema_table_and_ratios_hold_what_they_promise() {
    let Some(mut python) = python() else { return };
    let out =
        python.args(["-B", "-m", "unittest", "discover", "-s"]).arg(script("gpu_check")).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// docs/results.md says what docs/results/ holds.
#[test]
fn the_results_page_is_up_to_date() {
    let Some(mut python) = python() else { return };
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/results.md");
    let out = python.arg("-B").arg(script("gpu_check/table.py")).arg("--check").arg(page).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}
