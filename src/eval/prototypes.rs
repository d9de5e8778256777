//! Prototypes for a checkpoint that stores none: what refine would start from.

use super::embed::Embedder;
use super::request::Request;
use super::rows::Rows;
use crate::device::Act;
use crate::error::{Code, Error, Result};
use crate::genes::marker_score::Standardiser;
use crate::genes::markers::MarkerSets;
use crate::objective::prototypes::{Sources, initial};
use crate::objective::{ObjectiveConfig, PrototypeMode, Teacher};
use crate::ops::Backend;

/// Prototypes (P, D) about a centre (D).
pub(super) struct Prototypes {
    pub vectors: Vec<f32>,
    pub centre: Vec<f32>,
    pub origin: &'static str,
}

/// Prototypes from markers or labels.
pub(super) fn make_prototypes<B: Backend<A>, A: Act>(
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
        return Err(Error::new(Code::MarkersNeeded, "these prototypes are made from marker sets")
            .next("--markers M.gmt"));
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
