//! Training, validation and test cells, leak-proof by construction.
//!
//! A split is a pure function of (corpus, [`SplitSpec`]): a run folder records the spec and a digest, and the parts are computed
//! again. Fractions are drawn class by class (largest remainder, at least one cell of each class on either side); the draw of a
//! class depends on (seed, class name) alone, so leaving out one label does not move the others, and the first 5 labelled cells
//! of `--labels-per-class 10` are those of `--labels-per-class 5`. Whatever is fitted takes [`TrainingCells`], which only a
//! [`Split`] can make.

use super::format::hex;
use super::reader::Corpus;
use crate::error::{Error, Result, nearest};
use crate::rng::{Philox, site};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

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

fn unknown_value(corpus: &Corpus, column: &str, value: &str, known: &[String]) -> Error {
    let listed: Vec<&str> = known.iter().take(20).map(String::as_str).collect();
    let more = if known.len() > 20 { format!(" and {} more", known.len() - 20) } else { String::new() };
    let e = Error::input(format!("no cell has {value:?} in obs column {column:?}"))
        .at(corpus.path().display())
        .found(format!("{}{more}", listed.join(", ")));
    match nearest(value, known.iter().map(String::as_str)) {
        Some(near) => e.next(format!("did you mean {near:?}?")),
        None => e,
    }
}

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
            Error::usage(what)
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
            _ => Err(Error::usage("a held-out value is named as COLUMN=VALUE")
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
            return Err(Error::usage("label values can be left out only of a named label column")
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
                return Err(Error::input(format!("the {name} part of the split is empty"))
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
        Err(Error::input("the training part needs at least two classes")
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
            return Err(Error::input("the split was made for another corpus")
                .at(corpus.path().display())
                .found(corpus.digest())
                .wanted(&record.corpus_digest)
                .next("give the corpus that the run was trained on"));
        }
        let split = Split::make(corpus, &record.spec)?;
        if split.digest() != record.sha256 {
            return Err(Error::input("the recorded split cannot be made again from its settings")
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
        let mut out = std::io::BufWriter::new(std::fs::File::create(path).map_err(io)?);
        writeln!(out, "cell_id\tpart\tlabel").map_err(io)?;
        for (cell, part) in part.into_iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            let hidden = part == "train" && self.labelled.binary_search(&(cell as u32)).is_err();
            let class = self.labels.as_ref().filter(|_| !hidden);
            let label = class.and_then(|l| l.class(cell).map(|k| l.classes[k].as_str())).unwrap_or("");
            writeln!(out, "{}\t{part}\t{label}", corpus.cell_id(cell)?).map_err(io)?;
        }
        out.flush().map_err(io)
    }
}

fn included(labels: &Option<Labels>, cell: u32) -> bool {
    labels.as_ref().is_none_or(|l| l.codes[cell as usize] != Labels::EXCLUDED)
}

/// Cells by class; last, those without a label.
fn strata(labels: &Option<Labels>, cells: Vec<u32>) -> Vec<Vec<u32>> {
    let Some(labels) = labels else { return vec![cells] };
    let mut strata = vec![Vec::new(); labels.classes.len() + 1];
    for cell in cells {
        match labels.codes[cell as usize] {
            Labels::EXCLUDED => {}
            Labels::MISSING => strata[labels.classes.len()].push(cell),
            class => strata[class as usize].push(cell),
        }
    }
    strata
}

fn refuse_single_cells(corpus: &Corpus, labels: &Option<Labels>, strata: &[Vec<u32>]) -> Result<()> {
    let Some(labels) = labels else { return Ok(()) };
    let single: Vec<String> = (labels.classes.iter().zip(strata))
        .filter(|(_, cells)| cells.len() == 1)
        .map(|(name, _)| format!("{name:?}"))
        .collect();
    if single.is_empty() {
        return Ok(());
    }
    Err(Error::input("a class with one cell cannot stand on both sides of a split")
        .at(format!("{}: obs column {:?}", corpus.path().display(), labels.column))
        .found(single.join(", "))
        .wanted("at least two cells in each class")
        .next(format!("leave it out: --exclude-label {}", single[0])))
}

/// A class's own number: its draw does not depend on which other classes there are.
fn stratum_number(labels: &Option<Labels>, stratum: usize) -> u32 {
    match labels {
        Some(l) if stratum < l.classes.len() => crc32c::crc32c(l.classes[stratum].as_bytes()),
        _ => 0,
    }
}

fn divide(
    strata: &[Vec<u32>],
    labels: &Option<Labels>,
    fraction: [f64; 3],
    seed: u64,
    parts: &mut [Vec<u32>; 3],
) {
    for (s, cells) in strata.iter().enumerate() {
        let mut cells = cells.clone();
        Philox::new(seed, stratum_number(labels, s), site::SPLIT).shuffle(&mut cells);
        let mut rest = &cells[..];
        for (part, n) in parts.iter_mut().zip(shares(cells.len(), fraction)) {
            let (now, later) = rest.split_at(n);
            part.extend_from_slice(now);
            rest = later;
        }
    }
}

/// How many of `n` cells go to each part: largest remainder, then at least one for training, test and validation, in that
/// order, as far as `n` reaches. Sums to `n`.
fn shares(n: usize, fraction: [f64; 3]) -> [usize; 3] {
    let exact = fraction.map(|f| f * n as f64);
    let mut share = exact.map(|e| (e + 1e-9).floor() as usize);
    while share.iter().sum::<usize>() < n {
        let remainder = |p: usize| exact[p] - share[p] as f64;
        let next = (0..3).rev().max_by(|&a, &b| remainder(a).total_cmp(&remainder(b))).expect("three parts");
        share[next] += 1;
    }
    let wanted: Vec<usize> = [0, 2, 1].into_iter().filter(|&p| fraction[p] > 0.0).collect();
    for &p in wanted.iter().take(n) {
        if share[p] == 0 {
            let richest = (0..3).max_by_key(|&q| share[q]).expect("three parts");
            share[richest] -= 1;
            share[p] = 1;
        }
    }
    share
}

/// Training cells whose label may be used: all, or the first `labels_per_class` of a seeded order in each class.
fn choose_labelled(labels: &Labels, train: &[u32], spec: &SplitSpec) -> Vec<u32> {
    let mut by_class = vec![Vec::new(); labels.classes.len()];
    for &cell in train {
        if let Some(class) = labels.class(cell as usize) {
            by_class[class].push(cell);
        }
    }
    if let Some(limit) = spec.labels_per_class {
        for (cells, name) in by_class.iter_mut().zip(&labels.classes) {
            Philox::new(spec.seed, crc32c::crc32c(name.as_bytes()), site::LABELS).shuffle(cells);
            cells.truncate(limit);
        }
    }
    let mut chosen = by_class.concat();
    chosen.sort_unstable();
    chosen
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

/// A view of training cells and their labels. Only [`Split::training`] makes one, so that what is fitted cannot see others.
#[derive(Debug, Clone)]
pub struct TrainingCells<'a> {
    cells: Cow<'a, [u32]>,
    labels: Vec<i32>,
    classes: &'a [String],
}

impl<'a> TrainingCells<'a> {
    /// The cells, ascending.
    pub fn cells(&self) -> &[u32] {
        &self.cells
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
    /// Only the cells that have a label: what supervised training draws from.
    pub fn labelled(&self) -> TrainingCells<'a> {
        let keep = |i: &usize| self.labels.get(*i).is_some_and(|&l| l >= 0);
        let chosen: Vec<usize> = (0..self.cells.len()).filter(keep).collect();
        TrainingCells {
            cells: chosen.iter().map(|&i| self.cells[i]).collect(),
            labels: chosen.iter().map(|&i| self.labels[i]).collect(),
            classes: self.classes,
        }
    }
}

#[cfg(test)]
mod tests {
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
