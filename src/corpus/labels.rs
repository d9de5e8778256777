//! Class labels from an obs column.

use super::reader::Corpus;
use crate::error::{Code, Error, Result, nearest};

/// Class labels of all cells of a corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// Name of the obs column.
    pub column: String,
    /// Class names, sorted, excluded ones left out.
    pub classes: Vec<String>,
    /// Class per cell; [`Labels::MISSING`] or [`Labels::EXCLUDED`] otherwise.
    pub codes: Vec<i32>,
}

impl Labels {
    /// The source gives no label.
    pub const MISSING: i32 = -1;
    /// The label is one that was asked to be left out: the cell is in no part of a split.
    pub const EXCLUDED: i32 = -2;

    /// Reads `column`, leaving out the label values in `exclude` (an unknown value is an error).
    pub fn read(corpus: &Corpus, column: &str, exclude: &[String]) -> Result<Labels> {
        let all = corpus.categorical(column)?;
        for value in exclude {
            if all.categories.binary_search(value).is_err() {
                return Err(unknown_value(corpus, column, value, &all.categories));
            }
        }
        let mut code_of = Vec::with_capacity(all.categories.len());
        let mut classes = Vec::new();
        for name in all.categories {
            if exclude.contains(&name) {
                code_of.push(Self::EXCLUDED);
            } else {
                code_of.push(classes.len() as i32);
                classes.push(name);
            }
        }
        let code = |c: i32| if c < 0 { Self::MISSING } else { code_of[c as usize] };
        Ok(Labels { column: column.into(), classes, codes: all.codes.into_iter().map(code).collect() })
    }

    /// Class of `cell`, if it has one.
    #[inline]
    pub fn class(&self, cell: usize) -> Option<usize> {
        usize::try_from(self.codes[cell]).ok()
    }
}

pub(super) fn unknown_value(corpus: &Corpus, column: &str, value: &str, known: &[String]) -> Error {
    let listed: Vec<&str> = known.iter().take(20).map(String::as_str).collect();
    let more = if known.len() > 20 { format!(" and {} more", known.len() - 20) } else { String::new() };
    let e = Error::new(Code::ObsValueMissing, format!("no cell has {value:?} in obs column {column:?}"))
        .at(corpus.path().display())
        .found(format!("{}{more}", listed.join(", ")));
    match nearest(value, known.iter().map(String::as_str)) {
        Some(near) => e.next(format!("did you mean {near:?}?")),
        None => e,
    }
}
