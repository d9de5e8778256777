//! Agreement of two partitions: adjusted Rand index and normalised mutual information.
//!
//! With n_ij cells in cluster i of one partition and j of the other, a_i and b_j their sums:
//!
//! ```text
//! ARI = 2 (tp·tn − fn·fp) / ((tp + fn)(fn + tn) + (tp + fp)(fp + tn))     over pairs of cells
//! NMI = I(a; b) / ((H(a) + H(b)) / 2)                                       scikit-learn's arithmetic mean
//! ```
//!
//! Pair counts are exact integers (i128), so ARI carries one rounding; both are symmetric and blind to cluster names.

use super::rows::same_length;
use crate::error::Result;
use std::collections::BTreeMap;

/// Cells per pair of clusters, and the two marginals. Ordered maps: sums run in one order whatever the labels are.
struct Contingency {
    joint: BTreeMap<(usize, usize), u64>,
    rows: BTreeMap<usize, u64>,
    columns: BTreeMap<usize, u64>,
    n: u64,
}

fn contingency(a: &[usize], b: &[usize]) -> Result<Contingency> {
    same_length("comparison of partitions", a.len(), b.len())?;
    let mut c = Contingency {
        joint: BTreeMap::new(),
        rows: BTreeMap::new(),
        columns: BTreeMap::new(),
        n: a.len() as u64,
    };
    for (&i, &j) in a.iter().zip(b) {
        *c.joint.entry((i, j)).or_default() += 1;
        *c.rows.entry(i).or_default() += 1;
        *c.columns.entry(j).or_default() += 1;
    }
    Ok(c)
}

/// Adjusted Rand index in [−0.5, 1]; 1 for equal partitions (also for none or one cell), about 0 for unrelated ones.
pub fn adjusted_rand_index(a: &[usize], b: &[usize]) -> Result<f64> {
    let c = contingency(a, b)?;
    let squares = |counts: &mut dyn Iterator<Item = u64>| counts.map(|n| (n as i128).pow(2)).sum::<i128>();
    let joint = squares(&mut c.joint.values().copied());
    let rows = squares(&mut c.rows.values().copied());
    let columns = squares(&mut c.columns.values().copied());
    let n = c.n as i128;
    // Ordered pairs of distinct cells: together in both, in one only, in neither.
    let (tp, fp, fn_) = (joint - n, columns - joint, rows - joint);
    let tn = n * n - fp - fn_ - joint;
    if fp == 0 && fn_ == 0 {
        return Ok(1.0);
    }
    let (tp, fp, fn_, tn) = (tp as f64, fp as f64, fn_ as f64, tn as f64);
    Ok(2.0 * (tp * tn - fn_ * fp) / ((tp + fn_) * (fn_ + tn) + (tp + fp) * (fp + tn)))
}

/// Normalised mutual information in [0, 1], arithmetic mean of the entropies. Two trivial partitions (one cluster each,
/// or no cells) agree fully: 1; one trivial partition against any other: 0.
pub fn normalised_mutual_information(a: &[usize], b: &[usize]) -> Result<f64> {
    let c = contingency(a, b)?;
    if c.rows.len() <= 1 && c.columns.len() <= 1 {
        return Ok(1.0);
    }
    let n = c.n as f64;
    let entropy = |counts: &BTreeMap<usize, u64>| {
        -counts.values().map(|&m| m as f64 / n * (m as f64 / n).ln()).sum::<f64>()
    };
    let information: f64 = c
        .joint
        .iter()
        .map(|((i, j), &m)| {
            let m = m as f64;
            m / n * ((m / n).ln() - (c.rows[i] as f64 / n).ln() - (c.columns[j] as f64 / n).ln())
        })
        .sum();
    let mean = 0.5 * (entropy(&c.rows) + entropy(&c.columns));
    // Sums of logarithms end a few ulp below zero for independent partitions.
    if information <= f64::EPSILON { Ok(0.0) } else { Ok((information / mean).min(1.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts pairs one by one.
    fn naive_ari(a: &[usize], b: &[usize]) -> f64 {
        let (mut both, mut in_a, mut in_b, mut pairs) = (0f64, 0f64, 0f64, 0f64);
        for i in 0..a.len() {
            for j in 0..i {
                let (x, y) = (a[i] == a[j], b[i] == b[j]);
                pairs += 1.0;
                in_a += f64::from(x);
                in_b += f64::from(y);
                both += f64::from(x && y);
            }
        }
        let expected = in_a * in_b / pairs;
        (both - expected) / (0.5 * (in_a + in_b) - expected)
    }

    #[test]
    fn ari_equals_the_definition_over_pairs() {
        let mut rng = crate::rng::Philox::new(5, 0, crate::rng::site::EVAL);
        for n in [3usize, 10, 57] {
            let mut draw = |k| (0..n).map(|_| rng.below(k) as usize).collect::<Vec<_>>();
            let (a, b) = (draw(3), draw(4));
            assert!((adjusted_rand_index(&a, &b).unwrap() - naive_ari(&a, &b)).abs() < 1e-12);
            assert_eq!(adjusted_rand_index(&a, &b).unwrap(), adjusted_rand_index(&b, &a).unwrap());
            assert!((normalised_mutual_information(&a, &a).unwrap() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn trivial_partitions() {
        assert_eq!(adjusted_rand_index(&[7], &[3]).unwrap(), 1.0);
        assert_eq!(adjusted_rand_index(&[], &[]).unwrap(), 1.0);
        assert_eq!(normalised_mutual_information(&[1, 1, 1], &[4, 4, 4]).unwrap(), 1.0);
        assert_eq!(normalised_mutual_information(&[1, 1, 1], &[0, 1, 2]).unwrap(), 0.0);
        assert_eq!(adjusted_rand_index(&[1, 1, 1], &[0, 1, 2]).unwrap(), 0.0);
        assert!(adjusted_rand_index(&[1], &[]).is_err());
    }
}
