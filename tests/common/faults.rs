//! What the tests of faults share: how much to try, and the record that the table of docs/reliability.md is made of.
//!
//! A test tries its short selection in `cargo test` and all of it where `scripts/faults.sh` sets `FAULTS=all`. Each says in the
//! file named by `FAULTS_REPORT` how many cases it tried of which fault and how many of them were lost: it is a line of JSON,
//! and it is written before the assertion, so that a table shows a promise that was broken.

use std::io::Write;

/// `all` of the cases under `scripts/faults.sh`, `few` in `cargo test`.
pub fn cases(few: usize, all: usize) -> usize {
    if std::env::var("FAULTS").is_ok_and(|v| v == "all") { all } else { few }
}

/// Records `tried` cases of `fault` (F1 to F25 of docs/reliability.md), `lost` of which broke the promise, and what they were.
/// Panics where one did.
pub fn report(fault: &str, what: &str, tried: usize, lost: &[String]) {
    if let Some(path) = std::env::var_os("FAULTS_REPORT") {
        let line = serde_json::json!({"fault": fault, "what": what, "cases": tried, "lost": lost.len()});
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
    assert!(tried > 0, "{fault}: nothing was tried");
    assert!(lost.is_empty(), "{fault}: {} of {tried} cases lost:\n{}", lost.len(), lost.join("\n"));
}
