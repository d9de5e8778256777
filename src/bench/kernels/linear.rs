//! Linear layers of the encoder: three products each, at the four shapes of a layer.

use super::{About, Expected, Kernel, KernelCase, Make, check};
use crate::bench::random;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::ops::Backend;
use crate::ops::linear::{self, Activation, BackwardInput, BackwardWeight, Dims, In};

/// Rows, or outputs, that are checked.
const CHECKED: usize = 6;

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Forward(Activation),
    Input,
    Weight,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Direction::Forward(_) => "linear_forward",
            Direction::Input => "linear_backward_input",
            Direction::Weight => "linear_backward_weight",
        }
    }
}

struct Linear<B: Device, A: Act> {
    dev: B,
    name: &'static str,
    dims: Dims,
    direction: Direction,
    /// x, or dy, and the weight, or x.
    left: B::Buf<A>,
    right: B::Buf<A>,
    bias: B::Buf<A>,
    host: [Vec<A>; 3],
    out: B::Buf<A>,
    dweight: B::Buf<f32>,
    dbias: B::Buf<f32>,
}

/// Every product of a layer.
pub(super) fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let (rows, d, f) = (case.lengths.iter().sum(), case.preset.width, case.preset.ffn);
    let seed = case.seed;
    let layers = [
        ("qkv", d, 3 * d, Activation::None),
        ("out", d, d, Activation::None),
        ("up_relu", d, f, Activation::Relu),
        ("down", f, d, Activation::None),
    ];
    let mut makes: Vec<Make<B>> = Vec::new();
    for (name, inputs, outputs, activation) in layers {
        for direction in [Direction::Forward(activation), Direction::Input, Direction::Weight] {
            let dims = Dims { rows, inputs, outputs };
            let label = format!("{}/{name}", direction.name());
            makes.push(Make::new(label, move |dev| Linear::<B, A>::new(dev, name, dims, direction, seed)));
        }
    }
    makes
}

impl<B: Backend<A>, A: Act> Linear<B, A> {
    fn new(dev: &B, name: &'static str, dims: Dims, direction: Direction, seed: u64) -> Result<Self> {
        let Dims { rows, inputs, outputs } = dims;
        let (left, right, out) = match direction {
            Direction::Forward(_) => (rows * inputs, outputs * inputs, rows * outputs),
            Direction::Input => (rows * outputs, outputs * inputs, rows * inputs),
            Direction::Weight => (rows * outputs, rows * inputs, 0),
        };
        let host = [
            random::numbers(seed + 1, left, 1.0),
            random::numbers(seed + 2, right, 1.0 / (inputs as f32).sqrt()),
            random::numbers(seed + 3, outputs, 1.0),
        ];
        let gradients = if direction == Direction::Weight { outputs } else { 0 };
        Ok(Linear {
            name,
            dims,
            direction,
            left: dev.upload(&host[0])?,
            right: dev.upload(&host[1])?,
            bias: dev.upload(&host[2])?,
            host,
            out: dev.upload(&vec![A::from_f32(f32::NAN); out])?,
            dweight: dev.zeros(gradients * inputs)?,
            dbias: dev.zeros(gradients)?,
            dev: dev.clone(),
        })
    }
}

/// Σ_i a[i·step_a]·b[i·step_b].
fn dot<A: Act>(a: &[A], step_a: usize, b: &[A], step_b: usize, len: usize) -> f64 {
    (0..len).map(|i| f64::from(a[i * step_a].to_f32()) * f64::from(b[i * step_b].to_f32())).sum()
}

impl<B: Backend<A>, A: Act> Kernel for Linear<B, A> {
    fn about(&self) -> About {
        let Dims { rows, inputs, outputs } = self.dims;

        let e = size_of::<A>() as f64;
        let (x, y, w) = ((rows * inputs) as f64, (rows * outputs) as f64, (outputs * inputs) as f64);
        // The weight's gradient is read and written in f32.
        let weight_bytes = if self.direction == Direction::Weight { 8.0 } else { e };
        About {
            name: format!("{}/{}", self.direction.name(), self.name),
            shape: format!("{rows}x{inputs}x{outputs}"),
            flop: 2.0 * rows as f64 * w,
            bytes: e * (x + y) + weight_bytes * w,
            act: A::NAME,
            bound: check::rounded_once::<A>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        let (dev, dims) = (&self.dev, self.dims);
        match self.direction {
            Direction::Forward(activation) => {
                let input = In { x: &self.left, weight: &self.right, bias: Some(&self.bias), activation };
                linear::forward::<A, B>(dev, dims, input, &mut self.out)
            }
            Direction::Input => {
                let input = BackwardInput {
                    dy: &self.left,
                    weight: &self.right,
                    relu_output: None,
                    accumulate: false,
                };
                linear::backward_input::<A, B>(dev, dims, input, &mut self.out)
            }
            Direction::Weight => {
                let input = BackwardWeight { x: &self.right, dy: &self.left };
                linear::backward_weight::<A, B>(dev, dims, input, &mut self.dweight, Some(&mut self.dbias))
            }
        }
    }

    fn outputs(&self) -> Result<Vec<(&'static str, Vec<f64>)>> {
        Ok(match self.direction {
            Direction::Weight => vec![
                ("dweight", super::wide(&self.dev.download(&self.dweight)?)),
                ("dbias", super::wide(&self.dev.download(&self.dbias)?)),
            ],
            _ => vec![("y", super::wide(&self.dev.download(&self.out)?))],
        })
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let Dims { rows, inputs, outputs } = self.dims;
        let [left, right, bias] = &self.host;
        let mut elements = Vec::new();
        match self.direction {
            Direction::Forward(activation) => {
                for r in super::spread(rows, CHECKED) {
                    for o in 0..outputs {
                        let y = dot(&left[r * inputs..], 1, &right[o * inputs..], 1, inputs);
                        let y = y + f64::from(bias[o].to_f32());
                        elements.push((
                            r * outputs + o,
                            if activation == Activation::Relu { y.max(0.0) } else { y },
                        ));
                    }
                }
            }
            Direction::Input => {
                for r in super::spread(rows, CHECKED) {
                    for i in 0..inputs {
                        elements.push((
                            r * inputs + i,
                            dot(&left[r * outputs..], 1, &right[i..], inputs, outputs),
                        ));
                    }
                }
            }
            Direction::Weight => {
                let mut sums = Vec::new();
                for o in super::spread(outputs, CHECKED) {
                    let column = |i: usize| dot(&left[o..], outputs, &right[i..], inputs, rows);
                    elements
                        .extend(super::spread(inputs, 16).into_iter().map(|i| (o * inputs + i, column(i))));
                    sums.push((o, (0..rows).map(|r| f64::from(left[r * outputs + o].to_f32())).sum()));
                }
                let dbias = Expected { output: 1, what: "dbias", elements: sums };
                return Ok(vec![Expected { output: 0, what: "dweight", elements }, dbias]);
            }
        }
        Ok(vec![Expected { output: 0, what: "y", elements }])
    }
}
