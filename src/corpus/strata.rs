//! How a split draws: class by class, largest remainder, each class from a generator of its own.

use super::labels::Labels;
use super::reader::Corpus;
use super::splits::SplitSpec;
use crate::error::{Code, Error, Result};
use crate::rng::{Philox, site};

pub(super) fn included(labels: &Option<Labels>, cell: u32) -> bool {
    labels.as_ref().is_none_or(|l| l.codes[cell as usize] != Labels::EXCLUDED)
}

/// Cells by class; last, those without a label.
pub(super) fn strata(labels: &Option<Labels>, cells: Vec<u32>) -> Vec<Vec<u32>> {
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

pub(super) fn refuse_single_cells(
    corpus: &Corpus,
    labels: &Option<Labels>,
    strata: &[Vec<u32>],
) -> Result<()> {
    let Some(labels) = labels else { return Ok(()) };
    let single: Vec<String> = (labels.classes.iter().zip(strata))
        .filter(|(_, cells)| cells.len() == 1)
        .map(|(name, _)| format!("{name:?}"))
        .collect();
    if single.is_empty() {
        return Ok(());
    }
    Err(Error::new(Code::SplitClasses, "a class with one cell cannot stand on both sides of a split")
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

pub(super) fn divide(
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
pub(super) fn shares(n: usize, fraction: [f64; 3]) -> [usize; 3] {
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
pub(super) fn choose_labelled(labels: &Labels, train: &[u32], spec: &SplitSpec) -> Vec<u32> {
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
