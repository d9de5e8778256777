//! Training, validation and test cells, leak-proof by construction.
//!
//! A split is a pure function of (corpus, [`SplitSpec`]): a run folder records the spec and a digest, and the parts are computed
//! again. Fractions are drawn class by class (largest remainder, at least one cell of each class on either side); the draw of a
//! class depends on (seed, class name) alone, so leaving out one label does not move the others, and the first 5 labelled cells
//! of `--labels-per-class 10` are those of `--labels-per-class 5`. Whatever is fitted takes [`TrainingCells`], which only a
//! [`Split`] can make.

pub use super::labels::Labels;
use super::labels::unknown_value;
use super::reader::Corpus;
use super::strata::{choose_labelled, divide, included, refuse_single_cells, strata};
pub use super::training_cells::TrainingCells;
use crate::digest::hex;
use crate::disk;
use crate::error::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

/// How cells are divided; with the corpus it decides the split completely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitSpec {
    /// Stratified fractions, or one value of a column held out.
    pub rule: SplitRule,
    /// Label column to stratify by.
    pub label: Option<String>,
    /// Label values left out of every part.
    pub exclude: Vec<String>,
    /// At most so many labelled cells per class in the training part; the rest of it trains unlabelled.
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
    /// Cells whose `column` is `value` are the test part; `val` of the others validate. A cell without a value in the column is
    /// in no part: it may come from the held-out source.
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
        let bad = |what: &str| {
            Error::new(Code::SplitForm, what)
                .at("--split")
                .found(text)
                .wanted("train=0.67,test=0.33 or train=0.6,val=0.1,test=0.3")
        };
        let mut part = [None; 3];
        for piece in text.split(',') {
            let (name, number) =
                piece.split_once('=').ok_or_else(|| bad("a part of the split has no `=`"))?;
            let at = ["train", "val", "test"]
                .iter()
                .position(|n| *n == name.trim())
                .ok_or_else(|| bad(&format!("{:?} is no part of a split", name.trim())))?;
            let fraction: f64 = number.trim().parse().map_err(|_| bad("a fraction is not a number"))?;
            if !(0.0..=1.0).contains(&fraction) {
                return Err(bad("a fraction must lie in 0 to 1"));
            }
            if part[at].replace(fraction).is_some() {
                return Err(bad(&format!("{:?} is given twice", name.trim())));
            }
        }
        let [train, val, test] = part.map(|p| p.unwrap_or(0.0));
        if (train + val + test - 1.0).abs() > 1e-6 {
            return Err(bad("the fractions of the split must sum to 1"));
        }
        if train == 0.0 {
            return Err(bad("the training part is empty"));
        }
        Ok(SplitRule::Fractions { train, val, test })
    }

    /// `COLUMN=VALUE`.
    pub fn parse_holdout(text: &str, val: f64) -> Result<SplitRule> {
        match text.split_once('=') {
            Some((column, value)) if !column.is_empty() && !value.is_empty() && (0.0..1.0).contains(&val) => {
                Ok(SplitRule::Holdout { column: column.into(), value: value.into(), val })
            }
            _ => Err(Error::new(Code::SplitForm, "a held-out value is named as COLUMN=VALUE")
                .at("--holdout")
                .found(text)
                .wanted("for example --holdout donor=D3")),
        }
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
    /// Training cells whose label may be used, ascending.
    labelled: Vec<u32>,
}

impl Split {
    /// Divides `corpus`. Errors (kind input): an absent column or value, a class of a single cell that cannot stand on both
    /// sides, an empty part, fewer than two classes with labels in the training part.
    pub fn make(corpus: &Corpus, spec: &SplitSpec) -> Result<Split> {
        let labels = spec.label.as_deref().map(|c| Labels::read(corpus, c, &spec.exclude)).transpose()?;
        if labels.is_none() && !spec.exclude.is_empty() {
            return Err(Error::new(
                Code::LabelsNeeded,
                "label values can be left out only of a named label column",
            )
            .found("--exclude-label without --label")
            .next("add --label COLUMN"));
        }
        let mut parts = [Vec::new(), Vec::new(), Vec::new()];
        let all: Vec<u32> = (0..corpus.cells() as u32).collect();
        match &spec.rule {
            SplitRule::All => parts[0] = all.into_iter().filter(|&c| included(&labels, c)).collect(),
            SplitRule::Fractions { train, val, test } => {
                let strata = strata(&labels, all);
                if *train < 1.0 {
                    refuse_single_cells(corpus, &labels, &strata)?;
                }
                divide(&strata, &labels, [*train, *val, *test], spec.seed, &mut parts);
            }
            SplitRule::Holdout { column, value, val } => {
                let source = corpus.categorical(column)?;
                let code = source
                    .categories
                    .binary_search(value)
                    .map_err(|_| unknown_value(corpus, column, value, &source.categories))?;
                let (held, rest): (Vec<u32>, Vec<u32>) = all
                    .into_iter()
                    .filter(|&c| source.codes[c as usize] >= 0)
                    .partition(|&c| source.codes[c as usize] == code as i32);
                parts[2] = held.into_iter().filter(|&c| included(&labels, c)).collect();
                divide(&strata(&labels, rest), &labels, [1.0 - val, *val, 0.0], spec.seed, &mut parts);
            }
        }
        for part in &mut parts {
            part.sort_unstable();
        }
        let wanted = match spec.rule {
            SplitRule::All => [true, false, false],
            SplitRule::Fractions { val, test, .. } => [true, val > 0.0, test > 0.0],
            SplitRule::Holdout { val, .. } => [true, val > 0.0, true],
        };
        for ((part, name), wanted) in parts.iter().zip(["training", "validation", "test"]).zip(wanted) {
            if wanted && part.is_empty() {
                return Err(Error::new(Code::SplitEmpty, format!("the {name} part of the split is empty"))
                    .at(corpus.path().display())
                    .found(format!("{} cells in the corpus", corpus.cells()))
                    .wanted("at least one cell in each part")
                    .next("change --split or --holdout, or pack more cells"));
            }
        }
        let [train, val, test] = parts;
        let labelled = labels.as_ref().map_or(Vec::new(), |l| choose_labelled(l, &train, spec));
        let split = Split {
            train,
            val,
            test,
            spec: spec.clone(),
            corpus_digest: corpus.digest().into(),
            labels,
            labelled,
        };
        split.refuse_single_class(corpus)?;
        Ok(split)
    }

    fn refuse_single_class(&self, corpus: &Corpus) -> Result<()> {
        let Some(labels) = &self.labels else { return Ok(()) };
        let training = self.training();
        let present: Vec<&str> = (training.counts().iter().zip(&labels.classes))
            .filter(|(n, _)| **n > 0)
            .map(|(_, name)| name.as_str())
            .collect();
        if present.len() >= 2 {
            return Ok(());
        }
        Err(Error::new(Code::SplitClasses, "the training part needs at least two classes")
            .at(format!("{}: obs column {:?}", corpus.path().display(), labels.column))
            .found(if present.is_empty() {
                "no labelled cell".into()
            } else {
                format!("only {:?}", present[0])
            })
            .next("name another --label column, or change --split, --holdout or --exclude-label"))
    }

    /// The training cells with their labels: what class counts, markers, prototypes and medians may see. Labels beyond
    /// `labels_per_class` are hidden.
    pub fn training(&self) -> TrainingCells<'_> {
        let Some(labels) = &self.labels else {
            return TrainingCells { cells: Cow::Borrowed(&self.train), labels: Vec::new(), classes: &[] };
        };
        let mut codes = vec![Labels::MISSING; self.train.len()];
        let mut at = 0;
        for &cell in &self.labelled {
            at += self.train[at..].partition_point(|&c| c < cell);
            codes[at] = labels.codes[cell as usize];
        }
        TrainingCells { cells: Cow::Borrowed(&self.train), labels: codes, classes: &labels.classes }
    }

    fn digest(&self) -> String {
        let mut sha = Sha256::new();
        for part in [&self.train, &self.val, &self.test, &self.labelled] {
            sha.update((part.len() as u64).to_le_bytes());
            sha.update(bytemuck::cast_slice::<u32, u8>(part));
        }
        hex(&sha.finalize())
    }

    /// The record for a run folder (`split.json`).
    pub fn record(&self) -> SplitRecord {
        SplitRecord {
            spec: self.spec.clone(),
            corpus_digest: self.corpus_digest.clone(),
            cells: [self.train.len(), self.val.len(), self.test.len()],
            sha256: self.digest(),
        }
    }

    /// The same split again from its record; an error where the corpus is another or the parts differ.
    pub fn restore(corpus: &Corpus, record: &SplitRecord) -> Result<Split> {
        if corpus.digest() != record.corpus_digest {
            return Err(Error::new(Code::SplitMismatch, "the split was made for another corpus")
                .at(corpus.path().display())
                .found(corpus.digest())
                .wanted(&record.corpus_digest)
                .next("give the corpus that the run was trained on"));
        }
        let split = Split::make(corpus, &record.spec)?;
        if split.digest() != record.sha256 {
            return Err(Error::new(
                Code::SplitMismatch,
                "the recorded split cannot be made again from its settings",
            )
            .at(corpus.path().display())
            .found(split.digest())
            .wanted(&record.sha256)
            .next("the record was edited, or written by another version of cellrefine"));
        }
        Ok(split)
    }

    /// Writes `cell_id, part, label` per line, in corpus order, so that other programs can use the same cells. The label is
    /// empty where it is missing or hidden; cells of no part are left out.
    pub fn write_tsv(&self, corpus: &Corpus, path: &Path) -> Result<()> {
        let io = |e: std::io::Error| Error::io(path, "write the split", &e);
        let mut part = vec![""; corpus.cells()];
        for (cells, name) in [(&self.train, "train"), (&self.val, "val"), (&self.test, "test")] {
            cells.iter().for_each(|&c| part[c as usize] = name);
        }
        let mut out = disk::Pending::create(path)?;
        writeln!(out, "cell_id\tpart\tlabel").map_err(io)?;
        for (cell, part) in part.into_iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            let hidden = part == "train" && self.labelled.binary_search(&(cell as u32)).is_err();
            let class = self.labels.as_ref().filter(|_| !hidden);
            let label = class.and_then(|l| l.class(cell).map(|k| l.classes[k].as_str())).unwrap_or("");
            writeln!(out, "{}\t{part}\t{label}", corpus.cell_id(cell)?).map_err(io)?;
        }
        out.publish()
    }
}

/// A split in a run folder. The parts are recomputed from the corpus and proved by their digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitRecord {
    /// What made it.
    pub spec: SplitSpec,
    /// Digest of the corpus.
    pub corpus_digest: String,
    /// Cells in train, val, test.
    pub cells: [usize; 3],
    /// Digest of the parts.
    pub sha256: String,
}

#[cfg(test)]
mod tests {
    use super::super::strata::shares;
    use super::*;

    #[test]
    fn shares_sum_follow_the_fractions_and_starve_no_one() {
        for n in 0..200 {
            for fraction in [[0.67, 0.0, 0.33], [0.6, 0.1, 0.3], [0.98, 0.01, 0.01], [1.0, 0.0, 0.0]] {
                let s = shares(n, fraction);
                assert_eq!(s.iter().sum::<usize>(), n);
                let parts = fraction.iter().filter(|f| **f > 0.0).count();
                for p in 0..3 {
                    let exact = fraction[p] * n as f64;
                    assert!((s[p] as f64 - exact).abs() < 1.0 + f64::from(n < 200), "{n} {fraction:?} {s:?}");
                    assert!(fraction[p] > 0.0 || s[p] == 0);
                    assert!(n < parts || fraction[p] == 0.0 || s[p] > 0, "{n} {fraction:?} {s:?}");
                }
            }
        }
        assert_eq!(shares(2, [0.6, 0.1, 0.3]), [1, 0, 1]);
        assert_eq!(shares(1, [0.5, 0.0, 0.5]), [1, 0, 0]);
        assert_eq!(shares(100, [0.67, 0.0, 0.33]), [67, 0, 33]);
    }

    #[test]
    fn rules_are_read_or_refused_as_usage() {
        assert_eq!(
            SplitRule::parse_fractions("train=0.67,test=0.33").unwrap(),
            SplitRule::Fractions { train: 0.67, val: 0.0, test: 0.33 }
        );
        assert!(SplitRule::parse_fractions("test=0.2, train=0.7, val=0.1").is_ok());
        for bad in [
            "",
            "train",
            "train=0.5",
            "train=x,test=1",
            "train=.5,train=.5",
            "trian=1",
            "test=1",
            "train=2,test=-1",
        ] {
            let e = SplitRule::parse_fractions(bad).unwrap_err();
            assert_eq!(e.kind(), crate::error::Kind::Usage, "{bad}");
        }
        assert_eq!(
            SplitRule::parse_holdout("donor=a=b", 0.0).unwrap(),
            SplitRule::Holdout { column: "donor".into(), value: "a=b".into(), val: 0.0 }
        );
        assert!(
            SplitRule::parse_holdout("donor", 0.0).is_err() && SplitRule::parse_holdout("=x", 0.0).is_err()
        );
    }
}
