//! Training, validation and test cells, leak-proof by construction.

use super::reader::Corpus;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

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
        let _ = (corpus, column, exclude);
        Err(Error::bug("labels are not written yet"))
    }
}

/// How cells are divided; with the corpus it decides the split completely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitSpec {
    /// Stratified fractions, or one value of a column held out.
    pub rule: SplitRule,
    /// Label column to stratify by.
    pub label: Option<String>,
    /// Label values left out of every part.
    pub exclude: Vec<String>,
    /// At most so many labelled cells per class in the training part.
    pub labels_per_class: Option<usize>,
    /// Seed of the draw.
    pub seed: u64,
}

/// The rule of a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitRule {
    /// Every cell trains.
    All,
    /// Fractions of each class; they sum to 1.
    Fractions {
        /// Training part.
        train: f64,
        /// Validation part.
        val: f64,
        /// Test part.
        test: f64,
    },
    /// Cells whose `column` is `value` are the test part; `val` of the others validate.
    Holdout {
        /// Obs column.
        column: String,
        /// Held-out value.
        value: String,
        /// Fraction of the remaining cells that validates.
        val: f64,
    },
}

impl SplitRule {
    /// `train=0.67,test=0.33`, also with `val=`.
    pub fn parse_fractions(text: &str) -> Result<SplitRule> {
        Err(Error::bug("splits are not written yet").at(text))
    }
    /// `COLUMN=VALUE`.
    pub fn parse_holdout(text: &str, val: f64) -> Result<SplitRule> {
        let _ = val;
        Err(Error::bug("splits are not written yet").at(text))
    }
}

/// Cells by part, each list ascending.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Training cells.
    pub train: Vec<u32>,
    /// Validation cells; may be empty.
    pub val: Vec<u32>,
    /// Test cells; empty under [`SplitRule::All`].
    pub test: Vec<u32>,
    /// What made it.
    pub spec: SplitSpec,
    /// Digest of the corpus that it divides.
    pub corpus_digest: String,
    /// The labels, where the spec names a column.
    pub labels: Option<Labels>,
}

impl Split {
    /// Divides `corpus`.
    pub fn make(corpus: &Corpus, spec: &SplitSpec) -> Result<Split> {
        let _ = (corpus, spec);
        Err(Error::bug("splits are not written yet"))
    }
    /// The training cells with their labels: what class counts, markers, prototypes and medians may see.
    pub fn training(&self) -> TrainingCells<'_> {
        TrainingCells { cells: &self.train, labels: Vec::new(), classes: &[] }
    }
    /// The record for a run folder (`split.json`).
    pub fn record(&self) -> SplitRecord {
        SplitRecord {
            spec: self.spec.clone(),
            corpus_digest: self.corpus_digest.clone(),
            cells: [self.train.len(), self.val.len(), self.test.len()],
            sha256: String::new(),
        }
    }
    /// The same split again from its record; an error where the corpus is another or the parts differ.
    pub fn restore(corpus: &Corpus, record: &SplitRecord) -> Result<Split> {
        let _ = (corpus, record);
        Err(Error::bug("splits are not written yet"))
    }
}

/// A split in a run folder. The parts are recomputed from the corpus and proved by their digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitRecord {
    /// What made it.
    pub spec: SplitSpec,
    /// Digest of the corpus.
    pub corpus_digest: String,
    /// Cells in train, val, test.
    pub cells: [usize; 3],
    /// Digest of the three lists.
    pub sha256: String,
}

/// A view of training cells and their labels. Only [`Split::training`] makes one, so that what is fitted cannot see others.
#[derive(Debug, Clone)]
pub struct TrainingCells<'a> {
    cells: &'a [u32],
    labels: Vec<i32>,
    classes: &'a [String],
}

impl<'a> TrainingCells<'a> {
    /// The cells, ascending.
    pub fn cells(&self) -> &'a [u32] {
        self.cells
    }
    /// Class per cell, parallel to [`cells`](Self::cells); −1 = no label. Empty without a label column.
    pub fn labels(&self) -> &[i32] {
        &self.labels
    }
    /// Class names.
    pub fn classes(&self) -> &'a [String] {
        self.classes
    }
    /// Labelled cells per class.
    pub fn counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.classes.len()];
        for &label in &self.labels {
            if label >= 0 {
                counts[label as usize] += 1;
            }
        }
        counts
    }
}
