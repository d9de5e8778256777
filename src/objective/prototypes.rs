//! Where prototypes start: q⁰ (P, D), in the space of the teacher's cell vectors.
//!
//! ```text
//! A sentence   q_k = f(markers of k, strongest first, as one cell)
//! B tokens     q_k = Σ_g a_kg E[g]
//! C cells      q_k = mean of h⁰ over the m cells with the highest u_ik: its own cells where labelled, else unlabelled ones
//! L labels     q_k = mean of h⁰ over the cells labelled k
//! ```
//! The frozen encoder is a closure from token lists to cell vectors, so nothing here knows the model.

use super::{ObjectiveConfig, PrototypeMode, Teacher};
use crate::error::{Code, Error, Result};
use crate::genes::markers::MarkerSets;

/// What prototypes may be made from.
pub struct Sources<'a> {
    /// Marker sets in the order of the types.
    pub markers: &'a MarkerSets,
    /// Most genes of a cell that the encoder takes, special tokens not counted.
    pub context: usize,
    /// Word embeddings (V, D) for mode B.
    pub word: &'a [f32],
    /// The teacher's embeddings of the training cells.
    pub teacher: &'a Teacher,
    /// Labels (N), -1 = missing.
    pub labels: &'a [i32],
    /// Marker scores (N, P), standardised; mode C needs them.
    pub scores: Option<&'a [f32]>,
}

/// q⁰ (P, D) by `config.prototypes`. `embed` turns marker sentences (token lists without special tokens) into cell vectors
/// (sentences, D).
///
/// # Errors
/// A type for which the mode has nothing to go by; whatever `embed` fails with.
pub fn initial(
    config: &ObjectiveConfig,
    sources: &Sources<'_>,
    embed: impl FnMut(&[Vec<u32>]) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    match config.prototypes {
        PrototypeMode::Sentence => sentences(sources, embed),
        PrototypeMode::Tokens => tokens(sources),
        PrototypeMode::Cells => cells(sources, config.cells_per_prototype),
        PrototypeMode::Labels => labels(sources),
    }
}

fn nothing_to_go_by(sources: &Sources<'_>, k: usize, wanted: &str) -> Error {
    Error::new(Code::NoPrototypeSource, "a type has nothing to make its prototype from")
        .at(&sources.markers.names[k])
        .found("no usable marker gene and no labelled training cell")
        .wanted(wanted)
        .next("add a set for it to the marker file, or leave the type out with --marker-map")
}

/// The cells labelled `k`.
fn labelled(sources: &Sources<'_>, k: usize) -> Vec<u32> {
    let own = sources.labels.iter().enumerate().filter(|(_, l)| **l == k as i32);
    own.map(|(i, _)| i as u32).collect()
}

/// A type without markers starts at its labelled cells' mean in every marker mode.
fn without_markers(sources: &Sources<'_>, k: usize) -> Result<Vec<f32>> {
    let own = labelled(sources, k);
    if own.is_empty() {
        return Err(nothing_to_go_by(sources, k, "a marker set, or cells with this label"));
    }
    Ok(sources.teacher.mean_of(&own))
}

/// Mode A.
fn sentences(
    sources: &Sources<'_>,
    mut embed: impl FnMut(&[Vec<u32>]) -> Result<Vec<f32>>,
) -> Result<Vec<f32>> {
    let width = sources.teacher.width();
    let sets = &sources.markers.sets;
    let strongest_first = |set: &Vec<(u32, f32)>| {
        let mut set = set.clone();
        set.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        set.iter().take(sources.context).map(|(token, _)| *token).collect::<Vec<u32>>()
    };
    let written: Vec<Vec<u32>> = sets.iter().filter(|s| !s.is_empty()).map(strongest_first).collect();
    let embedded = if written.is_empty() { Vec::new() } else { embed(&written)? };
    if embedded.len() != written.len() * width {
        return Err(Error::bug("marker sentences came back with another size").found(embedded.len()));
    }
    let mut rows = embedded.chunks_exact(width);
    let mut q = Vec::with_capacity(sets.len() * width);
    for (k, set) in sets.iter().enumerate() {
        match rows.next().filter(|_| !set.is_empty()) {
            Some(row) => q.extend_from_slice(row),
            None => q.extend(without_markers(sources, k)?),
        }
    }
    Ok(q)
}

/// Mode B.
fn tokens(sources: &Sources<'_>) -> Result<Vec<f32>> {
    let width = sources.teacher.width();
    let mut q = Vec::with_capacity(sources.markers.len() * width);
    for (k, set) in sources.markers.sets.iter().enumerate() {
        if set.is_empty() {
            q.extend(without_markers(sources, k)?);
            continue;
        }
        let total: f64 = set.iter().map(|(_, a)| *a as f64).sum();
        let mut mean = vec![0.0f64; width];
        for (token, a) in set {
            let row = &sources.word[*token as usize * width..][..width];
            mean.iter_mut().zip(row).for_each(|(m, e)| *m += *a as f64 / total * *e as f64);
        }
        q.extend(mean.iter().map(|m| *m as f32));
    }
    Ok(q)
}

/// The cells that mode C averages for each type, best first.
pub fn best_cells(sources: &Sources<'_>, m: usize) -> Result<Vec<Vec<u32>>> {
    let types = sources.markers.len();
    let scores = sources.scores.ok_or_else(|| Error::bug("prototypes from cells need marker scores"))?;
    let score = |i: u32, k: usize| scores[i as usize * types + k];
    let all_labelled = sources.labels.iter().all(|l| *l >= 0);
    let by_score = |mut cells: Vec<u32>, k: usize| {
        cells.sort_by(|a, b| score(*b, k).total_cmp(&score(*a, k)).then(a.cmp(b)));
        cells
    };
    let mut best = Vec::with_capacity(types);
    for k in 0..types {
        let own = by_score(labelled(sources, k), k);
        let has_markers = !sources.markers.sets[k].is_empty();
        let mut chosen = own;
        if !all_labelled && has_markers {
            let free = (0..sources.labels.len() as u32).filter(|i| sources.labels[*i as usize] < 0);
            chosen.extend(by_score(free.collect(), k));
        }
        if chosen.is_empty() && has_markers {
            // A type that no training cell carries: the cell that looks most like it.
            let all = by_score((0..sources.labels.len() as u32).collect(), k);
            chosen.extend(all.first());
        }
        if chosen.is_empty() {
            return Err(nothing_to_go_by(sources, k, "a marker set, or cells with this label"));
        }
        chosen.truncate(m);
        best.push(chosen);
    }
    Ok(best)
}

/// Mode C.
fn cells(sources: &Sources<'_>, m: usize) -> Result<Vec<f32>> {
    let best = best_cells(sources, m)?;
    Ok(best.iter().flat_map(|cells| sources.teacher.mean_of(cells)).collect())
}

/// Mode L.
fn labels(sources: &Sources<'_>) -> Result<Vec<f32>> {
    let mut q = Vec::new();
    for k in 0..sources.markers.len() {
        let own = labelled(sources, k);
        if own.is_empty() {
            return Err(nothing_to_go_by(sources, k, "cells with this label (prototypes = \"labels\")"));
        }
        q.extend(sources.teacher.mean_of(&own));
    }
    Ok(q)
}

/// Mode C's refresh: q ← r q + (1 - r) mean, with `mean` (P, D) over the same cells under the current encoder.
pub fn refresh(q: &mut [f32], mean: &[f32], r: f32) {
    q.iter_mut().zip(mean).for_each(|(q, m)| *q = r * *q + (1.0 - r) * m);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markers(sets: &[&[(u32, f32)]]) -> MarkerSets {
        MarkerSets {
            names: (0..sets.len()).map(|k| format!("type {k}")).collect(),
            sets: sets.iter().map(|s| s.to_vec()).collect(),
        }
    }

    fn table() -> Teacher {
        let mut teacher = Teacher::new(2);
        for i in 0..6 {
            teacher.push(&[i as f32, 1.0]).unwrap();
        }
        teacher
    }

    fn config(prototypes: PrototypeMode) -> ObjectiveConfig {
        ObjectiveConfig { prototypes, cells_per_prototype: 2, ..Default::default() }
    }

    #[test]
    fn four_ways_to_start() {
        let (markers, teacher) = (markers(&[&[(3, 0.25), (1, 0.75)], &[(2, 1.0)]]), table());
        let word = [0.0, 0.0, 4.0, 0.0, 5.0, 5.0, 0.0, 8.0];
        let scores = [0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0, 5.0, 4.0];
        let sources = |labels| Sources {
            markers: &markers,
            context: 1,
            word: &word,
            teacher: &teacher,
            labels,
            scores: Some(&scores),
        };
        let never = |_: &[Vec<u32>]| -> Result<Vec<f32>> { panic!("no sentence is wanted") };
        let all = &[0, 0, 0, 1, 1, 1][..];
        let q = initial(&config(PrototypeMode::Sentence), &sources(all), |s| {
            assert_eq!(s, [vec![1], vec![2]]);
            Ok(vec![1.0, 2.0, 3.0, 4.0])
        });
        assert_eq!(q.unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let mode = |mode, labels| initial(&config(mode), &sources(labels), never);
        assert_eq!(mode(PrototypeMode::Tokens, all).unwrap(), [3.0, 2.0, 5.0, 5.0]);
        assert_eq!(mode(PrototypeMode::Labels, all).unwrap(), [1.0, 1.0, 4.0, 1.0]);
        // Labelled: the class's own. Unlabelled: all. Partly: its own first, then the best unlabelled.
        assert_eq!(mode(PrototypeMode::Cells, all).unwrap(), [1.5, 1.0, 3.5, 1.0]);
        assert_eq!(mode(PrototypeMode::Cells, &[-1; 6]).unwrap(), [4.5, 1.0, 0.5, 1.0]);
        assert_eq!(mode(PrototypeMode::Cells, &[0, -1, -1, -1, -1, 1]).unwrap(), [2.0, 1.0, 3.0, 1.0]);
        // Type 1 is nobody's: the one cell that looks most like it.
        assert_eq!(mode(PrototypeMode::Cells, &[0; 6]).unwrap(), [4.5, 1.0, 0.0, 1.0]);
        assert_eq!(mode(PrototypeMode::Labels, &[0; 6]).unwrap_err().kind().exit_code(), 3);
    }

    #[test]
    fn a_type_without_markers_needs_labels() {
        let (markers, teacher) = (markers(&[&[(1, 1.0)], &[]]), table());
        let word = [0.0; 8];
        let sources = |labels| Sources {
            markers: &markers,
            context: 8,
            word: &word,
            teacher: &teacher,
            labels,
            scores: Some(&[0.0; 12]),
        };
        for mode in [PrototypeMode::Sentence, PrototypeMode::Tokens, PrototypeMode::Cells] {
            let embed = |s: &[Vec<u32>]| Ok(vec![7.0; s.len() * 2]);
            let q = initial(&config(mode), &sources(&[0, 0, 0, 0, 1, 1]), embed).unwrap();
            assert_eq!(q[2..], [4.5, 1.0]);
            let e = initial(&config(mode), &sources(&[0, 0, 0, -1, -1, -1]), embed).unwrap_err();
            assert_eq!((e.kind().exit_code(), e.place()), (3, Some("type 1")));
        }
    }

    #[test]
    fn refresh_moves_towards_the_mean() {
        let mut q = [1.0, 2.0];
        refresh(&mut q, &[3.0, 4.0], 0.75);
        assert_eq!(q, [1.5, 2.5]);
    }
}
