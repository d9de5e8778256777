//! Input embedding: gather, sum and LayerNorm forward; the tables' gradients backward.

use super::{About, Expected, Kernel, KernelCase, Make, check, spread, wide};
use crate::bench::random;
use crate::device::{Act, Device, Dropout};
use crate::error::Result;
use crate::ops::Backend;
use crate::ops::embed::{self, BackwardIn, Dims, Gradients, Out, Tables};

const EPS: f32 = 1e-12;
const CHECKED: usize = 6;

struct Embed<B: Device, A: Act> {
    dev: B,
    dims: Dims,
    backward: bool,
    gene: Vec<u32>,
    position: Vec<u32>,
    ids: [B::Buf<u32>; 2],
    /// Word, position and type tables, LayerNorm weight and bias, dx.
    host: [Vec<A>; 6],
    bufs: [B::Buf<A>; 6],
    x: B::Buf<A>,
    mean: B::Buf<f32>,
    rstd: B::Buf<f32>,
    /// Word, position, type, weight, bias.
    gradients: [B::Buf<f32>; 5],
}

pub(super) fn all<B: Backend<A>, A: Act>(case: &KernelCase) -> Vec<Make<B>> {
    let (p, lengths, seed) = (case.preset, case.lengths.clone(), case.seed);
    let positions = p.positions.max(lengths.iter().copied().max().unwrap_or(1));
    let dims = Dims {
        tokens: lengths.iter().sum(),
        width: p.width,
        vocab: p.vocab,
        positions,
        value_bins: 0,
        eps: EPS,
    };
    let mut makes: Vec<Make<B>> = Vec::new();
    for backward in [false, true] {
        let lengths = lengths.clone();
        makes.push(Make::new(name(backward), move |dev| {
            Embed::<B, A>::new(dev, dims, &lengths, backward, seed)
        }));
    }
    makes
}

fn name(backward: bool) -> &'static str {
    if backward { "embed_backward" } else { "embed_forward" }
}

impl<B: Backend<A>, A: Act> Embed<B, A> {
    fn new(dev: &B, dims: Dims, lengths: &[usize], backward: bool, seed: u64) -> Result<Self> {
        let (n, d) = (dims.tokens, dims.width);
        let gene = random::integers(seed + 10, n, dims.vocab as u32);
        let position: Vec<u32> = lengths.iter().flat_map(|len| 0..*len as u32).collect();
        let sizes = [dims.vocab * d, dims.positions * d, 2 * d, d, d, if backward { n * d } else { 0 }];
        let mut host: [Vec<A>; 6] =
            std::array::from_fn(|i| random::numbers(seed + 11 + i as u64, sizes[i], 1.0));
        // Rows have a mean: a variance that is not taken round it shows.
        host[0].iter_mut().for_each(|x| *x = A::from_f32(x.to_f32() + 1.0));
        let gradient = |i: usize| dev.zeros::<f32>(if backward { sizes[i] } else { 0 });
        let mut kernel = Embed {
            dims,
            backward,
            ids: [dev.upload(&gene)?, dev.upload(&position)?],
            gene,
            position,
            bufs: [
                dev.upload(&host[0])?,
                dev.upload(&host[1])?,
                dev.upload(&host[2])?,
                dev.upload(&host[3])?,
                dev.upload(&host[4])?,
                dev.upload(&host[5])?,
            ],
            host,
            x: dev.upload(&vec![A::from_f32(f32::NAN); n * d])?,
            mean: dev.upload(&vec![f32::NAN; n])?,
            rstd: dev.upload(&vec![f32::NAN; n])?,
            gradients: [gradient(0)?, gradient(1)?, gradient(2)?, gradient(3)?, gradient(4)?],
            dev: dev.clone(),
        };
        if backward {
            kernel.queue(false)?;
        }
        Ok(kernel)
    }

    fn queue(&mut self, backward: bool) -> Result<()> {
        let [word, position_table, type_table, weight, bias, dx] = &self.bufs;
        let tables = Tables {
            gene: &self.ids[0],
            position: &self.ids[1],
            value_bin: None,
            word,
            position_table,
            type_table,
            value_table: None,
            weight,
            bias,
            dropout: Dropout::NONE,
        };
        if !backward {
            let out = Out { x: &mut self.x, mean: &mut self.mean, rstd: &mut self.rstd };
            return embed::forward::<A, B>(&self.dev, self.dims, tables, out);
        }
        let input = BackwardIn { dx, mean: &self.mean, rstd: &self.rstd };
        let [word, position_table, type_table, weight, bias] = &mut self.gradients;
        let grads = Gradients { word, position_table, type_table, value_table: None, weight, bias };
        embed::backward::<A, B>(&self.dev, self.dims, tables, input, grads)
    }

    /// Normed sum of the tables' rows of token `t`, and 1/σ.
    fn normed(&self, t: usize) -> (Vec<f64>, f64) {
        let d = self.dims.width;
        let [word, position, kind, ..] = &self.host;
        let at = |table: &[A], row: u32, c: usize| f64::from(table[row as usize * d + c].to_f32());
        let sum: Vec<f64> = (0..d)
            .map(|c| at(word, self.gene[t], c) + at(position, self.position[t], c) + at(kind, 0, c))
            .collect();
        let mean = sum.iter().sum::<f64>() / d as f64;
        let variance = sum.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
        let rstd = 1.0 / (variance + f64::from(EPS)).sqrt();
        (sum.iter().map(|x| (x - mean) * rstd).collect(), rstd)
    }

    /// Gradient of the sum of token `t`.
    fn slope(&self, t: usize) -> Vec<f64> {
        let d = self.dims.width;
        let (normed, rstd) = self.normed(t);
        let dx = &self.host[5][t * d..(t + 1) * d];
        let g: Vec<f64> =
            (0..d).map(|c| f64::from(dx[c].to_f32()) * f64::from(self.host[3][c].to_f32())).collect();
        let mean_g = g.iter().sum::<f64>() / d as f64;
        let mean_gn = g.iter().zip(&normed).map(|(g, n)| g * n).sum::<f64>() / d as f64;
        (0..d).map(|c| rstd * (g[c] - mean_g - normed[c] * mean_gn)).collect()
    }

    /// Sums of the slopes of the tokens whose id is `row`, for a few rows.
    fn table(&self, ids: &[u32], rows: &[u32]) -> Vec<(usize, f64)> {
        let d = self.dims.width;
        let mut elements = Vec::new();
        for row in rows {
            let mut sum = vec![0.0; d];
            for t in (0..ids.len()).filter(|t| ids[*t] == *row) {
                for (s, x) in sum.iter_mut().zip(self.slope(t)) {
                    *s += x;
                }
            }
            elements.extend(sum.into_iter().enumerate().map(|(c, x)| (*row as usize * d + c, x)));
        }
        elements
    }
}

impl<B: Backend<A>, A: Act> Kernel for Embed<B, A> {
    fn about(&self) -> About {
        let (nd, e) = ((self.dims.tokens * self.dims.width) as f64, size_of::<A>() as f64);
        About {
            name: name(self.backward).into(),
            shape: format!("{}x{}", self.dims.tokens, self.dims.width),
            flop: 0.0,
            bytes: if self.backward { 3.0 * e + 16.0 } else { 3.0 * e } * nd,
            act: A::NAME,
            bound: check::rounded_once::<A>(),
            small: false,
        }
    }

    fn run(&mut self) -> Result<()> {
        self.queue(self.backward)
    }

    fn outputs(&self) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let dev = &self.dev;
        if !self.backward {
            return Ok(vec![
                ("x", wide(&dev.download(&self.x)?)),
                ("mean", wide(&dev.download(&self.mean)?)),
                ("rstd", wide(&dev.download(&self.rstd)?)),
            ]);
        }
        let names = ["word", "position", "type", "weight", "bias"];
        names.into_iter().zip(&self.gradients).map(|(name, g)| Ok((name, wide(&dev.download(g)?)))).collect()
    }

    fn expected(&self) -> Result<Vec<Expected>> {
        let (n, d) = (self.dims.tokens, self.dims.width);
        let of = |output, what, elements| Expected { output, what, elements };
        if !self.backward {
            let (weight, bias) = (&self.host[3], &self.host[4]);
            let mut x = Vec::new();
            for t in spread(n, CHECKED) {
                let (normed, _) = self.normed(t);
                let affine =
                    |c: usize| normed[c] * f64::from(weight[c].to_f32()) + f64::from(bias[c].to_f32());
                x.extend((0..d).map(|c| (t * d + c, affine(c))));
            }
            return Ok(vec![of(0, "x", x)]);
        }
        let genes: Vec<u32> = spread(n, CHECKED).into_iter().map(|t| self.gene[t]).collect();
        let last = *self.position.iter().max().unwrap_or(&0);
        // A gene that no token has keeps its zeros.
        let absent: Vec<u32> =
            (0..self.dims.vocab as u32).filter(|g| !self.gene.contains(g)).take(1).collect();
        let word = [genes, absent].concat();
        Ok(vec![
            of(0, "word", self.table(&self.gene, &word)),
            of(1, "position", self.table(&self.position, &[0, last])),
        ])
    }
}
