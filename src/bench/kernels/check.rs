//! Is a result right? Held against f64, against itself, against another device.
//!
//! Errors are told as a share of the largest magnitude among the elements of one name: a row of a matrix product with one wrong
//! element stands out from thousands of right ones, and elements that cancel to nearly nothing are not asked for digits
//! that no sum in f32 or bf16 holds.

use super::{Expected, Kernel, KernelCase, all};
use crate::backend::{Choice, Open};
use crate::cpu::Cpu;
use crate::cuda::Cuda;
use crate::device::Act;
use crate::error::{Error, Result};
use crate::ops::Backend;
use serde_json::{Value, json};

/// Largest error, as a share of the largest magnitude, of f32 sums in another order.
const F32_BOUND: f64 = 2e-4;

/// Of results that are rounded to the activation type when they are stored, and perhaps once before: two of bf16's 2⁻⁹.
pub(super) fn rounded_once<A: Act>() -> f64 {
    if A::IS_F32 { F32_BOUND } else { 8e-3 }
}

/// Of results of two products, between which probabilities or gradients of scores are rounded to bf16.
pub(super) fn rounded_inside<A: Act>() -> f64 {
    if A::IS_F32 { F32_BOUND } else { 2e-2 }
}

/// What is asked of a result besides being right.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Trial {
    /// Runs from the start whose bits have to be those of the first.
    pub repeats: usize,
    /// A device that has to agree.
    pub against: Option<Choice>,
}

type Outputs = Vec<(&'static str, Vec<f64>)>;

impl Trial {
    /// Runs `kernel`, number `index` of the case, and says how its results are: `ok`, `max_err`, `bound`, `why` where wrong, and
    /// `repeats` and `against_err` where asked for.
    pub(super) fn judge<B: Backend<A>, A: Act>(
        &self,
        dev: &B,
        case: &KernelCase,
        index: usize,
        kernel: &mut dyn Kernel,
    ) -> Result<Value> {
        let bound = kernel.about().bound;
        kernel.run()?;
        let got = kernel.outputs()?;
        let (max_err, mut why) = held(&got, &kernel.expected()?, bound);
        let mut verdict = json!({"max_err": max_err, "bound": bound});
        if why.is_none() && self.repeats > 0 {
            verdict["repeats"] = json!(self.repeats);
            let again = all::<B, A>(case).swap_remove(index);
            for run in 0..self.repeats {
                let mut kernel = (again.make)(dev)?;
                kernel.run()?;
                if let Some(place) = first_difference(&got, &kernel.outputs()?) {
                    why = Some(format!("run {} differs at {place}", run + 2));
                    break;
                }
            }
        }
        if let (None, Some(choice)) = (&why, self.against) {
            let other = match choice.open()? {
                Open::Cpu(cpu) => elsewhere::<Cpu, A>(&cpu, case, index)?,
                Open::Cuda(cuda) => elsewhere::<Cuda, A>(&cuda, case, index)?,
            };
            let (error, place) = farthest(&got, &other)?;
            verdict["against"] = json!(choice.to_string());
            verdict["against_err"] = json!(error);
            if !within(error, bound) {
                why = Some(format!("{choice} differs by {error:.2e} of the largest at {place}"));
            }
        }
        verdict["ok"] = json!(why.is_none());
        verdict["why"] = json!(why);
        Ok(verdict)
    }
}

/// Not where the error is NaN.
fn within(error: f64, limit: f64) -> bool {
    error <= limit
}

/// The same kernel's results on another device.
fn elsewhere<B: Backend<A>, A: Act>(dev: &B, case: &KernelCase, index: usize) -> Result<Outputs> {
    let mut kernel = (all::<B, A>(case).swap_remove(index).make)(dev)?;
    kernel.run()?;
    kernel.outputs()
}

/// Largest error against the sample, and what is wrong: an element that is no number, or one out of bounds.
fn held(got: &Outputs, expected: &[Expected], bound: f64) -> (f64, Option<String>) {
    for (name, values) in got {
        if let Some(i) = values.iter().position(|x| !x.is_finite()) {
            return (f64::NAN, Some(format!("{name}: element {i} of {} is {}", values.len(), values[i])));
        }
    }
    let (mut worst, mut why) = (0.0f64, None);
    if expected.iter().all(|e| e.elements.is_empty()) {
        return (f64::NAN, Some("nothing was checked".into()));
    }
    for e in expected {
        let largest = e.elements.iter().fold(1e-30f64, |m, (_, value)| m.max(value.abs()));
        for (i, value) in &e.elements {
            let error = (got[e.output].1[*i] - value).abs() / largest;
            // `max` would pass over a NaN of the oracle.
            if !within(error, worst) {
                worst = error;
            }
            if !within(error, bound) && why.is_none() {
                let found = got[e.output].1[*i];
                why = Some(format!("{}: element {i} is {found:e}, f64 says {value:e}", e.what));
            }
        }
    }
    (worst, why)
}

/// Where two runs differ.
fn first_difference(a: &Outputs, b: &Outputs) -> Option<String> {
    a.iter().zip(b).find_map(|((name, a), (_, b))| {
        let i = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())?;
        Some(format!("{name}, element {i}: {:e} and {:e}", a[i], b[i]))
    })
}

/// Largest difference as a share of the largest magnitude, and where.
fn farthest(a: &Outputs, b: &Outputs) -> Result<(f64, String)> {
    let (mut worst, mut place) = (0.0f64, String::new());
    for ((name, a), (_, b)) in a.iter().zip(b) {
        if a.len() != b.len() {
            return Err(Error::bug("two devices gave results of two sizes").found(name));
        }
        let largest = a.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            let error = (a - b).abs() / largest;
            if !within(error, worst) {
                (worst, place) = (error, format!("{name}, element {i}"));
            }
        }
    }
    Ok((worst, place))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(values: &[f64]) -> Outputs {
        vec![("y", values.to_vec())]
    }

    #[test]
    fn a_wrong_element_an_unwritten_one_and_an_empty_sample_are_found() {
        let expected = |elements| [Expected { output: 0, what: "y", elements }];
        let right = expected(vec![(0, 1.0), (2, -4.0)]);
        assert_eq!(held(&one(&[1.0, 9.0, -4.0]), &right, 1e-3), (0.0, None));
        let (error, why) = held(&one(&[1.0, 9.0, -3.9]), &right, 1e-3);
        assert!((error - 0.025).abs() < 1e-12 && why.unwrap().contains("element 2"));
        assert!(held(&one(&[1.0, f64::NAN, -4.0]), &right, 1e-3).1.unwrap().contains("NaN"));
        assert!(held(&one(&[1.0]), &expected(vec![(0, f64::NAN)]), 1e-3).1.is_some());
        assert!(held(&one(&[1.0]), &expected(Vec::new()), 1e-3).1.is_some());
    }

    #[test]
    fn bits_and_distances() {
        assert_eq!(first_difference(&one(&[0.0, 1.0]), &one(&[0.0, 1.0])), None);
        assert!(first_difference(&one(&[0.0]), &one(&[-0.0])).unwrap().contains("element 0"));
        assert_eq!(farthest(&one(&[2.0, -8.0]), &one(&[2.0, -6.0])).unwrap(), (0.25, "y, element 1".into()));
        assert!(farthest(&one(&[2.0]), &one(&[f64::NAN])).unwrap().0.is_nan());
    }
}
