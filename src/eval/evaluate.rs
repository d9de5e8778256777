//! The `eval` command: everything that is asked about one checkpoint on one split, in one pass over the cells.
//!
//! Fitted on the training part alone: the probe, the kNN reference, the centre, the marker scale, prototypes made here, and the
//! shares that make a class head or tail. Scored on the test part alone. `accuracy`, `macro_f1` and the per-class scores are the
//! checkpoint's own answer: its classifier where it has one, else the nearest prototype, else the linear probe; `predictor` says
//! which, and `methods` holds all of them.

use super::cells::Cells;
use super::class_names::class_of_names;
use super::embed::Embedder;
use super::frozen::frozen;
use super::metrics::{Classification, RecallAt, classification, recall_at};
use super::mixing::{Mixing, mixing};
use super::request::Request;
use super::rows::Rows;
use super::summary::{Evaluation, Scored};
use super::types::Types;
use super::zero_shot::{Evidence, combine, top, with_markers};
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::model::checkpoint;
use crate::model::heads;
use crate::ops::Backend;
use crate::rng::{Philox, site};

/// The values of k of recall@k.
pub const RECALL_AT: [usize; 4] = [1, 3, 5, 10];
/// Cells above which batch mixing is that of a seeded sample: it is quadratic within a type.
const MIXING_CELLS: usize = 10_000;

/// Evaluates. `progress` hears how many cells were embedded.
///
/// # Errors
/// Input: no such column, a single class, no labelled training or test cells, embeddings that are not finite; what the parts
/// fail with.
pub fn evaluate<B: Backend<A>, A: Act>(
    dev: &B,
    request: &Request,
    progress: impl Fn(u64),
) -> Result<Evaluation> {
    let corpus = &request.corpus;
    // The cells first: a misspelt column should not wait for a model.
    let cells = Cells::divide(request)?;
    let test_cells = cells.test.len();
    let mut notes = Vec::new();
    let mut embedder = Embedder::<B, A>::open(dev, &request.checkpoint, corpus.clone(), &request.embed)?;
    let width = embedder.width();
    // All training cells: centre and marker scale need no labels. Those with a visible one are the reference of probe and kNN.
    let train_rows = embedder.collect(&cells.split.train, &progress)?;
    let test_rows = embedder.collect(&cells.test, &progress)?;
    let (train, test) = (Rows::new(&train_rows, width)?, Rows::new(&test_rows, width)?);
    let visible_rows = train.select(&cells.visible_place);
    let visible = Rows::new(&visible_rows, width)?;
    let classes = cells.labels.classes.len();
    let frozen = frozen(visible, &cells.visible_class, test, &cells.truth, classes, request.frozen)?;
    if !frozen.linear_probe_converged {
        notes.push("the linear probe ran out of iterations".into());
    }

    let types = Types::gather(request, &cells, &mut embedder, train, test, &mut notes)?;
    let mut answers = Answers::new(&cells);
    let own_space =
        embedder.layer() == embedder.config().layer && embedder.pooling() == embedder.config().pooling;
    if let Some(c) = checkpoint::read_classifier(embedder.folder(), width)?.filter(|_| own_space) {
        answers.add_classifier(&c.labels, &heads::logits(&test_rows, &c.weights), &types)?;
    }
    let recall = answers.add_zero_shot(&types, &mut notes)?;
    answers.add("linear_probe", &frozen.linear_probe_predictions)?;
    answers.add("knn", &frozen.knn_predictions)?;
    let evidence = match request.evidence {
        Some(e) if !recall.iter().any(|(have, _)| *have == e) => {
            return combine(e, types.cosines.as_deref(), types.markers.as_deref()).and(Err(Error::new(
                Code::NoLabelledCells,
                "no test cell has a type with a prototype or marker set",
            )));
        }
        Some(e) => Some(e),
        None => recall.first().map(|(e, _)| *e),
    };
    let (predictor, own) = answers.own(request.evidence, evidence.filter(|_| types.cosines.is_some()));

    let mixing = match &request.batch_key {
        None => None,
        Some(key) => {
            let all: Vec<u32> = cells.visible.iter().chain(&cells.test).copied().collect();
            let class: Vec<usize> = cells.visible_class.iter().chain(&cells.truth).copied().collect();
            let values = [visible_rows.as_slice(), &test_rows].concat();
            Some(mix(corpus, key, &all, &class, Rows::new(&values, width)?, request.frozen.seed)?)
        }
    };
    let Answers { classes, methods, called, .. } = answers;
    let scored = Scored {
        cells: cells.test,
        truth: cells.truth,
        called,
        rows: test_rows,
        width,
        types: types.names,
        prototypes: types.prototypes,
        sets: types.sets,
    };
    Ok(Evaluation {
        scored,
        classes,
        predictor,
        own,
        methods,
        frozen,
        evidence,
        recall,
        prototypes: types.origin,
        mixing,
        thresholds: request.thresholds,
        part: request.part,
        split: cells.split.record(),
        train_cells: cells.visible.len(),
        test_cells,
        train_counts: cells.train_counts,
        split_origin: cells.origin,
        checkpoint: embedder.folder().to_path_buf(),
        layer: embedder.layer(),
        notes,
    })
}

/// The answers of every method to the same cells.
struct Answers<'a> {
    labels: &'a [String],
    truth: &'a [usize],
    /// The labels, and behind them the types that are no label.
    classes: Vec<String>,
    methods: Vec<(&'static str, Classification)>,
    /// The class that each method calls each cell.
    called: Vec<(&'static str, Vec<usize>)>,
}

impl<'a> Answers<'a> {
    fn new(cells: &'a Cells) -> Self {
        let labels = &cells.labels.classes;
        Answers {
            labels,
            truth: &cells.truth,
            classes: labels.clone(),
            methods: Vec::new(),
            called: Vec::new(),
        }
    }

    fn add(&mut self, method: &'static str, called: &[usize]) -> Result<()> {
        self.methods.push((method, classification(self.truth, called, self.classes.len())?));
        self.called.push((method, called.to_vec()));
        Ok(())
    }

    /// A classifier of classes `names` alone, and with the markers beside it where every class has a set: one without would be
    /// charged for what nobody could measure.
    fn add_classifier(&mut self, names: &[String], logits: &[f32], types: &Types) -> Result<()> {
        let class = class_of_names(names, self.labels, &mut self.classes);
        let rows = || logits.chunks_exact(names.len());
        let called: Vec<usize> = rows().map(|row| class[top(row, 1)[0]]).collect();
        self.add("classifier", &called)?;
        let columns: Option<Vec<usize>> = types.columns(names).into_iter().collect();
        if let (Some(columns), Some(u)) = (columns, &types.markers) {
            let called: Vec<usize> = rows()
                .zip(u.chunks_exact(types.names.len()))
                .map(|(row, u)| class[top(&with_markers(row, u, &columns), 1)[0]])
                .collect();
            self.add("classifier_markers", &called)?;
        }
        Ok(())
    }

    /// Nearest prototype, best marker score, and both; recall@k of each.
    fn add_zero_shot(&mut self, types: &Types, notes: &mut Vec<String>) -> Result<Vec<(Evidence, RecallAt)>> {
        if types.cosines.is_none() && types.markers.is_none() {
            return Ok(Vec::new());
        }
        let columns = types.columns(self.labels);
        let missing: Vec<&str> =
            columns.iter().zip(self.labels).filter(|(c, _)| c.is_none()).map(|(_, l)| l.as_str()).collect();
        if !missing.is_empty() {
            notes
                .push(format!("no prototype or marker set for {}: left out of recall@k", missing.join(", ")));
        }
        let mut class = class_of_names(&types.names, self.labels, &mut self.classes);
        for (k, column) in columns.iter().enumerate().rev() {
            column.iter().for_each(|&c| class[c] = k);
        }
        let wanted: Vec<Option<usize>> = self.truth.iter().map(|&t| columns[t]).collect();
        let mut recall = Vec::new();
        for evidence in [Evidence::Prototype, Evidence::Markers, Evidence::Both] {
            let scores = combine(evidence, types.cosines.as_deref(), types.markers.as_deref());
            let Ok(scores) = scores else { continue };
            recall.extend(
                recall_at(&scores, types.names.len(), &wanted, &RECALL_AT)?.map(|recall| (evidence, recall)),
            );
            let called: Vec<usize> =
                scores.chunks_exact(types.names.len()).map(|row| class[top(row, 1)[0]]).collect();
            self.add(evidence.name(), &called)?;
        }
        Ok(recall)
    }

    /// The checkpoint's own answer: with `asked` for both evidences the classifier with markers, else the classifier, else
    /// `zero_shot`, else the linear probe.
    fn own(&self, asked: Option<Evidence>, zero_shot: Option<Evidence>) -> (&'static str, Classification) {
        let zero_shot = asked.or(zero_shot).map(Evidence::name);
        let rank = |name: &str| match name {
            "classifier_markers" if asked == Some(Evidence::Both) => 0,
            "classifier" => 1,
            name if Some(name) == zero_shot => 2,
            "linear_probe" => 3,
            _ => 4,
        };
        self.methods.iter().min_by_key(|(name, _)| rank(name)).cloned().expect("the probe is there")
    }
}

/// Mixing of the batches in obs column `key` over `cells`, or over a seeded sample of them.
fn mix(corpus: &Corpus, key: &str, cells: &[u32], types: &[usize], rows: Rows, seed: u64) -> Result<Mixing> {
    let batches = corpus.categorical(key)?;
    let mut chosen: Vec<usize> =
        (0..cells.len()).filter(|&i| batches.codes[cells[i] as usize] >= 0).collect();
    if chosen.is_empty() {
        return Err(Error::new(Code::ObsValueMissing, "no cell has a value in the batch column")
            .at(format!("obs column {key:?}")));
    }
    if chosen.len() > MIXING_CELLS {
        Philox::new(seed, (1 << 31) + 1, site::EVAL).shuffle(&mut chosen);
        chosen.truncate(MIXING_CELLS);
        chosen.sort_unstable();
    }
    let values = rows.select(&chosen);
    let types: Vec<usize> = chosen.iter().map(|&i| types[i]).collect();
    let batch: Vec<usize> = chosen.iter().map(|&i| batches.codes[cells[i] as usize] as usize).collect();
    mixing(Rows::new(&values, rows.width())?, &types, &batch)
}
