//! Multinomial logistic regression on frozen rows: the linear probe.
//!
//! ```text
//! minimise  (1/W) Σ_i w_i [ LSE_k(x_i·v_k + b_k) − (x_i·v_{y_i} + b_{y_i}) ]  +  1/(2 C W) Σ_k ‖v_k‖²        W = Σ_i w_i
//! ```
//!
//! That is scikit-learn's `LogisticRegression(C)` (intercepts not penalised), and like there two classes are one logit:
//! v_1 = −v_0 = v/2 with penalty ‖v‖²/2, which is the same sum with twice the penalty. Features are standardised by the
//! training rows (`StandardScaler`). The problem is convex, so this solver and scikit-learn's meet at one point; ours is
//! L-BFGS in f64 over blocks whose size depends on the number of rows alone, hence the same bits on any number of threads.

use super::lbfgs::{Stop, minimise};
use super::rows::{Rows, product_abt, product_atb, same_length};
use super::silhouette::compact;
use crate::error::{Code, Error, Result};
use rayon::prelude::*;

/// Settings of [`Probe::fit`].
#[derive(Debug, Clone, Copy)]
pub struct ProbeSettings {
    /// Inverse strength of the L2 penalty, scikit-learn's C.
    pub c: f64,
    /// Weigh class c by n / (K n_c), so that every class has the same total weight.
    pub balanced: bool,
    /// L-BFGS iterations at most.
    pub iterations: usize,
    /// Largest gradient component of the mean loss at which to stop.
    pub tolerance: f64,
}

impl Default for ProbeSettings {
    fn default() -> Self {
        ProbeSettings { c: 0.1, balanced: false, iterations: 500, tolerance: 1e-5 }
    }
}

/// A fitted probe: standardisation and weights.
#[derive(Debug, Clone)]
pub struct Probe {
    /// Column means of the training rows, (D).
    pub mean: Vec<f64>,
    /// What a centred column is multiplied by, (D): 1 / standard deviation, 1 for a constant column.
    pub scale: Vec<f64>,
    /// The classes that training saw, ascending, (K).
    pub classes: Vec<usize>,
    /// (K, D), on standardised columns; columns sum to zero over classes.
    pub weight: Vec<f64>,
    /// (K).
    pub bias: Vec<f64>,
    /// False when the iterations ran out first.
    pub converged: bool,
    /// L-BFGS iterations made.
    pub iterations: usize,
}

/// Rows per parallel block: at least 256, and at most 64 blocks, because each keeps a gradient of its own.
fn rows_per_block(n: usize) -> usize {
    n.div_ceil(64).max(256)
}

/// Column means and inverse standard deviations, (D) each.
fn standardisation(rows: Rows) -> (Vec<f64>, Vec<f64>) {
    let mean = rows.mean();
    let mut variance = vec![0f64; rows.width()];
    for i in 0..rows.count() {
        for ((v, &x), m) in variance.iter_mut().zip(rows.row(i)).zip(&mean) {
            *v += (x as f64 - m).powi(2);
        }
    }
    let n = rows.count() as f64;
    let scale = variance.iter().zip(&mean).map(|(v, m)| {
        let deviation = (v / n).sqrt();
        // A column whose spread is below the rounding of its own f32 values is constant: dividing would blow up noise.
        if deviation <= 1e-6 * m.abs() || deviation == 0.0 { 1.0 } else { 1.0 / deviation }
    });
    (mean.clone(), scale.collect())
}

impl Probe {
    /// Fits on `rows` (C, D) with classes `labels` (C). One class alone gives a probe that always names it.
    pub fn fit(rows: Rows, labels: &[usize], settings: ProbeSettings) -> Result<Probe> {
        same_length("linear probe", rows.count(), labels.len())?;
        if labels.is_empty() || settings.c <= 0.0 {
            return Err(Error::new(
                Code::TooFewCells,
                "a linear probe needs at least one labelled training cell and C > 0",
            )
            .found(format!("{} cells, C = {}", labels.len(), settings.c)));
        }
        let (mean, scale) = standardisation(rows);
        let mut classes = labels.to_vec();
        classes.sort_unstable();
        classes.dedup();
        let (labels, counts) = compact(labels);
        let (k, d, n) = (classes.len(), rows.width(), rows.count());
        let class_weight: Vec<f64> = counts
            .iter()
            .map(|&c| if settings.balanced { n as f64 / (k as f64 * c as f64) } else { 1.0 })
            .collect();
        if k == 1 {
            return Ok(Probe {
                mean,
                scale,
                classes,
                weight: vec![0.0; d],
                bias: vec![0.0],
                converged: true,
                iterations: 0,
            });
        }
        let total: f64 = labels.iter().map(|&l| class_weight[l]).sum();
        let penalty = if k == 2 { 2.0 } else { 1.0 } / (settings.c * total);
        let data =
            Data { rows, labels: &labels, mean: &mean, scale: &scale, class_weight: &class_weight, k, total };
        let stop = Stop { iterations: settings.iterations, gradient: settings.tolerance };
        let minimum = minimise(vec![0f64; k * (d + 1)], stop, |x, gradient| data.loss(x, penalty, gradient));
        let mut weight = minimum.x;
        let bias = weight.split_off(k * d);
        Ok(Probe {
            mean,
            scale,
            classes,
            weight,
            bias,
            converged: minimum.converged,
            iterations: minimum.iterations,
        })
    }

    /// Logits (C, K) of `rows`, columns in the order of `classes`.
    pub fn logits(&self, rows: Rows) -> Result<Vec<f64>> {
        let (k, d) = (self.classes.len(), self.mean.len());
        if rows.width() != d {
            return Err(Error::bug("linear probe: rows of another width").found(rows.width()).wanted(d));
        }
        let block = 256;
        let mut out = vec![0f64; rows.count() * k];
        out.par_chunks_mut(block * k).enumerate().for_each_init(Vec::new, |x, (b, out)| {
            let first = b * block;
            rows.widen(first..first + out.len() / k, x);
            standardise(x, &self.mean, &self.scale);
            product_abt(x, &self.weight, d, out);
            out.chunks_exact_mut(k).for_each(|row| row.iter_mut().zip(&self.bias).for_each(|(o, b)| *o += b));
        });
        Ok(out)
    }

    /// The class of each row: highest logit, the lowest class of equals.
    pub fn predict(&self, rows: Rows) -> Result<Vec<usize>> {
        let k = self.classes.len();
        let best = |row: &[f64]| (0..k).reduce(|a, b| if row[b] > row[a] { b } else { a }).unwrap_or(0);
        Ok(self.logits(rows)?.chunks_exact(k).map(|row| self.classes[best(row)]).collect())
    }
}

fn standardise(x: &mut [f64], mean: &[f64], scale: &[f64]) {
    for row in x.chunks_exact_mut(mean.len()) {
        row.iter_mut().zip(mean).zip(scale).for_each(|((x, m), s)| *x = (*x - m) * s);
    }
}

/// The training set as the objective sees it.
struct Data<'a> {
    rows: Rows<'a>,
    labels: &'a [usize],
    mean: &'a [f64],
    scale: &'a [f64],
    class_weight: &'a [f64],
    k: usize,
    total: f64,
}

impl Data<'_> {
    /// Objective at `x` = (K·D weights, K biases); sets the gradient.
    fn loss(&self, x: &[f64], penalty: f64, gradient: &mut [f64]) -> f64 {
        let (k, d) = (self.k, self.rows.width());
        let (weight, bias) = x.split_at(k * d);
        let block = rows_per_block(self.rows.count());
        let partial: Vec<(f64, Vec<f64>)> = self
            .labels
            .par_chunks(block)
            .enumerate()
            .map(|(b, labels)| self.block(b * block, labels, weight, bias))
            .collect();
        gradient.fill(0.0);
        let mut value = 0.0;
        for (loss, part) in partial {
            value += loss;
            gradient.iter_mut().zip(part).for_each(|(g, p)| *g += p);
        }
        for (g, w) in gradient.iter_mut().zip(weight) {
            *g += penalty * w;
        }
        value + 0.5 * penalty * weight.iter().map(|w| w * w).sum::<f64>()
    }

    /// Loss and gradient of rows `first..first + labels.len()`, a sub-block at a time so that scratch stays small.
    fn block(&self, first: usize, labels: &[usize], weight: &[f64], bias: &[f64]) -> (f64, Vec<f64>) {
        const ROWS: usize = 256;
        let (k, d) = (self.k, self.rows.width());
        let mut gradient = vec![0f64; k * (d + 1)];
        let (mut x, mut logits, mut product) = (Vec::new(), vec![0f64; ROWS * k], vec![0f64; k * d]);
        let mut loss = 0.0;
        for (s, labels) in labels.chunks(ROWS).enumerate() {
            let start = first + s * ROWS;
            self.rows.widen(start..start + labels.len(), &mut x);
            standardise(&mut x, self.mean, self.scale);
            let logits = &mut logits[..labels.len() * k];
            product_abt(&x, weight, d, logits);
            for (row, &label) in logits.chunks_exact_mut(k).zip(labels) {
                row.iter_mut().zip(bias).for_each(|(l, b)| *l += b);
                let scale = self.class_weight[label] / self.total;
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let target = row[label];
                row.iter_mut().for_each(|l| *l = (*l - max).exp());
                let sum: f64 = row.iter().sum();
                loss += scale * (max + sum.ln() - target);
                // The logits become their own gradient.
                row.iter_mut().for_each(|p| *p *= scale / sum);
                row[label] -= scale;
                gradient[k * d..].iter_mut().zip(row.iter()).for_each(|(g, r)| *g += r);
            }
            product_atb(logits, &x, labels.len(), &mut product);
            gradient.iter_mut().zip(&product).for_each(|(g, p)| *g += p);
        }
        (loss, gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Philox, site};

    fn table(n: usize, d: usize, k: usize) -> (Vec<f32>, Vec<usize>) {
        let mut rng = Philox::new(21, 0, site::EVAL);
        let labels: Vec<usize> = (0..n).map(|i| (i * 7) % k).collect();
        let value = |rng: &mut Philox, c: usize, j: usize| {
            5.0 + rng.normal() as f32 + if j % k == c { 1.0 } else { 0.0 }
        };
        (
            labels.iter().flat_map(|&c| (0..d).map(|j| value(&mut rng, c, j)).collect::<Vec<_>>()).collect(),
            labels,
        )
    }

    #[test]
    fn gradient_equals_finite_differences() {
        let (values, labels) = table(37, 4, 3);
        let rows = Rows::new(&values, 4).unwrap();
        let (mean, scale) = standardisation(rows);
        let class_weight = [0.5, 1.0, 2.0];
        let data = Data {
            rows,
            labels: &labels,
            mean: &mean,
            scale: &scale,
            class_weight: &class_weight,
            k: 3,
            total: 41.0,
        };
        let x: Vec<f64> = (0..15).map(|i| (i as f64).sin()).collect();
        let mut gradient = vec![f64::NAN; 15];
        data.loss(&x, 0.3, &mut gradient);
        for i in 0..15 {
            let at = |step: f64| {
                let mut x = x.clone();
                x[i] += step;
                data.loss(&x, 0.3, &mut [0.0; 15])
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((numeric - gradient[i]).abs() < 1e-8, "{i}: {numeric} {}", gradient[i]);
        }
    }

    #[test]
    fn one_class_one_cell_and_constant_columns() {
        let values = [3f32, 1.0, 3.0, 2.0, 3.0, 9.0, 3.0, 8.0];
        let rows = Rows::new(&values, 2).unwrap();
        assert_eq!(
            Probe::fit(rows, &[4; 4], ProbeSettings::default()).unwrap().predict(rows).unwrap(),
            [4; 4]
        );
        let p = Probe::fit(rows, &[1, 1, 6, 6], ProbeSettings { c: 10.0, ..Default::default() }).unwrap();
        assert_eq!(p.predict(rows).unwrap(), [1, 1, 6, 6]);
        assert!(p.weight[0].abs() < 1e-12, "a constant column carries no weight");
        let one = Rows::new(&values[..2], 2).unwrap();
        assert_eq!(Probe::fit(one, &[0], ProbeSettings::default()).unwrap().predict(rows).unwrap(), [0; 4]);
        assert!(Probe::fit(Rows::new(&[], 2).unwrap(), &[], ProbeSettings::default()).is_err());
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (values, labels) = table(1500, 5, 3);
        let run = || Probe::fit(Rows::new(&values, 5).unwrap(), &labels, ProbeSettings::default()).unwrap();
        let in_pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(run);
        let (a, b) = (in_pool(1), in_pool(3));
        assert!(a.weight == b.weight && a.bias == b.bias && a.converged);
    }
}
