//! What a refine run starts from: markers, the frozen teacher's embeddings, targets and the first prototypes.
//!
//! All of it comes from the training split alone. The teacher's embeddings and q⁰ are computed once, by the encoder as it was
//! given, and kept in the run folder (`start.safetensors`): a resumed run, whose encoder has moved on, reads them there.

use super::inputs::{Opened, RunInputs};
use super::observer::Observer;
use super::refine::{Parts, Truth};
use super::trunk::Trunk;
use crate::corpus::Corpus;
use crate::corpus::splits::TrainingCells;
use crate::device::{Act, Device};
use crate::digest::sha256_of_file;
use crate::disk;
use crate::error::{Code, Error, Result};
use crate::genes::marker_score::{Standardiser, marker_scores};
use crate::genes::markers::{MarkerSets, read_marker_map};
use crate::genes::markers_derive::derive;
use crate::genes::markers_file::RawSets;
use crate::model::ledger::Ledger;
use crate::model::tensors::{Declared, TensorFile, write};
use crate::objective::{CellTargets, Objective, PrototypeMode, Start, Teacher, prototypes};
use crate::ops::Backend;
use std::path::{Path, PathBuf};

/// Name of the file in the run folder.
pub const START: &str = "start.safetensors";

/// Where marker sets come from.
#[derive(Debug, Clone, Default)]
pub struct MarkerInputs {
    /// GMT or TSV file, or `derive`: one versus rest on the labelled training cells.
    pub markers: PathBuf,
    /// Label to set name.
    pub map: Option<PathBuf>,
    /// Symbols of the marker file to ids of the vocabulary.
    pub gene_map: Option<PathBuf>,
    /// Labels without a set are allowed.
    pub allow_unmatched: bool,
}

/// Genes per derived set.
const DERIVED_GENES: usize = 50;

/// The marker sets, one per type: the classes of the label, or without a label the sets of the file.
pub fn marker_sets(
    inputs: &MarkerInputs,
    opened: &Opened,
    training: &TrainingCells<'_>,
    labelled: bool,
) -> Result<MarkerSets> {
    if inputs.markers == Path::new("derive") {
        if !labelled {
            return Err(Error::new(Code::MarkersNeeded, "markers can be derived from labelled cells alone")
                .next("add --label COLUMN, or give a marker file with --markers"));
        }
        return Ok(derive(&opened.corpus, training, DERIVED_GENES)?.markers);
    }
    let raw = RawSets::load(&inputs.markers, &opened.vocab, inputs.gene_map.as_deref())?;
    if !labelled {
        return raw.all();
    }
    let map = inputs.map.as_deref().map(read_marker_map).transpose()?;
    raw.for_labels(training.classes(), map.as_deref(), inputs.allow_unmatched)
}

/// Builds and starts the objective; `trunk` holds the encoder as it was given, or, when the run is resumed, as it is now.
pub fn start<B: Backend<A>, A: Act>(
    trunk: &mut Trunk<B, A>,
    opened: &Opened,
    inputs: &RunInputs,
    markers: &MarkerSets,
    training: &TrainingCells<'_>,
    labelled: bool,
    observer: &mut dyn Observer,
) -> Result<Started<B>> {
    let (config, settings) = (&opened.settings.objective, &opened.settings);
    let (types, width, cells) = (markers.len(), trunk.config().width, training.cells());
    let labels = match labelled {
        true => training.labels().to_vec(),
        false => vec![-1; cells.len()],
    };
    let needs_scores = labels.iter().any(|l| *l < 0) || config.prototypes == PrototypeMode::Cells;
    let (scores, standard) = match needs_scores {
        true => {
            let mut scores = marker_scores(&opened.corpus, cells, markers)?;
            let standard = Standardiser::fit(&scores, types);
            standard.apply(&mut scores);
            (Some(scores), Some(standard))
        }
        false => (None, None),
    };
    let place = inputs.out.join(START);
    let (teacher, q, rows) = if opened.resume.is_some() {
        let (teacher, q) = read_start(&place, cells.len(), types, width)?;
        (teacher, q, None)
    } else {
        observer.note("embedding the training cells with the frozen encoder");
        let rows = trunk.embed(cells)?;
        let mut teacher = Teacher::new(width);
        teacher.push(&rows)?;
        let special = trunk.config().prefix() + trunk.config().suffix();
        let word = match config.prototypes {
            PrototypeMode::Tokens => trunk.dev.download(&trunk.params.master().named().embeddings.word)?,
            _ => Vec::new(),
        };
        let sources = prototypes::Sources {
            markers,
            context: trunk.options.max_tokens - special,
            word: &word,
            teacher: &teacher,
            labels: &labels,
            scores: scores.as_deref(),
        };
        let q = prototypes::initial(config, &sources, |sentences| trunk.embed_lists(sentences))?;
        (teacher, q, Some(rows))
    };
    let refresh = match config.refresh > 0.0 && config.prototypes == PrototypeMode::Cells {
        true => {
            let sources = prototypes::Sources {
                markers,
                context: 0,
                word: &[],
                teacher: &teacher,
                labels: &labels,
                scores: scores.as_deref(),
            };
            prototypes::best_cells(&sources, config.cells_per_prototype)?
        }
        false => Vec::new(),
    };
    let targets = CellTargets::new(&labels, scores.as_deref(), types, config)?;
    observer.note(&format!(
        "{types} prototypes; {} labelled cells, {} more by their markers, of {}",
        targets.labelled(),
        targets.kept() - targets.labelled().min(targets.kept()),
        cells.len()
    ));
    let mut ledger = Ledger::new(&trunk.dev);
    let batch = trunk.options.cells;
    let mut objective =
        Objective::planned(&mut ledger, config.clone(), types, width, batch, targets.entries())?;
    let jaccard = markers.jaccard();
    objective.start(&trunk.dev, Start { prototypes: &q, jaccard: &jaccard, teacher, targets })?;
    let truth = match &opened.split.labels {
        Some(labels) if labelled => Truth::Labels(labels.codes.clone()),
        _ => Truth::Markers(best_types(&opened.corpus, &opened.split.val, markers, standard.as_ref())?),
    };
    let parts = Parts {
        objective,
        training: cells.to_vec(),
        names: markers.names.clone(),
        truth,
        refresh,
        learning_rate: settings.optimizer.prototype_learning_rate,
    };
    Ok(Started { parts, first: rows.map(|teacher| First { teacher, prototypes: q, width }) })
}

/// The stage's parts, and what the folder of a new run must keep of them.
pub struct Started<B: Device> {
    /// The parts.
    pub parts: Parts<B>,
    /// Of a new run.
    pub first: Option<First>,
}

/// The teacher and the prototypes that a run began with.
pub struct First {
    teacher: Vec<f32>,    // (cells, D)
    prototypes: Vec<f32>, // (P, D)
    width: usize,
}

impl First {
    /// Writes [`START`] into the run folder.
    pub fn write(&self, out: &Path) -> Result<()> {
        write_start(&out.join(START), &self.teacher, &self.prototypes, self.width)
    }
}

/// The type of the best marker score of `cells`, at their corpus indices; -1 elsewhere.
fn best_types(
    corpus: &Corpus,
    cells: &[u32],
    markers: &MarkerSets,
    standard: Option<&Standardiser>,
) -> Result<Vec<i32>> {
    let mut best = vec![-1; corpus.cells()];
    let Some(standard) = standard.filter(|_| !cells.is_empty()) else { return Ok(best) };
    let mut scores = marker_scores(corpus, cells, markers)?;
    standard.apply(&mut scores);
    for (cell, row) in cells.iter().zip(scores.chunks_exact(markers.len())) {
        let top = row.iter().enumerate().fold(0, |top, (k, u)| if *u > row[top] { k } else { top });
        best[*cell as usize] = top as i32;
    }
    Ok(best)
}

fn write_start(place: &Path, rows: &[f32], q: &[f32], width: usize) -> Result<()> {
    let partial = place.with_extension("partial");
    let tensors = vec![
        Declared::f32("teacher", &[rows.len() / width, width]),
        Declared::f32("prototypes", &[q.len() / width, width]),
    ];
    write(&partial, &[("format", "pt")], tensors, |t| {
        Ok(bytemuck::cast_slice(if t.name == "teacher" { rows } else { q }).to_vec())
    })?;
    disk::rename(&partial, place)
        .and_then(|()| disk::sync_folder(disk::parent(place)))
        .map_err(|e| Error::io(place, "publish the teacher's embeddings", &e))
}

fn read_start(place: &Path, cells: usize, types: usize, width: usize) -> Result<(Teacher, Vec<f32>)> {
    let file = TensorFile::open(place)?;
    let mut teacher = Teacher::new(width);
    teacher.push(&file.floats("teacher", &[cells, width])?)?;
    Ok((teacher, file.floats("prototypes", &[types, width])?))
}

/// SHA-256 of the start, for the run's identity: a resumed run must find the very same teacher.
pub fn digest(out: &Path) -> Result<String> {
    sha256_of_file(&out.join(START))
}
