//! k-means with greedy k-means++ seeding (Arthur & Vassilvitskii 2007), as scikit-learn's defaults: 10 restarts, at most
//! 300 Lloyd iterations, stop when the centres move less than 1e-4 of the mean column variance, best inertia wins.
//!
//! Deterministic: restart r draws from Philox stream (seed, r), sums run over blocks of fixed size in fixed order, equal
//! distances go to the lowest centre. A cluster that loses all its cells restarts at the cell farthest from its centre.

use super::rows::{Rows, product_abt};
use crate::error::{Code, Error, Result};
use crate::rng::{Philox, site};
use rayon::prelude::*;

/// Cells per block of an iteration: few enough partial sums, enough blocks for the threads.
const CELLS_PER_BLOCK: usize = 1024;

/// Settings of [`kmeans`].
#[derive(Debug, Clone, Copy)]
pub struct KMeans {
    /// Number of clusters.
    pub clusters: usize,
    /// Restarts; the one of least inertia is returned.
    pub restarts: usize,
    /// Lloyd iterations at most.
    pub iterations: usize,
    /// Centre movement, relative to the mean variance of the columns, below which a restart has converged.
    pub tolerance: f64,
    /// Seed.
    pub seed: u64,
}

impl KMeans {
    /// scikit-learn's defaults for `clusters` clusters, with 10 restarts.
    pub fn new(clusters: usize, seed: u64) -> Self {
        KMeans { clusters, restarts: 10, iterations: 300, tolerance: 1e-4, seed }
    }
}

/// A clustering.
pub struct Clusters {
    /// Cluster of each cell, (C).
    pub assignment: Vec<usize>,
    /// Centres, (clusters, D).
    pub centres: Vec<f64>,
    /// Sum of squared distances to the centres.
    pub inertia: f64,
}

/// Clusters `rows`. Needs at least as many cells as clusters.
pub fn kmeans(rows: Rows, settings: KMeans) -> Result<Clusters> {
    let (n, k) = (rows.count(), settings.clusters);
    if k == 0 || n < k {
        return Err(Error::new(Code::TooFewCells, "k-means needs at least as many cells as clusters")
            .found(format!("{n} cells, {k} clusters")));
    }
    // Centred columns: inertia is a difference of large numbers otherwise.
    let mean = rows.mean();
    let width = rows.width();
    let centred: Vec<f64> =
        rows.values().iter().enumerate().map(|(i, &x)| x as f64 - mean[i % width]).collect();
    let variance = centred.iter().map(|x| x * x).sum::<f64>() / centred.len() as f64;
    let data = Data { values: &centred, width, norms: row_norms(&centred, width) };
    let runs = (0..settings.restarts.max(1)).map(|r| {
        let mut rng = Philox::new(settings.seed, r as u32, site::EVAL);
        lloyd(&data, seed_centres(&data, k, &mut rng), &settings, settings.tolerance * variance)
    });
    // Strictly better only: of equal restarts the first stands.
    let mut best = runs
        .reduce(|a, b| if b.inertia < a.inertia * (1.0 - 1e-12) { b } else { a })
        .expect("there is at least one restart");
    best.centres.chunks_exact_mut(width).for_each(|c| c.iter_mut().zip(&mean).for_each(|(c, m)| *c += m));
    Ok(best)
}

struct Data<'a> {
    values: &'a [f64], // (C, D), centred
    width: usize,
    norms: Vec<f64>, // (C)
}

fn row_norms(values: &[f64], width: usize) -> Vec<f64> {
    values.chunks_exact(width).map(|r| r.iter().map(|x| x * x).sum()).collect()
}

impl Data<'_> {
    fn count(&self) -> usize {
        self.norms.len()
    }
    fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.width..(i + 1) * self.width]
    }
    /// Squared distances of all cells to each of `centres` (k, D): (C, k).
    fn distances(&self, centres: &[f64]) -> Vec<f64> {
        let (k, width) = (centres.len() / self.width, self.width);
        let centre_norms = row_norms(centres, width);
        let mut out = vec![0f64; self.count() * k];
        let blocks =
            out.par_chunks_mut(CELLS_PER_BLOCK * k).zip(self.values.par_chunks(CELLS_PER_BLOCK * width));
        blocks.enumerate().for_each(|(b, (out, values))| {
            product_abt(values, centres, width, out);
            for (i, row) in out.chunks_exact_mut(k).enumerate() {
                let norm = self.norms[b * CELLS_PER_BLOCK + i];
                row.iter_mut().zip(&centre_norms).for_each(|(d, c)| *d = (norm + c - 2.0 * *d).max(0.0));
            }
        });
        out
    }
}

/// Greedy k-means++: each new centre is the best of 2 + ⌊ln k⌋ candidates drawn with probability ∝ squared distance.
fn seed_centres(data: &Data, k: usize, rng: &mut Philox) -> Vec<f64> {
    let trials = 2 + (k as f64).ln() as usize;
    let mut centres = data.row(rng.below(data.count() as u64) as usize).to_vec();
    let mut nearest = data.distances(&centres);
    while centres.len() < k * data.width {
        let total: f64 = nearest.iter().sum();
        let picks: Vec<usize> = (0..trials)
            .map(|_| {
                let mut left = rng.uniform() * total;
                // All cells on centres already (total = 0): any cell will do.
                nearest
                    .iter()
                    .position(|&d| {
                        left -= d;
                        left < 0.0
                    })
                    .unwrap_or_else(|| rng.below(data.count() as u64) as usize)
            })
            .collect();
        let candidates: Vec<f64> = picks.iter().flat_map(|&i| data.row(i).iter().copied()).collect();
        let distances = data.distances(&candidates); // (C, trials)
        let potential = |t: usize| -> f64 {
            nearest.iter().zip(distances.chunks_exact(trials)).map(|(n, d)| n.min(d[t])).sum()
        };
        let (best, _) = (0..trials)
            .map(|t| (t, potential(t)))
            .reduce(|a, b| if b.1 < a.1 { b } else { a })
            .expect("there are at least two trials");
        nearest.iter_mut().zip(distances.chunks_exact(trials)).for_each(|(n, d)| *n = n.min(d[best]));
        centres.extend_from_slice(data.row(picks[best]));
    }
    centres
}

fn assign(data: &Data, centres: &[f64]) -> (Vec<usize>, Vec<f64>) {
    let k = centres.len() / data.width;
    let pick = |row: &[f64]| (0..k).reduce(|a, b| if row[b] < row[a] { b } else { a }).unwrap_or(0);
    let distances = data.distances(centres);
    distances.chunks_exact(k).map(|row| (pick(row), row[pick(row)])).unzip()
}

fn lloyd(data: &Data, mut centres: Vec<f64>, settings: &KMeans, tolerance: f64) -> Clusters {
    let (k, width) = (settings.clusters, data.width);
    let (mut assignment, mut distance) = assign(data, &centres);
    for _ in 0..settings.iterations {
        let mut sums = vec![0f64; k * width];
        let mut counts = vec![0usize; k];
        for (i, &c) in assignment.iter().enumerate() {
            counts[c] += 1;
            sums[c * width..(c + 1) * width].iter_mut().zip(data.row(i)).for_each(|(s, x)| *s += x);
        }
        for c in 0..k {
            if counts[c] == 0 {
                let far = (0..data.count())
                    .reduce(|a, b| if distance[b] > distance[a] { b } else { a })
                    .unwrap_or(0);
                sums[c * width..(c + 1) * width].copy_from_slice(data.row(far));
                distance[far] = 0.0;
                counts[c] = 1;
            }
        }
        sums.chunks_exact_mut(width)
            .zip(&counts)
            .for_each(|(s, &m)| s.iter_mut().for_each(|x| *x /= m as f64));
        let moved: f64 = sums.iter().zip(&centres).map(|(a, b)| (a - b).powi(2)).sum();
        centres = sums;
        let next = assign(data, &centres);
        let same = next.0 == assignment;
        (assignment, distance) = next;
        if same || moved <= tolerance {
            break;
        }
    }
    Clusters { assignment, centres, inertia: distance.iter().sum() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::clustering::adjusted_rand_index;

    /// `per` cells around each of `k` far corners.
    fn blobs(k: usize, per: usize) -> (Vec<f32>, Vec<usize>) {
        let mut rng = Philox::new(11, 0, site::EVAL);
        let labels: Vec<usize> = (0..k * per).map(|i| i % k).collect();
        let value = |rng: &mut Philox, c: usize, d: usize| {
            100.0 + if c == d { 9.0 } else { 0.0 } + rng.normal() as f32
        };
        (
            labels
                .iter()
                .flat_map(|&c| [value(&mut rng, c, 0), value(&mut rng, c, 1), value(&mut rng, c, 2)])
                .collect(),
            labels,
        )
    }

    #[test]
    fn separated_blobs_are_found_and_the_inertia_is_that_of_their_means() {
        let (values, labels) = blobs(4, 40);
        let rows = Rows::new(&values, 3).unwrap();
        let got = kmeans(rows, KMeans::new(4, 7)).unwrap();
        assert_eq!(adjusted_rand_index(&got.assignment, &labels).unwrap(), 1.0);
        let inertia: f64 = (0..rows.count())
            .map(|i| {
                let c = &got.centres[got.assignment[i] * 3..][..3];
                rows.row(i).iter().zip(c).map(|(&x, c)| (x as f64 - c).powi(2)).sum::<f64>()
            })
            .sum();
        assert!((got.inertia - inertia).abs() < 1e-6 * inertia);
    }

    #[test]
    fn equal_cells_one_cluster_and_too_few_cells() {
        let same = vec![2f32; 10];
        let rows = Rows::new(&same, 2).unwrap();
        let got = kmeans(rows, KMeans::new(3, 0)).unwrap();
        assert!(got.inertia == 0.0 && got.assignment.iter().all(|&c| c < 3));
        assert_eq!(kmeans(rows, KMeans::new(1, 0)).unwrap().assignment, [0; 5]);
        assert_eq!(kmeans(rows, KMeans::new(6, 0)).err().unwrap().kind().exit_code(), 3);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (values, _) = blobs(3, 900);
        let run = || kmeans(Rows::new(&values, 3).unwrap(), KMeans::new(5, 1)).unwrap();
        let in_pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(run);
        let (a, b) = (in_pool(1), in_pool(3));
        assert!(a.assignment == b.assignment && a.centres == b.centres && a.inertia == b.inertia);
    }
}
