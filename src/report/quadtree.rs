//! Sums over all pairs of points in the plane, by Barnes and Hut: a far square of points acts as one at its centre of mass.
//!
//! The tree is an array in depth-first order: each node says where the next one stands that is not below it, so a walk needs no
//! stack. Points are sorted along a Morton curve first, which makes every square a run of them and neighbours in the walk
//! neighbours in memory. Each point's sum is its own, in tree order: the number of threads leaves no trace.

use rayon::prelude::*;

/// A square counts as one point when its side is below this share of its distance.
const OPENING: f32 = 0.5;
/// Points of a square that is not divided further.
const LEAF: usize = 8;
/// Bits of a Morton code per axis.
const BITS: u32 = 16;
/// Points per task.
const CHUNK: usize = 256;

struct Node {
    centre: [f32; 2],
    count: f32,
    /// (side / OPENING)²: closer than that the square is opened.
    reach: f32,
    /// The next node outside this one.
    skip: u32,
    /// Its points, where it is a leaf: first, number.
    points: (u32, u32),
}

/// Points sorted along the curve, and the tree over them.
struct Tree {
    nodes: Vec<Node>,
    codes: Vec<u32>,
    at: Vec<[f32; 2]>,
}

/// For each point i: Σ_j q² (y_i − y_j) with q = 1 / (1 + ‖y_i − y_j‖²), into `force`; returns Σ_{i≠j} q.
pub fn repulsion(points: &[[f32; 2]], force: &mut [[f32; 2]]) -> f64 {
    let (low, side) = bounds(points);
    let scale = (1u32 << BITS) as f32 / side;
    let cell = |x: f32, low: f32| (((x - low) * scale) as u32).min((1 << BITS) - 1);
    let mut order: Vec<u64> = points
        .iter()
        .enumerate()
        .map(|(i, p)| (morton(cell(p[0], low[0]), cell(p[1], low[1])) as u64) << 32 | i as u64)
        .collect();
    order.par_sort_unstable();
    let mut tree = Tree {
        nodes: Vec::with_capacity(points.len() / 2 + 1),
        codes: order.iter().map(|key| (key >> 32) as u32).collect(),
        at: order.iter().map(|key| points[*key as u32 as usize]).collect(),
    };
    tree.grow(0, points.len(), 2 * BITS, side);
    let mut sums = vec![[0f32; 2]; points.len()];
    let parts: Vec<f64> = sums
        .par_chunks_mut(CHUNK)
        .zip(tree.at.par_chunks(CHUNK))
        .map(|(sums, at)| {
            sums.iter_mut()
                .zip(at)
                .map(|(sum, p)| {
                    let (push, weight) = tree.push(*p);
                    *sum = push;
                    weight as f64
                })
                .sum()
        })
        .collect();
    order.iter().zip(sums).for_each(|(key, sum)| force[*key as u32 as usize] = sum);
    parts.iter().sum()
}

/// Lower corner and side of a square round all points.
fn bounds(points: &[[f32; 2]]) -> ([f32; 2], f32) {
    let mut low = [f32::INFINITY; 2];
    let mut high = [f32::NEG_INFINITY; 2];
    for p in points {
        for axis in 0..2 {
            low[axis] = low[axis].min(p[axis]);
            high[axis] = high[axis].max(p[axis]);
        }
    }
    (low, (high[0] - low[0]).max(high[1] - low[1]).max(1e-12) * 1.0001)
}

/// The bits of `x` and `y` in turn.
fn morton(x: u32, y: u32) -> u32 {
    let spread = |v: u32| {
        let v = (v | v << 8) & 0x00ff_00ff;
        let v = (v | v << 4) & 0x0f0f_0f0f;
        let v = (v | v << 2) & 0x3333_3333;
        (v | v << 1) & 0x5555_5555
    };
    spread(x) | spread(y) << 1
}

impl Tree {
    /// Appends the square of points `first..end`, whose codes agree above bit `shift`, and all below it.
    fn grow(&mut self, first: usize, end: usize, shift: u32, side: f32) {
        let place = self.nodes.len();
        let count = (end - first) as f32;
        let mut sum = [0f64; 2];
        for p in &self.at[first..end] {
            sum[0] += p[0] as f64;
            sum[1] += p[1] as f64;
        }
        let leaf = end - first <= LEAF || shift == 0;
        self.nodes.push(Node {
            centre: sum.map(|s| (s / count as f64) as f32),
            count,
            reach: (side / OPENING).powi(2),
            skip: 0,
            points: if leaf { (first as u32, (end - first) as u32) } else { (0, 0) },
        });
        if !leaf {
            let mut start = first;
            for quarter in 0..4u32 {
                let within = |code: &u32| (code >> (shift - 2)) & 3 <= quarter;
                let next = start + self.codes[start..end].partition_point(within);
                if next > start {
                    self.grow(start, next, shift - 2, side / 2.0);
                }
                start = next;
            }
        }
        self.nodes[place].skip = self.nodes.len() as u32;
    }

    /// What all other points do to one at `p`, which is among them: Σ q² (p − y) and Σ q.
    fn push(&self, p: [f32; 2]) -> ([f32; 2], f32) {
        // The point itself adds q = 1 and no force: its own square is never far, so it is met in a leaf.
        let (mut x, mut y, mut weight) = (0f32, 0f32, -1f32);
        let mut place = 0;
        while let Some(node) = self.nodes.get(place) {
            let (dx, dy) = (p[0] - node.centre[0], p[1] - node.centre[1]);
            let square = dx * dx + dy * dy;
            if square > node.reach {
                let q = 1.0 / (1.0 + square);
                weight += node.count * q;
                let pull = node.count * q * q;
                x += pull * dx;
                y += pull * dy;
                place = node.skip as usize;
            } else if node.points.1 > 0 {
                let first = node.points.0 as usize;
                for other in &self.at[first..first + node.points.1 as usize] {
                    let (dx, dy) = (p[0] - other[0], p[1] - other[1]);
                    let q = 1.0 / (1.0 + dx * dx + dy * dy);
                    weight += q;
                    x += q * q * dx;
                    y += q * q * dy;
                }
                place = node.skip as usize;
            } else {
                place += 1;
            }
        }
        ([x, y], weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Philox, site};

    fn cloud(n: usize) -> Vec<[f32; 2]> {
        let mut rng = Philox::new(3, 0, site::EVAL);
        (0..n)
            .map(|i| [rng.normal() as f32 * 8.0 + (i % 3) as f32 * 30.0, rng.normal() as f32 * 8.0])
            .collect()
    }

    #[test]
    fn sums_agree_with_all_pairs() {
        let points = cloud(1500);
        let mut force = vec![[0f32; 2]; points.len()];
        let weight = repulsion(&points, &mut force);
        let (mut exact, mut error, mut size) = (0f64, 0f64, 0f64);
        for (i, p) in points.iter().enumerate() {
            let mut sum = [0f64; 2];
            for (j, o) in points.iter().enumerate() {
                let (dx, dy) = ((p[0] - o[0]) as f64, (p[1] - o[1]) as f64);
                let q = 1.0 / (1.0 + dx * dx + dy * dy);
                if i != j {
                    exact += q;
                }
                sum[0] += q * q * dx;
                sum[1] += q * q * dy;
            }
            error += (sum[0] - force[i][0] as f64).powi(2) + (sum[1] - force[i][1] as f64).powi(2);
            size += sum[0] * sum[0] + sum[1] * sum[1];
        }
        assert!((weight / exact - 1.0).abs() < 1.5e-2, "{weight} {exact}");
        assert!((error / size).sqrt() < 2e-2, "{}", (error / size).sqrt());
    }

    #[test]
    fn points_in_one_place_and_a_single_one_end() {
        let mut force = vec![[1f32; 2]; 100];
        assert!((repulsion(&[[2.0, 2.0]; 100], &mut force) - 9900.0).abs() < 1e-3);
        assert!(force.iter().all(|f| *f == [0.0; 2]));
        assert_eq!(repulsion(&[[2.0, 2.0]], &mut force[..1]), 0.0);
    }
}
