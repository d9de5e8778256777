//! `bench kernels` and `bench step` from the outside: the fields that scripts read, lengths from every source, comparison with an
//! earlier report. Nothing is timed to be judged.

use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

const SMALL: [&str; 7] = ["--preset", "tiny", "--vocab", "300", "--quick", "--json", "--quiet"];

fn bench(folder: &Path, words: &[&str]) -> (i32, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cellrefine"));
    let out = command.current_dir(folder).arg("bench").args(words).args(SMALL).output().unwrap();
    let json = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!("{words:?}: {e}: {}", String::from_utf8_lossy(&out.stderr));
    });
    (out.status.code().unwrap(), json)
}

#[test]
fn kernels_have_the_promised_fields_and_are_compared_row_by_row() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = ["kernels", "--sweep", "--seq", "20", "--dtype", "bf16"];
    let (code, report) = bench(dir.path(), &[&kernels[..], &["--out", "old.json"]].concat());
    assert_eq!(code, 0);
    let rows = report["kernels"].as_array().unwrap();
    for row in rows {
        for field in ["ms_median", "gb_per_s", "tflop_per_s", "fraction_of_peak", "max_err", "bound"] {
            assert!(row[field].is_number(), "{field}: {row}");
        }
        assert!(row["name"].is_string() && row["shape"].is_string() && row["ok"] == true);
    }
    for field in ["peak_gflop_per_s", "copy_gb_per_s"] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field}");
    }
    let written: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("old.json")).unwrap()).unwrap();
    assert_eq!(written, report);

    // Twice as slow as it ever was: every row is found, and the report is written before it fails.
    let mut slow = written.clone();
    for row in slow["kernels"].as_array_mut().unwrap() {
        row["ms_median"] = json!(1e9);
    }
    std::fs::write(dir.path().join("slow.json"), slow.to_string()).unwrap();
    let compare = |old: &str| {
        bench(
            dir.path(),
            &[&kernels[..], &["--compare", old, "--fail-above", "3%", "--out", "new.json"]].concat(),
        )
    };
    let (code, report) = compare("slow.json");
    assert_eq!((code, report["compared"].as_array().unwrap().len()), (0, rows.len()));
    for row in slow["kernels"].as_array_mut().unwrap() {
        row["ms_median"] = json!(1e-9);
    }
    std::fs::write(dir.path().join("fast.json"), slow.to_string()).unwrap();
    let (code, error) = compare("fast.json");
    assert_eq!(code, 4, "{error}");
    let written: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("new.json")).unwrap()).unwrap();
    assert_eq!(written["compared"].as_array().unwrap().len(), rows.len());
}

#[test]
fn lengths_come_from_a_file_a_mixture_or_a_corpus_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("lengths.txt"), "30 7\n12").unwrap();
    let (_, report) = bench(dir.path(), &["step", "--lengths", "lengths.txt"]);
    assert_eq!((&report["lengths"], &report["sum_len2"]), (&json!([30, 7, 12]), &json!(900 + 49 + 144)));
    let mixture = ["step", "--lengths", "lognormal:40,0.5", "--tokens", "300", "--seed", "5"];
    let (_, a) = bench(dir.path(), &mixture);
    let (_, b) = bench(dir.path(), &mixture);
    let tokens = a["tokens"].as_u64().unwrap();
    assert!(a["lengths"] == b["lengths"] && (200..=300).contains(&tokens), "{tokens}");
    assert_eq!(bench(dir.path(), &["step", "--lengths", "lognormal:4"]).0, 2);
    assert_eq!(bench(dir.path(), &["kernels", "--corpus", "absent.cells"]).0, 3);
}

#[test]
fn steps_have_the_promised_fields_in_every_mode() {
    let dir = tempfile::tempdir().unwrap();
    for mode in ["fwd", "train", "refine"] {
        let (code, report) =
            bench(dir.path(), &["step", "--mode", mode, "--batch", "4", "--seq", "20", "--device", "cpu"]);
        assert_eq!(code, 0, "{report}");
        for field in ["preset", "mode", "dtype", "device"] {
            assert!(report[field].is_string(), "{mode} {field}: {report}");
        }
        for field in [
            "seq",
            "batch",
            "threads",
            "ms_median",
            "ms_min",
            "runs",
            "tokens_per_s",
            "cells_per_s",
            "gflop_per_s",
        ] {
            assert!(report[field].as_f64().unwrap() > 0.0, "{mode} {field}: {report}");
        }
        for field in ["peak_gflop_per_s", "peak_source", "fraction_of_peak"] {
            assert!(report.get(field).is_some(), "{mode} {field}: {report}");
        }
    }
}

/// The emulator computes a step, also as a graph, and gives no time for it.
#[cfg(emulator)]
#[test]
fn an_emulated_step_has_no_time() {
    let dir = tempfile::tempdir().unwrap();
    for more in [&["--mode", "train", "--graph"][..], &["--mode", "refine"], &["--mode", "fwd"]] {
        let words =
            [&["step", "--batch", "4", "--seq", "20", "--device", "emulated", "--dtype", "bf16"], more]
                .concat();
        let (code, report) = bench(dir.path(), &words);
        assert_eq!(code, 0, "{report}");
        for field in ["ms_median", "tokens_per_s", "gflop_per_s", "fraction_of_peak", "peak_gflop_per_s"] {
            assert!(report[field].is_null(), "{field}: {report}");
        }
    }
}
