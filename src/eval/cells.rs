//! The cells of an evaluation: those that a fit may see, and those that are scored.

use super::request::{Part, Request, choose_split};
use crate::corpus::{Labels, Split};
use crate::error::{Code, Error, Result};

pub(super) struct Cells {
    pub split: Split,
    /// Where the split came from, for people.
    pub origin: String,
    pub labels: Labels,
    /// Training cells with a visible label, their classes, and their places among the split's training cells.
    pub visible: Vec<u32>,
    pub visible_class: Vec<usize>,
    pub visible_place: Vec<usize>,
    /// Cells that are scored, and their classes.
    pub test: Vec<u32>,
    pub truth: Vec<usize>,
    /// Training cells of each class, hidden labels included.
    pub train_counts: Vec<usize>,
}

impl Cells {
    /// Divides the corpus as the request says.
    ///
    /// # Errors
    /// Input: no such column, a single class, no labelled cells to train or test on.
    pub fn divide(request: &Request) -> Result<Self> {
        let corpus = &request.corpus;
        let (split, origin) = choose_split(corpus, &request.checkpoint, &request.label, &request.split)?;
        let own = split.labels.as_ref().filter(|l| l.column == request.label);
        let labels = match own {
            Some(labels) => labels.clone(),
            None => Labels::read(corpus, &request.label, &request.split.exclude)?,
        };
        let labelled = |cells: &[u32]| -> (Vec<u32>, Vec<usize>) {
            cells.iter().filter_map(|&c| Some((c, labels.class(c as usize)?))).unzip()
        };
        let (visible, visible_class): (Vec<u32>, Vec<usize>) = match own {
            Some(_) => {
                let training = split.training();
                let by_cell = training.cells().iter().zip(training.labels());
                by_cell.filter(|(_, l)| **l >= 0).map(|(c, l)| (*c, *l as usize)).unzip()
            }
            None => labelled(&split.train),
        };
        let scored = match request.part {
            Part::Test => &split.test,
            Part::Val => &split.val,
        };
        let (test, truth) = labelled(scored);
        check(request, &split, &visible_class, &test)?;
        let mut train_counts = vec![0usize; labels.classes.len()];
        labelled(&split.train).1.into_iter().for_each(|k| train_counts[k] += 1);
        let visible_place = visible.iter().map(|c| split.train.binary_search(c).unwrap_or(0)).collect();
        Ok(Cells { split, origin, labels, visible, visible_class, visible_place, test, truth, train_counts })
    }

    /// Classes of the split's training cells, −1 where hidden.
    pub fn known_classes(&self) -> Vec<i32> {
        let mut known = vec![-1i32; self.split.train.len()];
        self.visible_place.iter().zip(&self.visible_class).for_each(|(&i, &l)| known[i] = l as i32);
        known
    }
}

fn check(request: &Request, split: &Split, visible: &[usize], test: &[u32]) -> Result<()> {
    let at = |e: Error| e.at(format!("{}, obs column {:?}", request.corpus.path().display(), request.label));
    if visible.is_empty() || test.is_empty() {
        let (part, example) = match request.part {
            Part::Test => ("test", "train=0.67,test=0.33"),
            Part::Val => ("validation", "train=0.5,val=0.17,test=0.33"),
        };
        return Err(at(Error::new(
            Code::NoLabelledCells,
            "the split leaves no labelled cells to train or test on",
        ))
        .found(format!("{} labelled training cells, {} labelled {part} cells", visible.len(), test.len()))
        .next(format!("--split {example} (the corpus has {} cells)", request.corpus.cells())));
    }
    let first = visible[0];
    if visible.iter().all(|&l| l == first) {
        let all = split.labels.as_ref().map_or(1, |l| l.classes.len());
        return Err(at(Error::new(
            Code::SplitClasses,
            "the training part holds a single class: there is nothing to tell apart",
        ))
        .found(format!("{all} class(es) in the column, one among the labelled training cells"))
        .next("choose another --label or split"));
    }
    Ok(())
}
