//! `bench cpu`: every row of the table is there, is a number, and is found again by `--compare`. Nothing is timed to be judged.

use cellrefine::bench::compare::compare;
use cellrefine::bench::table::{self, TableCase};
use cellrefine::model::Preset;

#[test]
fn every_row_of_the_table_is_there_and_can_be_compared() {
    let preset = Preset { vocab: 300, ..Preset::named("tiny").unwrap() };
    let case = TableCase { seqs: vec![8, 33], loader_cells: 300, ..TableCase::quick(preset, 1) };
    let mut heard = Vec::new();
    let mut report = table::run(&case, |what| heard.push(what.to_string())).unwrap();
    assert!(heard.len() == 7 && heard.contains(&"loader".to_string()), "{heard:?}");
    let steps = report["steps"].as_array().unwrap();
    let rows: Vec<(u64, &str, &str)> = steps
        .iter()
        .map(|s| (s["seq"].as_u64().unwrap(), s["mode"].as_str().unwrap(), s["dtype"].as_str().unwrap()))
        .collect();
    let modes = [("fwd", "f32"), ("fwd", "bf16"), ("train", "f32"), ("train", "bf16")];
    let want: Vec<_> =
        [8, 33].iter().flat_map(|seq| modes.iter().map(|(mode, dtype)| (*seq, *mode, *dtype))).collect();
    assert_eq!(rows, want);
    for s in steps {
        for field in ["ms_median", "ms_min", "tokens_per_s", "peak_gflop_per_s", "fraction_of_peak"] {
            assert!(s[field].as_f64().unwrap() > 0.0, "{field}");
        }
    }
    assert!(report["loader"]["cells_per_s"].as_f64().unwrap() > 0.0 && report["pack"].is_null());
    for field in ["device", "date", "version"] {
        assert!(report[field].is_string(), "{field}");
    }
    assert!(report["peak_f32"]["gflop_per_s"].as_f64().unwrap() > 0.0);
    assert!(report["copy_gb_per_s"].as_f64().unwrap() > 0.0 && report["threads"].as_u64().unwrap() > 0);
    let kernels = report["kernels"].as_array().unwrap();
    let attention = kernels.iter().filter(|k| k["name"] == "gene_attention_forward");
    let types: Vec<&str> = attention.map(|k| k["dtype"].as_str().unwrap()).collect();
    assert_eq!(types, ["f32", "bf16"]);
    let (cases, text) = (steps.len() + kernels.len() + 1, table::to_markdown(&report));
    assert_eq!(text.lines().filter(|l| l.starts_with("| ")).count(), steps.len() + kernels.len() + 2);
    // Against itself: every row is found again and none is slower.
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old.json");
    std::fs::write(&old, report.to_string()).unwrap();
    compare(&mut report, &old, Some(1e-6)).unwrap();
    assert_eq!(report["compared"].as_array().unwrap().len(), cases);
}
