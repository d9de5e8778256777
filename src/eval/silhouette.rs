//! Silhouette (Rousseeuw 1987), cosine or euclidean, and the neural-collapse ratio NC1.
//!
//! ```text
//! s(i) = (b(i) − a(i)) / max(a(i), b(i))
//! a(i) = mean distance to the other cells of i's class       b(i) = least mean distance to the cells of another class
//! NC1  = tr(Σ_W) / tr(Σ_B)         within- over between-class scatter, each cell weighing the same
//! ```
//!
//! A cell alone in its class has s = 0, as in scikit-learn. Distances are made a block at a time and summed by class at
//! once, so memory is O(n·d) and time O(n²·d); above `limit` cells a seeded sample stands for all.

use super::rows::{BLOCK, Rows, centred_unit_rows, product_abt, same_length};
use crate::error::Result;
use crate::rng::{Philox, site};
use rayon::prelude::*;
use serde::Serialize;

/// How far two cells are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// 1 − cosine; a row of zeros is at distance 1 from everything.
    Cosine,
    /// ‖a − b‖.
    Euclidean,
}

/// s(i) of every cell, (C); `None` unless there are at least 2 classes and fewer classes than cells.
pub fn silhouette_samples(rows: Rows, labels: &[usize], metric: Metric) -> Result<Option<Vec<f64>>> {
    same_length("silhouette", rows.count(), labels.len())?;
    let (labels, counts) = compact(labels);
    let (n, width, classes) = (rows.count(), rows.width(), counts.len());
    if classes < 2 || classes >= n {
        return Ok(None);
    }
    let unit = if metric == Metric::Cosine { centred_unit_rows(rows, &vec![0.0; width]) } else { Vec::new() };
    let rows = if metric == Metric::Cosine { Rows::new(&unit, width)? } else { rows };
    let norms = rows.square_norms();
    let mut out = vec![0f64; n];
    out.par_chunks_mut(BLOCK).enumerate().for_each_init(
        || (Vec::new(), Vec::new(), vec![0f64; BLOCK * 4 * BLOCK]),
        |(a, b, products), (block, out)| {
            let first = block * BLOCK;
            rows.widen(first..first + out.len(), a);
            let mut sums = vec![0f64; out.len() * classes];
            for start in (0..n).step_by(4 * BLOCK) {
                let end = (start + 4 * BLOCK).min(n);
                rows.widen(start..end, b);
                let products = &mut products[..out.len() * (end - start)];
                product_abt(a, b, width, products);
                for (i, row) in products.chunks_exact(end - start).enumerate() {
                    let (i_norm, sums) = (norms[first + i], &mut sums[i * classes..(i + 1) * classes]);
                    for (j, &product) in row.iter().enumerate() {
                        let j = start + j;
                        if j != first + i {
                            sums[labels[j]] += match metric {
                                Metric::Cosine => (1.0 - product).clamp(0.0, 2.0),
                                Metric::Euclidean => (i_norm + norms[j] - 2.0 * product).max(0.0).sqrt(),
                            };
                        }
                    }
                }
            }
            for (i, s) in out.iter_mut().enumerate() {
                let own = labels[first + i];
                if counts[own] == 1 {
                    continue;
                }
                let sums = &sums[i * classes..(i + 1) * classes];
                let a = sums[own] / (counts[own] - 1) as f64;
                let others = (0..classes).filter(|&c| c != own).map(|c| sums[c] / counts[c] as f64);
                let b = others.fold(f64::INFINITY, f64::min);
                let larger = a.max(b);
                *s = if larger > 0.0 { (b - a) / larger } else { 0.0 };
            }
        },
    );
    Ok(Some(out))
}

/// Mean silhouette over all cells, or over a seeded sample of `limit` where there are more. `None` where it is not
/// defined: fewer than 2 classes, or every cell its own.
pub fn silhouette(
    rows: Rows,
    labels: &[usize],
    metric: Metric,
    limit: usize,
    seed: u64,
) -> Result<Option<f64>> {
    same_length("silhouette", rows.count(), labels.len())?;
    let mean = |s: Vec<f64>| s.iter().sum::<f64>() / s.len() as f64;
    if rows.count() <= limit {
        return Ok(silhouette_samples(rows, labels, metric)?.map(mean));
    }
    let chosen = sample(rows.count(), limit, seed);
    let values = rows.select(&chosen);
    let labels: Vec<usize> = chosen.iter().map(|&i| labels[i]).collect();
    Ok(silhouette_samples(Rows::new(&values, rows.width())?, &labels, metric)?.map(mean))
}

/// `limit` of `0..count` without replacement, ascending.
fn sample(count: usize, limit: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    // Step numbers of this site below 2³¹ are k-means restarts.
    let mut rng = Philox::new(seed, 1 << 31, site::EVAL);
    for i in 0..limit {
        let j = i + rng.below((count - i) as u64) as usize;
        order.swap(i, j);
    }
    order.truncate(limit);
    order.sort_unstable();
    order
}

/// NC1 = tr(Σ_W)/tr(Σ_B): 0 when classes have collapsed to points. `None` for fewer than 2 classes or equal class means.
pub fn nc1(rows: Rows, labels: &[usize]) -> Result<Option<f64>> {
    same_length("NC1", rows.count(), labels.len())?;
    let (labels, counts) = compact(labels);
    let width = rows.width();
    let mut means = vec![0f64; counts.len() * width];
    for (i, &c) in labels.iter().enumerate() {
        means[c * width..(c + 1) * width].iter_mut().zip(rows.row(i)).for_each(|(m, &x)| *m += x as f64);
    }
    means.chunks_exact_mut(width).zip(&counts).for_each(|(m, &n)| m.iter_mut().for_each(|x| *x /= n as f64));
    let overall = rows.mean();
    let square = |a: &[f64], b: &mut dyn Iterator<Item = f64>| {
        a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>()
    };
    let within: f64 = (0..rows.count())
        .map(|i| square(&means[labels[i] * width..][..width], &mut rows.row(i).iter().map(|&x| x as f64)))
        .sum();
    let between: f64 = means
        .chunks_exact(width)
        .zip(&counts)
        .map(|(m, &n)| n as f64 * square(m, &mut overall.iter().copied()))
        .sum();
    Ok((counts.len() > 1 && between > 0.0).then(|| within / between))
}

/// Labels renumbered 0.. in order of value, and the cells of each.
pub(crate) fn compact(labels: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let mut values = labels.to_vec();
    values.sort_unstable();
    values.dedup();
    let compact: Vec<usize> =
        labels.iter().map(|l| values.binary_search(l).expect("it is one of them")).collect();
    let mut counts = vec![0usize; values.len()];
    compact.iter().for_each(|&c| counts[c] += 1);
    (compact, counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: usize, width: usize) -> Vec<f32> {
        let mut rng = Philox::new(3, 0, site::EVAL);
        (0..n * width).map(|_| rng.normal() as f32).collect()
    }

    /// Straight from the definition, one distance at a time.
    fn naive(rows: Rows, labels: &[usize], metric: Metric) -> Vec<f64> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| x as f64 * y as f64).sum::<f64>();
        let distance = |i: usize, j: usize| {
            let (a, b) = (rows.row(i), rows.row(j));
            match metric {
                Metric::Cosine => 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt(),
                Metric::Euclidean => (dot(a, a) + dot(b, b) - 2.0 * dot(a, b)).max(0.0).sqrt(),
            }
        };
        let n = rows.count();
        (0..n)
            .map(|i| {
                let mean = |c: usize| {
                    let cells: Vec<usize> = (0..n).filter(|&j| j != i && labels[j] == c).collect();
                    (!cells.is_empty())
                        .then(|| cells.iter().map(|&j| distance(i, j)).sum::<f64>() / cells.len() as f64)
                };
                let Some(a) = mean(labels[i]) else { return 0.0 };
                let classes = labels.iter().max().unwrap() + 1;
                let b =
                    (0..classes).filter(|&c| c != labels[i]).filter_map(mean).fold(f64::INFINITY, f64::min);
                (b - a) / a.max(b)
            })
            .collect()
    }

    #[test]
    fn equals_the_definition_at_odd_sizes() {
        for (n, width, classes) in [(5, 2, 2), (65, 3, 4), (321, 7, 5)] {
            let values = random(n, width);
            let rows = Rows::new(&values, width).unwrap();
            let mut labels: Vec<usize> = (0..n).map(|i| (i * i) % classes).collect();
            labels[n - 1] = classes; // one class of a single cell
            for metric in [Metric::Cosine, Metric::Euclidean] {
                let got = silhouette_samples(rows, &labels, metric).unwrap().unwrap();
                let want = naive(rows, &labels, metric);
                // Unit rows are kept in f32: a cosine carries one rounding of each factor.
                assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-6), "{metric:?} {n}");
            }
        }
    }

    #[test]
    fn undefined_cases_are_none_and_equal_cells_score_zero() {
        let values = vec![1f32; 12];
        let rows = Rows::new(&values, 2).unwrap();
        let score = |labels: &[usize]| silhouette(rows, labels, Metric::Euclidean, 100, 0).unwrap();
        assert_eq!(score(&[0; 6]), None);
        assert_eq!(score(&[0, 1, 2, 3, 4, 5]), None);
        assert_eq!(score(&[0, 0, 0, 9, 9, 9]), Some(0.0));
        assert_eq!(nc1(rows, &[0, 0, 0, 1, 1, 1]).unwrap(), None);
        let one = Rows::new(&values[..2], 2).unwrap();
        assert_eq!(silhouette(one, &[0], Metric::Cosine, 100, 0).unwrap(), None);
    }

    #[test]
    fn a_sample_is_seeded_distinct_and_of_the_size_asked_for() {
        let chosen = sample(1000, 37, 4);
        assert!(chosen.len() == 37 && chosen.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(chosen, sample(1000, 37, 4));
        assert_ne!(chosen, sample(1000, 37, 5));
    }

    #[test]
    fn nc1_is_the_ratio_of_scatters() {
        // Two classes at −1 and 3, each with spread ±1 about its mean.
        let values = [-2.0, 0.0, 2.0, 4.0];
        let got = nc1(Rows::new(&values, 1).unwrap(), &[0, 0, 1, 1]).unwrap().unwrap();
        assert!((got - 4.0 / 16.0).abs() < 1e-15);
    }
}
