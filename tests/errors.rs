//! The codes of errors: every constructor in the sources names one, `explain` knows each, and real failures print them.

use assert_cmd::Command;
use cellrefine::error::{Code, explain};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// (where, text) of every source file but the tables that define the codes.
fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, out: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("explain") {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("error/code.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    let mut out = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut out);
    out
}

/// The identifiers that stand behind `Code::` in `text`.
fn named(text: &str) -> impl Iterator<Item = &str> {
    text.split("Code::").skip(1).map(|rest| {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        &rest[..end]
    })
}

#[test]
fn every_code_is_used_and_every_error_has_one() {
    let mut uses: BTreeMap<&str, usize> = Code::ALL.iter().map(|c| (c.name(), 0)).collect();
    let sources = sources();
    assert!(sources.len() > 150, "the sources are not there: {}", sources.len());
    for (path, text) in &sources {
        named(text).for_each(|name| {
            if let Some(n) = uses.get_mut(name) {
                *n += 1;
            }
        });
        let lines: Vec<&str> = text.lines().map(|l| l.split("//").next().unwrap_or_default()).collect();
        let code = lines.join("\n");
        for rest in code.split("Error::new(").skip(1) {
            let argument = rest.trim_start().trim_start_matches("crate::error::");
            let coded = argument.starts_with("Code::") || argument.starts_with("code,");
            let foreign = argument.starts_with("ErrorKind::") || argument.starts_with("std::io::");
            assert!(coded || foreign, "{}: Error::new({argument:.60}", path.display());
        }
    }
    let unused: Vec<_> = uses.iter().filter(|(_, n)| **n == 0).collect();
    assert!(unused.is_empty(), "codes that nothing prints: {unused:?}");
}

#[test]
fn codes_read_back_and_fit_their_exit_codes() {
    for &code in Code::ALL {
        assert_eq!(Code::parse(&code.to_string()), Some(code));
        assert_eq!(Code::parse(&code.to_string().to_lowercase()), Some(code));
        let exit = match code.number() {
            1..100 => 1,
            100..200 => 2,
            200..800 => 3,
            800..900 => 4,
            900..1000 => 5,
            _ => 6,
        };
        assert_eq!(code.kind().exit_code(), exit, "{code}");
        assert!(explain::of(code).is_some(), "{code} is not explained");
    }
    assert_eq!(Code::parse("CR9999"), None);
    assert_eq!(Code::parse("seven"), None);
}

#[test]
fn the_page_of_errors_is_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errors.md");
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(page == explain::page(), "run: cellrefine explain --markdown > docs/errors.md");
}

fn run(args: &[&str], folder: &Path) -> std::process::Output {
    Command::cargo_bin("cellrefine").unwrap().args(args).current_dir(folder).output().unwrap()
}

/// Runs `args` in `folder`: fails with `code`, the same on stderr and in the object, the code's exit code, and a next step.
#[track_caller]
fn fails(folder: &Path, args: &str, code: Code) {
    let mut words: Vec<&str> = args.split(' ').collect();
    words.push("--json");
    let out = run(&words, folder);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(stderr.contains(&format!("error[{code}]: ")), "{args}: {stderr}");
    assert_eq!(out.status.code(), Some(code.kind().exit_code().into()), "{args}: {stderr}");
    let object: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(object["error"]["code"], code.to_string(), "{args}: {object}");
    assert_eq!(object["error"]["exit_code"], code.kind().exit_code(), "{args}");
    for field in ["message", "next"] {
        assert!(object["error"][field].as_str().is_some_and(|text| !text.is_empty()), "{args}: {object}");
    }
    // As clap says it, or as we do.
    assert!(stderr.contains("try '--help'") || stderr.contains("  try:    "), "{args}: {stderr}");
}

#[test]
fn real_failures_print_their_codes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
    write("v.tsv", b"gene\tid\n");
    write("empty.h5ad", b"");
    write("text.h5ad", b"cell,gene\n");
    write("bad.toml", b"a = = 1");
    write("m.gmt", b"T cell CD3E CD3D\n");
    for name in ["x.cells", "y.cells", "run", "nothing", "pickled"] {
        std::fs::create_dir(folder.join(name)).unwrap();
    }
    write("y.cells/corpus.json", b"{");
    write("pickled/config.json", b"{}");
    write("pickled/pytorch_model.bin", b"\x80\x02.");

    fails(folder, "refine --no-such-flag", Code::CommandLine);
    fails(folder, "pack", Code::CommandLine);
    fails(folder, "doctor --device abacus", Code::CommandLine);
    fails(folder, "explain CR4711", Code::CodeUnknown);
    fails(folder, "plan --preset tiny --set optimizer.lerning_rate=1", Code::SettingUnknown);
    fails(folder, "plan --preset tiny --set train.steps=many", Code::SettingValue);
    fails(folder, "plan --preset tiny --config bad.toml", Code::SettingsFile);
    fails(folder, "plan --preset tiny --config absent.toml", Code::FileMissing);
    fails(folder, "plan --preset enormous", Code::PresetUnknown);
    fails(folder, "watch run --every 0", Code::FlagValue);
    fails(folder, "watch run", Code::RunFolder);
    fails(folder, "inspect absent", Code::FileMissing);
    fails(folder, "inspect x.cells", Code::CorpusMissing);
    fails(folder, "inspect y.cells", Code::ManifestDamaged);
    fails(folder, "inspect v.tsv", Code::MarkerSets);
    fails(folder, "vocab build absent.h5ad --out w.tsv", Code::FileMissing);
    fails(folder, "vocab build empty.h5ad --out w.tsv", Code::FileEmpty);
    fails(folder, "vocab build text.h5ad --out w.tsv", Code::Hdf5Damaged);
    fails(folder, "vocab build nothing --out w.tsv", Code::InputUnknown);
    fails(folder, "pack empty.h5ad --vocab v.tsv --out z.cells", Code::VocabularyForm);
    fails(folder, "merge x.cells y.cells --out z.cells", Code::CorpusMissing);
    fails(folder, "report run --out r.html", Code::RunFolder);
    fails(folder, "merge m.gmt --out z.cells", Code::CorpusMissing);
    fails(folder, "inspect m.gmt", Code::MarkerForm);
    fails(folder, "inspect run", Code::CheckpointMissing);
    fails(folder, "inspect pickled", Code::ModelConfig);
}

#[test]
fn explain_prints_every_code() {
    let here = Path::new(".");
    let list = String::from_utf8(run(&["explain"], here).stdout).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&run(&["explain", "--json"], here).stdout).unwrap();
    assert_eq!(json["codes"].as_array().unwrap().len(), Code::ALL.len());
    for code in Code::ALL {
        assert!(list.contains(&code.to_string()), "{code}");
    }
    let one = String::from_utf8(run(&["explain", "cr0307"], here).stdout).unwrap();
    assert!(one.starts_with("CR0307: ") && one.contains("exit code 3") && one.contains("indptr"), "{one}");
    assert!(one.lines().all(|l| l.chars().count() <= 100), "{one}");
}

/// Both ways in which a fault of the program ends: a panic on a thread of the pool, and an error that is returned.
#[test]
fn a_fault_of_the_program_leaves_a_report_without_data() {
    for (extra, code, needle) in
        [("--json", "CR0002", "asked to break off"), ("--returned", "CR0001", "asked to return")]
    {
        let dir = tempfile::tempdir().unwrap();
        let out = Command::cargo_bin("cellrefine")
            .unwrap()
            .args(["break-off", extra, "--threads", "2"])
            .env("TMPDIR", dir.path())
            .env("CELLREFINE_SEED", "7")
            .env("UNRELATED_SECRET", "hunter2")
            .env_remove("RUST_BACKTRACE")
            .output()
            .unwrap();
        let stderr = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{stderr}");
        assert!(
            stderr.starts_with(&format!("error[{code}]: ")) && stderr.contains("bug in cellrefine"),
            "{stderr}"
        );
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        assert!(stderr.contains(&files[0].display().to_string()), "{stderr}");
        let report = std::fs::read_to_string(&files[0]).unwrap();
        for wanted in [needle, "break-off", env!("CARGO_PKG_VERSION"), "CELLREFINE_SEED=\"7\"", "threads: 2"]
        {
            assert!(report.contains(wanted), "{wanted} is not in:\n{report}");
        }
        assert!(!report.contains("hunter2"), "the report copies the environment");
        if code == "CR0002" {
            assert!(report.contains("stack:") && report.contains("src/cli/mod.rs"), "{report}");
            let object: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!(object["error"]["code"], code);
        }
    }
}
