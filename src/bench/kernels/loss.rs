//! The streaming softmax loss: the vocabulary head on 15 % of the tokens, and prototypes over the sizes of the sweep.
//!
//! The oracle of the column gradients takes lse as the first pass of the same device left it, which that pass's own rows check.

use super::{About, Expected, Kernel, KernelCase, Make, check, spread, wide};
use crate::bench::random;
use crate::device::{Act, Device};
use crate::error::Result;
use crate::ops::Backend;
use crate::ops::prototype_loss::{self, ColumnGradients, Dims, In, Out, PrototypeLoss, Target};
use rayon::prelude::*;

/// Rows, or columns, that are checked.
const CHECKED: usize = 4;
/// 1/τ of prototypes.
const SCALE: f32 = 1.0 / 0.07;
/// Margin of prototypes.
const MARGIN: f32 = 0.2;
/// Rows × columns below which a pass is a matter of launches.
const SMALL: usize = 1 << 21;

struct Loss<B: Device, A: Act> {
    dev: B,
    dims: Dims,
    /// Prototypes: unit rows, temperature and margin. Else the vocabulary: biases.
    prototypes: bool,
    backward: bool,
    z: B::Buf<A>,
    column: B::Buf<A>,
    /// Scale, bias, margin of each column; weight of each row.
    scale: B::Buf<f32>,
    bias: B::Buf<f32>,
    margin: B::Buf<f32>,
    row_weight: B::Buf<f32>,
    label: B::Buf<i32>,
    host_z: Vec<A>,
    host_column: Vec<A>,
    host_bias: Vec<f32>,
    host_label: Vec<i32>,
    loss: B::Buf<f32>,
    lse: B::Buf<f32>,
    dz: B::Buf<A>,
    dcolumn: B::Buf<f32>,
    dbias: B::Buf<f32>,
}

/// The vocabulary head, then the sweep in the activation type, and its first size in f32, as the objective runs it.
pub(super) fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let (p, seed) = (case.preset, case.seed);
    let masked = (case.lengths.iter().sum::<usize>() * 15).div_ceil(100);
    let mut makes = both::<B, A>([masked, p.vocab, p.width], false, seed);
    for size in &case.sweep.losses {
        makes.extend(both::<B, A>(*size, true, seed));
    }
    if let (false, Some(size)) = (A::IS_F32, case.sweep.losses.first()) {
        makes.extend(both::<B, f32>(*size, true, seed));
    }
    makes
}

fn name(prototypes: bool, backward: bool) -> String {
    let (direction, what) =
        (if backward { "backward" } else { "forward" }, if prototypes { "" } else { "/masked_genes" });
    format!("prototype_loss_{direction}{what}")
}

fn shape([rows, columns, width]: [usize; 3]) -> String {
    format!("{rows}x{columns}x{width}")
}

/// Both passes.
fn both<B: PrototypeLoss<A>, A: Act>(size: [usize; 3], prototypes: bool, seed: u64) -> Vec<Make<B>> {
    let make = |backward| {
        let label = format!("{} {}", name(prototypes, backward), shape(size));
        Make::new(label, move |dev| Loss::<B, A>::new(dev, size, prototypes, backward, seed))
    };
    vec![make(false), make(true)]
}

impl<B: PrototypeLoss<A>, A: Act> Loss<B, A> {
    fn new(dev: &B, size: [usize; 3], prototypes: bool, backward: bool, seed: u64) -> Result<Self> {
        let [rows, columns, width] = size;
        // Rows of about unit length for cosines; logits of about unit variance for the vocabulary.
        let length = 1.0 / (width as f32).sqrt();
        let host_z = random::numbers::<A>(seed + 20, rows * width, if prototypes { length } else { 1.0 });
        let host_column = random::numbers::<A>(seed + 21, columns * width, length);
        let host_bias = random::numbers::<f32>(seed + 22, columns, 0.1);
        let host_label: Vec<i32> =
            random::integers(seed + 23, rows, columns as u32).iter().map(|k| *k as i32).collect();
        let gradients = |len: usize| dev.zeros::<f32>(if backward { len } else { 0 });
        let dims = Dims { rows, columns, width, gradient_scale: 1.0, bias_in_target: true };
        let mut kernel = Loss {
            dims,
            prototypes,
            backward,
            z: dev.upload(&host_z)?,
            column: dev.upload(&host_column)?,
            scale: dev.upload(&vec![SCALE; columns])?,
            bias: dev.upload(&host_bias)?,
            margin: dev.upload(&vec![MARGIN; columns])?,
            row_weight: dev.upload(&vec![1.0 / rows as f32; rows])?,
            label: dev.upload(&host_label)?,
            host_z,
            host_column,
            host_bias,
            host_label,
            loss: dev.upload(&vec![f32::NAN; rows])?,
            lse: dev.upload(&vec![f32::NAN; rows])?,
            dz: dev.upload(&vec![A::from_f32(f32::NAN); rows * width])?,
            dcolumn: gradients(columns * width)?,
            dbias: gradients(columns)?,
            dev: dev.clone(),
        };
        if backward {
            kernel.queue(false)?;
        }
        Ok(kernel)
    }

    fn queue(&mut self, backward: bool) -> Result<()> {
        let input = In {
            z: &self.z,
            column: &self.column,
            scale: self.prototypes.then_some(&self.scale),
            bias: (!self.prototypes).then_some(&self.bias),
            margin: self.prototypes.then_some(&self.margin),
            row_weight: &self.row_weight,
            target: Target::Sparse { entries: 1, column: &self.label, mass: None, mix: None, teacher: None },
        };
        if !backward {
            let out =
                Out { loss: &mut self.loss, lse: &mut self.lse, dz: &mut self.dz, accumulate_dz: false };
            return prototype_loss::forward::<A, B>(&self.dev, self.dims, input, out);
        }
        let bias = if self.prototypes { None } else { Some(&mut self.dbias) };
        let grads = ColumnGradients { column: &mut self.dcolumn, bias, scale: None };
        prototype_loss::backward::<A, B>(&self.dev, self.dims, input, &self.lse, grads)
    }

    fn factor(&self) -> f64 {
        if self.prototypes { f64::from(SCALE) } else { 1.0 }
    }

    /// s_ik.
    fn logit(&self, i: usize, k: usize) -> f64 {
        let d = self.dims.width;
        let (z, p) = (&self.host_z[i * d..(i + 1) * d], &self.host_column[k * d..(k + 1) * d]);
        let cosine: f64 = z.iter().zip(p).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum();
        match self.prototypes {
            true if self.host_label[i] as usize == k => self.factor() * (cosine - f64::from(MARGIN)),
            true => self.factor() * cosine,
            false => cosine + f64::from(self.host_bias[k]),
        }
    }

    fn expected_rows(&self) -> Vec<Expected> {
        let Dims { rows, columns, width, .. } = self.dims;
        let (mut loss, mut lse, mut dz) = (Vec::new(), Vec::new(), Vec::new());
        for i in spread(rows, CHECKED) {
            let logits: Vec<f64> = (0..columns).into_par_iter().map(|k| self.logit(i, k)).collect();
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = largest + logits.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
            let label = self.host_label[i] as usize;
            loss.push((i, (log_sum - logits[label]) / rows as f64));
            lse.push((i, log_sum));
            let mut row = vec![0.0; width];
            for (k, s) in logits.iter().enumerate() {
                let slope =
                    ((s - log_sum).exp() - f64::from(u8::from(k == label))) * self.factor() / rows as f64;
                for (sum, p) in row.iter_mut().zip(&self.host_column[k * width..]) {
                    *sum += slope * f64::from(p.to_f32());
                }
            }
            dz.extend(row.into_iter().enumerate().map(|(c, x)| (i * width + c, x)));
        }
        let of = |output, what, elements| Expected { output, what, elements };
        vec![of(0, "loss", loss), of(1, "lse", lse), of(2, "dz", dz)]
    }

    fn expected_columns(&self) -> Result<Vec<Expected>> {
        let Dims { rows, columns, width, .. } = self.dims;
        let lse = self.dev.download(&self.lse)?;
        let (mut dcolumn, mut dbias) = (Vec::new(), Vec::new());
        // Columns that are some row's label, and the last.
        let labels = spread(rows, CHECKED).into_iter().map(|i| self.host_label[i] as usize);
        for k in labels.chain([columns - 1]) {
            let (mut sum, mut bias) = (vec![0.0; width], 0.0);
            for (i, lse) in lse.iter().enumerate() {
                let p = (self.logit(i, k) - f64::from(*lse)).exp();
                let slope = (p - f64::from(u8::from(self.host_label[i] as usize == k))) / rows as f64;
                bias += slope;
                for (s, z) in sum.iter_mut().zip(&self.host_z[i * width..]) {
                    *s += slope * self.factor() * f64::from(z.to_f32());
                }
            }
            dcolumn.extend(sum.into_iter().enumerate().map(|(c, x)| (k * width + c, x)));
            dbias.push((k, bias));
        }
        let mut all = vec![Expected { output: 0, what: "dcolumn", elements: dcolumn }];
        if !self.prototypes {
            all.push(Expected { output: 1, what: "dbias", elements: dbias });
        }
        Ok(all)
    }
}

impl<B: PrototypeLoss<A>, A: Act> Kernel for Loss<B, A> {
    fn about(&self) -> About {
        let Dims { rows, columns, width, .. } = self.dims;
        // Two products a pass: the logits, and the gradient of what the pass is for.
        let flop = 4.0 * (rows * columns * width) as f64;
        let (z, column) = ((rows * width) as f64, (columns * width) as f64);
        let e = size_of::<A>() as f64;
        About {
            name: name(self.prototypes, self.backward),
            shape: shape([rows, columns, width]),
            flop,
            bytes: if self.backward { e * (z + column) + 8.0 * column } else { e * (2.0 * z + column) },
            act: A::NAME,
            bound: check::rounded_inside::<A>(),
            small: rows * columns < SMALL,
        }
    }

    fn run(&mut self) -> Result<()> {
        self.queue(self.backward)
    }

    fn outputs(&self) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let dev = &self.dev;
        if self.backward {
            return Ok(vec![
                ("dcolumn", wide(&dev.download(&self.dcolumn)?)),
                ("dbias", wide(&dev.download(&self.dbias)?)),
            ]);
        }
        Ok(vec![
            ("loss", wide(&dev.download(&self.loss)?)),
            ("lse", wide(&dev.download(&self.lse)?)),
            ("dz", wide(&dev.download(&self.dz)?)),
        ])
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        if self.backward { self.expected_columns() } else { Ok(self.expected_rows()) }
    }
}
