//! Fixtures of the formats of 10x Genomics and Hugging Face, from tests/golden/formats.

#![allow(dead_code)] // not every test file uses all of it

use std::io::Read;
use std::path::{Path, PathBuf};

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/formats").join(name)
}

/// Unpacks an HDF5 fixture into `dir`.
pub fn h5(dir: &Path, name: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let packed = std::fs::File::open(golden(&format!("{name}.h5.gz"))).unwrap();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    let path = dir.join(format!("{name}.h5"));
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Copies a folder of fixtures into `dir`.
pub fn folder(dir: &Path, name: &str) -> PathBuf {
    let target = dir.join(name);
    let _ = std::fs::remove_dir_all(&target);
    std::fs::create_dir(&target).unwrap();
    for entry in std::fs::read_dir(golden(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
    target
}
