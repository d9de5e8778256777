//! How sure a score is: 95 % intervals by the bootstrap over the scored cells.
//!
//! Cells are drawn with replacement within each true class, so that a class of five cells keeps five in every draw. All methods see the
//! same draws: the interval of a difference is that of a paired comparison. Shares (recall@k) have Wilson's interval instead.

use crate::rng::{Philox, site};
use rayon::prelude::*;

/// Draws.
pub const DRAWS: usize = 1000;
/// First stream of the draws among those of evaluation.
const STREAM: u32 = (1 << 31) + 1000;

/// Lower and upper end, 2.5 % and 97.5 %.
pub type Interval = (f64, f64);

/// The scores of one method in every draw.
#[derive(Debug, Clone)]
pub struct Draws {
    /// Accuracy, (draws).
    pub accuracy: Vec<f64>,
    /// Macro-F1 over classes that truth or predictions hold, (draws).
    pub macro_f1: Vec<f64>,
    /// Mean F1 of the tail classes, (draws); empty where there are none.
    pub tail_f1: Vec<f64>,
    /// F1 of each class, (classes, draws).
    pub f1: Vec<Vec<f64>>,
}

/// One method in one draw: accuracy, macro-F1, tail F1, F1 by class.
type Draw = (f64, f64, f64, Vec<f64>);

/// The middle 95 % of `values`; NaN where there are none.
pub fn interval(values: impl IntoIterator<Item = f64>) -> Interval {
    let mut sorted: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| match sorted.len() {
        0 => f64::NAN,
        n => sorted[((share * (n - 1) as f64).round() as usize).min(n - 1)],
    };
    (at(0.025), at(0.975))
}

/// The interval of `after − before`, draw by draw.
pub fn difference(before: &[f64], after: &[f64]) -> Interval {
    interval(before.iter().zip(after).map(|(b, a)| a - b))
}

/// Wilson's interval of `share` of `n`.
pub fn wilson(share: f64, n: usize) -> Interval {
    if n == 0 {
        return (f64::NAN, f64::NAN);
    }
    let (z, n) = (1.959964f64, n as f64);
    let middle = (share + z * z / (2.0 * n)) / (1.0 + z * z / n);
    let half = z / (1.0 + z * z / n) * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// Scores of `called` (methods × cells) against `truth` in [`DRAWS`] draws. Classes lie below `classes`; `tail` names some.
pub fn draws(truth: &[usize], called: &[&[usize]], classes: usize, tail: &[bool], seed: u64) -> Vec<Draws> {
    let mut members: Vec<Vec<u32>> = vec![Vec::new(); classes];
    truth.iter().enumerate().for_each(|(i, &t)| members[t].push(i as u32));
    let counted: Vec<Vec<bool>> = called
        .iter()
        .map(|c| {
            let mut seen: Vec<bool> = members.iter().map(|m| !m.is_empty()).collect();
            c.iter().for_each(|&k| seen[k] = true);
            seen
        })
        .collect();
    let per_draw: Vec<Vec<Draw>> = (0..DRAWS)
        .into_par_iter()
        .map(|draw| {
            let mut rng = Philox::new(seed, STREAM + draw as u32, site::EVAL);
            let mut hit = vec![0u32; called.len() * classes];
            let mut named = vec![0u32; called.len() * classes];
            for (class, cells) in members.iter().enumerate() {
                for _ in 0..cells.len() {
                    let cell = cells[rng.below(cells.len() as u64) as usize] as usize;
                    for (m, c) in called.iter().enumerate() {
                        named[m * classes + c[cell]] += 1;
                        hit[m * classes + class] += u32::from(c[cell] == class);
                    }
                }
            }
            (0..called.len())
                .map(|m| {
                    let (hit, named) = (&hit[m * classes..][..classes], &named[m * classes..][..classes]);
                    let f1: Vec<f64> = (0..classes)
                        .map(|c| match members[c].len() as u32 + named[c] {
                            0 => 0.0,
                            both => 2.0 * hit[c] as f64 / both as f64,
                        })
                        .collect();
                    let mean = |of: &dyn Fn(usize) -> bool| {
                        let kept: Vec<f64> =
                            (0..classes).filter(|&c| counted[m][c] && of(c)).map(|c| f1[c]).collect();
                        kept.iter().sum::<f64>() / kept.len() as f64
                    };
                    let right = hit.iter().sum::<u32>() as f64 / truth.len() as f64;
                    (right, mean(&|_| true), mean(&|c| tail.get(c).copied().unwrap_or(false)), f1)
                })
                .collect()
        })
        .collect();
    (0..called.len())
        .map(|m| {
            let column = |of: fn(&Draw) -> f64| per_draw.iter().map(|d| of(&d[m])).collect();
            Draws {
                accuracy: column(|d| d.0),
                macro_f1: column(|d| d.1),
                tail_f1: column(|d| d.2),
                f1: (0..classes).map(|c| per_draw.iter().map(|d| d[m].3[c]).collect()).collect(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metrics::classification;

    #[test]
    fn intervals_hold_the_score_shrink_with_cells_and_see_paired_differences() {
        let truth: Vec<usize> = (0..600).map(|i| i % 3).collect();
        let half: Vec<usize> = (0..600).map(|i| if i % 5 < 2 { (i + 1) % 3 } else { i % 3 }).collect();
        let better: Vec<usize> = (0..600).map(|i| if i % 5 == 0 { (i + 1) % 3 } else { i % 3 }).collect();
        let d = draws(&truth, &[&half, &better], 3, &[false, false, true], 1);
        let score = classification(&truth, &half, 3).unwrap();
        let (low, high) = interval(d[0].macro_f1.iter().copied());
        assert!(low < score.macro_f1 && score.macro_f1 < high && high - low < 0.1, "{low} {high}");
        let class = interval(d[0].f1[2].iter().copied());
        assert!(class.0 < score.per_class[2].f1 && score.per_class[2].f1 < class.1);
        assert_eq!(d[0].tail_f1, d[0].f1[2]);
        let (least, _) = difference(&d[0].macro_f1, &d[1].macro_f1);
        assert!(least > 0.1, "{least}");
        let few = draws(&truth[..60], &[&half[..60]], 3, &[], 1);
        let (a, b) = interval(few[0].accuracy.iter().copied());
        assert!(b - a > 2.0 * (high - low) && few[0].tail_f1[0].is_nan());
    }

    #[test]
    fn perfect_answers_have_no_spread_and_nothing_is_nan_that_has_cells() {
        let truth = [0usize, 0, 1, 2];
        let d = draws(&truth, &[&truth], 4, &[], 0);
        assert!(d[0].macro_f1.iter().chain(&d[0].accuracy).all(|x| *x == 1.0));
        assert!(interval([f64::NAN]).0.is_nan());
    }

    #[test]
    fn wilson_agrees_with_statsmodels() {
        // statsmodels.stats.proportion.proportion_confint(45, 50, method="wilson")
        let (low, high) = wilson(0.9, 50);
        assert!((low - 0.786_398).abs() < 1e-4 && (high - 0.956_52).abs() < 1e-4, "{low} {high}");
        assert!((wilson(1.0, 10).1 - 1.0).abs() < 1e-12 && wilson(0.5, 0).0.is_nan());
    }
}
