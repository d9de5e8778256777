//! Which cell of the corpus each row of an `.h5ad` file is: by name, never by position.
//!
//! The corpus names cells as `obs` does. Where inputs packed together shared names, the corpus put the file's stem in front
//! (`pbmc8k:AAACCTG-1`); both forms are looked up. Memory is 16 bytes a cell of the corpus and 4 a row: names are compared in
//! place, in the corpus's memory map and in windows of the file.

use crate::corpus::Corpus;
use crate::error::{Code, Error, Result};
use crate::import::frame::Frame;
use crate::import::hdf5::{Attribute, H5Source, Node};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// A row that is no cell of the corpus.
pub const ABSENT: u32 = u32::MAX;

/// Names of all cells of a corpus, to be looked up.
struct CellNames<'a> {
    corpus: &'a Corpus,
    sorted: Vec<(u64, u32)>, // (hash of the name, cell)
}

fn hash(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

impl<'a> CellNames<'a> {
    fn of(corpus: &'a Corpus) -> Result<Self> {
        let mut sorted = (0..corpus.cells())
            .map(|cell| Ok((hash(corpus.cell_id(cell)?), cell as u32)))
            .collect::<Result<Vec<_>>>()?;
        sorted.sort_unstable();
        Ok(CellNames { corpus, sorted })
    }

    /// The cell called `name`, if there is one.
    ///
    /// # Errors
    /// Input: several cells are called so (a merge of corpora that share names).
    fn find(&self, name: &str) -> Result<Option<u32>> {
        let wanted = hash(name);
        let from = self.sorted.partition_point(|(h, _)| *h < wanted);
        let mut found = None;
        for &(_, cell) in self.sorted[from..].iter().take_while(|(h, _)| *h == wanted) {
            if self.corpus.cell_id(cell as usize)? != name {
                continue;
            }
            if found.is_some() {
                return Err(Error::new(Code::CellsUnmatched, "several cells of the corpus have the name of one cell of the file")
                    .at(self.corpus.path().display())
                    .found(format!("{name:?}"))
                    .wanted("names that tell cells apart")
                    .next("pack the files in one call (it makes names unique), or embed the corpus of this file alone"));
            }
            found = Some(cell);
        }
        Ok(found)
    }
}

/// Opens `obs` of a file, whatever its matrix holds.
pub(super) fn open_obs(source: &Arc<dyn H5Source>) -> Result<Frame> {
    let old = || {
        Error::new(Code::H5adNotExtended, "obs is stored in a way that columns cannot be added to")
            .at(format!("{}:obs", source.name()))
            .wanted("a group with an index, as anndata 0.8 and later write it")
            .next("write it again: anndata.read_h5ad(FILE).write_h5ad(NEW)")
    };
    if source.node("obs")? != Some(Node::Group) {
        return Err(old());
    }
    let Some(Attribute::Text(index)) = source.attribute("obs", "_index")? else { return Err(old()) };
    let names = format!("obs/{index}");
    let names = match source.node(&names)? {
        Some(Node::Array) => names,
        Some(Node::Group) => ["values", "codes"]
            .iter()
            .map(|part| format!("{names}/{part}"))
            .find(|path| matches!(source.node(path), Ok(Some(Node::Array))))
            .ok_or_else(old)?,
        None => return Err(old()),
    };
    let rows = source.array(&names)?.shape().first().copied().unwrap_or(0);
    Frame::open(source, "obs", rows)
}

/// The corpus cell of each row of `obs`, [`ABSENT`] for a row that the corpus lacks. `stem` is the file's name without suffix.
///
/// # Errors
/// Input: not one row is in the corpus, two rows are one cell, or a name means several cells.
pub(super) fn match_cells(corpus: &Corpus, obs: &Frame, stem: &str) -> Result<Vec<u32>> {
    let names = CellNames::of(corpus)?;
    let mut cells = Vec::new();
    let mut taken = vec![false; corpus.cells()];
    for (start, rows) in obs.windows() {
        for name in obs.read_texts(obs.index(), start, rows)? {
            let cell = match names.find(&name)? {
                Some(cell) => Some(cell),
                None => names.find(&format!("{stem}:{name}"))?,
            };
            if let Some(cell) = cell
                && std::mem::replace(&mut taken[cell as usize], true)
            {
                return Err(Error::new(
                    Code::CellsUnmatched,
                    "two rows of the file have the same name, which is that of one cell",
                )
                .at(obs.place())
                .found(format!("{name:?}"))
                .wanted("unique obs_names: cells are matched by them")
                .next("adata.obs_names_make_unique(), write the file, and pack that one"));
            }
            cells.push(cell.unwrap_or(ABSENT));
        }
    }
    if cells.iter().all(|c| *c == ABSENT) && !cells.is_empty() {
        let first = obs.read_texts(obs.index(), 0, 1)?.remove(0);
        let ours = if corpus.cells() > 0 { corpus.cell_id(0)? } else { "no cell" };
        return Err(Error::new(Code::CellsUnmatched, "no cell of the file is in the corpus")
            .at(obs.place())
            .found(format!(
                "{} rows, the first called {first:?}; the corpus starts with {ours:?}",
                cells.len()
            ))
            .wanted(format!("names of {}", corpus.path().display()))
            .next("--h5ad SOURCE.h5ad: the file that this corpus was packed from"));
    }
    Ok(cells)
}
