//! The ops that only move memory: pooling, unit rows, AdamW, sums.

use super::{About, Expected, Kernel, KernelCase, Make, check, spread, starts, wide};
use crate::bench::random;
use crate::device::{Act, Device, Len};
use crate::error::Result;
use crate::ops::pool::{self, Pooling};
use crate::ops::{Backend, adamw, normalize, reduce};

const CHECKED: usize = 6;
const HYPER: adamw::Hyper = adamw::Hyper {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.01,
    step: 1,
    max_norm: f32::INFINITY,
    norm_slot: 0,
};

/// Results by name: what most kernels of this file hold.
type Outputs = Vec<(&'static str, Vec<f64>)>;

pub(super) fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let (lengths, width, seed) = (case.lengths.clone(), case.preset.width, case.seed);
    // Rows of the loss: the cells of a batch.
    let rows = case.sweep.losses.iter().map(|l| l[0]).max().unwrap_or(lengths.len());
    let parameters = case.preset.vocab * width;
    let mut makes: Vec<Make<B>> = Vec::new();
    for (backward, name) in [(false, "pool_forward"), (true, "pool_backward")] {
        let lengths = lengths.clone();
        makes.push(Make::new(name, move |dev| Pool::<B, A>::new(dev, &lengths, width, backward, seed)));
    }
    for (backward, name) in [(false, "normalize_forward"), (true, "normalize_backward")] {
        makes.push(Make::new(name, move |dev| Normalize::<B>::new(dev, rows, width, backward, seed)));
    }
    makes.push(Make::new("adamw", move |dev| AdamW::<B, A>::new(dev, parameters, seed)));
    makes.push(Make::new("reduce_sum_squares", move |dev| SumSquares::<B>::new(dev, parameters, seed)));
    makes
}

struct Pool<B: Device, A: Act> {
    dev: B,
    dims: pool::Dims,
    starts: Vec<u32>,
    backward: bool,
    cell_start: B::Buf<u32>,
    host_x: Vec<A>,
    host_dh: Vec<f32>,
    x: B::Buf<A>,
    h: B::Buf<f32>,
}

impl<B: Backend<A>, A: Act> Pool<B, A> {
    fn new(dev: &B, lengths: &[usize], width: usize, backward: bool, seed: u64) -> Result<Self> {
        let (tokens, cells) = (lengths.iter().sum::<usize>(), lengths.len());
        let dims = pool::Dims { tokens, cells, width, pooling: Pooling::Mean, prefix: 0, suffix: 0 };
        let host_x = random::numbers::<A>(seed + 30, tokens * width, 1.0);
        let host_dh = random::numbers::<f32>(seed + 31, cells * width, 1.0);
        let starts = starts(lengths);
        Ok(Pool {
            dims,
            backward,
            cell_start: dev.upload(&starts)?,
            starts,
            x: dev.upload(&if backward {
                vec![A::from_f32(f32::NAN); tokens * width]
            } else {
                host_x.clone()
            })?,
            h: dev.upload(&if backward { host_dh.clone() } else { vec![f32::NAN; cells * width] })?,
            host_x,
            host_dh,
            dev: dev.clone(),
        })
    }
}

impl<B: Backend<A>, A: Act> Kernel for Pool<B, A> {
    fn about(&self) -> About {
        let pool::Dims { tokens, cells, width, .. } = self.dims;
        About {
            name: if self.backward { "pool_backward" } else { "pool_forward" }.into(),
            shape: format!("{tokens}x{width}, {cells} cells"),
            flop: 0.0,
            bytes: ((size_of::<A>() * tokens + 4 * cells) * width) as f64,
            act: A::NAME,
            bound: check::rounded_once::<A>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        match self.backward {
            false => pool::forward::<A, B>(&self.dev, self.dims, &self.x, &self.cell_start, &mut self.h),
            true => pool::backward::<A, B>(&self.dev, self.dims, &self.h, &self.cell_start, &mut self.x),
        }
    }

    fn outputs(&self) -> Result<Outputs> {
        Ok(match self.backward {
            false => vec![("h", wide(&self.dev.download(&self.h)?))],
            true => vec![("dx", wide(&self.dev.download(&self.x)?))],
        })
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let d = self.dims.width;
        let mut elements = Vec::new();
        for cell in spread(self.dims.cells, CHECKED) {
            let (start, end) = (self.starts[cell] as usize, self.starts[cell + 1] as usize);
            let len = (end - start) as f64;
            for c in 0..d {
                if self.backward {
                    let dx = f64::from(self.host_dh[cell * d + c]) / len;
                    elements.extend([start, end - 1].map(|t| (t * d + c, dx)));
                } else {
                    let sum: f64 = (start..end).map(|t| f64::from(self.host_x[t * d + c].to_f32())).sum();
                    elements.push((cell * d + c, sum / len));
                }
            }
        }
        Ok(vec![Expected { output: 0, what: if self.backward { "dx" } else { "h" }, elements }])
    }
}

struct Normalize<B: Device> {
    dev: B,
    dims: normalize::Dims,
    backward: bool,
    host: [Vec<f32>; 2],
    h: B::Buf<f32>,
    dz: B::Buf<f32>,
    z: B::Buf<f32>,
    inverse_norm: B::Buf<f32>,
    dh: B::Buf<f32>,
}

impl<B: normalize::Normalize> Normalize<B> {
    fn new(dev: &B, rows: usize, width: usize, backward: bool, seed: u64) -> Result<Self> {
        let n = rows * width;
        let host = [random::numbers::<f32>(seed + 32, n, 1.0), random::numbers::<f32>(seed + 33, n, 1.0)];
        let nan = |len: usize| dev.upload(&vec![f32::NAN; len]);
        let mut kernel = Normalize {
            dims: normalize::Dims { rows, width },
            backward,
            h: dev.upload(&host[0])?,
            dz: dev.upload(&host[1])?,
            host,
            z: nan(n)?,
            inverse_norm: nan(rows)?,
            dh: nan(n)?,
            dev: dev.clone(),
        };
        if backward {
            kernel.forward()?;
        }
        Ok(kernel)
    }

    fn forward(&mut self) -> Result<()> {
        normalize::forward(&self.dev, self.dims, &self.h, None, &mut self.z, &mut self.inverse_norm)
    }
}

impl<B: normalize::Normalize> Kernel for Normalize<B> {
    fn about(&self) -> About {
        let normalize::Dims { rows, width } = self.dims;
        About {
            name: if self.backward { "normalize_backward" } else { "normalize_forward" }.into(),
            shape: format!("{rows}x{width}"),
            flop: 0.0,
            bytes: (4 * rows * width * if self.backward { 3 } else { 2 }) as f64,
            act: f32::NAME,
            bound: check::rounded_once::<f32>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        if !self.backward {
            return self.forward();
        }
        normalize::backward(&self.dev, self.dims, &self.dz, &self.z, &self.inverse_norm, false, &mut self.dh)
    }

    fn outputs(&self) -> Result<Outputs> {
        Ok(match self.backward {
            false => vec![("z", wide(&self.dev.download(&self.z)?))],
            true => vec![("dh", wide(&self.dev.download(&self.dh)?))],
        })
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let d = self.dims.width;
        let mut elements = Vec::new();
        for r in spread(self.dims.rows, CHECKED) {
            let row = |x: &[f32]| wide(&x[r * d..(r + 1) * d]);
            let (h, dz) = (row(&self.host[0]), row(&self.host[1]));
            let scale = 1.0 / h.iter().map(|x| x * x).sum::<f64>().sqrt();
            let along = h.iter().zip(&dz).map(|(h, g)| h * g).sum::<f64>() * scale;
            let value = |c: usize| match self.backward {
                false => h[c] * scale,
                true => scale * (dz[c] - along * h[c] * scale),
            };
            elements.extend((0..d).map(|c| (r * d + c, value(c))));
        }
        Ok(vec![Expected { output: 0, what: if self.backward { "dh" } else { "z" }, elements }])
    }
}

struct AdamW<B: Device, A: Act> {
    dev: B,
    host: [Vec<f32>; 2],
    weight: B::Buf<f32>,
    grad: B::Buf<f32>,
    m: B::Buf<f32>,
    v: B::Buf<f32>,
    copy: Option<B::Buf<A>>,
    scalars: B::Buf<f64>,
}

impl<B: Backend<A>, A: Act> AdamW<B, A> {
    fn new(dev: &B, len: usize, seed: u64) -> Result<Self> {
        let host =
            [random::numbers::<f32>(seed + 34, len, 0.02), random::numbers::<f32>(seed + 35, len, 1.0)];
        Ok(AdamW {
            weight: dev.upload(&host[0])?,
            grad: dev.upload(&host[1])?,
            host,
            m: dev.zeros(len)?,
            v: dev.zeros(len)?,
            copy: if A::IS_F32 { None } else { Some(dev.upload(&vec![A::from_f32(f32::NAN); len])?) },
            scalars: dev.zeros(1)?,
            dev: dev.clone(),
        })
    }
}

impl<B: Backend<A>, A: Act> Kernel for AdamW<B, A> {
    fn about(&self) -> About {
        let len = self.weight.len();
        About {
            name: "adamw".into(),
            shape: format!("{len}"),
            flop: 0.0,
            bytes: (len * (28 + if A::IS_F32 { 0 } else { size_of::<A>() })) as f64,
            act: A::NAME,
            bound: check::rounded_once::<A>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        let len = self.weight.len();
        let state = adamw::State {
            weight: &mut self.weight,
            grad: &self.grad,
            m: &mut self.m,
            v: &mut self.v,
            copy: self.copy.as_mut(),
            scalars: &self.scalars,
        };
        adamw::step::<A, B>(&self.dev, 0..len, HYPER, state)
    }

    fn outputs(&self) -> Result<Outputs> {
        let mut all = vec![("weight", wide(&self.dev.download(&self.weight)?))];
        if let Some(copy) = &self.copy {
            all.push(("copy", wide(&self.dev.download(copy)?)));
        }
        Ok(all)
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let weight = |i: usize| {
            let (w, g) = (f64::from(self.host[0][i]), f64::from(self.host[1][i]));
            // In the first step both moments are those of g alone.
            w - f64::from(HYPER.learning_rate)
                * (g / (g.abs() + f64::from(HYPER.eps)) + f64::from(HYPER.weight_decay) * w)
        };
        let elements: Vec<(usize, f64)> =
            spread(self.host[0].len(), 100).into_iter().map(|i| (i, weight(i))).collect();
        let mut all = vec![Expected { output: 0, what: "weight", elements: elements.clone() }];
        if self.copy.is_some() {
            all.push(Expected { output: 1, what: "copy", elements });
        }
        Ok(all)
    }
}

struct SumSquares<B: Device> {
    dev: B,
    host: Vec<f32>,
    x: B::Buf<f32>,
    scalars: B::Buf<f64>,
}

impl<B: reduce::Reduce> SumSquares<B> {
    fn new(dev: &B, len: usize, seed: u64) -> Result<Self> {
        let host = random::numbers::<f32>(seed + 36, len, 1.0);
        Ok(SumSquares { x: dev.upload(&host)?, host, scalars: dev.upload(&[f64::NAN])?, dev: dev.clone() })
    }
}

impl<B: reduce::Reduce> Kernel for SumSquares<B> {
    fn about(&self) -> About {
        About {
            name: "reduce_sum_squares".into(),
            shape: format!("{}", self.host.len()),
            flop: 0.0,
            bytes: 4.0 * self.host.len() as f64,
            act: f32::NAME,
            bound: check::rounded_once::<f32>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        reduce::sum_squares(&self.dev, &self.x, self.host.len(), &mut self.scalars, 0)
    }

    fn outputs(&self) -> Result<Outputs> {
        Ok(vec![("sum", self.dev.download(&self.scalars)?)])
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let sum = self.host.iter().map(|x| f64::from(*x).powi(2)).sum();
        Ok(vec![Expected { output: 0, what: "sum", elements: vec![(0, sum)] }])
    }
}
