//! t-SNE (van der Maaten and Hinton 2008, with the trees of 2014): a plane in which neighbours stay neighbours.
//!
//! ```text
//! p_j|i ∝ exp(−β_i ‖x_i − x_j‖²) over the 3·perplexity nearest, β_i such that 2^H = perplexity;   P = (p_j|i + p_i|j) / 2C
//! ∂/∂y_i = 4 [ Σ_j P_ij q_ij (y_i − y_j) − Σ_j q_ij² (y_i − y_j) / Z ],   q = 1 / (1 + ‖y_i − y_j‖²),  Z = Σ q
//! ```
//! Neighbours are exact; the second sum is that of [`quadtree`](super::quadtree). It starts from the first two principal components, so
//! nothing is drawn at random, and every sum has an order: the same rows give the same picture on any number of threads.

use super::quadtree::repulsion;
use crate::error::Result;
use crate::eval::Rows;
use crate::eval::knn::{Neighbours, nearest};
use rayon::prelude::*;

/// Effective number of neighbours.
pub const PERPLEXITY: f64 = 30.0;
/// Steps with attraction made stronger, and all steps.
const EARLY: usize = 250;
/// All steps.
pub const STEPS: usize = 750;
/// How much stronger, which also sets the learning rate: C / 12 (Belkina et al. 2019).
const EXAGGERATION: f32 = 12.0;

/// Symmetric affinities, one row a point.
struct Affinities {
    start: Vec<usize>, // (C + 1)
    other: Vec<u32>,   // (pairs)
    weight: Vec<f32>,  // (pairs)
}

/// Neighbours that [`tsne`] wants of each of `cells` points.
pub fn neighbours(rows: Rows) -> Result<Neighbours> {
    let k = (3.0 * perplexity(rows.count())).floor() as usize;
    nearest(rows, rows, k.max(1), true)
}

fn perplexity(cells: usize) -> f64 {
    PERPLEXITY.min((cells.saturating_sub(1)) as f64 / 3.0).max(1.0)
}

/// The plane (C) for points with these `near` neighbours, from the `start` (C), whose spread is immaterial.
pub fn tsne(near: &Neighbours, start: &[[f32; 2]], steps: usize) -> Vec<[f32; 2]> {
    let n = start.len();
    let mut at = small(start);
    if n < 4 || near.k == 0 {
        return at;
    }
    let pairs = affinities(near, n);
    let mut velocity = vec![[0f32; 2]; n];
    let mut gain = vec![[1f32; 2]; n];
    let mut push = vec![[0f32; 2]; n];
    let learning_rate = (n as f32 / EXAGGERATION).max(50.0);
    for step in 0..steps {
        let early = step < EARLY.min(steps / 3);
        let (pull_by, momentum) = if early { (EXAGGERATION, 0.5) } else { (1.0, 0.8) };
        let push_by = (1.0 / repulsion(&at, &mut push).max(1e-12)) as f32;
        let still = &at;
        let moved: Vec<[f32; 2]> = velocity
            .par_iter_mut()
            .zip(&mut gain)
            .zip(&push)
            .enumerate()
            .map(|(i, ((velocity, gain), push))| {
                let pull = pairs.pull(i, still);
                let mut y = still[i];
                for axis in 0..2 {
                    let gradient = 4.0 * (pull_by * pull[axis] - push_by * push[axis]);
                    let same = (gradient > 0.0) == (velocity[axis] > 0.0);
                    gain[axis] = if same { (gain[axis] * 0.8).max(0.01) } else { gain[axis] + 0.2 };
                    velocity[axis] = momentum * velocity[axis] - learning_rate * gain[axis] * gradient;
                    y[axis] += velocity[axis];
                }
                y
            })
            .collect();
        at = moved;
        centre(&mut at);
    }
    at
}

impl Affinities {
    /// Σ_j P_ij q_ij (y_i − y_j).
    fn pull(&self, i: usize, at: &[[f32; 2]]) -> [f32; 2] {
        let mut sum = [0f32; 2];
        let range = self.start[i]..self.start[i + 1];
        for (other, weight) in self.other[range.clone()].iter().zip(&self.weight[range]) {
            let o = at[*other as usize];
            let (dx, dy) = (at[i][0] - o[0], at[i][1] - o[1]);
            let q = weight / (1.0 + dx * dx + dy * dy);
            sum[0] += q * dx;
            sum[1] += q * dy;
        }
        sum
    }
}

/// The start with a standard deviation of 10⁻⁴ along its first axis.
fn small(start: &[[f32; 2]]) -> Vec<[f32; 2]> {
    let mut at = start.to_vec();
    centre(&mut at);
    let variance = at.iter().map(|p| (p[0] as f64).powi(2)).sum::<f64>() / at.len().max(1) as f64;
    let scale = if variance > 0.0 { (1e-4 / variance.sqrt()) as f32 } else { 0.0 };
    at.iter_mut().for_each(|p| p.iter_mut().for_each(|x| *x *= scale));
    at
}

fn centre(at: &mut [[f32; 2]]) {
    let mut mean = [0f64; 2];
    for p in at.iter() {
        (mean[0], mean[1]) = (mean[0] + p[0] as f64, mean[1] + p[1] as f64);
    }
    let mean = mean.map(|m| (m / at.len().max(1) as f64) as f32);
    at.iter_mut().for_each(|p| (p[0], p[1]) = (p[0] - mean[0], p[1] - mean[1]));
}

fn affinities(near: &Neighbours, n: usize) -> Affinities {
    let k = near.k;
    let wanted = perplexity(n).min(k as f64).ln();
    let mut conditional = vec![0f32; n * k];
    conditional
        .par_chunks_mut(k)
        .zip(near.square_distance.par_chunks(k))
        .for_each(|(p, distance)| row(p, distance, wanted));
    // Each pair stands twice, in the row of either end; then equal ends are added.
    let mut rows: Vec<Vec<(u32, f32)>> = vec![Vec::with_capacity(2 * k); n];
    for i in 0..n {
        for (j, p) in near.index[i * k..(i + 1) * k].iter().zip(&conditional[i * k..(i + 1) * k]) {
            let weight = p / (2 * n) as f32;
            rows[i].push((*j, weight));
            rows[*j as usize].push((i as u32, weight));
        }
    }
    rows.par_iter_mut().for_each(|row| {
        row.sort_by_key(|(j, _)| *j);
        row.dedup_by(|b, a| {
            let same = a.0 == b.0;
            if same {
                a.1 += b.1;
            }
            same
        });
    });
    let mut pairs = Affinities { start: vec![0], other: Vec::new(), weight: Vec::new() };
    for row in rows {
        pairs.other.extend(row.iter().map(|(j, _)| *j));
        pairs.weight.extend(row.iter().map(|(_, w)| *w));
        pairs.start.push(pairs.other.len());
    }
    pairs
}

/// The conditional probabilities of one point, whose entropy is `wanted`, by bisection of β.
fn row(p: &mut [f32], distance: &[f64], wanted: f64) {
    let nearest = distance[0];
    let (mut low, mut high, mut beta) =
        (0f64, f64::INFINITY, 1.0 / (distance[distance.len() / 2]).max(1e-12));
    for _ in 0..64 {
        let (mut sum, mut moment) = (0f64, 0f64);
        for d in distance {
            let e = (-(d - nearest) * beta).exp();
            sum += e;
            moment += e * (d - nearest);
        }
        let entropy = sum.ln() + beta * moment / sum;
        p.iter_mut().zip(distance).for_each(|(p, d)| *p = ((-(d - nearest) * beta).exp() / sum) as f32);
        if (entropy - wanted).abs() < 1e-5 {
            break;
        }
        if entropy > wanted {
            low = beta
        } else {
            high = beta
        }
        beta = if high.is_finite() { (low + high) / 2.0 } else { beta * 2.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Philox, site};

    fn blobs(n: usize) -> (Vec<f32>, Vec<[f32; 2]>) {
        let mut rng = Philox::new(4, 0, site::EVAL);
        let rows: Vec<f32> = (0..n)
            .flat_map(|i| {
                (0..5).map(|d| if d == i % 4 { 12.0 } else { 0.0 } + rng.normal() as f32).collect::<Vec<_>>()
            })
            .collect();
        let start = rows.chunks_exact(5).map(|r| [r[0], r[1]]).collect();
        (rows, start)
    }

    #[test]
    fn the_entropy_of_a_row_is_that_of_its_perplexity() {
        let distance: Vec<f64> = (1..=90).map(|i| i as f64 * 0.37).collect();
        let mut p = vec![0f32; 90];
        row(&mut p, &distance, 30f64.ln());
        let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|&p| -(p as f64) * (p as f64).ln()).sum();
        assert!((entropy.exp() - 30.0).abs() < 0.01, "{}", entropy.exp());
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn four_clouds_stay_apart_and_threads_leave_no_trace() {
        let (rows, start) = blobs(400);
        let near = neighbours(Rows::new(&rows, 5).unwrap()).unwrap();
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| tsne(&near, &start, 300))
        };
        let at = with(1);
        assert_eq!(at, with(2));
        // Every point's nearest in the plane is of its own cloud.
        let plane: Vec<f32> = at.iter().flatten().copied().collect();
        let found = nearest(Rows::new(&plane, 2).unwrap(), Rows::new(&plane, 2).unwrap(), 1, true).unwrap();
        let strays = (0..400).filter(|&i| found.index[i] as usize % 4 != i % 4).count();
        assert!(strays == 0, "{strays} strays");
        let spread = at.iter().map(|p| p[0].abs().max(p[1].abs())).fold(0f32, f32::max);
        assert!(spread > 5.0 && spread < 500.0, "{spread}");
    }

    #[test]
    fn few_and_equal_points_are_drawn_too() {
        for n in [0, 1, 2, 3, 5] {
            let rows = vec![1f32; 2 * n];
            let near = neighbours(Rows::new(&rows, 2).unwrap()).unwrap();
            let at = tsne(&near, &vec![[1.0, 1.0]; n], 50);
            assert!(at.len() == n && at.iter().flatten().all(|x| x.is_finite()));
        }
    }
}
