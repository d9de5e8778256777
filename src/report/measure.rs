//! What the report measures: `eval` on each run and on what it started from, on the cells and the split that the run recorded.
//!
//! A checkpoint that several runs share is measured once. Where something cannot be measured (a corpus that has moved, no label
//! column, a damaged checkpoint) the reason stands in its place, and the page says it.

use super::run::Run;
use crate::corpus::Corpus;
use crate::device::Act;
use crate::error::Result;
use crate::eval::embed::{EmbedOptions, Embedder, run_context, run_folder};
use crate::eval::evaluate::evaluate;
use crate::eval::frozen::FrozenSettings;
use crate::eval::metrics::ShareThresholds;
use crate::eval::request::{MarkerChoice, Request, SplitChoice};
use crate::eval::rows::Rows;
use crate::eval::summary::Evaluation;
use crate::eval::zero_shot::{cosines, top};
use crate::objective::StoredPrototypes;
use crate::ops::Backend;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What flags say over the runs' own records.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Corpus instead of the recorded one.
    pub corpus: Option<PathBuf>,
    /// Label column instead of the recorded one.
    pub label: Option<String>,
    /// Marker sets instead of those that the runs used.
    pub markers: Option<PathBuf>,
    /// Seed of the measures.
    pub seed: u64,
    /// Most cells of a map.
    pub map_cells: usize,
    /// Leave measures and maps out.
    pub records_only: bool,
}

/// One checkpoint, measured.
pub struct Model {
    /// Name for people.
    pub name: String,
    /// Index of its run among the report's, where it is one of them.
    pub run: Option<usize>,
    /// Stage that made it, where known.
    pub stage: String,
    /// The model folder.
    pub folder: PathBuf,
    /// Its scores; the reason, where there are none.
    pub found: std::result::Result<Evaluation, String>,
    /// Cells for its map where there are no scores: rows and the type that each cell is nearest to.
    pub unlabelled: Option<Unlabelled>,
    /// The cells it was measured on.
    pub corpus: Option<Arc<Corpus>>,
}

/// Embedded cells without labels.
pub struct Unlabelled {
    /// Corpus indices, (C).
    pub cells: Vec<u32>,
    /// (C, D).
    pub rows: Vec<f32>,
    /// D.
    pub width: usize,
    /// Names of the types, and the nearest of each cell, (C).
    pub types: Vec<String>,
    /// Index of the nearest type, (C).
    pub nearest: Vec<usize>,
}

/// Two models of which one came of the other, or of the same with one stage more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Index of the model before.
    pub before: usize,
    /// Index of the model after.
    pub after: usize,
    /// What lies between: `refine`, `fine-tuning`, or `refine before fine-tuning`.
    pub what: &'static str,
}

/// Everything measured.
#[derive(Default)]
pub struct Measures {
    /// Checkpoints, in the order of the runs, each behind what it started from.
    pub models: Vec<Model>,
    /// Comparisons, the most telling first.
    pub pairs: Vec<Pair>,
}

/// Measures `runs` and what they started from. `say` hears what is being done.
///
/// # Errors
/// None of a single checkpoint's: those become its reason.
pub fn measure<B: Backend<A>, A: Act>(
    dev: &B,
    runs: &[Run],
    options: &Options,
    say: &dyn Fn(&str),
) -> Result<Measures> {
    let mut measures = Measures::default();
    let mut keys: Vec<(PathBuf, Value)> = Vec::new();
    let mut places: Vec<(Option<usize>, usize)> = Vec::new(); // of each run: parent, itself
    for run in runs {
        let parent = run.parent().and_then(|p| crate::model::checkpoint::resolve(&p).ok().map(|f| (p, f)));
        let before = parent.map(|(path, folder)| {
            let stage = run_folder(&path).and_then(|p| Run::read(&p).ok());
            let name = named_as(runs, &folder).unwrap_or_else(|| display_name(&path));
            let stage = stage.map_or(String::new(), |r| r.stage().to_string());
            place(dev, &mut measures, &mut keys, run, folder, (name, stage), options, say)
        });
        let own = crate::model::checkpoint::resolve(&run.path).unwrap_or_else(|_| run.path.clone());
        let names = (run.name.clone(), run.stage().to_string());
        let after = place(dev, &mut measures, &mut keys, run, own, names, options, say);
        places.push((before, after));
    }
    for model in &mut measures.models {
        model.run = runs.iter().position(|r| same_folder(&r.path, &model.folder));
    }
    pair(&mut measures, runs, &places);
    Ok(measures)
}

/// The index of the model in `folder` under the run's split, measured now if it was not before.
#[allow(clippy::too_many_arguments)] // the parts of one measurement
fn place<B: Backend<A>, A: Act>(
    dev: &B,
    measures: &mut Measures,
    keys: &mut Vec<(PathBuf, Value)>,
    run: &Run,
    folder: PathBuf,
    (name, stage): (String, String),
    options: &Options,
    say: &dyn Fn(&str),
) -> usize {
    let key = (std::fs::canonicalize(&folder).unwrap_or(folder.clone()), run.split.clone());
    if let Some(i) = keys.iter().position(|k| *k == key) {
        return i;
    }
    keys.push(key);
    let mut model = Model {
        name,
        run: None,
        stage,
        folder,
        found: Err("left out on request (--records-only)".into()),
        unlabelled: None,
        corpus: None,
    };
    if !options.records_only {
        say(&format!("measure {}", model.name));
        model.found = evaluated::<B, A>(dev, run, &mut model.corpus, &model.folder, options);
        if model.found.is_err() && model.corpus.is_some() {
            model.unlabelled = unlabelled::<B, A>(dev, &model, options).ok();
        }
    }
    measures.models.push(model);
    measures.models.len() - 1
}

fn evaluated<B: Backend<A>, A: Act>(
    dev: &B,
    run: &Run,
    opened: &mut Option<Arc<Corpus>>,
    folder: &Path,
    options: &Options,
) -> std::result::Result<Evaluation, String> {
    let short = |e: crate::error::Error| e.to_string().lines().next().unwrap_or_default().to_string();
    let path = options.corpus.clone().or_else(|| run.corpus());
    let path = path.ok_or("the run's corpus is not where it was (name it with --corpus)")?;
    let corpus = Arc::new(Corpus::open(&path).map_err(short)?);
    let recorded = run.split["corpus_digest"].as_str();
    if options.corpus.is_none() && recorded.is_some_and(|digest| digest != corpus.digest()) {
        return Err(format!("{} is no longer the corpus that the run read", path.display()));
    }
    *opened = Some(corpus.clone());
    let label = options.label.clone().or_else(|| run.record["label"].as_str().map(str::to_string));
    let label = label.ok_or("the run saw no labels (name a column with --label)")?;
    let request = Request {
        corpus,
        checkpoint: folder.to_path_buf(),
        label,
        split: SplitChoice {
            seed: Some(options.seed),
            recorded_by: Some(run.path.clone()),
            ..SplitChoice::default()
        },
        part: Default::default(),
        markers: markers(run, options).map(|file| MarkerChoice {
            file,
            allow_unmatched: true,
            ..MarkerChoice::default()
        }),
        evidence: None,
        prototypes: None,
        batch_key: None,
        thresholds: ShareThresholds::default(),
        embed: embed_options(folder),
        frozen: FrozenSettings { seed: options.seed, ..FrozenSettings::default() },
    };
    evaluate::<B, A>(dev, &request, |_| ()).map_err(short)
}

fn embed_options(folder: &Path) -> EmbedOptions {
    EmbedOptions { max_tokens: run_context(folder), ..EmbedOptions::default() }
}

/// The marker sets that the run used, or that a run it came from used.
fn markers(run: &Run, options: &Options) -> Option<PathBuf> {
    if options.markers.is_some() {
        return options.markers.clone();
    }
    let mut folder = Some(run.path.clone());
    for _ in 0..4 {
        let here = folder?;
        let file = here.join("markers.gmt");
        if file.is_file() {
            return Some(file);
        }
        folder = Run::read(&here).ok().and_then(|r| r.parent()).and_then(|p| run_folder(&p));
    }
    None
}

/// Every cell (up to the most of a map, evenly taken) with the nearest prototype, where the checkpoint has some.
fn unlabelled<B: Backend<A>, A: Act>(dev: &B, model: &Model, options: &Options) -> Result<Unlabelled> {
    let corpus = model.corpus.clone().ok_or_else(|| crate::error::Error::bug("no corpus"))?;
    let mut embedder =
        Embedder::<B, A>::open(dev, &model.folder, corpus.clone(), &embed_options(&model.folder))?;
    let (all, most) = (corpus.cells(), options.map_cells);
    let cells: Vec<u32> = match all <= most {
        true => (0..all as u32).collect(),
        false => (0..most).map(|i| (i * all / most) as u32).collect(),
    };
    let rows = embedder.collect(&cells, |_| ())?;
    let width = embedder.width();
    let stored = StoredPrototypes::read(embedder.folder(), width)?;
    let (types, nearest) = match stored {
        Some(s) => {
            let scores = cosines(Rows::new(&rows, width)?, Rows::new(&s.vectors, width)?, &s.centre)?;
            let nearest = scores.chunks_exact(s.names.len()).map(|row| top(row, 1)[0]).collect();
            (s.names, nearest)
        }
        None => (vec!["cells".to_string()], vec![0; cells.len()]),
    };
    Ok(Unlabelled { cells, rows, width, types, nearest })
}

/// Refine beside what it started from; fine-tuning after refine beside fine-tuning without; then each run beside its start.
fn pair(measures: &mut Measures, runs: &[Run], places: &[(Option<usize>, usize)]) {
    let mut pairs: Vec<Pair> = Vec::new();
    let mut add = |before: usize, after: usize, what: &'static str| {
        if before != after && !pairs.iter().any(|p| (p.before, p.after) == (before, after)) {
            pairs.push(Pair { before, after, what });
        }
    };
    let of = |stage: &'static str| runs.iter().zip(places).filter(move |(r, _)| r.stage() == stage);
    for (_, (before, after)) in of("refine") {
        if let Some(before) = before {
            add(*before, *after, "refine");
        }
    }
    for (_, (start, after)) in of("finetune") {
        // A second fine-tuning that began where the refine under the first began.
        let refined = of("refine").find(|(_, (_, own))| Some(*own) == *start).and_then(|(_, (b, _))| *b);
        for (_, (other, before)) in of("finetune") {
            if refined.is_some() && *other == refined {
                add(*before, *after, "refine before fine-tuning");
            }
        }
    }
    for (run, (before, after)) in runs.iter().zip(places) {
        if let (Some(before), "finetune") = (before, run.stage()) {
            let told = of("refine").any(|(_, (b, own))| Some(*own) == Some(*before) || *b == Some(*before));
            if !told {
                add(*before, *after, "fine-tuning");
            }
        }
    }
    measures.pairs = pairs;
}

fn same_folder(run: &Path, folder: &Path) -> bool {
    let absolute = |p: &Path| std::fs::canonicalize(p).ok();
    absolute(run).is_some_and(|run| absolute(folder).is_some_and(|f| f.starts_with(run)))
}

/// The name of the run among `runs` that `folder` belongs to.
fn named_as(runs: &[Run], folder: &Path) -> Option<String> {
    runs.iter().find(|r| same_folder(&r.path, folder)).map(|r| r.name.clone())
}

fn display_name(path: &Path) -> String {
    let run = run_folder(path).unwrap_or_else(|| path.to_path_buf());
    run.file_name().map_or_else(|| run.display().to_string(), |n| n.to_string_lossy().into_owned())
}
