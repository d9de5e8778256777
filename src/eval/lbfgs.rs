//! Limited-memory BFGS (Nocedal 1980) with a line search for the strong Wolfe conditions, in f64.
//!
//! ```text
//! x ← x − α H g      H from the last 10 pairs (s, y) by the two-loop recursion
//! f(x + αp) ≤ f(x) + 1e-4 α g·p        |g(x + αp)·p| ≤ 0.9 |g·p|
//! ```
//!
//! The line search is the bracket-and-zoom of Nocedal & Wright (algorithms 3.5 and 3.6) with cubic interpolation. Plain sums
//! in index order: the path taken is the same on every run.

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    /// Iterations at most.
    pub iterations: usize,
    /// Largest gradient component at which the minimum counts as found.
    pub gradient: f64,
}

/// Where the search ended.
#[derive(Debug, Clone)]
pub struct Minimum {
    /// The point.
    pub x: Vec<f64>,
    /// The value there.
    pub value: f64,
    /// Iterations made.
    pub iterations: usize,
    /// The gradient fell below the tolerance, or no step of this precision lowers the value any more.
    pub converged: bool,
}

const PAIRS: usize = 10;
const DECREASE: f64 = 1e-4;
const CURVATURE: f64 = 0.9;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// A point on the search line.
#[derive(Clone)]
struct Trial {
    step: f64,
    value: f64,
    slope: f64,
    x: Vec<f64>,
    gradient: Vec<f64>,
}

/// Minimises `f` from `x`. `f(x, gradient)` returns the value and sets the gradient.
pub fn minimise(mut x: Vec<f64>, stop: Stop, mut f: impl FnMut(&[f64], &mut [f64]) -> f64) -> Minimum {
    let mut gradient = vec![0f64; x.len()];
    let mut value = f(&x, &mut gradient);
    let mut pairs: std::collections::VecDeque<(Vec<f64>, Vec<f64>, f64)> = Default::default();
    for iteration in 0..stop.iterations {
        let steepest = gradient.iter().fold(0f64, |m, g| m.max(g.abs()));
        if steepest <= stop.gradient {
            return Minimum { x, value, iterations: iteration, converged: true };
        }
        let mut direction = two_loop(&gradient, &pairs);
        let mut slope = dot(&direction, &gradient);
        if slope >= 0.0 {
            // Rounding has spoilt the pairs: start again from the gradient.
            pairs.clear();
            direction = gradient.iter().map(|g| -g).collect();
            slope = dot(&direction, &gradient);
        }
        let first = if pairs.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt().max(1.0) } else { 1.0 };
        let start = Trial { step: 0.0, value, slope, x: x.clone(), gradient: gradient.clone() };
        let Some(end) = line_search(&start, &direction, first, &mut f) else {
            return Minimum { x, value, iterations: iteration, converged: true };
        };
        let s: Vec<f64> = end.x.iter().zip(&x).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = end.gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let curvature = dot(&s, &y);
        if curvature > 1e-10 * dot(&y, &y) {
            if pairs.len() == PAIRS {
                pairs.pop_front();
            }
            pairs.push_back((s, y, curvature));
        }
        (x, value, gradient) = (end.x, end.value, end.gradient);
    }
    Minimum { x, value, iterations: stop.iterations, converged: false }
}

/// −H g.
fn two_loop(gradient: &[f64], pairs: &std::collections::VecDeque<(Vec<f64>, Vec<f64>, f64)>) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut alphas = Vec::with_capacity(pairs.len());
    for (s, y, sy) in pairs.iter().rev() {
        let alpha = dot(s, &q) / sy;
        q.iter_mut().zip(y).for_each(|(q, y)| *q -= alpha * y);
        alphas.push(alpha);
    }
    if let Some((_, y, sy)) = pairs.back() {
        let scale = sy / dot(y, y);
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((s, y, sy), alpha) in pairs.iter().zip(alphas.into_iter().rev()) {
        let beta = dot(y, &q) / sy;
        q.iter_mut().zip(s).for_each(|(q, s)| *q += (alpha - beta) * s);
    }
    q
}

/// A step that satisfies the strong Wolfe conditions; failing that, the best that lowers the value; `None` when none does.
fn line_search(
    start: &Trial,
    direction: &[f64],
    first: f64,
    f: &mut impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Option<Trial> {
    let mut at = |step: f64| {
        let x: Vec<f64> = start.x.iter().zip(direction).map(|(x, d)| x + step * d).collect();
        let mut gradient = vec![0f64; x.len()];
        let value = f(&x, &mut gradient);
        Trial { step, value, slope: dot(&gradient, direction), x, gradient }
    };
    let too_high = |t: &Trial| t.value.is_nan() || t.value > start.value + DECREASE * t.step * start.slope;
    let flat = |t: &Trial| t.slope.abs() <= -CURVATURE * start.slope;
    let mut previous = start.clone();
    let mut step = first;
    let mut bracket = None;
    for i in 0..30 {
        let trial = at(step);
        if too_high(&trial) || (i > 0 && trial.value >= previous.value) {
            bracket = Some((previous, trial));
            break;
        }
        if flat(&trial) {
            return Some(trial);
        }
        if trial.slope >= 0.0 {
            bracket = Some((trial, previous));
            break;
        }
        step *= 2.0;
        previous = trial;
    }
    let (mut low, mut high) = bracket?;
    for _ in 0..40 {
        let trial = at(cubic_minimum(&low, &high));
        if too_high(&trial) || trial.value >= low.value {
            high = trial;
        } else {
            if flat(&trial) {
                return Some(trial);
            }
            if trial.slope * (high.step - low.step) >= 0.0 {
                high = low;
            }
            low = trial;
        }
        if (high.step - low.step).abs() <= 1e-14 * low.step.abs().max(1e-300) {
            break;
        }
    }
    (low.step > 0.0 && low.value < start.value).then_some(low)
}

/// Minimum of the cubic through both values and slopes, kept a tenth of the interval away from its ends.
fn cubic_minimum(a: &Trial, b: &Trial) -> f64 {
    let width = b.step - a.step;
    let d1 = a.slope + b.slope - 3.0 * (b.value - a.value) / width;
    let square = d1 * d1 - a.slope * b.slope;
    let inside = if square >= 0.0 {
        let d2 = square.sqrt().copysign(width);
        b.step - width * (b.slope + d2 - d1) / (b.slope - a.slope + 2.0 * d2)
    } else {
        f64::NAN
    };
    let (left, right) = (a.step.min(b.step) + 0.1 * width.abs(), a.step.max(b.step) - 0.1 * width.abs());
    if inside >= left && inside <= right { inside } else { a.step + 0.5 * width }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_minimum_of_rosenbrock_in_ten_dimensions() {
        let f = |x: &[f64], g: &mut [f64]| {
            g.fill(0.0);
            let mut value = 0.0;
            for i in 0..x.len() - 1 {
                let (a, b) = (x[i + 1] - x[i] * x[i], 1.0 - x[i]);
                value += 100.0 * a * a + b * b;
                g[i] += -400.0 * a * x[i] - 2.0 * b;
                g[i + 1] += 200.0 * a;
            }
            value
        };
        let start: Vec<f64> = (0..10).map(|i| if i % 2 == 0 { -1.2 } else { 1.0 }).collect();
        let m = minimise(start, Stop { iterations: 1000, gradient: 1e-10 }, f);
        assert!(m.converged && m.iterations < 300, "{m:?}");
        assert!(m.x.iter().all(|x| (x - 1.0).abs() < 1e-8), "{m:?}");
    }

    #[test]
    fn a_start_at_the_minimum_stays_there_and_a_budget_is_kept() {
        let f = |x: &[f64], g: &mut [f64]| {
            g.iter_mut().zip(x).for_each(|(g, x)| *g = 4.0 * x.powi(3));
            x.iter().map(|x| x.powi(4)).sum()
        };
        assert_eq!(minimise(vec![0.0; 3], Stop { iterations: 5, gradient: 1e-9 }, f).iterations, 0);
        let m = minimise(vec![5.0; 3], Stop { iterations: 2, gradient: 0.0 }, f);
        assert!(!m.converged && m.iterations == 2 && m.value < 1875.0);
    }
}
