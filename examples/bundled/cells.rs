//! The bundled cells as a corpus in a temporary folder: `pack_and_read` says what happens here.

use cellrefine::cli::Progress;
use cellrefine::corpus::Corpus;
use cellrefine::error::{Error, Result};
use cellrefine::import::medians::{BuildOptions, build};
use cellrefine::import::pack::{PackOptions, pack};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folder, to be removed, and the corpus in it.
pub fn corpus(name: &str) -> Result<(PathBuf, Arc<Corpus>)> {
    let inputs = [PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/pbmc700/pbmc700.h5ad"))];
    let folder = std::env::temp_dir().join(format!("cellrefine-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, "make a folder", &e))?;
    let vocab = build(&inputs, &BuildOptions::default())?.vocab;
    let path = folder.join("x.cells");
    pack(&inputs, &vocab, &path, &PackOptions::default(), &Progress::silent())?;
    Ok((folder, Arc::new(Corpus::open(&path)?)))
}

/// Removes what [`corpus`] made.
pub fn remove(folder: &Path) -> Result<()> {
    std::fs::remove_dir_all(folder).map_err(|e| Error::io(folder, "remove the folder", &e))
}
