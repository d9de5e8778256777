//! The user's guide runs: every `sh` block of docs/guide.md, in order, in one folder, stopping at the first command that fails.

use std::path::Path;
use std::process::Command;

/// The lines between "```sh" and "```".
fn blocks(text: &str) -> Vec<String> {
    let (mut blocks, mut open): (Vec<String>, bool) = (Vec::new(), false);
    for line in text.lines() {
        match (line, open) {
            ("```sh", false) => {
                blocks.push(String::new());
                open = true;
            }
            ("```", true) => open = false,
            (line, true) => blocks.last_mut().unwrap().extend([line, "\n"]),
            _ => {}
        }
    }
    blocks
}

#[test]
fn every_command_of_the_guide_runs_as_written() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/guide.md")).unwrap();
    let blocks = blocks(&text);
    assert!(blocks.len() >= 8, "{} blocks", blocks.len());
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(root.join("data"), dir.path().join("data")).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_cellrefine")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    for block in blocks {
        let out = Command::new("sh")
            .args(["-e", "-c", &block])
            .current_dir(&dir)
            .env("PATH", &path)
            .env("CELLREFINE_DEVICE", "cpu")
            .output()
            .unwrap();
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(out.status.success(), "{block}\n{}\n{}", said(&out.stdout), said(&out.stderr));
    }
    for file in
        ["report.html", "embedded.h5ad", "labels.tsv", "deletions.tsv", "refined-hf/model.safetensors"]
    {
        assert!(dir.path().join(file).is_file(), "{file}");
    }
}
