//! Exact nearest neighbours, and the k-nearest-neighbour vote.
//!
//! ```text
//! ‖q − t‖² = ‖q‖² − 2 q·t + ‖t‖²
//! ```
//!
//! Blocks of queries meet blocks of training rows in one f64 product each; every query keeps its k best in a short sorted
//! list, so memory is O(blocks), never queries × training rows. Equal distances keep the lower training index; equal votes
//! go to the lowest class, as in scikit-learn (uniform weights). On unit rows the order is that of the cosine.

use super::rows::{BLOCK, Rows, product_abt, same_length};
use crate::error::{Code, Error, Result};
use rayon::prelude::*;

/// Neighbours of each query: `k` per query, nearest first.
pub struct Neighbours {
    /// Neighbours kept per query: the k asked for, or all there are.
    pub k: usize,
    /// Indices into the training rows, (Q, k).
    pub index: Vec<u32>,
    /// Squared euclidean distances, (Q, k).
    pub square_distance: Vec<f64>,
}

/// The `k` nearest rows of `train` for each row of `query`; fewer when `train` has fewer. `skip_self` leaves out
/// training row i for query i: for neighbourhoods within one table.
pub fn nearest(train: Rows, query: Rows, k: usize, skip_self: bool) -> Result<Neighbours> {
    if train.width() != query.width() {
        return Err(Error::bug("nearest neighbours: tables of different width")
            .found(query.width())
            .wanted(train.width()));
    }
    let width = train.width();
    let k = k.min(train.count().saturating_sub(usize::from(skip_self)));
    let train_norms = train.square_norms();
    let mut index = vec![0u32; query.count() * k];
    let mut square_distance = vec![0f64; query.count() * k];
    if k == 0 {
        return Ok(Neighbours { k, index, square_distance });
    }
    // Many queries: threads take blocks of queries. Few queries are still one block per 64, which is fine.
    let blocks = index.par_chunks_mut(BLOCK * k).zip(square_distance.par_chunks_mut(BLOCK * k)).enumerate();
    blocks.for_each_init(
        || (Vec::new(), Vec::new(), vec![0f64; BLOCK * 4 * BLOCK]),
        |(q, t, products), (block, (index, distance))| {
            let first = block * BLOCK;
            let queries = index.len() / k;
            query.widen(first..first + queries, q);
            let norms: Vec<f64> = q.chunks_exact(width).map(|r| r.iter().map(|x| x * x).sum()).collect();
            let mut kept = vec![0usize; queries];
            for start in (0..train.count()).step_by(4 * BLOCK) {
                let end = (start + 4 * BLOCK).min(train.count());
                train.widen(start..end, t);
                let products = &mut products[..queries * (end - start)];
                product_abt(q, t, width, products);
                for i in 0..queries {
                    let best_index = &mut index[i * k..(i + 1) * k];
                    let best = &mut distance[i * k..(i + 1) * k];
                    let row = &products[i * (end - start)..(i + 1) * (end - start)];
                    for (j, &product) in row.iter().enumerate() {
                        let j = start + j;
                        let d = (norms[i] + train_norms[j] - 2.0 * product).max(0.0);
                        if (skip_self && j == first + i) || (kept[i] == k && d >= best[k - 1]) {
                            continue;
                        }
                        // Rows come in index order, so "strictly nearer" keeps the lower index in front on ties.
                        let full = kept[i] == k;
                        let mut at = if full { k - 1 } else { kept[i] };
                        kept[i] += usize::from(!full);
                        while at > 0 && best[at - 1] > d {
                            (best[at], best_index[at]) = (best[at - 1], best_index[at - 1]);
                            at -= 1;
                        }
                        (best[at], best_index[at]) = (d, j as u32);
                    }
                }
            }
        },
    );
    Ok(Neighbours { k, index, square_distance })
}

/// Class of each row of `query` by uniform vote of its `k` nearest rows of `train` with classes `labels` (below
/// `classes`); all training rows vote when there are fewer than `k`. Ties go to the lowest class.
pub fn classify(train: Rows, labels: &[usize], query: Rows, classes: usize, k: usize) -> Result<Vec<usize>> {
    same_length("kNN", train.count(), labels.len())?;
    if train.count() == 0 || k == 0 {
        return Err(Error::new(Code::TooFewCells, "kNN needs at least one training cell and k ≥ 1")
            .found(format!("{} cells, k = {k}", train.count())));
    }
    let neighbours = nearest(train, query, k, false)?;
    let mut votes = vec![0u32; classes];
    Ok(neighbours
        .index
        .chunks_exact(neighbours.k)
        .map(|near| {
            votes.fill(0);
            near.iter().for_each(|&i| votes[labels[i as usize]] += 1);
            // max_by_key returns the last maximum; of the reversed order that is the lowest class.
            (0..classes)
                .rev()
                .max_by_key(|&c| votes[c])
                .expect("a label is below `classes`, so there is a class")
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Philox, site};

    fn random(n: usize, width: usize, seed: u64) -> Vec<f32> {
        let mut rng = Philox::new(seed, 0, site::EVAL);
        (0..n * width).map(|_| rng.normal() as f32).collect()
    }

    #[test]
    fn neighbours_equal_a_full_sort_at_odd_sizes() {
        for (n, q, width, k) in [(1, 1, 1, 3), (63, 5, 3, 7), (300, 131, 5, 15), (257, 64, 2, 1)] {
            let (train, query) = (random(n, width, 1), random(q, width, 2));
            let (train, query) = (Rows::new(&train, width).unwrap(), Rows::new(&query, width).unwrap());
            let got = nearest(train, query, k, false).unwrap();
            assert_eq!(got.k, k.min(n));
            for i in 0..q {
                let distance = |j: usize| -> f64 {
                    query.row(i).iter().zip(train.row(j)).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum()
                };
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)).then(a.cmp(&b)));
                for (r, &j) in order[..got.k].iter().enumerate() {
                    assert_eq!(got.index[i * got.k + r], j as u32);
                    assert!((got.square_distance[i * got.k + r] - distance(j)).abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn equal_rows_keep_index_order_and_ties_go_to_the_lowest_class() {
        let same = vec![1f32; 6];
        let rows = Rows::new(&same, 1).unwrap();
        let near = nearest(rows, rows, 3, true).unwrap();
        assert_eq!(near.index[..6], [1, 2, 3, 0, 2, 3]);
        assert_eq!(classify(rows, &[2, 1, 1, 2, 0, 0], rows, 3, 4).unwrap(), [1; 6]);
        // k beyond the number of rows: all vote.
        assert_eq!(classify(rows, &[2, 1, 2, 2, 0, 0], rows, 3, 100).unwrap(), [2; 6]);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (train, query) = (random(500, 9, 3), random(201, 9, 4));
        let run =
            || nearest(Rows::new(&train, 9).unwrap(), Rows::new(&query, 9).unwrap(), 15, false).unwrap();
        let in_pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(run);
        let (a, b) = (in_pool(1), in_pool(3));
        assert!(a.index == b.index && a.square_distance == b.square_distance);
    }
}
