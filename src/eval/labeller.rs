//! Zero-shot labels for rows as they stream by: the types, what a full marker score is, and the softmax over both.
//!
//! Types are those of the checkpoint's prototypes where the marker file speaks of them, else the sets of the marker file; then
//! prototypes are made from the markers by the encoder itself. Without a marker file they are the checkpoint's.

use super::annotate::Request;
use super::embed::Embedder;
use super::prototypes::{build_prototypes, origin};
use super::request::recorded;
use super::rows::Rows;
use super::zero_shot::{Evidence, MarkerScale, TEMPERATURE, combine, cosines, posterior};
use crate::corpus::{Corpus, Split};
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::genes::marker_score::marker_scores;
use crate::genes::markers::MarkerSets;
use crate::objective::{PrototypeMode, StoredPrototypes};
use crate::ops::Backend;

/// What labels rows.
pub struct Labeller {
    /// Name of each type, (P).
    pub names: Vec<String>,
    /// Types without a usable marker set.
    pub without_markers: Vec<String>,
    /// Where prototypes came from; `None` where none were used.
    pub origin: Option<&'static str>,
    /// What the marker scale and the centre were taken from.
    pub reference: String,
    /// Softmax temperature.
    pub temperature: f32,
    /// What speaks for a label.
    pub evidence: Evidence,
    vectors: Vec<f32>, // (P, D)
    centre: Vec<f32>,  // (D)
    markers: Option<(MarkerSets, MarkerScale)>,
}

/// Scores of a block of cells, (n, P) each.
pub struct Scores {
    /// Softmax over the types.
    pub probability: Vec<f32>,
    /// Cosine to each prototype, where rows were given.
    pub cosine: Option<Vec<f32>>,
    /// Marker scores as shares of the best reference cell's, where there are markers.
    pub marker: Option<Vec<f32>>,
}

impl Labeller {
    /// Types of the marker file of `request`, and prototypes where its evidence needs them.
    ///
    /// # Errors
    /// Input: what corpus, checkpoint and markers can be guilty of.
    pub fn from_markers<B: Backend<A>, A: Act>(
        request: &Request,
        embedder: &mut Embedder<B, A>,
        progress: &impl Fn(u64),
    ) -> Result<Self> {
        let (cells, reference) = reference(request)?;
        let types = types(request, embedder, &cells, progress)?;
        let p = types.sets.len();
        let scale = MarkerScale::fit(&marker_scores(&request.corpus, &cells, &types.sets)?, p);
        let empty = types.sets.sets.iter().zip(&types.sets.names).filter(|(s, _)| s.is_empty());
        Ok(Labeller {
            names: types.sets.names.clone(),
            without_markers: empty.map(|(_, n)| n.clone()).collect(),
            origin: types.origin,
            reference,
            temperature: request.temperature.unwrap_or(types.temperature),
            evidence: request.evidence,
            vectors: types.vectors,
            centre: types.centre,
            markers: Some((types.sets, scale)),
        })
    }

    /// The checkpoint's own prototypes; `None` where it has none for this layer and pooling.
    pub fn from_checkpoint<B: Backend<A>, A: Act>(embedder: &Embedder<B, A>) -> Result<Option<Self>> {
        Ok(stored(embedder)?.map(|s| Labeller {
            without_markers: Vec::new(),
            origin: Some("checkpoint"),
            reference: "the checkpoint".into(),
            temperature: s.temperature,
            evidence: Evidence::Prototype,
            vectors: s.vectors,
            centre: s.centre,
            names: s.names,
            markers: None,
        }))
    }

    /// Cosines (n, P) of `rows` (n, D) and the prototypes, both about their centre.
    pub fn cosines(&self, rows: &[f32]) -> Result<Vec<f32>> {
        let width = self.centre.len();
        cosines(Rows::new(rows, width)?, Rows::new(&self.vectors, width)?, &self.centre)
    }

    /// Scores of `cells`, whose embeddings are `rows` (n, D) where the evidence needs them.
    pub fn scores(&self, corpus: &Corpus, cells: &[u32], rows: Option<&[f32]>) -> Result<Scores> {
        let cosine = rows.filter(|_| !self.vectors.is_empty()).map(|rows| self.cosines(rows)).transpose()?;
        let marker = self.markers.as_ref().map(|(sets, scale)| {
            let mut scores = marker_scores(corpus, cells, sets)?;
            scale.apply(&mut scores);
            Ok::<_, Error>(scores)
        });
        let marker = marker.transpose()?;
        let mut probability = combine(self.evidence, cosine.as_deref(), marker.as_deref())?;
        posterior(&mut probability, self.names.len(), self.temperature);
        Ok(Scores { probability, cosine, marker })
    }
}

/// The checkpoint's prototypes, where they are of the embedder's layer and pooling.
fn stored<B: Backend<A>, A: Act>(embedder: &Embedder<B, A>) -> Result<Option<StoredPrototypes>> {
    let stored = StoredPrototypes::read(embedder.folder(), embedder.width())?;
    Ok(stored.filter(|s| s.layer == embedder.layer() && s.pooling == embedder.pooling()))
}

struct Types {
    sets: MarkerSets,
    vectors: Vec<f32>, // (P, D)
    centre: Vec<f32>,  // (D)
    origin: Option<&'static str>,
    temperature: f32,
}

/// Reference cells and what they are.
fn reference(request: &Request) -> Result<(Vec<u32>, String)> {
    let corpus = &request.corpus;
    match recorded(&request.checkpoint)? {
        Some((place, record)) if record.corpus_digest == corpus.digest() => {
            let split = Split::restore(corpus, &record)?;
            Ok((split.train, format!("training cells of the split in {}", place.display())))
        }
        _ => Ok(((0..corpus.cells() as u32).collect(), "all cells".into())),
    }
}

/// The types with their marker sets, and their prototypes where the evidence needs them.
fn types<B: Backend<A>, A: Act>(
    request: &Request,
    embedder: &mut Embedder<B, A>,
    reference: &[u32],
    progress: &impl Fn(u64),
) -> Result<Types> {
    let width = embedder.width();
    let (raw, map) = request.markers.load(&request.corpus)?;
    let stored = if request.prototypes.is_none() { stored(embedder)? } else { None };
    if let Some(s) = stored {
        // The file may speak of other types than the checkpoint was refined towards: then they are new ones.
        if let Ok(sets) = raw.for_labels(&s.names, map.as_deref(), true) {
            let origin = Some("checkpoint");
            return Ok(Types {
                sets,
                vectors: s.vectors,
                centre: s.centre,
                origin,
                temperature: s.temperature,
            });
        }
    }
    let sets = raw.all()?;
    let temperature = TEMPERATURE;
    if request.evidence == Evidence::Markers {
        return Ok(Types { sets, vectors: Vec::new(), centre: Vec::new(), origin: None, temperature });
    }
    let mode = request.prototypes.unwrap_or(PrototypeMode::Cells);
    if mode == PrototypeMode::Labels {
        return Err(Error::new(Code::FlagConflict, "annotation has no labels to make prototypes from")
            .next("--prototypes cells"));
    }
    let rows = embedder.collect(reference, progress)?;
    let scores = marker_scores(&request.corpus, reference, &sets)?;
    let unknown = vec![-1; reference.len()];
    let (vectors, centre) =
        build_prototypes(embedder, mode, Rows::new(&rows, width)?, &sets, Some(scores), &unknown)?;
    Ok(Types { sets, vectors, centre, origin: Some(origin(mode)), temperature })
}
