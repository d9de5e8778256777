//! The examples, run as a reader runs them. `cargo test` has built them beside this binary: then building them again does nothing;
//! under `--test examples` alone it brings them up to date.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// target/PROFILE/examples/NAME, up to date.
fn built(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let folder = BUILT.get_or_init(|| {
        let profile = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_path_buf();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--quiet", "--examples"]);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "the examples do not build");
        profile.join("examples")
    });
    folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// What it prints; its temporary folder must be gone afterwards.
#[track_caller]
fn run(name: &str) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let out = Command::new(built(name)).env("TMPDIR", scratch.path()).output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{name}\n{stdout}{stderr}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "{name} left files behind");
    stdout.into_owned()
}

/// The number after `before`.
#[track_caller]
fn number(text: &str, before: &str) -> f64 {
    let rest = text.split(before).nth(1).unwrap_or_else(|| panic!("no {before:?} in\n{text}")).trim_start();
    let end = rest.find(|c: char| !(c.is_ascii_digit() || "+-.e".contains(c))).unwrap_or(rest.len());
    rest[..end]
        .trim_end_matches('.')
        .parse()
        .unwrap_or_else(|_| panic!("no number after {before:?} in\n{text}"))
}

#[test]
fn pack_and_read() {
    let text = run("pack_and_read");
    assert_eq!((number(&text, "vocabulary:"), number(&text, "packed")), (769.0, 700.0));
    assert!(text.contains("AAAGCCTGGCTAAC-1"), "{text}");
    // Every token that fits a batch is there, none besides.
    assert!(number(&text, "tokens hold") <= number(&text, "700 cells,"));
}

#[test]
fn one_op_two_backends() {
    let text = run("one_op_two_backends");
    if cfg!(emulator) {
        assert_eq!(number(&text, "cpu       y[0] ="), number(&text, "emulated  y[0] ="), "{text}");
    } else {
        assert!(text.contains("not in this build"));
    }
}

#[test]
fn training_loop() {
    let text = run("training_loop");
    let (first, last) = (number(&text, "step  1  loss"), number(&text, "step 60  loss"));
    assert!((6.3..7.0).contains(&first), "untrained over 765 genes: ln 765 = 6.64, not {first}");
    assert!(last < first - 0.25, "{text}");
}

#[test]
fn loss_term() {
    let text = run("loss_term");
    let (fell, predicted) = (number(&text, "fell by"), number(&text, "predicted"));
    assert!(fell > 0.0 && (fell / predicted - 1.0).abs() < 0.05, "{text}");
}
