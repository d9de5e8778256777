//! An `.h5ad` file as a source of cells: which slot holds raw counts, the genes that belong to it, cell names and annotations.
//!
//! Slots: `X` with `var`, `raw/X` with `raw/var` (other genes than `var`), `layers/NAME` with `var`. Without `--counts` it is `X`,
//! whatever the file's size; if `X` holds no counts the file is refused, and the message names the slot that does.

use super::frame::{Column, Frame};
use super::hdf5::{H5Source, Node};
use super::matrix::{Matrix, Pass, RowBlock};
use super::source::CellSource;
use crate::error::{Code, Error, Result, nearest};
use crate::genes::mapping::NameColumn;
use std::sync::Arc;

/// An opened `.h5ad` file.
pub struct H5ad {
    counts: Matrix,
    obs: Frame,
    var: Frame,
    source: Arc<dyn H5Source>,
}

impl H5ad {
    /// Opens a file. `counts` is `X`, `raw` or `layers/NAME`, absent = `X`.
    ///
    /// # Errors
    /// Input: not such a file; the slot is absent or, judged by a sample, holds no raw counts (unless `allow_non_integer`); frames
    /// that do not fit the matrix.
    pub(super) fn from_source(
        source: Arc<dyn H5Source>,
        counts: Option<&str>,
        allow_non_integer: bool,
    ) -> Result<H5ad> {
        let slot = match counts {
            None | Some("X") => "X".to_string(),
            Some("raw" | "raw/X" | "raw.X") => "raw/X".to_string(),
            Some(layer) => match layer.strip_prefix("layers/") {
                Some(name) if !name.is_empty() && !name.contains("..") => layer.to_string(),
                _ => {
                    return Err(Error::new(Code::FlagValue, "--counts takes X, raw or layers/NAME")
                        .found(format!("{layer:?}")));
                }
            },
        };
        let matrix = match Matrix::open(source.as_ref(), &slot)? {
            Some(m) => m,
            None => {
                let all = slots(source.as_ref())?;
                if all.is_empty() {
                    let members = source.children("/")?;
                    return Err(Error::new(
                        Code::MatrixMissing,
                        "the file holds no matrix where AnnData puts one",
                    )
                    .at(source.name())
                    .found(format!("members {}", members.join(", ")))
                    .wanted("X, raw/X or layers/NAME of an .h5ad file, or the groups of a 10x .h5 file")
                    .next("check the file (links are not followed)"));
                }
                let hint = nearest(&slot, all.iter().map(String::as_str))
                    .map_or(String::new(), |n| format!("; did you mean {n}?"));
                return Err(Error::new(Code::MatrixMissing, format!("there is no {slot}"))
                    .at(source.name())
                    .found(format!("matrices {}{hint}", all.join(", ")))
                    .next(format!("--counts {}", flag(&all[0]))));
            }
        };
        if !allow_non_integer && let Some(bad) = matrix.sample_non_count()? {
            let found = format!("a value {bad} ({})", matrix.describe());
            return Err(no_counts(
                source.as_ref(),
                Error::new(Code::NotRawCounts, super::matrix::NO_COUNTS).at(matrix.place()).found(found),
                &slot,
            ));
        }
        let obs = Frame::open(&source, "obs", matrix.rows())?;
        let var = Frame::open(&source, if slot == "raw/X" { "raw/var" } else { "var" }, matrix.columns())?;
        Ok(H5ad { counts: matrix, obs, var, source })
    }
}

/// All slots with a matrix.
fn slots(source: &dyn H5Source) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for slot in ["X", "raw/X"] {
        if source.node(slot)?.is_some() {
            all.push(slot.to_string());
        }
    }
    if source.node("layers")? == Some(Node::Group) {
        all.extend(source.children("layers")?.into_iter().map(|name| format!("layers/{name}")));
    }
    Ok(all)
}

/// A slot as `--counts` takes it.
fn flag(slot: &str) -> &str {
    if slot == "raw/X" { "raw" } else { slot }
}

/// Completes the refusal of a slot: names the slot that does hold counts.
fn no_counts(source: &dyn H5Source, e: Error, refused: &str) -> Error {
    let holds_counts = |slot: &String| {
        slot != refused
            && matches!(Matrix::open(source, slot), Ok(Some(m)) if m.entries() > 0 && matches!(m.sample_non_count(), Ok(None)))
    };
    let e = e.wanted("integers from 0 (ranks come from raw counts)");
    match slots(source).unwrap_or_default().iter().find(|s| holds_counts(s)) {
        Some(slot) => e.next(format!("--counts {} ({slot} holds counts)", flag(slot))),
        None => e.next("no other slot holds counts: get the raw file, or --allow-non-integer to rank these values as they are"),
    }
}

impl CellSource for H5ad {
    fn cells(&self) -> u64 {
        self.counts.rows()
    }
    fn entries(&self) -> u64 {
        self.counts.entries()
    }
    fn describe(&self) -> String {
        format!("{}, {}", self.counts.slot(), self.counts.describe())
    }
    fn gene_place(&self) -> &str {
        self.var.place()
    }

    fn gene_names(&self) -> Result<Vec<NameColumn>> {
        let text = |c: &&Column| c.is_text() || c.categories().is_some();
        let candidates = std::iter::once(self.var.index()).chain(self.var.columns().iter().filter(text));
        candidates.map(|c| Ok(NameColumn { name: c.name.clone(), values: self.var.all_texts(c)? })).collect()
    }

    fn obs(&self) -> &Frame {
        &self.obs
    }

    fn for_each_block(&self, pass: &Pass<'_>, each: &mut dyn FnMut(&RowBlock) -> Result<()>) -> Result<()> {
        self.counts.for_each_block(pass, each).map_err(|e| {
            if e.what() == super::matrix::NO_COUNTS {
                no_counts(self.source.as_ref(), e, self.counts.slot())
            } else {
                e
            }
        })
    }
}
