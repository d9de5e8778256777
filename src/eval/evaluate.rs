//! The `eval` command: everything that is asked about one checkpoint on one split, in one pass over the cells.
//!
//! Fitted on the training part alone: the probe, the kNN reference, the centre, the marker scale, prototypes made here, and the
//! shares that make a class head or tail. Scored on the test part alone. `accuracy`, `macro_f1` and the per-class scores are the
//! checkpoint's own answer: its classifier where it has one, else the nearest prototype, else the linear probe; `predictor` says
//! which, and `methods` holds all of them.

use super::embed::{EmbedOptions, Embedder, run_folder};
use super::frozen::{FrozenSettings, frozen};
use super::metrics::{Classification, ShareThresholds, classification, recall_at};
use super::mixing::{Mixing, mixing};
use super::rows::Rows;
use super::summary::Evaluation;
use super::zero_shot::{Evidence, MarkerScale, combine, cosines, top, with_markers};
use crate::corpus::splits::{SplitRecord, SplitRule};
use crate::corpus::{Corpus, Labels, Split, SplitSpec};
use crate::device::Act;
use crate::error::{Error, Result};
use crate::genes::Vocab;
use crate::genes::marker_score::{Standardiser, marker_scores};
use crate::genes::markers::{MarkerSets, read_marker_map};
use crate::genes::markers_file::RawSets;
use crate::model::checkpoint::{self, VOCABULARY};
use crate::model::heads;
use crate::objective::prototypes::{Sources, initial};
use crate::objective::{ObjectiveConfig, PrototypeMode, StoredPrototypes, Teacher};
use crate::ops::Backend;
use crate::rng::{Philox, site};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The values of k of recall@k.
pub const RECALL_AT: [usize; 4] = [1, 3, 5, 10];
/// Cells above which batch mixing is that of a seeded sample: it is quadratic within a type.
const MIXING_CELLS: usize = 10_000;

/// How the cells are divided, as flags say it; with nothing said, the run's recorded split.
#[derive(Debug, Clone, Default)]
pub struct SplitChoice {
    /// `train=0.67,test=0.33`.
    pub split: Option<String>,
    /// `COLUMN=VALUE`.
    pub holdout: Option<String>,
    /// Label values left out.
    pub exclude: Vec<String>,
    /// Labels kept per class of the training part.
    pub labels_per_class: Option<usize>,
    /// Seed of a split made here.
    pub seed: Option<u64>,
}

/// Marker sets, as flags name them.
#[derive(Debug, Clone, Default)]
pub struct MarkerChoice {
    /// GMT or TSV.
    pub file: PathBuf,
    /// TSV: label, set name.
    pub map: Option<PathBuf>,
    /// Symbols to Ensembl ids.
    pub gene_map: Option<PathBuf>,
    /// A label without a set is no error.
    pub allow_unmatched: bool,
}

impl MarkerChoice {
    /// The file's sets as tokens, and the label table.
    #[allow(clippy::type_complexity)] // (label, set name) pairs, as `RawSets::for_labels` takes them
    pub fn load(&self, corpus: &Corpus) -> Result<(RawSets, Option<Vec<(String, String)>>)> {
        let vocab = Vocab::load(corpus.path().join(VOCABULARY))?;
        let raw = RawSets::load(&self.file, &vocab, self.gene_map.as_deref())?;
        Ok((raw, self.map.as_deref().map(read_marker_map).transpose()?))
    }
}

/// The cells that are scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Test cells.
    #[default]
    Test,
    /// Validation cells: for choosing settings, so that the test cells stay unseen.
    Val,
}

/// What to evaluate.
pub struct Request {
    /// The cells.
    pub corpus: Arc<Corpus>,
    /// Run, checkpoint or Hugging Face folder.
    pub checkpoint: PathBuf,
    /// Label column.
    pub label: String,
    /// Division of the cells.
    pub split: SplitChoice,
    /// The cells that are scored.
    pub part: Part,
    /// Marker sets.
    pub markers: Option<MarkerChoice>,
    /// What recall@k and a prototype prediction go by.
    pub evidence: Option<Evidence>,
    /// Make prototypes in this way instead of taking the checkpoint's.
    pub prototypes: Option<PrototypeMode>,
    /// obs column of batches, for mixing.
    pub batch_key: Option<String>,
    /// Head and tail.
    pub thresholds: ShareThresholds,
    /// How cells become rows.
    pub embed: EmbedOptions,
    /// Probe, kNN, clustering.
    pub frozen: FrozenSettings,
}

/// The split that `choice` asks for on `corpus`, and where it came from.
///
/// # Errors
/// Usage: contradicting flags. Input: a recorded split that the corpus does not give again.
pub fn choose_split(
    corpus: &Corpus,
    checkpoint: &Path,
    label: &str,
    choice: &SplitChoice,
) -> Result<(Split, String)> {
    let fresh = |rule: SplitRule| {
        let spec = SplitSpec {
            rule,
            label: Some(label.to_string()),
            exclude: choice.exclude.clone(),
            labels_per_class: choice.labels_per_class,
            seed: choice.seed.unwrap_or(0),
        };
        Split::make(corpus, &spec)
    };
    match (&choice.split, &choice.holdout) {
        (Some(_), Some(_)) => return Err(Error::usage("--split and --holdout exclude each other")),
        (Some(text), None) => return Ok((fresh(SplitRule::parse_fractions(text)?)?, "flags".into())),
        (None, Some(text)) => return Ok((fresh(SplitRule::parse_holdout(text, 0.0)?)?, "flags".into())),
        (None, None) => {}
    }
    let why = match recorded(checkpoint)? {
        None => "no run recorded a split".to_string(),
        Some((place, r)) if r.corpus_digest != corpus.digest() => {
            format!("{} divides another corpus", place.display())
        }
        Some((place, r)) if r.spec.rule == SplitRule::All => {
            format!("the run of {} trained on all cells, test cells included", place.display())
        }
        Some((place, r)) => {
            let mut split = Split::restore(corpus, &r)?;
            if !choice.exclude.is_empty() && choice.exclude != r.spec.exclude {
                return Err(Error::usage("the run divided its cells with other labels left out")
                    .at(place.display())
                    .found(format!("--exclude-label {}", choice.exclude.join(", ")))
                    .wanted(format!("{:?}, as in that run", r.spec.exclude))
                    .next("leave --exclude-label out, or give --split for a new division"));
            }
            if choice.labels_per_class.is_some() && choice.labels_per_class != r.spec.labels_per_class {
                split =
                    Split::make(corpus, &SplitSpec { labels_per_class: choice.labels_per_class, ..r.spec })?;
            }
            return Ok((split, format!("recorded in {}", place.display())));
        }
    };
    let split = fresh(SplitRule::parse_fractions("train=0.67,test=0.33")?)?;
    Ok((split, format!("default train=0.67,test=0.33 ({why})")))
}

/// The split that the checkpoint's run recorded, if it did.
pub(super) fn recorded(checkpoint: &Path) -> Result<Option<(PathBuf, SplitRecord)>> {
    let Some(place) = run_folder(checkpoint).map(|run| run.join("split.json")).filter(|p| p.is_file()) else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(&place).map_err(|e| Error::io(&place, "read the run's split", &e))?;
    let record = serde_json::from_str(&text).map_err(|e| {
        Error::input("the split's record cannot be read").at(place.display()).found(e.to_string())
    })?;
    Ok(Some((place, record)))
}

/// Cells of a part that have a class, with it.
fn labelled(cells: &[u32], class: impl Fn(u32) -> Option<usize>) -> (Vec<u32>, Vec<usize>) {
    cells.iter().filter_map(|&c| Some((c, class(c)?))).unzip()
}

/// Prototypes (P, D) about a centre (D).
struct Prototypes {
    vectors: Vec<f32>,
    centre: Vec<f32>,
    origin: &'static str,
}

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
    // The labels first: a misspelt column should not wait for a model.
    let (split, split_origin) = choose_split(corpus, &request.checkpoint, &request.label, &request.split)?;
    let labels = match &split.labels {
        Some(l) if l.column == request.label => l.clone(),
        _ => Labels::read(corpus, &request.label, &request.split.exclude)?,
    };
    let class = |cell: u32| labels.class(cell as usize);
    let mut notes = Vec::new();
    let (visible, visible_labels) = if split.labels.as_ref().is_some_and(|l| l.column == request.label) {
        let training = split.training();
        let by_cell = training.cells().iter().zip(training.labels());
        by_cell.filter(|(_, l)| **l >= 0).map(|(c, l)| (*c, *l as usize)).unzip()
    } else {
        labelled(&split.train, class)
    };
    let scored = match request.part {
        Part::Test => &split.test,
        Part::Val => &split.val,
    };
    let (test, truth) = labelled(scored, class);
    check_parts(request, &split, &visible_labels, &test)?;
    let mut train_counts = vec![0usize; labels.classes.len()];
    split.train.iter().filter_map(|&c| class(c)).for_each(|k| train_counts[k] += 1);

    let mut embedder = Embedder::<B, A>::open(dev, &request.checkpoint, corpus.clone(), &request.embed)?;
    let width = embedder.width();
    // All training cells: centre and marker scale need no labels. Those with a visible one are the reference of probe and kNN.
    let train_rows = embedder.collect(&split.train, &progress)?;
    let test_rows = embedder.collect(&test, &progress)?;
    let (train_all, test_set) = (Rows::new(&train_rows, width)?, Rows::new(&test_rows, width)?);
    let place: Vec<usize> = visible.iter().map(|c| split.train.binary_search(c).unwrap_or(0)).collect();
    let visible_rows = train_all.select(&place);
    let train_set = Rows::new(&visible_rows, width)?;
    let frozen = frozen(train_set, &visible_labels, test_set, &truth, labels.classes.len(), request.frozen)?;
    if !frozen.linear_probe_converged {
        notes.push("the linear probe ran out of iterations".into());
    }

    let mut classes = labels.classes.clone();
    let mut methods: Vec<(&'static str, Classification)> = Vec::new();
    let own_space =
        embedder.layer() == embedder.config().layer && embedder.pooling() == embedder.config().pooling;
    let classifier = checkpoint::read_classifier(embedder.folder(), width)?.filter(|_| own_space);
    let logits = classifier.as_ref().map(|c| heads::logits(&test_rows, &c.weights)).unwrap_or_default();
    if let Some(c) = &classifier {
        let predicted = class_of_names(&c.labels, &labels.classes, &mut classes);
        let predicted: Vec<usize> =
            logits.chunks_exact(c.labels.len()).map(|r| predicted[top(r, 1)[0]]).collect();
        methods.push(("classifier", classification(&truth, &predicted, classes.len())?));
    }

    // Zero-shot: prototypes and markers over the same types.
    let raw = request.markers.as_ref().map(|m| m.load(corpus)).transpose()?;
    let allow = request.markers.as_ref().is_some_and(|m| m.allow_unmatched);
    let mut stored =
        StoredPrototypes::read(embedder.folder(), width)?.filter(|_| request.prototypes.is_none());
    if stored.as_ref().is_some_and(|s| s.layer != embedder.layer() || s.pooling != embedder.pooling()) {
        notes.push("the checkpoint's prototypes belong to another layer or pooling: left out".into());
        stored = None;
    }
    let names = stored.as_ref().map_or_else(|| labels.classes.clone(), |s| s.names.clone());
    let markers = raw
        .as_ref()
        .map(|(raw, map)| raw.for_labels(&names, map.as_deref(), allow || stored.is_some()))
        .transpose()?;
    let marker_train = markers.as_ref().map(|m| marker_scores(corpus, &split.train, m)).transpose()?;
    let marker_test = match (&markers, &marker_train) {
        (Some(m), Some(train)) => {
            let mut u = marker_scores(corpus, &test, m)?;
            MarkerScale::fit(train, m.len()).apply(&mut u);
            Some(u)
        }
        _ => None,
    };
    if let (Some(c), Some(u)) = (&classifier, &marker_test) {
        let map = raw.as_ref().and_then(|(_, map)| map.as_deref());
        let column: Option<Vec<usize>> = c.labels.iter().map(|l| column_of(l, &names, map)).collect();
        if let Some(column) = column {
            let predicted = class_of_names(&c.labels, &labels.classes, &mut classes);
            let called: Vec<usize> = logits
                .chunks_exact(column.len())
                .zip(u.chunks_exact(names.len()))
                .map(|(logits, u)| predicted[top(&with_markers(logits, u, &column), 1)[0]])
                .collect();
            methods.push(("classifier_markers", classification(&truth, &called, classes.len())?));
        }
    }
    let prototypes = match stored {
        Some(s) => Some(Prototypes { vectors: s.vectors, centre: s.centre, origin: "checkpoint" }),
        None => {
            // Labels of the training cells, hidden ones as −1, in the order of the rows.
            let mut known = vec![-1i32; split.train.len()];
            place.iter().zip(&visible_labels).for_each(|(&i, &l)| known[i] = l as i32);
            make_prototypes(
                request,
                &mut embedder,
                train_all,
                &names,
                markers.as_ref(),
                marker_train.as_deref(),
                &known,
            )?
        }
    };
    let map = raw.as_ref().and_then(|(_, map)| map.as_deref());
    let column: Vec<Option<usize>> = labels.classes.iter().map(|c| column_of(c, &names, map)).collect();
    let cosine = prototypes
        .as_ref()
        .map(|p| cosines(test_set, Rows::new(&p.vectors, width)?, &p.centre))
        .transpose()?;
    let missing: Vec<&str> =
        column.iter().zip(&labels.classes).filter(|(c, _)| c.is_none()).map(|(_, l)| l.as_str()).collect();
    let mut recall = Vec::new();
    if cosine.is_some() || marker_test.is_some() {
        if !missing.is_empty() {
            notes
                .push(format!("no prototype or marker set for {}: left out of recall@k", missing.join(", ")));
        }
        let class_of_column = {
            let mut of = vec![None; names.len()];
            column.iter().enumerate().for_each(|(k, c)| c.iter().for_each(|&c| of[c] = of[c].or(Some(k))));
            let named = class_of_names(&names, &labels.classes, &mut classes);
            of.into_iter().zip(named).map(|(o, n): (Option<usize>, usize)| o.unwrap_or(n)).collect::<Vec<_>>()
        };
        let wanted: Vec<Option<usize>> = truth.iter().map(|&t| column[t]).collect();
        for (evidence, name) in
            [(Evidence::Prototype, "prototype"), (Evidence::Markers, "markers"), (Evidence::Both, "both")]
        {
            let Ok(scores) = combine(evidence, cosine.as_deref(), marker_test.as_deref()) else { continue };
            recall.extend(recall_at(&scores, names.len(), &wanted, &RECALL_AT)?.map(|r| (evidence, r)));
            let called: Vec<usize> =
                scores.chunks_exact(names.len()).map(|row| class_of_column[top(row, 1)[0]]).collect();
            methods.push((name, classification(&truth, &called, classes.len())?));
        }
    }
    let evidence = match request.evidence {
        Some(e) if !recall.iter().any(|(have, _)| *have == e) => {
            return combine(e, cosine.as_deref(), marker_test.as_deref())
                .and(Err(Error::input("no test cell has a type with a prototype or marker set")));
        }
        Some(e) => Some(e),
        None => recall.first().map(|(e, _)| *e),
    };
    methods.push(("linear_probe", frozen.linear_probe.clone()));
    methods.push(("knn", frozen.knn.clone()));
    let zero_shot = evidence.filter(|_| request.evidence.is_some() || cosine.is_some()).map(Evidence::name);
    let rank = |name: &str| match name {
        "classifier_markers" if request.evidence == Some(Evidence::Both) => 0,
        "classifier" => 1,
        n if Some(n) == zero_shot => 2,
        "linear_probe" => 3,
        _ => 4,
    };
    let (predictor, own) = methods.iter().min_by_key(|(n, _)| rank(n)).cloned().expect("the probe is there");

    let mixing = match &request.batch_key {
        None => None,
        Some(key) => {
            let cells: Vec<u32> = visible.iter().chain(&test).copied().collect();
            let types: Vec<usize> = visible_labels.iter().chain(&truth).copied().collect();
            let values = [visible_rows.as_slice(), &test_rows].concat();
            Some(mix(corpus, key, &cells, &types, Rows::new(&values, width)?, request.frozen.seed)?)
        }
    };
    Ok(Evaluation {
        classes,
        predictor,
        own,
        methods,
        frozen,
        evidence,
        recall,
        prototypes: prototypes.map(|p| p.origin),
        mixing,
        train_counts,
        thresholds: request.thresholds,
        split_origin,
        part: request.part,
        split: split.record(),
        train_cells: visible.len(),
        test_cells: test.len(),
        checkpoint: embedder.folder().to_path_buf(),
        layer: embedder.layer(),
        notes,
    })
}

fn check_parts(request: &Request, split: &Split, visible: &[usize], test: &[u32]) -> Result<()> {
    let at = |e: Error| e.at(format!("{}, obs column {:?}", request.corpus.path().display(), request.label));
    if visible.is_empty() || test.is_empty() {
        let (part, example) = match request.part {
            Part::Test => ("test", "train=0.67,test=0.33"),
            Part::Val => ("validation", "train=0.5,val=0.17,test=0.33"),
        };
        return Err(at(Error::input("the split leaves no labelled cells to train or test on"))
            .found(format!("{} labelled training cells, {} labelled {part} cells", visible.len(), test.len()))
            .next(format!("--split {example} (the corpus has {} cells)", request.corpus.cells())));
    }
    let first = visible[0];
    if visible.iter().all(|&l| l == first) {
        let all = split.labels.as_ref().map_or(1, |l| l.classes.len());
        return Err(at(Error::input(
            "the training part holds a single class: there is nothing to tell apart",
        ))
        .found(format!("{all} class(es) in the column, one among the labelled training cells"))
        .next("choose another --label or split"));
    }
    Ok(())
}

/// Class index of each name: that of the equal label, or a new class behind the labels.
fn class_of_names(names: &[String], labels: &[String], classes: &mut Vec<String>) -> Vec<usize> {
    names
        .iter()
        .map(|name| {
            labels.iter().position(|l| plain(l) == plain(name)).unwrap_or_else(|| {
                classes.iter().position(|c| c == name).unwrap_or_else(|| {
                    classes.push(name.clone());
                    classes.len() - 1
                })
            })
        })
        .collect()
}

/// Column of `label` among `names`: by the map, by equality, by letters and digits.
fn column_of(label: &str, names: &[String], map: Option<&[(String, String)]>) -> Option<usize> {
    let position = |wanted: &str| names.iter().position(|n| n == wanted);
    let mapped = map.and_then(|m| m.iter().find(|(l, _)| l == label)).and_then(|(_, set)| position(set));
    mapped.or_else(|| position(label)).or_else(|| names.iter().position(|n| plain(n) == plain(label)))
}

/// Lower-case letters, digits and signs: `CD16+` is never `CD16-`.
fn plain(name: &str) -> String {
    name.to_lowercase().chars().filter(|c| c.is_alphanumeric() || matches!(c, '+' | '-')).collect()
}

/// Prototypes from markers or labels where the checkpoint stores none: what refine would start from.
fn make_prototypes<B: Backend<A>, A: Act>(
    request: &Request,
    embedder: &mut Embedder<B, A>,
    rows: Rows,
    names: &[String],
    markers: Option<&MarkerSets>,
    scores: Option<&[f32]>,
    labels: &[i32],
) -> Result<Option<Prototypes>> {
    let mode = match (request.prototypes, markers) {
        (Some(mode), _) => mode,
        (None, Some(_)) => PrototypeMode::Cells,
        (None, None) => return Ok(None),
    };
    let empty = MarkerSets { names: names.to_vec(), sets: vec![Vec::new(); names.len()] };
    if markers.is_none() && mode != PrototypeMode::Labels {
        return Err(Error::usage("these prototypes are made from marker sets").next("--markers M.gmt"));
    }
    let (vectors, centre) = build_prototypes(
        embedder,
        mode,
        rows,
        markers.unwrap_or(&empty),
        scores.map(<[f32]>::to_vec),
        labels,
    )?;
    Ok(Some(Prototypes { vectors, centre, origin: origin(mode) }))
}

/// Where prototypes of this mode come from, in words.
pub(super) fn origin(mode: PrototypeMode) -> &'static str {
    match mode {
        PrototypeMode::Sentence => "marker sentences",
        PrototypeMode::Tokens => "marker tokens",
        PrototypeMode::Cells => "best-scoring training cells",
        PrototypeMode::Labels => "label means",
    }
}

/// Prototypes (P, D) made over reference `rows` (cells, D), and the rows' mean (D) as their centre. `scores` are raw marker
/// scores (cells, P); `labels` are −1 where unknown.
pub fn build_prototypes<B: Backend<A>, A: Act>(
    embedder: &mut Embedder<B, A>,
    mode: PrototypeMode,
    rows: Rows,
    markers: &MarkerSets,
    mut scores: Option<Vec<f32>>,
    labels: &[i32],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut teacher = Teacher::new(rows.width());
    teacher.push(rows.values())?;
    if let Some(u) = &mut scores {
        Standardiser::fit(u, markers.len()).apply(u);
    }
    let word = if mode == PrototypeMode::Tokens { embedder.word_table()? } else { Vec::new() };
    let sources = Sources {
        markers,
        context: embedder.context(),
        word: &word,
        teacher: &teacher,
        labels,
        scores: scores.as_deref(),
    };
    let config = ObjectiveConfig { prototypes: mode, ..Default::default() };
    let vectors = initial(&config, &sources, |sentences| embedder.sentences(sentences))?;
    Ok((vectors, rows.mean().into_iter().map(|m| m as f32).collect()))
}

/// Mixing of the batches in obs column `key` over `cells`, or over a seeded sample of them.
fn mix(corpus: &Corpus, key: &str, cells: &[u32], types: &[usize], rows: Rows, seed: u64) -> Result<Mixing> {
    let batches = corpus.categorical(key)?;
    let mut chosen: Vec<usize> =
        (0..cells.len()).filter(|&i| batches.codes[cells[i] as usize] >= 0).collect();
    if chosen.is_empty() {
        return Err(Error::input("no cell has a value in the batch column").at(format!("obs column {key:?}")));
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
