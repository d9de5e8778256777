//! Principal components by randomised subspace iteration: the (C, D) table meets thin (D, m) matrices alone, never a D × D one.
//!
//! ```text
//! A = rows − mean,  Ω (D, m) normal;   4 times: Ω ← orth(Aᵀ (A Ω));   scores = A Ω V,  V the eigenvectors of (A Ω)ᵀ(A Ω)
//! ```
//! Products run over blocks of fixed size and are added in block order, so nothing depends on the number of threads. The sign of a
//! component is that which makes its largest loading positive.

use crate::error::Result;
use crate::eval::Rows;
use crate::eval::rows::{product_abt, product_atb};
use crate::rng::{Philox, site};
use rayon::prelude::*;

/// Rows per block.
const BLOCK: usize = 512;
/// Directions beyond those asked for.
const OVERSAMPLING: usize = 10;
/// Passes over the table; the spectrum of embeddings falls fast, and four leave errors below drawing.
const PASSES: usize = 4;
/// Stream of Ω among those of evaluation.
const STREAM: u32 = (1 << 31) + 11;

/// The scores of the first `components` principal components, (C, k), and k: the number asked for or what there is.
pub fn scores(rows: Rows, components: usize, seed: u64) -> Result<(Vec<f32>, usize)> {
    let (cells, width) = (rows.count(), rows.width());
    let k = components.min(width).min(cells);
    let m = (k + OVERSAMPLING).min(width);
    if k == 0 {
        return Ok((Vec::new(), 0));
    }
    let mean = rows.mean();
    let mut rng = Philox::new(seed, STREAM, site::EVAL);
    let mut basis: Vec<f64> = (0..m * width).map(|_| rng.normal()).collect(); // (m, D)
    orthonormalise(&mut basis, width);
    for _ in 0..PASSES {
        basis = back(rows, &mean, &basis, m);
        orthonormalise(&mut basis, width);
    }
    let projected = forth(rows, &mean, &basis, m); // (C, m)
    let mut gram = vec![0f64; m * m];
    for block in projected.chunks(BLOCK * m) {
        let mut part = vec![0f64; m * m];
        product_atb(block, block, block.len() / m, &mut part);
        gram.iter_mut().zip(part).for_each(|(g, p)| *g += p);
    }
    let vectors = eigenvectors(gram, m); // rows, falling eigenvalue
    let mut chosen = vectors[..k * m].to_vec();
    for vector in chosen.chunks_exact_mut(m) {
        let loading =
            |d: usize| vector.iter().enumerate().map(|(j, v)| v * basis[j * width + d]).sum::<f64>();
        let largest = (0..width).map(loading).fold(0.0, |a: f64, b| if b.abs() > a.abs() { b } else { a });
        if largest < 0.0 {
            vector.iter_mut().for_each(|v| *v = -*v);
        }
    }
    let mut out = vec![0f32; cells * k];
    out.par_chunks_mut(BLOCK * k).zip(projected.par_chunks(BLOCK * m)).for_each(|(out, block)| {
        let mut scores = vec![0f64; block.len() / m * k];
        product_abt(block, &chosen, m, &mut scores);
        out.iter_mut().zip(scores).for_each(|(o, s)| *o = s as f32);
    });
    Ok((out, k))
}

/// A block of rows minus the mean, in f64.
fn centred(rows: Rows, mean: &[f64], block: usize) -> Vec<f64> {
    let end = ((block + 1) * BLOCK).min(rows.count());
    let mut values = Vec::with_capacity((end - block * BLOCK) * rows.width());
    for i in block * BLOCK..end {
        values.extend(rows.row(i).iter().zip(mean).map(|(&x, m)| x as f64 - m));
    }
    values
}

/// A Ωᵀ, (C, m), for a basis of m rows.
fn forth(rows: Rows, mean: &[f64], basis: &[f64], m: usize) -> Vec<f64> {
    let mut out = vec![0f64; rows.count() * m];
    out.par_chunks_mut(BLOCK * m)
        .enumerate()
        .for_each(|(block, out)| product_abt(&centred(rows, mean, block), basis, rows.width(), out));
    out
}

/// (Aᵀ A Ωᵀ)ᵀ, (m, D).
fn back(rows: Rows, mean: &[f64], basis: &[f64], m: usize) -> Vec<f64> {
    let width = rows.width();
    let parts: Vec<Vec<f64>> = (0..rows.count().div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let a = centred(rows, mean, block);
            let n = a.len() / width;
            let mut y = vec![0f64; n * m];
            product_abt(&a, basis, width, &mut y);
            let mut part = vec![0f64; m * width];
            product_atb(&y, &a, n, &mut part);
            part
        })
        .collect();
    let mut sum = vec![0f64; m * width];
    parts.iter().for_each(|part| sum.iter_mut().zip(part).for_each(|(s, p)| *s += p));
    sum
}

/// Modified Gram–Schmidt over rows of `width`, twice; a row that vanishes becomes zero.
fn orthonormalise(basis: &mut [f64], width: usize) {
    for _ in 0..2 {
        for i in 0..basis.len() / width {
            let (done, rest) = basis.split_at_mut(i * width);
            let row = &mut rest[..width];
            let before = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            for other in done.chunks_exact(width) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            let scale = if norm > 1e-12 * before { 1.0 / norm } else { 0.0 };
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

/// Eigenvectors of a symmetric (n, n) matrix as rows, by falling eigenvalue: cyclic Jacobi, as n is some tens.
fn eigenvectors(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    let mut v: Vec<f64> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _ in 0..50 {
        let off: f64 = (0..n * n).filter(|i| i / n != i % n).map(|i| a[i] * a[i]).sum();
        if off <= 1e-24 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = a[p * n + q];
                if apq == 0.0 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for i in 0..n {
                    let (x, y) = (a[i * n + p], a[i * n + q]);
                    (a[i * n + p], a[i * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for i in 0..n {
                    let (x, y) = (a[p * n + i], a[q * n + i]);
                    (a[p * n + i], a[q * n + i]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (v[p * n + i], v[q * n + i]);
                    (v[p * n + i], v[q * n + i]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j * n + j].total_cmp(&a[i * n + i]).then(i.cmp(&j)));
    order.iter().flat_map(|&i| v[i * n..(i + 1) * n].to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that vary by 10, 3 and 1 along three known orthogonal directions, about a far-off mean.
    fn table(cells: usize) -> Vec<f32> {
        let mut rng = Philox::new(5, 0, site::EVAL);
        (0..cells)
            .flat_map(|_| {
                let (a, b, c) = (10.0 * rng.normal(), 3.0 * rng.normal(), rng.normal());
                [a + b, a - b, c, 0.0].map(|x| (x * 0.5f64.sqrt() + 100.0) as f32)
            })
            .collect()
    }

    #[test]
    fn finds_the_directions_that_the_rows_were_made_of() {
        let rows = table(2000);
        let (scores, k) = scores(Rows::new(&rows, 4).unwrap(), 3, 1).unwrap();
        assert_eq!(k, 3);
        let spread = |j: usize| {
            let n = scores.len() / 3;
            (scores.iter().skip(j).step_by(3).map(|&x| (x as f64).powi(2)).sum::<f64>() / n as f64).sqrt()
        };
        for (j, wanted) in [10.0, 3.0, 0.5f64.sqrt()].into_iter().enumerate() {
            assert!((spread(j) / wanted - 1.0).abs() < 0.06, "component {j}: {}", spread(j));
        }
        // The first score is the coordinate along (1, 1, 0, 0).
        let along = |i: usize| (rows[4 * i] as f64 + rows[4 * i + 1] as f64) * 0.5f64.sqrt();
        let mean = (0..2000).map(along).sum::<f64>() / 2000.0;
        assert!((0..2000).all(|i| (scores[3 * i] as f64 - (along(i) - mean)).abs() < 0.5));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let rows = table(1300);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| scores(Rows::new(&rows, 4).unwrap(), 2, 1).unwrap().0)
        };
        assert_eq!(with(1), with(3));
    }

    #[test]
    fn equal_rows_and_fewer_rows_than_components_do_no_harm() {
        let (same, k) = scores(Rows::new(&[1.0; 12], 4).unwrap(), 2, 1).unwrap();
        assert!(k == 2 && same.iter().all(|x| x.abs() < 1e-9), "{same:?}");
        assert_eq!(scores(Rows::new(&[1.0, 2.0, 3.0], 3).unwrap(), 2, 1).unwrap().1, 1);
    }
}
