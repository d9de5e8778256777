//! What an input is, told by what it holds, never by its name alone.
//!
//! | input | told by |
//! |---|---|
//! | `.h5ad` | HDF5 with `X`, `raw`, `layers` or `obs` |
//! | 10x HDF5 | HDF5 with `matrix/barcodes` (version 3) or a group with `barcodes` and `genes` (version 2) |
//! | 10x MTX | a folder with one `…matrix.mtx[.gz]`, or that file itself |
//! | Geneformer `.dataset` | a folder with `state.json` or `dataset_info.json` |

use super::frame::Frame;
use super::h5ad::H5ad;
use super::hdf5::{H5Source, PureFile};
use super::hf_dataset::{self, HfDataset};
use super::matrix::{Pass, RowBlock};
use super::mtx::{self, Mtx};
use super::tenx::{self, TenxH5};
use crate::digest::{hex, sha256_of_file};
use crate::error::{Code, Error, Result};
use crate::genes::mapping::NameColumn;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A source of cells with counts.
pub trait CellSource: Send {
    /// Cells.
    fn cells(&self) -> u64;
    /// Stored counts.
    fn entries(&self) -> u64;
    /// Which slot the counts come from, and how they are stored.
    fn describe(&self) -> String;
    /// `file:slot` of the gene names, for messages.
    fn gene_place(&self) -> &str;
    /// Columns that may hold gene names, the index first.
    fn gene_names(&self) -> Result<Vec<NameColumn>>;
    /// Cell names and annotations.
    fn obs(&self) -> &Frame;
    /// All cells in order.
    fn for_each_block(&self, pass: &Pass<'_>, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()>;
}

/// How inputs are opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions<'a> {
    /// `X`, `raw` or `layers/NAME`; absent = `X`. For `.h5ad` alone.
    pub counts: Option<&'a str>,
    /// The genome to take from a 10x file that holds several.
    pub genome: Option<&'a str>,
    /// Take values that are no integers.
    pub allow_non_integer: bool,
}

/// An opened input.
pub enum Source {
    /// Cells with counts, to be ranked.
    Counts(Box<dyn CellSource>),
    /// Cells that were ranked before.
    Tokens(Box<HfDataset>),
}

impl Source {
    /// Opens an input of any kind.
    ///
    /// # Errors
    /// Input: nothing of the kinds above, or one that is broken. Usage: an option that its kind does not have.
    pub fn open(path: &Path, options: &OpenOptions<'_>) -> Result<Source> {
        let no_slots = || match options.counts {
            Some(slot) => Err(Error::new(
                Code::FlagConflict,
                "--counts chooses a slot of an .h5ad file, and this is none",
            )
            .at(path.display())
            .found(format!("--counts {slot}"))),
            None => Ok(()),
        };
        if hf_dataset::is_dataset(path) {
            no_slots()?;
            return HfDataset::open(path).map(|d| Source::Tokens(Box::new(d)));
        }
        if mtx::is_mtx(path) {
            no_slots()?;
            return Ok(Source::Counts(Box::new(Mtx::open(path, options)?)));
        }
        if path.is_dir() {
            return Err(unknown_folder(path));
        }
        let file: Arc<dyn H5Source> = Arc::new(PureFile::open(path)?);
        if let Some(layout) = tenx::layout(file.as_ref(), options.genome)? {
            no_slots()?;
            return Ok(Source::Counts(Box::new(TenxH5::open(file, layout, options)?)));
        }
        if let Some(genome) = options.genome {
            return Err(Error::new(
                Code::FlagConflict,
                "--genome chooses a genome of a 10x file, and this is none",
            )
            .at(path.display())
            .found(format!("--genome {genome}")));
        }
        Ok(Source::Counts(Box::new(H5ad::from_source(file, options.counts, options.allow_non_integer)?)))
    }

    /// Cells.
    pub fn cells(&self) -> u64 {
        match self {
            Source::Counts(s) => s.cells(),
            Source::Tokens(s) => s.cells(),
        }
    }
    /// Cell names and annotations.
    pub fn obs(&self) -> &Frame {
        match self {
            Source::Counts(s) => s.obs(),
            Source::Tokens(s) => s.obs(),
        }
    }
    /// What the cells come from, for notes.
    pub fn describe(&self) -> String {
        match self {
            Source::Counts(s) => s.describe(),
            Source::Tokens(s) => s.describe(),
        }
    }
}

fn unknown_folder(path: &Path) -> Error {
    let names = std::fs::read_dir(path).map(|entries| {
        let mut names: Vec<String> =
            entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).take(12).collect();
        names.sort();
        names.join(", ")
    });
    let has = |name: &str| path.join(name).exists();
    let next = if has("corpus.json") {
        "this is a corpus already: name it as --corpus, or join corpora with cellrefine merge"
    } else if has("dataset_dict.json") {
        "this folder holds several splits: name one of them, such as FOLDER/train"
    } else if has(".zgroup") || has("zarr.json") {
        "zarr stores: convert to .h5ad with anndata.read_zarr(F).write_h5ad(F2)"
    } else {
        "check the path"
    };
    Error::new(Code::InputUnknown, "this folder is no input that can be packed")
        .at(path.display())
        .found(names.unwrap_or_default())
        .wanted("a 10x folder (matrix.mtx[.gz], barcodes.tsv[.gz], features.tsv[.gz]) or a Hugging Face data set (state.json)")
        .next(next)
}

/// The name of an input without its extension, for prefixes of cell names.
pub(super) fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

/// sha256 of an input, hexadecimal: of the file, or of the names and digests of the files that make up a folder.
pub(super) fn digest(path: &Path) -> Result<String> {
    let files: Vec<PathBuf> = if hf_dataset::is_dataset(path) {
        hf_dataset::files(path)?
    } else if mtx::is_mtx(path) {
        mtx::files(path)?
    } else {
        return sha256_of_file(path);
    };
    let mut hash = Sha256::new();
    for file in files {
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        hash.update(format!("{name} {}\n", sha256_of_file(&file)?));
    }
    Ok(hex(&hash.finalize()))
}
