//! The plane of a checkpoint's embeddings: which cells are drawn, where they fall, and how they travel in the page.
//!
//! Rows are centred and made unit rows, as kNN sees them; fifty principal components; t-SNE from the first two. A map after a stage is
//! turned and mirrored, never stretched, onto the map before it, so that the eye can follow. Coordinates become two u16 a cell.

use super::measure::{Measures, Model};
use super::{pca, tsne};
use crate::error::Result;
use crate::eval::rows::{Rows, centred_unit_rows};
use crate::rng::{Philox, site};

/// Principal components that neighbours are sought in.
const COMPONENTS: usize = 50;
/// Neighbours of the purity.
const NEAR: usize = 15;
/// Stream of the choice of cells among those of evaluation.
const STREAM: u32 = (1 << 31) + 12;

/// The same cells under one or more checkpoints.
pub struct CellSet {
    /// Corpus indices, (C).
    pub cells: Vec<u32>,
    /// Names of the cells, (C).
    pub ids: Vec<String>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Class of each cell, (C).
    pub class: Vec<usize>,
    /// Is the class a tail class?
    pub tail: Vec<bool>,
    /// Cells to choose from; more than (C) where some were left out.
    pub of: usize,
    /// Are the classes labels, or the checkpoint's own calls?
    pub labelled: bool,
}

/// Where the cells of a set fall under one checkpoint.
pub struct Plane {
    /// Index of the model.
    pub model: usize,
    /// Index of the set.
    pub set: usize,
    /// Coordinates, (C).
    pub at: Vec<[f32; 2]>,
    /// Class that the checkpoint calls each cell, (C), by the set's names and behind them its own.
    pub called: Vec<usize>,
    /// Names of classes called.
    pub called_names: Vec<String>,
    /// Share of the 15 nearest cells that have the cell's own class, by class; NaN for classes without cells.
    pub purity: Vec<f64>,
}

/// The maps of all measured models, a pair's second turned onto its first.
///
/// # Errors
/// Input: embeddings that are not finite; a corpus that cannot be read.
pub fn maps(
    measures: &Measures,
    most: usize,
    seed: u64,
    say: &dyn Fn(&str),
) -> Result<(Vec<CellSet>, Vec<Plane>)> {
    let (mut sets, mut planes) = (Vec::<CellSet>::new(), Vec::<Plane>::new());
    for (index, model) in measures.models.iter().enumerate() {
        let Some((cells, rows, width, chosen, class, classes, tail, labelled)) =
            candidates(model, most, seed)
        else {
            continue;
        };
        if chosen.len() < 4 {
            continue;
        }
        say(&format!("map {} cells of {}", chosen.len(), model.name));
        let of = cells.len();
        let picked: Vec<u32> = chosen.iter().map(|&i| cells[i]).collect();
        let class: Vec<usize> = chosen.iter().map(|&i| class[i]).collect();
        let corpus = model.corpus.as_ref();
        let same = |s: &CellSet| s.cells == picked && s.class == class && s.classes == classes;
        let set = match sets.iter().position(same) {
            Some(set) => set,
            None => {
                let id = |&c: &u32| corpus.map_or(Ok(""), |k| k.cell_id(c as usize)).map(str::to_string);
                let ids = picked.iter().map(id).collect::<Result<Vec<_>>>()?;
                sets.push(CellSet { cells: picked, ids, classes, class, tail, of, labelled });
                sets.len() - 1
            }
        };
        let rows = Rows::new(rows, width)?;
        let chosen_rows = rows.select(&chosen);
        let chosen_rows = Rows::new(&chosen_rows, width)?;
        let unit = centred_unit_rows(chosen_rows, &chosen_rows.mean());
        let (scores, k) = pca::scores(Rows::new(&unit, width)?, COMPONENTS, seed)?;
        let near = tsne::neighbours(Rows::new(&scores, k)?)?;
        let start: Vec<[f32; 2]> =
            scores.chunks_exact(k).map(|row| [row[0], row.get(1).copied().unwrap_or(0.0)]).collect();
        let mut at = tsne::tsne(&near, &start, tsne::STEPS);
        let before = measures.pairs.iter().find(|p| p.after == index).map(|p| p.before);
        if let Some(first) = planes.iter().find(|p| Some(p.model) == before && p.set == set) {
            turn_onto(&mut at, &first.at);
        }
        let purity = purity(&near.index, near.k, &sets[set].class, sets[set].classes.len());
        let (called, called_names) = called(model, &chosen);
        planes.push(Plane { model: index, set, at, called, called_names, purity });
    }
    Ok((sets, planes))
}

/// Cells, rows, width, the chosen among them, classes, their names, which are tail, and whether they are labels.
#[allow(clippy::type_complexity)] // one tuple, taken apart at its one call
fn candidates(
    model: &Model,
    most: usize,
    seed: u64,
) -> Option<(&[u32], &[f32], usize, Vec<usize>, Vec<usize>, Vec<String>, Vec<bool>, bool)> {
    if let Ok(found) = &model.found {
        let s = &found.scored;
        let labels = found.train_counts.len();
        let tail = tail(found);
        let chosen = choose(&s.truth, &tail, most, seed);
        let classes = found.classes[..labels].to_vec();
        return Some((&s.cells, &s.rows, s.width, chosen, s.truth.clone(), classes, tail, true));
    }
    let u = model.unlabelled.as_ref()?;
    let tail = vec![false; u.types.len()];
    let chosen = choose(&u.nearest, &tail, most, seed);
    Some((&u.cells, &u.rows, u.width, chosen, u.nearest.clone(), u.types.clone(), tail, false))
}

/// Which label classes are tail: the share of the training cells below the threshold.
pub fn tail(found: &crate::eval::summary::Evaluation) -> Vec<bool> {
    let total = found.train_counts.iter().sum::<usize>().max(1) as f64;
    found.train_counts.iter().map(|&n| (n as f64 / total) < found.thresholds.tail).collect()
}

/// All cells, or `most`: the cells of tail classes, and of the others an equal share of each class. Ascending.
fn choose(class: &[usize], tail: &[bool], most: usize, seed: u64) -> Vec<usize> {
    if class.len() <= most {
        return (0..class.len()).collect();
    }
    let mut order: Vec<usize> = (0..class.len()).collect();
    Philox::new(seed, STREAM, site::EVAL).shuffle(&mut order);
    let (mut kept, rest): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|&i| tail[class[i]]);
    kept.truncate(most);
    // A stable sort by the rank within the class takes every class in turn, in proportion to its size.
    let mut seen = vec![0usize; tail.len()];
    let mut sizes = vec![0usize; tail.len()];
    rest.iter().for_each(|&i| sizes[class[i]] += 1);
    let mut ranked: Vec<(f64, usize)> = rest
        .iter()
        .map(|&i| {
            seen[class[i]] += 1;
            (seen[class[i]] as f64 / sizes[class[i]] as f64, i)
        })
        .collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    kept.extend(ranked.into_iter().map(|(_, i)| i).take(most - kept.len()));
    kept.sort_unstable();
    kept
}

fn called(model: &Model, chosen: &[usize]) -> (Vec<usize>, Vec<String>) {
    let Ok(found) = &model.found else { return (Vec::new(), Vec::new()) };
    let own = found.scored.called.iter().find(|(name, _)| *name == found.predictor);
    let called = own.map_or(Vec::new(), |(_, called)| chosen.iter().map(|&i| called[i]).collect());
    (called, found.classes.clone())
}

fn purity(near: &[u32], k: usize, class: &[usize], classes: usize) -> Vec<f64> {
    let (mut sum, mut n) = (vec![0f64; classes], vec![0usize; classes]);
    for (i, &c) in class.iter().enumerate() {
        let near = &near[i * k..i * k + k.min(NEAR)];
        sum[c] += near.iter().filter(|&&j| class[j as usize] == c).count() as f64 / near.len().max(1) as f64;
        n[c] += 1;
    }
    sum.iter().zip(n).map(|(s, n)| s / n as f64).collect()
}

/// The rotation, with or without a mirror, that lays `at` best onto `onto`; both are centred.
fn turn_onto(at: &mut [[f32; 2]], onto: &[[f32; 2]]) {
    let mut m = [0f64; 4]; // Σ onto ⊗ at
    for (o, a) in onto.iter().zip(at.iter()) {
        for i in 0..4 {
            m[i] += o[i / 2] as f64 * a[i % 2] as f64;
        }
    }
    let (turn, mirror) = ((m[0] + m[3]).hypot(m[2] - m[1]), (m[0] - m[3]).hypot(m[1] + m[2]));
    let sign = if mirror > turn { -1.0 } else { 1.0 };
    let angle = if sign > 0.0 { (m[2] - m[1]).atan2(m[0] + m[3]) } else { (m[2] + m[1]).atan2(m[0] - m[3]) };
    let (sin, cos) = angle.sin_cos();
    for p in at.iter_mut() {
        let (x, y) = (p[0] as f64, sign * p[1] as f64);
        *p = [(cos * x - sin * y) as f32, (sin * x + cos * y) as f32];
    }
}

/// Two little-endian u16 a point: the square round all points on 0 … 65,535.
pub fn quantised(at: &[[f32; 2]]) -> Vec<u8> {
    let ends = |axis: usize| {
        let low = at.iter().map(|p| p[axis]).fold(f32::INFINITY, f32::min);
        (low, at.iter().map(|p| p[axis]).fold(f32::NEG_INFINITY, f32::max) - low)
    };
    let ((x, width), (y, height)) = (ends(0), ends(1));
    let side = width.max(height).max(f32::MIN_POSITIVE);
    let (x, y) = (x - (side - width) / 2.0, y - (side - height) / 2.0);
    let whole = |v: f32| (v / side * 65535.0).round().clamp(0.0, 65535.0) as u16;
    at.iter().flat_map(|p| [whole(p[0] - x), whole(p[1] - y)]).flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_cells_stay_and_the_others_keep_their_proportions() {
        let class: Vec<usize> = (0..1000).map(|i| if i < 5 { 2 } else { usize::from(i % 4 == 0) }).collect();
        let kept = choose(&class, &[false, false, true], 205, 0);
        let of = |c: usize| kept.iter().filter(|&&i| class[i] == c).count();
        assert_eq!((kept.len(), of(2)), (205, 5));
        assert!((of(0) as f64 / of(1) as f64 - 3.0).abs() < 0.2, "{} {}", of(0), of(1));
        assert_eq!(kept, choose(&class, &[false, false, true], 205, 0));
        assert_eq!(choose(&class[..10], &[false; 3], 10, 0).len(), 10);
    }

    #[test]
    fn a_turned_and_mirrored_map_is_laid_back() {
        let map: Vec<[f32; 2]> = vec![[3.0, 1.0], [-2.0, 0.5], [-1.0, -1.5], [0.0, 0.0]];
        for sign in [1.0, -1.0] {
            let (s, c) = 2.2f32.sin_cos();
            let mut other: Vec<[f32; 2]> =
                map.iter().map(|p| [c * p[0] - s * p[1], sign * (s * p[0] + c * p[1])]).collect();
            turn_onto(&mut other, &map);
            let far =
                other.iter().zip(&map).map(|(a, b)| (a[0] - b[0]).hypot(a[1] - b[1])).fold(0f32, f32::max);
            assert!(far < 1e-5, "{sign}: {far}");
        }
    }

    #[test]
    fn quantised_points_keep_their_shape() {
        let bytes = quantised(&[[0.0, 0.0], [10.0, 5.0]]);
        let word = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
        assert_eq!([word(0), word(1), word(2), word(3)], [0, 16384, 65535, 49151]);
        assert!(quantised(&[]).is_empty() && quantised(&[[1.0, 1.0]]).len() == 4);
    }
}
