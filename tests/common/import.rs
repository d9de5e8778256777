//! Fixtures of the import tests: files that anndata and numpy wrote.

#![allow(dead_code)] // not every test file uses all of it

use cellrefine::cli::Progress;
use cellrefine::error::{Error, Kind};
use cellrefine::genes::vocab::Vocab;
use cellrefine::import::pack::{PackOptions, PackReport, pack};
use std::io::Read;
use std::path::{Path, PathBuf};

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/import").join(name)
}

/// Unpacks a fixture into `dir`.
pub fn fixture(dir: &Path, name: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let packed = std::fs::File::open(golden(&format!("{name}.h5ad.gz"))).unwrap();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    let path = dir.join(format!("{name}.h5ad"));
    std::fs::write(&path, bytes).unwrap();
    path
}

pub fn expected() -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(golden("expected.json")).unwrap()).unwrap()
}

pub fn vocab() -> Vocab {
    Vocab::load(golden("V.tsv")).unwrap()
}

pub fn run(inputs: &[PathBuf], out: &Path, options: &PackOptions<'_>) -> Result<PackReport, Error> {
    pack(inputs, &vocab(), out, options, &Progress::silent())
}

pub fn program() -> assert_cmd::Command {
    assert_cmd::Command::cargo_bin("cellrefine").unwrap()
}

/// Packs a broken file; the error must be bad input, name all needles, and leave nothing behind.
pub fn refuse(path: &Path, options: &PackOptions<'_>, needles: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.cells");
    let e = match run(&[path.to_path_buf()], &out, options) {
        Ok(_) => panic!("{} was accepted; wanted {needles:?}", path.display()),
        Err(e) => e,
    };
    assert_eq!(e.kind(), Kind::Input, "{e}");
    for needle in needles {
        assert!(e.to_string().contains(needle), "{needle:?} not in: {e}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "left behind after: {e}");
}

/// Entries of a matrix with enough cells for several blocks, buckets and shards.
pub fn many() -> (usize, usize, Vec<(usize, usize, f32)>) {
    let (rows, columns) = (1500, 90);
    let mut state = 12345u64;
    let mut next = |n: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    let mut entries = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            if next(4) == 0 && row % 97 != 0 {
                entries.push((row, column, 1.0 + next(9) as f32));
            }
        }
    }
    (rows, columns, entries)
}

pub fn wide_vocab(genes: usize) -> Vocab {
    let token = ["<pad>", "<mask>"]
        .map(str::to_string)
        .into_iter()
        .chain((0..genes).map(|g| format!("ENSG{g:011}")))
        .collect();
    let median = (0..genes + 2).map(|g| if g < 2 { 0.0 } else { 0.5 + (g % 7) as f64 }).collect();
    Vocab::from_parts(token, median, Vec::new()).unwrap()
}
