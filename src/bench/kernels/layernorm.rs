//! LayerNorm with its residual, in both directions, and forward with dropout in front.

use super::{About, Expected, Kernel, KernelCase, Make, check, spread, wide};
use crate::bench::random;
use crate::device::{Act, Device, Dropout};
use crate::error::Result;
use crate::ops::Backend;
use crate::ops::layernorm::{self, BackwardIn, Dims, Gradients, In, Out};

const EPS: f32 = 1e-12;
const CHECKED: usize = 6;

#[derive(Clone, Copy, PartialEq)]
enum What {
    Forward,
    Dropped,
    Backward,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Forward => "layernorm_forward",
            What::Dropped => "layernorm_forward/dropout",
            What::Backward => "layernorm_backward",
        }
    }
}

struct LayerNorm<B: Device, A: Act> {
    dev: B,
    dims: Dims,
    what: What,
    /// Residual, or dy.
    first: B::Buf<A>,
    weight: B::Buf<A>,
    bias: B::Buf<A>,
    /// x and then the sum, or the sum.
    sum: B::Buf<A>,
    host: [Vec<A>; 4],
    y: B::Buf<A>,
    dresidual: B::Buf<A>,
    statistics: [B::Buf<f32>; 2],
    gradients: [B::Buf<f32>; 2],
}

pub(super) fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let dims = Dims { rows: case.lengths.iter().sum(), width: case.preset.width, eps: EPS };
    let seed = case.seed;
    let make = |what: What| Make::new(what.name(), move |dev| LayerNorm::<B, A>::new(dev, dims, what, seed));
    [What::Forward, What::Dropped, What::Backward].map(make).into()
}

impl<B: Backend<A>, A: Act> LayerNorm<B, A> {
    fn new(dev: &B, dims: Dims, what: What, seed: u64) -> Result<Self> {
        let (n, d) = (dims.rows * dims.width, dims.width);
        let numbers = |i: u64, len| random::numbers::<A>(seed + i, len, 1.0);
        let mut host = [numbers(6, n), numbers(7, d), numbers(8, d), numbers(9, n)];
        // Rows have a mean: a variance that is not taken round it shows.
        host[3].iter_mut().for_each(|x| *x = A::from_f32(x.to_f32() + 1.0));
        // Statistics of the sum, as a forward pass leaves them.
        let (mut mean, mut rstd) = (vec![f32::NAN; dims.rows], vec![f32::NAN; dims.rows]);
        if what == What::Backward {
            for (r, row) in host[3].chunks_exact(d).enumerate() {
                let (m, s) = moments(&wide(row));
                (mean[r], rstd[r]) = (m as f32, s as f32);
            }
        }
        let nan = vec![A::from_f32(f32::NAN); n];
        Ok(LayerNorm {
            dims,
            what,
            first: dev.upload(&host[0])?,
            weight: dev.upload(&host[1])?,
            bias: dev.upload(&host[2])?,
            sum: dev.upload(&host[3])?,
            host,
            y: dev.upload(&nan)?,
            dresidual: dev.upload(if what == What::Backward { &nan } else { &[] })?,
            statistics: [dev.upload(&mean)?, dev.upload(&rstd)?],
            gradients: [dev.zeros(d)?, dev.zeros(d)?],
            dev: dev.clone(),
        })
    }

    fn dropout(&self) -> Dropout {
        let probability = if self.what == What::Dropped { 0.1 } else { 0.0 };
        Dropout { probability, ..Dropout::NONE }
    }
}

/// Mean and 1/σ.
fn moments(row: &[f64]) -> (f64, f64) {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (mean, 1.0 / (variance + f64::from(EPS)).sqrt())
}

impl<B: Backend<A>, A: Act> Kernel for LayerNorm<B, A> {
    fn about(&self) -> About {
        let Dims { rows, width, .. } = self.dims;
        About {
            name: self.what.name().into(),
            shape: format!("{rows}x{width}"),
            flop: 0.0,
            bytes: (4 * size_of::<A>() * rows * width + 8 * rows) as f64,
            act: A::NAME,
            bound: check::rounded_once::<A>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        let dropout = self.dropout();
        let [mean, rstd] = &mut self.statistics;
        if self.what != What::Backward {
            let input = In { residual: Some(&self.first), weight: &self.weight, bias: &self.bias, dropout };
            let out = Out { x_then_sum: &mut self.sum, y: &mut self.y, mean, rstd };
            return layernorm::forward::<A, B>(&self.dev, self.dims, input, out);
        }
        let input = BackwardIn {
            dy: &self.first,
            sum: &self.sum,
            mean,
            rstd,
            weight: &self.weight,
            dropout,
            relu_input: false,
        };
        let [dweight, dbias] = &mut self.gradients;
        let grads = Gradients { dx: &mut self.y, dresidual: Some(&mut self.dresidual), dweight, dbias };
        layernorm::backward::<A, B>(&self.dev, self.dims, input, grads)
    }

    fn outputs(&self) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let dev = &self.dev;
        let [mean, rstd] = &self.statistics;
        if self.what != What::Backward {
            return Ok(vec![
                ("y", wide(&dev.download(&self.y)?)),
                ("sum", wide(&dev.download(&self.sum)?)),
                ("mean", wide(&dev.download(mean)?)),
                ("rstd", wide(&dev.download(rstd)?)),
            ]);
        }
        let [dweight, dbias] = &self.gradients;
        Ok(vec![
            ("dx", wide(&dev.download(&self.y)?)),
            ("dresidual", wide(&dev.download(&self.dresidual)?)),
            ("dweight", wide(&dev.download(dweight)?)),
            ("dbias", wide(&dev.download(dbias)?)),
        ])
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let (d, n) = (self.dims.width, self.dims.rows * self.dims.width);
        let [first, weight, bias, sum] = &self.host;
        let of = |output, what, elements| Expected { output, what, elements };
        let row = |x: &[A], r: usize| wide(&x[r * d..(r + 1) * d]);
        if self.what != What::Backward {
            let (mut y, mut total) = (Vec::new(), Vec::new());
            // Where dropout draws, the sum is the device's own: which elements it keeps is the business of the op's tests.
            let kept = if self.what == What::Dropped { Some(self.dev.download(&self.sum)?) } else { None };
            for r in spread(self.dims.rows, CHECKED) {
                let s = match &kept {
                    Some(sum) => row(sum, r),
                    None => row(sum, r).iter().zip(row(first, r)).map(|(x, r)| x + r).collect(),
                };
                let (mean, rstd) = moments(&s);
                let affine = |c: usize| {
                    (s[c] - mean) * rstd * f64::from(weight[c].to_f32()) + f64::from(bias[c].to_f32())
                };
                y.extend((0..d).map(|c| (r * d + c, affine(c))));
                total.extend((0..d).map(|c| (r * d + c, s[c])));
            }
            return Ok(vec![of(0, "y", y), of(1, "sum", total)]);
        }
        let mut dx = Vec::new();
        for r in spread(self.dims.rows, CHECKED) {
            let (s, dy) = (row(sum, r), row(first, r));
            let (mean, rstd) = moments(&s);
            let g: Vec<f64> = dy.iter().zip(weight).map(|(g, w)| g * f64::from(w.to_f32())).collect();
            let norm: Vec<f64> = s.iter().map(|x| (x - mean) * rstd).collect();
            let mean_g = g.iter().sum::<f64>() / d as f64;
            let mean_gn = g.iter().zip(&norm).map(|(g, n)| g * n).sum::<f64>() / d as f64;
            dx.extend((0..d).map(|c| (r * d + c, rstd * (g[c] - mean_g - norm[c] * mean_gn))));
        }
        let statistics: Vec<(f64, f64)> = sum[..n].chunks_exact(d).map(|row| moments(&wide(row))).collect();
        let column = |c: usize, normed: bool| -> f64 {
            let term = |(r, (mean, rstd)): (usize, &(f64, f64))| {
                let x = (f64::from(sum[r * d + c].to_f32()) - mean) * rstd;
                f64::from(first[r * d + c].to_f32()) * if normed { x } else { 1.0 }
            };
            statistics.iter().enumerate().map(term).sum()
        };
        let sums = |normed| spread(d, CHECKED).into_iter().map(|c| (c, column(c, normed))).collect();
        Ok(vec![
            of(0, "dx", dx.clone()),
            of(1, "dresidual", dx),
            of(2, "dweight", sums(true)),
            of(3, "dbias", sums(false)),
        ])
    }
}
